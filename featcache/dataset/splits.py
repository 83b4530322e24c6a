"""Folds by image id, and the one guard against an image on both sides of a split.

Subjects share images. So the fold of an image follows from its id alone: it is the same for every subject, in any
order and among any other images.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.dataset.subject import listed
from featcache.errors import ConfigError, FeatcacheError, LeakError


def assign_folds(image_ids: ArrayLike, n_folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each image: ``splitmix64(splitmix64(seed) + image_id) mod n_folds``.

    A pure function of image id, ``n_folds`` and ``seed``. Folds have the same size on average, not exactly; with few
    images a fold may be empty, which `check_folds` refuses.

    Parameters
    ----------
    image_ids : (n_images,), integers >= 0; an id may occur more than once
    n_folds : at least 2
    seed : any integer, taken modulo 2**64

    Returns
    -------
    folds : (n_images,) int64 in [0, n_folds)

    Raises
    ------
    ConfigError : ``n_folds`` below 2
    FeatcacheError : ids that are not a list of integers >= 0

    Source: splitmix64 is the finaliser of Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014).
    """
    if n_folds < 2:
        raise ConfigError("--folds", expected="2 or more", found=n_folds, remedy="raise it")
    ids = _checked_ids(image_ids)
    # An array and not a scalar: the hash needs numbers that wrap around, and NumPy warns of that for scalars.
    key = _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return (_splitmix64(key + ids) % np.uint64(n_folds)).astype(np.int64)


def check_folds(folds: ArrayLike, n_folds: int) -> None:
    """Raise ConfigError when one of the ``n_folds`` folds holds none of the images in ``folds``, (n_images,)."""
    folds = np.asarray(folds)
    empty = np.setdiff1d(np.arange(n_folds), folds)
    if empty.size:
        raise ConfigError(
            "--folds",
            expected=f"an image in each of the {n_folds} folds",
            found=f"none of {folds.size} images in fold {listed(empty)}",
            remedy="ask for fewer",
        )


def refuse_leak(trained_ids: ArrayLike, scored_ids: ArrayLike, what: str) -> None:
    """Raise LeakError when ``what`` is scored on an image that it was trained on.

    Parameters
    ----------
    trained_ids, scored_ids : (n_images,), integers >= 0; either may be empty, and ids may repeat
    what : name of the model in the message, e.g. "fold 2 of ridge"
    """
    shared = np.intersect1d(_checked_ids(trained_ids), _checked_ids(scored_ids))
    if shared.size:
        raise LeakError(
            what,
            expected="images that it was not trained on",
            found=f"{shared.size} on both sides of the split (id {listed(shared)})",
            remedy="split both by the same image ids, --folds and seed, and train it again",
        )


def _checked_ids(image_ids: ArrayLike) -> NDArray[np.uint64]:
    ids = np.asarray(image_ids)
    if ids.ndim != 1:
        raise FeatcacheError(
            "image ids", expected="one list, (n_images,)", found=f"the shape {ids.shape}", remedy="pass one list of ids"
        )
    integers = ids.dtype.kind in "iu" or not ids.size  # NumPy takes an empty list for floats
    if not integers or (ids < 0).any():
        found = f"{ids.min()}" if integers else f"values of type {ids.dtype}"
        raise FeatcacheError(
            "image ids", expected="integers >= 0", found=found, remedy="use the ids in the images' file names"
        )
    return ids.astype(np.uint64)


def _splitmix64(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
