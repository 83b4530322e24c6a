"""Prediction stores of the work folder -> blend, honest scores, weights and submission."""

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from featcache.cache.store import Store
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds, refuse_leak
from featcache.dataset.subject import Challenge, Subject
from featcache.errors import StoreError
from featcache.machine.files import replace_json
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import bar, say
from heads.blend.learn import Choice, Learnt, judge_of, learn, levels_of, nested_r
from heads.blend.models import Members, folds_of, has_ceilings, members_of
from heads.blend.plot import plot_weights
from heads.blend.products import N_FOLDS, SEED, Moments, gather
from heads.blend.saved import Coefficients, Saved, coefficients_of, load_blend, save_blend
from heads.blend.submission import write_predictions, write_zip
from heads.blend.uncertainty import Gain, Null, Resampled, gains, null, resample, scorer_of
from heads.blend.weights import r_of
from heads.config import BlendConfig
from heads.scores.metrics import VertexScores

FOLDER = "submission"
SAVED = "blend.safetensors"
WEIGHTS, PICTURE = "weights.json", "weights.png"  # of the same blend, for people
Shares = dict[str, dict[str, dict[str, dict[str, float]]]]  # {subject: {hemisphere: {ROI or 'all': {model: weight}}}}


@dataclass(frozen=True)
class Ensemble:
    """What a blend left behind.

    scores : {'best single' | 'uniform' | 'blend': scores per subject and hemisphere}, weights learnt on other folds
    gains : of the blend over the other two; points of accuracy, or r without ceilings
    null : of shuffled responses
    accuracy : whether there are ceilings
    weights : mean over the vertices of an ROI, and of 'all'
    unused : models without weight at any vertex of any subject
    submission : the zip, or None where a subject of the tree has no predictions
    """

    scores: Mapping[str, Sequence[VertexScores]]
    gains: Sequence[Gain]
    null: Null
    accuracy: bool
    weights: Shares
    unused: Sequence[str]
    submission: Path | None


@dataclass(frozen=True)
class Blended:
    """One subject's."""

    models: tuple[str, ...]
    weights: np.ndarray  # (n_vertices, n_models), left hemisphere first
    coefficients: dict[str, Coefficients]
    choices: Sequence[Choice]
    r: dict[str, np.ndarray]  # {name: (n_vertices,)}, and 'optimistic', of the images that the weights were learnt on
    resampled: Resampled


def blend(challenge: Challenge, config: BlendConfig, work: Path) -> Ensemble:
    """Blend the models of every subject. Raises StoreError or ConfigError where there is nothing to blend."""
    keep_freed_memory()
    members = members_of(challenge.subjects, work, config.models, config.exclude)
    _say_what_is_unusual(members)
    accuracy = has_ceilings(members)
    staging = _staging(work)
    done: dict[Subject, Blended] = {}
    with bar(f"blend {config.label}", len(members), "subjects") as advance:
        for subject, stores in members.items():
            done[subject] = blend_subject(subject, stores, config, accuracy)
            _write_test(staging, subject, done[subject].coefficients, stores)
            advance(1)
    weights = {subject.name: _shares(subject, one) for subject, one in done.items()}
    unused = _unused(list(done.values()))
    save_blend(staging / SAVED, {subject.name: one.coefficients for subject, one in done.items()})
    resampled = [one.resampled for one in done.values()]
    about = _about(members, config, done) | {"gains": [vars(gain) for gain in gains(resampled)]}
    replace_json(staging / WEIGHTS, about | {"unused": unused, "weights": weights})
    plot_weights(staging / PICTURE, weights, {subject.name: subject for subject in done})
    _publish(staging, work)
    scores: dict[str, list[VertexScores]] = {}
    for subject, one in done.items():
        for name in ("best single", "uniform", "blend"):
            scores.setdefault(name, []).extend(_vertex_scores(subject, one.r[name]))
    return Ensemble(
        scores, gains(resampled), null(resampled), accuracy, weights, unused, _submit(challenge, list(members), work)
    )


