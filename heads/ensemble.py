"""Every prediction store of the work folder -> blend, scores, weights and submission."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.challenge import Challenge, Subject
from featcache.contents import image_digest, response_digest, subject_digests
from featcache.device import keep_freed_memory
from featcache.errors import StoreError
from featcache.progress import bar, say
from featcache.roi import HEMISPHERES
from featcache.store import Store, replace_json
from heads.blend import Blended, blend_hemisphere
from heads.config import BlendConfig
from heads.features import keep, newer_fault, own_stores
from heads.fit import FOLDER as PREDICTIONS
from heads.fit import model_name
from heads.metrics import VertexScores
from heads.submission import write_predictions, write_zip

FOLDER = "submission"


@dataclass(frozen=True)
class Ensemble:
    """What a blend left behind.

    scores : {'best single' | 'uniform' | method: scores per subject and hemisphere}
    weights : {subject: {hemisphere: {model: weight}}}
    submission : the zip, or None where a subject of the tree has no predictions
    """

    scores: Mapping[str, Sequence[VertexScores]]
    weights: Mapping[str, Mapping[str, Mapping[str, float]]]
    submission: Path | None


def blend(challenge: Challenge, config: BlendConfig, work: Path) -> Ensemble:
    """Blend the models of every subject, per hemisphere. Raises StoreError where there is nothing to blend."""
    keep_freed_memory()
    members = {subject: models for subject in challenge.subjects if (models := prediction_stores(subject, work))}
    if not members:
        raise StoreError(
            f"{work / PREDICTIONS}: expected predictions for this tree; found none; run 'extract' and 'fit-heads' first"
        )
    staging = work / f".{FOLDER}"
    shutil.rmtree(staging, ignore_errors=True)
    scores: dict[str, list[VertexScores]] = {}
    weights: dict[str, dict[str, dict[str, float]]] = {}
    with bar(f"blend {config.method}", len(members) * len(HEMISPHERES), "hemispheres") as advance:
        for subject, stores in members.items():
            weights[subject.name] = {}
            for hemisphere in HEMISPHERES:
                blended = blend_hemisphere(subject, hemisphere, stores, config.method)
                write_predictions(staging, subject, hemisphere, blended.test)
                weights[subject.name][hemisphere] = _named(stores, blended.weights)
                _collect(scores, subject, hemisphere, blended)
                advance(1)
    replace_json(staging / "weights.json", {"method": config.method, "weights": weights})
    shutil.rmtree(work / FOLDER, ignore_errors=True)  # whole or not at all: never old files among new ones
    staging.rename(work / FOLDER)
    return Ensemble(scores, weights, _submit(challenge, members, work))


def prediction_stores(subject: Subject, work: Path) -> list[Store]:
    """The complete prediction stores of the subject's images and responses as they are now, one a model.

    The others are named.
    """
    stores = own_stores(subject, work / PREDICTIONS, "fit-heads")
    now = (image_digest(subject, work), response_digest(subject, work)) if stores else ("", "")
    about = subject_digests(subject)

    def fault(store: Store) -> str:
        then = (store.recipe["features"]["images"], store.recipe["responses"])
        others = [name for name in about if store.recipe.get(name, about[name]) != about[name]]
        if then != now:
            return "fitted to other images or responses than the tree has now"
        return f"fitted with another {' and '.join(others)} than given now" if others else ""

    stores = keep(subject, stores, fault)
    models = {store.name: model_name(store.recipe) for store in stores}

    def twin_fault(store: Store) -> str:  # two votes of one model would be a weight that nobody chose
        return newer_fault(store, [one for one in stores if models[one.name] == models[store.name]], "model")

    return keep(subject, stores, twin_fault)


def _named(stores: Sequence[Store], weights: np.ndarray) -> dict[str, float]:
    return {store.facts["model"]: round(float(weight), 6) for store, weight in zip(stores, weights, strict=True)}


def _collect(scores: dict[str, list[VertexScores]], subject: Subject, hemisphere: str, blended: Blended) -> None:
    ceiling, rois = subject.noise_ceiling[hemisphere], subject.rois[hemisphere]
    for method, r in blended.r.items():
        scores.setdefault(method, []).append(VertexScores(subject.name, hemisphere, r, ceiling, rois))


def _submit(challenge: Challenge, members: Mapping[Subject, list[Store]], work: Path) -> Path | None:
    if missing := [subject.name for subject in challenge.subjects if subject not in members]:
        (work / "submission.zip").unlink(missing_ok=True)  # an older blend's
        say(f"no submission.zip: {', '.join(missing)} of the tree have no predictions; extract and fit them first")
        return None
    return write_zip(work / FOLDER, challenge.subjects, work / "submission.zip")
