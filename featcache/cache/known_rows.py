"""Rows that other stores have of the same images: taken from there and not computed again.

Keys of stores change with every image that is added, but a row depends on its own image alone. So the row of an image
is looked for, by the image's content, in stores whose keys differ in the images and the subject and in nothing else: an
image that several subjects saw is computed once. A chunk whose rows
are all in their places in another store is linked, because no chunk is ever written twice; it takes no room then. Other
rows are copied. Checksums are compared as in every reading.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.store import Store, list_stores
from featcache.config import fingerprint
from featcache.dataset.image_lists import ImageList
from featcache.errors import StoreError


class LostRowsError(Exception):
    """Rows that could not be read; `known` is what is left without them."""

    def __init__(self, why: StoreError, known: "KnownRows") -> None:
        super().__init__(str(why))
        self.why, self.known = why, known


@dataclass(frozen=True, eq=False)
class KnownRows:
    """Where the rows of some images are.

    stores : that have them
    numbers : (n_images,) which of the stores has the image of each row; -1 where none has
    rows : (n_images,) its row there
    """

    stores: tuple[Store, ...]
    numbers: np.ndarray
    rows: np.ndarray

    @classmethod
    def nothing(cls, n_images: int) -> "KnownRows":
        """No rows are known."""
        return cls((), np.full(n_images, -1), np.full(n_images, -1))

    @classmethod
    def of(cls, found: Sequence[tuple[Store, np.ndarray]], n_images: int) -> "KnownRows":
        """Rows of several stores; for each image the first store that has it, those of most images first.

        found : stores, and for each image its row there, (n_images,), or -1
        """
        known = cls.nothing(n_images)
        by_size = sorted(found, key=lambda pair: -int((pair[1] >= 0).sum()))
        for number, (_, rows) in enumerate(by_size):
            new = (rows >= 0) & (known.numbers < 0)
            known.numbers[new], known.rows[new] = number, rows[new]
        return replace(known, stores=tuple(store for store, _ in by_size))

    def __len__(self) -> int:
        """Number of rows that are known."""
        return int((self.numbers >= 0).sum())

    @property
    def sources(self) -> list[str]:
        """Names of the stores that rows are taken from."""
        return [store.name for store in self._used]

    @property
    def subjects(self) -> set[str]:
        """Names of the subjects whose stores rows are taken from."""
        return {store.key["subject"] for store in self._used}

    @property
    def _used(self) -> list[Store]:
        return [store for number, store in enumerate(self.stores) if number in self.numbers]

    def missing(self, rows: range) -> list[int]:
        """The rows among some that are not known."""
        return [row for row in rows if self.numbers[row] < 0]

    def held_as(self, store: Store) -> "KnownRows":
        """The rows that are no coarser than those of a store: rows of float16 are not those that float32 would have."""
        known = self
        for number, other in enumerate(self.stores):
            if any(other.arrays[name].dtype.itemsize < array.dtype.itemsize for name, array in store.arrays.items()):
                known = known._without(number, 0, len(other.image_ids))
        return known

    def write(self, store: Store, name: str, rows: range, computed: np.ndarray | None, cast: "Cast") -> None:
        """Write some rows of an array in whole chunks, and commit nothing: linked, copied, or as computed.

        computed : of the missing rows, in their order, as they are stored; None where none is missing
        cast : (values, name of the array, dtype) -> values as they are stored

        Raises LostRowsError where a known row cannot be read.
        """
        chunk, missing = store.chunk_rows(name), self.missing(rows)
        for start in range(rows.start, rows.stop, chunk):
            part = range(start, min(start + chunk, rows.stop))
            if (other := self._in_place(store, name, part)) is not None:
                self._link(store, name, part, other)
                continue
            values = np.empty((len(part), *store.arrays[name].shape[1:]), store.arrays[name].dtype)
            for number in np.unique(self.numbers[part]):
                here = np.flatnonzero(self.numbers[part] == number)
                if number >= 0:
                    read = self._read(number, name, self.rows[part][here])
                    values[here] = cast(read, name, str(values.dtype))
                else:
                    assert computed is not None
                    values[here] = computed[np.searchsorted(missing, here + start)]
            store.put(name, start, values)

    def _in_place(self, store: Store, name: str, part: range) -> int | None:
        """Number of the store whose chunk has these rows, in these places, and no others."""
        number = int(self.numbers[part.start])
        if number < 0 or (self.numbers[part] != number).any() or (self.rows[part] != np.asarray(part)).any():
            return None
        ours, theirs = store.arrays[name], self.stores[number].arrays[name]
        whole = part.stop == min(part.start + ours.chunks[0], theirs.shape[0])
        return number if whole and (ours.dtype, ours.chunks) == (theirs.dtype, theirs.chunks) else None

    def _link(self, store: Store, name: str, part: range, number: int) -> None:
        values = self._read(number, name, np.asarray(part))
        try:
            store.link(name, part.start, self.stores[number])
        except OSError:  # a file system without hard links, or too many of this file
            store.put(name, part.start, values)

    def _read(self, number: int, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of a store; each of its chunks is read once."""
        store = self.stores[number]
        chunk, array = store.chunk_rows(name), store.arrays[name]
        values = np.empty((len(rows), *array.shape[1:]), array.dtype)
        for start in np.unique(rows // chunk) * chunk:
            stop = min(start + chunk, len(store.image_ids))
            here = (rows >= start) & (rows < stop)
            try:
                values[here] = store.read(name, int(start), int(stop))[rows[here] - start]
            except StoreError as error:
                raise LostRowsError(error, self._without(number, int(start), int(stop))) from error
        return values

    def _without(self, number: int, start: int, stop: int) -> "KnownRows":
        lost = (self.numbers == number) & (self.rows >= start) & (self.rows < stop)
        return replace(self, numbers=np.where(lost, -1, self.numbers))


Cast = Callable[[np.ndarray, str, str], np.ndarray]


def find_known(folder: Path, key: Mapping[str, Any], images: ImageList) -> KnownRows:
    """The rows of these images in the stores of a folder whose keys differ in images and subject and in nothing else.

    key : of the features of these images
    """
    found = []
    for store in list_stores(folder):
        theirs = {**store.key, "subject": images.subject, **images.key}  # what its key would be with these images
        if fingerprint(theirs) != fingerprint(key) or fingerprint(store.key) == fingerprint(key):
            continue
        if (
            earlier := replace(images, subject=store.key["subject"]).earlier(store.key, store.image_ids, store.n_train)
        ) is not None:
            found.append((store, images.rows_in(earlier, min(store.committed.values()))))
    return KnownRows.of(found, len(images.ids))
