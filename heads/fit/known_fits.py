"""Predictions of heads that were fitted to the same training images and responses: taken, and not fitted again.

The key of a prediction store has digests of all images, and changes with every test image. Heads depend on training
images alone. So where a store differs in test images and in nothing else, its rows are taken, and images that it does
not have are predicted by its saved heads.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors.torch import load_file

from featcache.cache.known_rows import KnownRows, LostRowsError
from featcache.cache.store import Store, list_stores, open_store
from featcache.config import fingerprint
from featcache.dataset.image_lists import ImageList
from featcache.errors import StoreError
from featcache.machine.progress import say
from featcache.machine.tensors import as_float32, write_tensors
from featcache.workdir import Workdir
from heads.modules.readout import HeadTensors, InFile
from heads.solvers.base import Problem

PredictTest = Callable[[HeadTensors, str], np.ndarray | None]  # (heads, surface) -> (n_test, n_vertices)
_IMAGES = ("images", "image_ids")


def find_known_fit(problem: Problem, key: Mapping[str, Any]) -> KnownRows | None:
    """The rows of a prediction store whose heads were fitted to what these would be; None if there is none.

    key : of the predictions of these images
    """
    folder, wanted = Workdir(problem.work).predictions, fingerprint(_of_training(key))
    prefix = f"{problem.subject.name}-"
    found: list[KnownRows] = []
    for store in list_stores(folder) if folder.is_dir() else ():
        alike = store.name.startswith(prefix) and fingerprint(_of_training(store.key)) == wanted
        whole = alike and store.complete and Workdir(problem.work).head_weights(store.name).exists()
        if whole and (rows := _rows(problem, store, ImageList.of(problem.subject, problem.work))) is not None:
            found.append(KnownRows.of([(store, rows)], len(rows)))
    return max(found, key=len, default=None)


def _of_training(key: Mapping[str, Any]) -> dict[str, Any]:
    """A key of predictions without the digests of the images, of all subjects that were trained together."""
    features = {name: value for name, value in key["features"].items() if name not in _IMAGES}
    joint = {name: _of_training(other) for name, other in key.get("joint", {}).items()}
    return {**key, "features": features} | ({"joint": joint} if joint else {})


def _rows(problem: Problem, store: Store, now: ImageList) -> np.ndarray | None:
    """The row of a store for each row of its successor, or -1; None where its heads saw other images."""
    before = now.earlier(store.key["features"], store.image_ids, store.n_train)
    if before is None or before.training != now.training or not _left_out_the_same(problem, store, before):
        return None
    tests = now.rows_in(before)[now.n_train :] - before.n_train  # a training image among them is in no row
    tests = np.where(tests < 0, -1, tests + store.n_train)
    return np.concatenate([np.arange(store.n_train), tests])


def _left_out_the_same(problem: Problem, store: Store, before: ImageList) -> bool:
    """Whether subjects that are trained together saw the same images then.

    A training may leave out the pictures that any of its subjects is tested on.
    """
    then, now = [before], [ImageList.of(trainee.subject, problem.work) for trainee in problem.trainees]
    joint = store.key.get("joint", {})
    for images in now:
        if images.subject in joint:
            other = images.earlier(joint[images.subject]["features"])
            if other is None or other.training != images.training:
                return False
            then.append(other)
    trained = np.concatenate([images.training.ids for images in then])
    tested = [np.concatenate([images.test_ids for images in lists]) for lists in (then, now) if lists]
    left_out = [set(np.intersect1d(trained, ids).tolist()) for ids in tested]
    return all(ids == left_out[0] for ids in left_out)


def take_known_fit(
    problem: Problem, known: KnownRows, store: Store, metadata: Mapping[str, str], by: PredictTest
) -> bool:
    """Fill a prediction store, and the file of its heads; False where that cannot be, and heads have to be fitted.

    metadata : of the file of heads
    by : predicts all test images by saved heads; None for heads that cannot predict any
    """
    (source,) = known.stores
    weights = Workdir(problem.work).head_weights(source.name)
    try:
        heads = InFile(weights, source.name)
        predicted = dict(_predicted(problem, known, store, heads, by))
        with store.writing():
            store = open_store(store.path)  # as the writer before this one left it
            for surface in problem.subject.surfaces:
                if source.arrays[surface].dtype != store.arrays[surface].dtype == np.float16:
                    store.widen(surface)  # what is known is float32 because float16 is too coarse, or was not asked for
                    store = open_store(store.path)
                rows = range(store.committed[surface], len(store.image_ids))
                new = np.array(known.missing(rows), dtype=np.int64) - store.n_train
                known.write(
                    store, surface, rows, predicted[surface][new] if len(new) else None, lambda values, *_: values
                )
                store.commit({surface: rows.stop})
            write_tensors(Workdir(problem.work).head_weights(store.name), load_file(weights), metadata)
    except (StoreError, LostRowsError, _OtherHeadsError) as error:
        why = error.why if isinstance(error, LostRowsError) else error
        words = why.found if isinstance(why, StoreError) else why
        say(f"{problem.subject.name}: {source.name} is not taken, and heads are fitted: found {words}")
        return False
    n_new, n_images = len(store.image_ids) - len(known), len(store.image_ids)
    what = f"{n_images - n_new} of {n_images} images are predicted in {source.name}"
    say(f"{problem.subject.name}: {what}, {n_new} now by its heads")
    return True


class _OtherHeadsError(Exception):
    """Saved heads that do not predict what their store has."""


def _predicted(
    problem: Problem, known: KnownRows, store: Store, heads: HeadTensors, by: PredictTest
) -> Iterator[tuple[str, np.ndarray]]:
    """(surface, predictions of the test images) where some are not known. Raises _OtherHeadsError.

    Heads of earlier versions may be others than those that predicted, so they have to predict what is known.
    """
    tests = known.rows[store.n_train :]
    there = known.numbers[store.n_train :] >= 0
    for surface in problem.subject.surfaces if not there.all() else ():
        values, (source,) = by(heads, surface), known.stores
        if values is None or not there.any():
            raise _OtherHeadsError("heads that cannot be checked")
        stored = as_float32(source.read(surface, source.n_train)[tests[there] - source.n_train])
        if not agree(values[there], stored):
            raise _OtherHeadsError("heads that do not predict what it has")
        yield surface, values


_MOST_ROUNDING = 0.1  # of predictions by saved heads, as a share of their standard deviation over images
_LEAST_SHARE = 0.01  # of the mean square of predictions that counts as their variance over images
_LEAST_VARIANCE = 1e-8  # of predictions that are constant, as those of a vertex that never answers


def agree(found: np.ndarray, fitted: np.ndarray) -> bool:
    """Whether predictions by saved heads are those of the solver, (n_images, n_vertices) both, but for rounding."""
    if not fitted.size:
        return True
    # of one image, or of images that are alike, nothing varies
    spread = max(float(fitted.var(0).mean()), _LEAST_SHARE * float(np.square(fitted).mean()))
    allowed = _MOST_ROUNDING**2 * spread + _LEAST_VARIANCE
    return bool(np.square(found - fitted).mean() <= allowed)
