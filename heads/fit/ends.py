"""Features that heads cannot be fitted to in float32: refused beforehand, by the array, the row and the column."""

import numpy as np

from featcache.cache.store import Store
from featcache.errors import StoreError
from heads.config import HEADS
from heads.features.sets import FeatureSet

_SAMPLE = 256  # rows that say how large numbers usually are
_ROWS = 512  # that are looked through at a time
_RANGE = (1e-12, 1e12)  # of an image's largest feature; beyond it, squares and their sums leave the range of float32
_LEAST_MODULE = 1e-3  # the same of modules on maps, which add 1e-5 to the variance of a channel
_FAR = 1e4  # times an image's usual largest feature: what a head gives for it, it gives for no other image


def refuse_ends(features: FeatureSet, head: str) -> None:
    """Raise StoreError for features whose scale no head could be fitted at.

    Scales are told by a sample of the rows; every row of float32 features is looked through for one that is far from
    all others, which float16 cannot hold.

    head : of HEADS
    """
    least = _LEAST_MODULE if HEADS[head].build else _RANGE[0]
    for store in features.stores:
        for name in features.names:
            _refuse_features(store, name, least)


def _refuse_features(store: Store, name: str, least: float) -> None:
    where = f"features {name} of {store.name}"
    n_images = len(store.image_ids)
    step = store.chunk_rows(name)
    starts = range(0, n_images, max(n_images // max(_SAMPLE // step, 1), step))
    sample = np.concatenate([_largest(store.read(name, k, min(k + step, n_images)))[:_SAMPLE] for k in starts])
    usual = float(np.median(sample))
    if usual and not least <= usual <= _RANGE[1]:
        raise StoreError(
            where,
            expected=f"numbers whose largest of an image is from {least:.0e} to {_RANGE[1]:.0e}",
            found=f"{usual:.1e} in a usual image",
            remedy=f"use other layers or weights{', or --head linear' if least > _RANGE[0] else ''}"
            if store.key.get("transform")
            else "scale them, such as to a standard deviation of 1, and run 'add-features' again",
        )
    if not usual or store.arrays[name].dtype == np.float16:
        return
    for start in range(0, n_images, _ROWS):
        rows = store.read(name, start, min(start + _ROWS, n_images))
        far = np.flatnonzero(_largest(rows) > _FAR * usual)
        if len(far):
            flat = np.abs(rows[far[0]].ravel())
            column = int(flat.argmax())
            raise StoreError(
                where,
                expected=f"numbers up to {_FAR:.0e} times the largest of a usual image, {usual:.1e}",
                found=f"{rows[far[0]].ravel()[column]:.1e} in row {start + far[0]}, column {column}",
                remedy="correct or clip it, and run 'add-features' again",
            )


def _largest(rows: np.ndarray) -> np.ndarray:
    """(n_images,) largest size of a feature of each image."""
    flat = rows.reshape(len(rows), -1)
    largest: np.ndarray = np.maximum(flat.max(1), -flat.min(1)).astype(np.float64)
    return largest
