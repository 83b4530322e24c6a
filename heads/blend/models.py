"""Which prediction stores are the models of a blend: complete, of the tree as it is now, chosen by name, leak-free."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featcache.cache.store import Store
from featcache.dataset.digests import image_digest, response_digest, subject_digests
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds, refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, StoreError
from featcache.workdir import Workdir
from heads.features.sets import keep, newer_fault, subject_stores
from heads.fit.names import PredictionKey

Members = dict[Subject, list[Store]]


def members_of(subjects: Sequence[Subject], work: Path, models: str = "*", exclude: str = "") -> Members:
    """The models of each subject that has any, in the order of their names.

    models, exclude : patterns of `chosen`

    Raises StoreError where there are none, ConfigError for patterns that leave none, LeakError for a model whose
    backbone was trained on an image that it predicts.
    """
    there = {subject: stores for subject in subjects if (stores := prediction_stores(subject, work))}
    if not there:
        raise StoreError(
            Workdir(work).predictions,
            expected="predictions for this tree",
            found="none",
            remedy="run 'extract' and 'fit-heads' first",
        )
    names = dict.fromkeys(store.facts["model"] for stores in there.values() for store in stores)
    wanted = chosen(list(names), models, exclude)
    found = {
        subject: sorted((one for one in stores if one.facts["model"] in wanted), key=lambda one: one.facts["model"])
        for subject, stores in there.items()
    }
    for subject, stores in found.items():
        for store in stores:
            _refuse_leaks(subject, store)
    return {subject: stores for subject, stores in found.items() if stores}


def chosen(names: Sequence[str], models: str, exclude: str = "") -> set[str]:
    """The names that match one of some patterns, with commas between, and none of others. Raises ConfigError.

    A pattern is of the whole name ('convnext*'), or the six digits that end it.
    """
    wanted = {name for name in names if _matches(name, models)}
    left = {name for name in wanted if not exclude or not _matches(name, exclude)}
    if not left:
        option, pattern = ("--exclude", exclude) if wanted else ("--models", models)
        raise ConfigError(
            option,
            expected=f"{('a pattern that leaves' if wanted else 'one that matches')} one of: {', '.join(names)}",
            found=f"{pattern!r}",
            remedy="correct it",
        )
    return left


def _matches(name: str, patterns: str) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern.strip()) or name.rpartition(" ")[2] == pattern.strip()
        for pattern in patterns.split(",")
    )


def prediction_stores(subject: Subject, work: Path) -> list[Store]:
    """The complete prediction stores of the subject's images and responses as they are now, one a model.

    The others are named.
    """
    stores = subject_stores(subject, Workdir(work).predictions, "fit-heads")
    now = (image_digest(subject, work), response_digest(subject, work)) if stores else ("", "")
    about = subject_digests(subject)

    def fault(store: Store) -> str:
        then = (store.key["features"]["images"], store.key["responses"])
        others = [name for name in about if store.key.get(name, about[name]) != about[name]]
        widths = [store.arrays[h].shape[1] if h in store.arrays else 0 for h in HEMISPHERES]
        if then != now:
            return "fitted to other images or responses than the tree has now"
        if widths != [subject.n_vertices[h] for h in HEMISPHERES]:
            return f"it has {' and '.join(map(str, widths))} vertices; delete it and run 'fit-heads' again"
        return f"fitted with another {' and '.join(others)} than given now" if others else ""

    stores = keep(subject, stores, fault)
    models = {store.name: PredictionKey.from_json(store.key).model for store in stores}

    def twin_fault(store: Store) -> str:  # two votes of one model would be a weight that nobody chose
        return newer_fault(store, [one for one in stores if models[one.name] == models[store.name]], "model")

    return keep(subject, keep(subject, stores, twin_fault), _unknown_past)


def _unknown_past(store: Store) -> str:
    if store.key["features"]["fold"] is None or "seen_ids" in store.facts:
        return ""
    return "it does not say which images its backbone was trained on; delete it and run 'fit-heads' again"


def _refuse_leaks(subject: Subject, store: Store) -> None:
    """No image may have been seen by the backbone whose features predict it, whatever became of its checkpoint."""
    fold = store.key["features"]["fold"]
    if fold is None:
        return
    ids = subject.train.ids
    folds = assign_folds(ids, fold["n_folds"], fold["seed"])
    for number, seen in zip(fold["held_out"], store.facts["seen_ids"], strict=True):
        what = f"{store.facts['model']} of {subject.name}"
        refuse_leak(np.array(seen, dtype=np.int64), ids[folds == number], f"fold {number} of {what}")
        refuse_leak(np.array(seen, dtype=np.int64), subject.test.ids, f"the test images of {what}")


def has_ceilings(members: Members) -> bool:
    """Whether scores are noise-normalised accuracy, or else r."""
    return any(ceiling is not None for subject in members for ceiling in subject.noise_ceiling.values())


def folds_of(store: Store) -> tuple[int, int]:
    """Number and seed of the folds that a model's predictions are out of."""
    fold = store.key["features"]["fold"] or store.key
    return fold["n_folds"], fold["seed"]
