"""Chosen places of every row of an array, such as the voxels inside a mask."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from featcache.formats.lazy import Array, Slices

_SPAN = 4096  # places of a single axis that are read together


def at_places(array: Array, places: Sequence[np.ndarray]) -> Array:
    """An array of some places of each row, (n_rows, n_places) in the dtype of the file.

    Where the file keeps each place in a chunk of its own, no other place is read. Else, boxes around places are read:
    a plane of the first axis of places at a time.

    places : for each axis of `array` after the first, (n_places,) the index of each place; in any order
    """
    alone = array.chunks is not None and set(array.chunks[1:]) == {1}

    def read(key: Slices) -> np.ndarray:
        rows, columns = key
        result = np.empty((rows.stop - rows.start, columns.stop - columns.start), dtype=array.dtype)
        for box, which, inside in _boxes([axis[columns] for axis in places], alone):
            block = array[(rows, *box)]
            result[:, which] = block.reshape(len(block), math.prod(block.shape[1:]))[:, inside]
        return result

    chunks = None if array.chunks is None else (array.chunks[0], 1 if alone else len(places[0]))
    return Array(array.place, (len(array), len(places[0])), array.dtype, read, chunks)


def _boxes(places: Sequence[np.ndarray], alone: bool) -> Iterator[tuple[Slices, np.ndarray, np.ndarray]]:
    """Boxes that hold all places: slices of each axis, which places are inside, and where in the flattened box.

    alone : whether a box has places without gaps along the last axis, and nothing else
    """
    if not len(places[0]):
        return
    order = np.lexsort(tuple(places)[::-1])
    axes = [axis[order] for axis in places]
    if alone:
        steps = [np.diff(axis) for axis in axes]
        new = (steps[-1] != 1) | np.any([step != 0 for step in steps[:-1]], axis=0) if axes[1:] else steps[-1] != 1
    else:
        new = np.diff(axes[0] // (1 if axes[1:] else _SPAN)) != 0
    starts = np.append(0, np.flatnonzero(new) + 1)
    lows = [np.minimum.reduceat(axis, starts).tolist() for axis in axes]
    highs = [np.maximum.reduceat(axis, starts).tolist() for axis in axes]
    stops = [*starts[1:].tolist(), len(order)]
    for number, (start, stop) in enumerate(zip(starts.tolist(), stops, strict=True)):
        low, high = [axis[number] for axis in lows], [axis[number] + 1 for axis in highs]
        shape = tuple(b - a for a, b in zip(low, high, strict=True))
        inside = np.ravel_multi_index([axis[start:stop] - a for axis, a in zip(axes, low, strict=True)], shape)
        yield tuple(map(slice, low, high)), order[start:stop], inside
