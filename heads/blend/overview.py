"""What there is to blend: the models of a work folder, how they score fold by fold, and how alike they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.dataset.subject import Subject
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import bar
from heads.blend.learn import judge_of
from heads.blend.models import has_ceilings, members_of
from heads.blend.products import N_FOLDS, Moments, gather
from heads.blend.uncertainty import scorer_of
from heads.blend.weights import each_r


@dataclass(frozen=True)
class Model:
    """One model, over the subjects that it predicts.

    score : mean over all their vertices, of predictions that are out of fold
    folds : the same for the images of each fold of the blend
    agreement : {each other model: mean over vertices of the correlation of their predictions}
    """

    name: str
    backbone: str
    checkpoint: str  # stage of training, or 'frozen'
    layers: tuple[str, ...]
    head: str
    objective: str
    subjects: tuple[str, ...]
    score: float
    folds: tuple[float, ...]
    agreement: dict[str, float]

    def closest(self) -> tuple[str, float] | None:
        """The model whose predictions are most alike."""
        return max(self.agreement.items(), key=lambda pair: pair[1], default=None)


def list_models(
    subjects: Sequence[Subject], work: Path, models: str = "*", exclude: str = ""
) -> tuple[list[Model], bool]:
    """Every model, best first, and whether scores are noise-normalised accuracy in percent, or else r.

    Raises as `members_of`.
    """
    keep_freed_memory()
    members = members_of(subjects, work, models, exclude)
    accuracy = has_ceilings(members)
    keys: dict[str, Mapping[str, Any]] = {}
    parts: list[_OfSubject] = []
    with bar("models", len(members), "subjects") as advance:
        for subject, stores in members.items():
            keys |= {store.facts["model"]: store.key for store in stores}
            moments = gather(subject, stores).moments
            scorer = scorer_of(subject, judge_of(subject), accuracy)
            total = moments.total()
            each = [scorer.mean(each_r(one)) for one in (total, *(moments.fold(fold) for fold in range(N_FOLDS)))]
            names = [store.facts["model"] for store in stores]
            parts.append(_OfSubject(subject.name, scorer.n_vertices, names, np.stack(each, 1), _agreement(total)))
            advance(1)
    found = [_model(name, key, parts) for name, key in keys.items()]
    return sorted(found, key=lambda one: -one.score), accuracy


@dataclass(frozen=True)
class _OfSubject:
    name: str
    n_vertices: int
    models: Sequence[str]
    scores: np.ndarray  # (n_models, 1 + n_folds), all images first
    agreement: np.ndarray  # (n_models, n_models)

    def row(self, model: str) -> int:
        return self.models.index(model)


def _model(name: str, key: Mapping[str, Any], parts: Sequence[_OfSubject]) -> Model:
    own = [part for part in parts if name in part.models]
    scores = np.average(
        [part.scores[part.row(name)] for part in own], axis=0, weights=[max(part.n_vertices, 1) for part in own]
    )
    others = dict.fromkeys(other for part in own for other in part.models if other != name)
    both = {other: [part for part in own if other in part.models] for other in others}
    agreement = {
        other: float(np.mean([part.agreement[part.row(name), part.row(other)] for part in shared]))
        for other, shared in both.items()
    }
    features = key["features"]
    return Model(
        name,
        features["backbone"],
        features["fold"]["stage"] if features["fold"] else "frozen",
        tuple(features.get("read", features["layers"])),
        key["head"],
        key["objective"],
        tuple(part.name for part in own),
        float(scores[0]),
        tuple(float(score) for score in scores[1:]),
        agreement,
    )


def _agreement(total: Moments) -> np.ndarray:
    """(n_models, n_models) mean over vertices of the correlation of two models' predictions."""
    gram = total.covariance[0]
    size = np.sqrt(np.maximum(np.einsum("vmm->vm", gram), 0))
    scale = np.where(size > 0, size, np.inf)
    return (gram / scale[:, :, None] / scale[:, None]).mean(0)
