"""Folds of images, and the one guard against an image, or a group of images, on both sides of a split.

Subjects share images. So the fold of an image follows from its id and the split: it is the same for every subject, in
any order and among any other images.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.config import fingerprint
from featcache.dataset.subject import listed
from featcache.errors import ConfigError, FeatcacheError, LeakError
from featcache.machine.documents import Count, Id, of_its_types, typed


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


@dataclass(frozen=True)
class SplitKey:
    """Name and digest of a split, as keys have them; without a digest it is that by image id."""

    name: str = "id"
    digest: str = ""

    @classmethod
    def from_json(cls, json: Mapping[str, str] | None) -> Self:
        """The split that a key names; a key that names none is of the split by image id. Raises KeyError."""
        return cls() if json is None else of_its_types(cls(json["name"], json["digest"]))

    def to_json(self) -> dict[str, dict[str, str]]:
        """What a key says of it, {'split': ...}; nothing of the split by image id, which the oldest keys have."""
        return {"split": dict(vars(self))} if self.digest else {}

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:6]})" if self.digest else self.name


@dataclass(frozen=True)
class Split:
    """Which images stay together: the images of a group have one fold, whatever the number of folds and the seed.

    name : as `--split` says it; a file without its folders
    groups : {image id: its group}; an image that is not there is drawn by its id
    numbers : {group: its fold}, where the split itself says so
    alone : the group that has fold 0 for itself, as the test images of a published split; '' where there is none
    """

    name: str = "id"
    groups: Mapping[int, str] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    alone: str = ""

    def folds(self, image_ids: ArrayLike, n_folds: int, seed: int) -> NDArray[np.int64]:
        """Fold of each image, (n_images,) int64 in [0, n_folds): the one place where folds come from.

        Without groups it is `assign_folds`. Groups are put, those of most images first, into the fold that has the
        fewest images of groups so far; of groups whose sizes differ by less than a factor of two the seed decides which
        comes first. So folds differ by the images of one group at most, and depend on no images that are asked for. A
        fold may be empty where groups are few, which `check_folds` refuses. Raises as `assign_folds`.
        """
        by_id = assign_folds(image_ids, n_folds, seed)
        if not self.groups:
            return by_id
        if self.alone:
            by_id = 1 + (assign_folds(image_ids, n_folds - 1, seed) if n_folds > 2 else np.zeros_like(by_id))
        placed = self._placed(n_folds, seed)
        ids = np.asarray(image_ids).tolist()
        return np.array(
            [placed[self.groups[i]] if i in self.groups else fold for i, fold in zip(ids, by_id.tolist(), strict=True)],
            dtype=np.int64,
        )

    def parts(self, image_ids: ArrayLike, n_parts: int, seed: int) -> NDArray[np.int64]:
        """Part of each image, (n_images,) int64 in [0, n_parts), where the images of one side are cut once more.

        Groups stay whole where the split has twice as many as there are parts; else images are drawn by id.
        """
        if len(self._first) < 2 * n_parts:
            return assign_folds(image_ids, n_parts, seed)
        ids = np.asarray(image_ids)
        firsts = [self._first[self.groups[i]] if i in self.groups else i for i in ids.tolist()]
        return assign_folds(np.array(firsts, dtype=ids.dtype), n_parts, seed)

    def _placed(self, n_folds: int, seed: int) -> dict[str, int]:
        """{group: its fold}"""
        sizes = Counter(self.groups.values())
        given = {group: fold for group, fold in self.numbers.items() if fold < n_folds}
        placed = given | ({self.alone: 0} if self.alone else {})
        loads = np.zeros(n_folds)
        for group, fold in placed.items():
            loads[fold] += sizes[group]
        if self.alone:
            loads[0] = np.inf
        key = _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
        drawn = _splitmix64(key + np.array(list(self._first.values()), dtype=np.uint64)).tolist()
        order = dict(zip(self._first, drawn, strict=True))
        for group in sorted(sizes.keys() - placed.keys(), key=lambda one: (-sizes[one].bit_length(), order[one])):
            placed[group] = int(loads.argmin())
            loads[placed[group]] += sizes[group]
        return placed

    @cached_property
    def _first(self) -> dict[str, int]:
        """{group: its smallest image id}"""
        first: dict[str, int] = {}
        for image_id in sorted(self.groups):
            first.setdefault(self.groups[image_id], image_id)
        return first

    def images(self, group: str) -> NDArray[np.int64]:
        """Ids of the images of a group, in rising order."""
        return np.array(sorted(i for i, other in self.groups.items() if other == group), dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """Digest of all that decides folds; '' for the split by image id."""
        return fingerprint(self._contents()) if self.groups else ""

    @property
    def key(self) -> SplitKey:
        """What keys say of it."""
        return SplitKey(self.name, self.digest) if self.groups else SplitKey()

    def _contents(self) -> dict[str, Any]:
        groups: dict[str, list[int]] = {}
        for image_id in sorted(self.groups):
            groups.setdefault(self.groups[image_id], []).append(image_id)
        return {"groups": groups, "numbers": dict(self.numbers), "alone": self.alone}

    def to_json(self) -> dict[str, Any]:
        """The split as the work folder keeps it, with its digest."""
        return {"name": self.name, "digest": self.digest} | self._contents()

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave. Raises KeyError, TypeError or ValueError for what is damaged."""
        said = typed(json["groups"], dict[str, list[Id]])
        groups = {image_id: group for group, ids in said.items() for image_id in ids}
        numbers = typed(json["numbers"], dict[str, Count])
        split = cls(typed(json["name"], str), groups, numbers, typed(json["alone"], str))
        if split.digest != json["digest"]:
            raise ValueError("the groups are not those that were written")
        return split


BY_ID = Split()


def refuse_leak(trained_ids: ArrayLike, scored_ids: ArrayLike, what: str, split: Split = BY_ID) -> None:
    """Raise LeakError when ``what`` is scored on an image that it was trained on, or on one of the same group.

    Parameters
    ----------
    trained_ids, scored_ids : (n_images,), integers >= 0; either may be empty, and ids may repeat
    what : name of the model in the message, e.g. "fold 2 of ridge"
    split : whose groups must stay on one side
    """
    shared = np.intersect1d(_checked_ids(trained_ids), _checked_ids(scored_ids))
    if shared.size:
        raise LeakError(
            what,
            expected="images that it was not trained on",
            found=f"{shared.size} on both sides of the split (id {listed(shared)})",
            remedy="split both by the same image ids, --folds and seed, and train it again",
        )
    sides = [{split.groups.get(i) for i in np.asarray(ids).tolist()} - {None} for ids in (trained_ids, scored_ids)]
    if both := sorted(str(group) for group in sides[0] & sides[1]):
        raise LeakError(
            what,
            expected=f"images of groups that it was not trained on (--split {split.name})",
            found=f"{len(both)} on both sides of the split (group {listed(both)})",
            remedy=f"train it again with --split {split.name}",
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