def apply(challenge: Challenge, saved: Path, work: Path) -> Path | None:
    """Put predictions of the same models, such as of other test images, through a blend. The zip, as in `Ensemble`.

    Raises StoreError for a file that is no blend, a subject that it does not have, or a model that is not there.
    """
    coefficients = load_blend(saved)
    members = members_of(challenge.subjects, work)
    refuse_strangers(saved, coefficients, members)
    staging = _staging(work)
    for subject, stores in members.items():
        _write_test(staging, subject, coefficients[subject.name], stores)
    shutil.copyfile(saved, staging / SAVED)
    for name in (WEIGHTS, PICTURE):
        if (about := saved.with_name(name)).is_file():
            shutil.copyfile(about, staging / name)
    _publish(staging, work)
    return _submit(challenge, list(members), work)


def refuse_strangers(path: Path, saved: Saved, members: Members) -> None:
    """Raise StoreError where a blend lacks a subject, or a model that has weight in it, or is of other vertices."""
    for subject, stores in members.items():
        if subject.name not in saved:
            raise StoreError(
                path,
                expected=f"a blend that has {subject.name}",
                found=", ".join(saved),
                remedy="run 'blend' on this tree",
            )
        there = {store.facts["model"] for store in stores}
        for hemisphere, own in saved[subject.name].items():
            needed = {model for model, row in zip(own.models, own.of_models, strict=True) if row.any()}
            if missing := sorted(needed - there):
                raise StoreError(
                    path,
                    expected=f"predictions of {subject.name} by {', '.join(missing)}",
                    found="none",
                    remedy="extract and fit the same models first",
                )
            if len(own.intercept) != subject.n_vertices[hemisphere]:
                raise StoreError(
                    path,
                    expected=f"{subject.n_vertices[hemisphere]} vertices of {subject.name} {hemisphere}",
                    found=len(own.intercept),
                    remedy="run 'blend' on this tree",
                )


def blend_subject(subject: Subject, stores: Sequence[Store], config: BlendConfig, accuracy: bool) -> Blended:
    """Learn, score and resample one subject's blend. `accuracy` : score by the ceilings, or else by r."""
    ids = subject.train.ids
    folds = assign_folds(ids, N_FOLDS, SEED)
    for fold in range(N_FOLDS):
        refuse_leak(ids[folds != fold], ids[folds == fold], f"the blend of {subject.name}")
    gathered, judge, levels = gather(subject, stores), judge_of(subject), levels_of(subject)
    parts = _parts(stores) if config.by == "backbone" else None
    learnt = learn(gathered.moments, judge, levels, config, parts)
    r = {name: nested_r(gathered.moments, weights) for name, weights in learnt.nested.items()}
    r["optimistic"] = r_of(gathered.moments.total().sums, learnt.weights)

    def again(moments: Moments, vertices: np.ndarray) -> Learnt:
        return learn(moments, judge.at(vertices), [level.at(vertices) for level in levels], config, parts)

    resampled = resample(gathered, ids, r, learnt, again, scorer_of(subject, judge, accuracy), config.seed)
    models = tuple(store.facts["model"] for store in stores)
    coefficients = coefficients_of(subject, models, gathered, learnt.weights)
    return Blended(models, learnt.weights, coefficients, learnt.choices, r, resampled)


def _parts(stores: Sequence[Store]) -> np.ndarray:
    """(n_backbones, n_models) the average of each backbone's models."""
    names = [store.key["features"]["backbone"] for store in stores]
    groups = np.array([[name == one for name in names] for one in dict.fromkeys(names)], dtype=np.float64)
    return groups / groups.sum(1, keepdims=True)


