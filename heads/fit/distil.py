"""A blend as the target of new heads: what many models say together, said by heads on one backbone.

The blend's predictions of the training images, out of fold, stand in for the responses. Each of them was made by models
that were fitted to the responses of all other folds, so heads that learn from them have been told, at second hand, of
every response: on the training images they can be held against the blend and not against what was measured. They are
kept apart from the predictions that are blended.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from featcache.cache.store import Store, open_store
from featcache.config import fingerprint
from featcache.dataset.digests import file_digest
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Subject
from featcache.errors import StoreError
from heads.blend.models import members_of
from heads.blend.run import FOLDER as SUBMISSION
from heads.blend.run import SAVED, refuse_strangers
from heads.blend.saved import Coefficients, load_blend
from heads.blend.submission import prediction_name
from heads.fit.run import Fitted
from heads.scores.metrics import pearson_r

FOLDER = "targets"
_ROWS = 512  # written at a time


def taught(subjects: Sequence[Subject], work: Path) -> list[Subject]:
    """The subjects with the predictions of the last blend in the place of their responses, and without ceilings.

    They are written under `targets` in the work folder, once for each blend. Raises StoreError where there is no blend,
    or a model of it is gone.
    """
    saved = work / SUBMISSION / SAVED
    if not saved.is_file():
        raise StoreError(saved, expected="a blend to learn from", found="none", remedy="run 'blend' first")
    blend, members = load_blend(saved), members_of(subjects, work)
    refuse_strangers(saved, blend, members)
    return [_taught(subject, stores, blend[subject.name], saved, work) for subject, stores in members.items()]


def agreement(targets: Sequence[Subject], fitted: Sequence[Fitted], work: Path) -> dict[str, float]:
    """{model: mean r, over all vertices, of what it and the blend predict for the test images}."""
    by_name = {subject.name: subject for subject in targets}
    r: dict[str, list[np.ndarray]] = {}
    for one in fitted:
        store, subject = open_store(one.path), by_name[one.subject]
        for hemisphere in HEMISPHERES:
            blend = np.load(work / SUBMISSION / prediction_name(subject, hemisphere))
            r.setdefault(one.model, []).append(pearson_r(store.read(hemisphere, store.n_train), blend))
    return {model: float(np.concatenate(parts).mean()) for model, parts in r.items()}


def _taught(
    subject: Subject, stores: Sequence[Store], blend: dict[str, Coefficients], saved: Path, work: Path
) -> Subject:
    by_name = {store.facts["model"]: store for store in stores}
    what = {"blend": file_digest(saved), "predictions": sorted(store.name for store in stores)}
    folder = work / FOLDER / f"{subject.name}-{fingerprint(what)}"
    target = replace(subject, folder=folder, noise_ceiling=dict.fromkeys(HEMISPHERES))
    if not folder.is_dir():
        for older in (work / FOLDER).glob(f"*{subject.name}-*"):  # of other blends, as large as the responses
            shutil.rmtree(older)
        staging = folder.with_name(f".{folder.name}.{os.getpid()}")
        for hemisphere, own in blend.items():
            _write(replace(target, folder=staging).response_path(hemisphere), subject, hemisphere, own, by_name)
        staging.rename(folder)
    return target


def _write(path: Path, subject: Subject, hemisphere: str, own: Coefficients, stores: dict[str, Store]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(subject.train), subject.n_vertices[hemisphere])
    rows = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for start in range(0, len(rows), _ROWS):
        stop = min(start + _ROWS, len(rows))
        rows[start:stop] = own.apply(hemisphere, stores, start, stop)
    rows.flush()
