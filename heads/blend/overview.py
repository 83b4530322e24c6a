"""What there is to blend: the models of a work folder, how they score fold by fold, and how alike they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featcache.dataset.grouping import recall
from featcache.dataset.splits import Split
from featcache.dataset.subject import Subject
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import bar
from heads.blend.learn import judge_of
from heads.blend.models import Model, chosen_on, find_models, has_ceilings
from heads.blend.products import N_FOLDS, Total, gather
from heads.blend.uncertainty import scorer_of


@dataclass(frozen=True)
class ModelScores:
    """One model and its scores over the subjects that it predicts.

    score : mean over all their vertices, of predictions that are out of fold
    folds : the same for the images of each fold of the blend
    agreement : {each other model: mean over vertices of the correlation of their predictions}
    predictions : {subject: its prediction store}
    chosen_on : whether the score is of images on which the epoch of its backbone was chosen
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
    predictions: dict[str, str]
    chosen_on: bool = False

    def closest(self) -> tuple[str, float] | None:
        """The model whose predictions are most alike, and their correlation."""
        return max(self.agreement.items(), key=lambda pair: pair[1], default=None)


def list_models(
    subjects: Sequence[Subject], work: Path, models: str = "*", exclude: str = ""
) -> tuple[list[ModelScores], bool]:
    """Every model, best first, and whether scores are noise-normalised accuracy in percent, or else r.

    Models of several splits are listed together; how alike models are is known within a split. Raises as `find_models`.
    """
    keep_freed_memory()
    found = find_models(subjects, work, models, exclude)
    accuracy = has_ceilings(list(found))
    parts: list[_Part] = []
    with bar("models", len(found), "subjects") as advance:
        for subject, of_subject in found.items():
            for key in dict.fromkeys(model.key.by for model in of_subject):  # those of one split can be blended
                of_split = [model for model in of_subject if model.key.by == key]
                parts.append(_score(subject, of_split, accuracy, recall(key, Path(work))))
            advance(1)
    by_name: dict[str, dict[str, Model]] = {}
    for subject, of_subject in found.items():
        for model in of_subject:
            by_name.setdefault(model.name, {})[subject.name] = model
    marked = chosen_on(found, Path(work))
    rows = [replace(_over_subjects(of_model, parts), chosen_on=name in marked) for name, of_model in by_name.items()]
    return sorted(rows, key=lambda row: -row.score), accuracy


@dataclass(frozen=True)
class _Part:
    """Scores of one subject's models.

    scores : (n_models, 1 + n_folds), all images first
    agreement : (n_models, n_models)
    """

    subject: str
    n_vertices: int
    models: Sequence[str]
    scores: np.ndarray
    agreement: np.ndarray


def _score(subject: Subject, models: Sequence[Model], accuracy: bool, by: Split) -> _Part:
    products = gather(subject, [model.store for model in models], by).products
    scorer, total = scorer_of(subject, judge_of(subject), accuracy), products.total()
    columns = [scorer.mean(part.r_of_each) for part in (total, *(products.fold(fold) for fold in range(N_FOLDS)))]
    names = [model.name for model in models]
    return _Part(subject.name, scorer.n_vertices, names, np.stack(columns, 1), _agreement(total))


def _over_subjects(models: Mapping[str, Model], parts: Sequence[_Part]) -> ModelScores:
    """Means over the subjects that a model predicts; of scores, weighed by vertices.

    models : {subject: the model}
    """
    model = next(iter(models.values()))
    rows = [(part, part.models.index(model.name)) for part in parts if model.name in part.models]
    n_vertices = [max(part.n_vertices, 1) for part, _ in rows]
    scores = np.average([part.scores[row] for part, row in rows], axis=0, weights=n_vertices).tolist()
    alike: dict[str, list[float]] = {}
    for part, row in rows:
        for other, agreement in zip(part.models, part.agreement[row], strict=True):
            alike.setdefault(other, []).append(agreement)
    return ModelScores(
        name=model.name,
        backbone=model.key.backbone,
        checkpoint=model.stage,
        layers=tuple(model.key.read),
        head=model.key.head,
        objective=model.key.objective,
        subjects=tuple(models),
        score=scores[0],
        folds=tuple(scores[1:]),
        agreement={other: float(np.mean(values)) for other, values in alike.items() if other != model.name},
        predictions={subject: of_subject.store.name for subject, of_subject in models.items()},
    )


def _agreement(total: Total) -> np.ndarray:
    """Mean over vertices of the correlation of two models' predictions, (n_models, n_models)."""
    gram = total.covariance[0]
    size = np.sqrt(np.maximum(np.einsum("vmm->vm", gram), 0))
    scale = np.where(size > 0, size, np.inf)
    return np.asarray((gram / scale[:, :, None] / scale[:, None]).mean(0))