def _say_what_is_unusual(members: Members) -> None:
    everywhere = dict.fromkeys(store.facts["model"] for stores in members.values() for store in stores)
    if any("seen_ids" in store.facts for stores in members.values() for store in stores):
        say(
            "on test images a model of a trained backbone is the mean over the networks of all folds: it is better "
            "there than out of fold, and what a blend gains is other than said (docs/blend.md)"
        )
    for subject, stores in members.items():
        names = [store.facts["model"] for store in stores]
        if len(names) == 1:
            say(f"{subject.name}: one model only, {names[0]}: it is passed through as it is")
        if missing := [name for name in everywhere if name not in names]:
            say(f"{subject.name}: blended without {', '.join(missing)}, of which it has no predictions")
        folds = {folds_of(store): store for store in stores}
        if len(folds) > 1:
            which = ", ".join(f"{n} folds of seed {seed} ({one.facts['model']})" for (n, seed), one in folds.items())
            say(f"{subject.name}: models of different folds: {which}; all are out of fold, and blended")


def _staging(work: Path) -> Path:
    staging = work / f".{FOLDER}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _publish(staging: Path, work: Path) -> None:
    shutil.rmtree(work / FOLDER, ignore_errors=True)  # whole or not at all: never old files among new ones
    staging.rename(work / FOLDER)


def _write_test(
    folder: Path, subject: Subject, coefficients: Mapping[str, Coefficients], stores: Sequence[Store]
) -> None:
    by_name = {store.facts["model"]: store for store in stores}
    n_train = len(subject.train)
    for hemisphere, own in coefficients.items():
        test = own.apply(hemisphere, by_name, n_train, n_train + len(subject.test))
        write_predictions(folder, subject, hemisphere, test)


def _shares(subject: Subject, one: Blended) -> dict[str, dict[str, dict[str, float]]]:
    """{hemisphere: {'all' or ROI: {model: mean weight}}}; an ROI without vertices has none."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    first = 0
    for hemisphere in HEMISPHERES:
        own = one.weights[first : first + subject.n_vertices[hemisphere]]
        first += len(own)
        masks = {"all": np.full(len(own), True)} | subject.rois[hemisphere]
        found[hemisphere] = {
            roi: dict(zip(one.models, own[mask].mean(0).round(6).tolist(), strict=True))
            for roi, mask in masks.items()
            if mask.any()
        }
    return found


def _unused(done: Sequence[Blended]) -> list[str]:
    used = {model for one in done for model, weights in zip(one.models, one.weights.T, strict=True) if weights.any()}
    return [model for model in dict.fromkeys(m for one in done for m in one.models) if model not in used]


def _about(members: Members, config: BlendConfig, done: Mapping[Subject, Blended]) -> dict[str, Any]:
    """What it takes to make a blend again."""
    stores = {
        subject.name: {
            store.facts["model"]: {"predictions": store.name, "features": store.facts["features"]}
            for store in of_subject
        }
        for subject, of_subject in members.items()
    }
    choices = {subject.name: [vars(choice) for choice in one.choices] for subject, one in done.items()}
    versions = {"featcache": importlib.metadata.version("featcache"), "numpy": np.__version__}
    versions |= {"torch": torch.__version__, "zarr": zarr.__version__}
    settings = {"method": config.method, "per": config.per, "by": config.by, "seed": config.seed}
    folds = {"n_folds": N_FOLDS, "seed": SEED}
    return settings | {"folds": folds, "versions": versions, "members": stores, "choices": choices}


def _vertex_scores(subject: Subject, r: np.ndarray) -> list[VertexScores]:
    parts = np.split(r, [subject.n_vertices[HEMISPHERES[0]]])
    return [
        VertexScores(subject.name, h, of_hemisphere, subject.noise_ceiling[h], subject.rois[h])
        for h, of_hemisphere in zip(HEMISPHERES, parts, strict=True)
    ]


def _submit(challenge: Challenge, subjects: Sequence[Subject], work: Path) -> Path | None:
    if missing := [subject.name for subject in challenge.subjects if subject not in subjects]:
        (work / "submission.zip").unlink(missing_ok=True)  # an older blend's
        say(f"no submission.zip: {', '.join(missing)} of the tree have no predictions; extract and fit them first")
        return None
    return write_zip(work / FOLDER, challenge.subjects, work / "submission.zip")
