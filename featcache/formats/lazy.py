"""What every format gives: an array whose rows stay on the disk, and rows of it in any order."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np

from featcache.errors import DataError, some_of
from featcache.formats.files import reading
from featcache.machine.memory import free_memory
from featcache.machine.progress import size_of

Slices = tuple[slice, ...]
_Read = Callable[[Slices], np.ndarray]

NUMERIC = "fiub"  # kinds of dtype: float, integer, unsigned, bool
_BLOCK = 32 * 2**20  # bytes read at once: above it no file is read faster, and a result is built within it
_SURELY_FREE = 64 * 2**20  # bytes up to which nobody asks how much memory is free
_NEAR = 256 * 2**10  # bytes between two wanted rows that are read along, as one read is cheaper than two
KINDS = {
    "f": "numbers",
    "i": "numbers",
    "u": "numbers",
    "b": "true and false",
    "c": "complex numbers",
    "O": "Python objects or text",
    "U": "text",
    "S": "text",
    "T": "text",
    "M": "dates",
    "m": "durations",
    "V": "records of several fields",
}


@dataclass(frozen=True)
class Place:
    """One array on the disk: a file or a store, and the array's name inside it, '' where there is only one."""

    path: Path
    array: str = ""

    @classmethod
    def of(cls, text: str) -> Self:
        """Place of 'betas.npy', 'betas.h5:group/betas' or 'store.zarr:betas'.

        The longest part before a colon that exists is the file, so a colon may be in its own name.
        """
        colons = [place for place, sign in enumerate(text) if sign == ":"]
        if os.path.exists(text) or not colons:
            return cls(Path(text))
        for colon in reversed(colons):
            if os.path.exists(text[:colon]):
                return cls(Path(text[:colon]), text[colon + 1 :])
        return cls(Path(text[: colons[-1]]), text[colons[-1] + 1 :])

    def __str__(self) -> str:
        return f"{self.path}:{self.array}" if self.array else str(self.path)


class Array:
    """An array whose values stay on the disk until a slice asks for them. The file is open as long as this lives.

    place : where it is
    shape, dtype : as of a numpy array
    chunks : shape of what the file gives at once (a compressed chunk; a whole column where columns are contiguous);
        None where rows are contiguous
    """

    def __init__(
        self,
        place: Place | Path | str,
        shape: Sequence[int],
        dtype: np.dtype,
        read: _Read,
        chunks: Sequence[int] | None = None,
    ) -> None:
        self.place, self.shape, self.dtype, self._read = place, tuple(map(int, shape)), np.dtype(dtype), read
        self.chunks = None if chunks is None else tuple(map(int, chunks))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, key: slice | Slices) -> np.ndarray:
        """Values of slices along the leading axes, each without a step. Raises DataError where the file is broken."""
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > self.ndim or not all(isinstance(one, slice) and one.step in (None, 1) for one in keys):
            raise TypeError(f"slices without a step, {self.ndim} at most; got {key!r}")
        full = keys + (slice(None),) * (self.ndim - len(keys))
        starts = [one.indices(n)[:2] for one, n in zip(full, self.shape, strict=True)]
        spans = tuple(slice(start, max(start, stop)) for start, stop in starts)
        refuse_too_large(self.place, self.dtype.itemsize * math.prod(one.stop - one.start for one in spans))
        with reading(self.place, "an array"):
            return self._read(spans)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"Array({str(self.place)!r}, {self.shape}, {self.dtype})"


class Joined(Array):
    """Arrays of the same columns as one, with the rows of each below those of the one before it.

    Raises DataError where the columns of one are not those of the first.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        first = parts[0]
        for part in parts:
            if part.shape[1:] != first.shape[1:]:
                raise DataError(
                    part.place,
                    expected=f"rows of the shape {first.shape[1:]}, as in {first.place}",
                    found=f"{part.shape[1:]}",
                    remedy="name files of the same columns",
                )
        self.parts, lengths = tuple(parts), [len(part) for part in parts]
        self.starts = np.cumsum([0, *lengths])
        dtype = np.result_type(*(part.dtype for part in parts))
        # Chunks of the whole begin where those of each part do, if every part but the last is made of whole ones.
        whole = all(n % part.chunks[0] == 0 for part, n in zip(parts[:-1], lengths, strict=False) if part.chunks)
        chunks = first.chunks if whole and all(part.chunks == first.chunks for part in parts) else None
        super().__init__(first.place, (sum(lengths), *first.shape[1:]), dtype, self._joined, chunks)

    def _joined(self, key: Slices) -> np.ndarray:
        rows, *columns = key
        spans = [
            (part, slice(max(rows.start - start, 0), min(rows.stop - start, len(part))))
            for part, start in zip(self.parts, self.starts.tolist(), strict=False)
        ]
        read = [part[(span, *columns)] for part, span in spans if span.start < span.stop]
        if len(read) == 1:  # a copy would take as much memory again
            return read[0]
        return np.concatenate(read) if read else self.parts[0][(slice(0, 0), *columns)]


def numbers(array: Array | np.ndarray, where: object, n_dimensions: int | tuple[int, ...]) -> None:
    """Raise DataError where an array is not of real numbers, or of true and false, or not of so many dimensions.

    Every size and byte order of integers and floats is taken. An array without a value is refused.
    """
    wanted = (n_dimensions,) if isinstance(n_dimensions, int) else n_dimensions
    expected = f"real numbers in {' or '.join(map(str, wanted))} dimension(s)"
    if array.dtype.kind not in NUMERIC:
        found = f"{KINDS.get(array.dtype.kind, 'another kind of value')} ({array.dtype})"
        remedy = "name an array of numbers"
    elif array.ndim not in wanted:
        found, remedy = f"{array.ndim}, of the shape {array.shape}", "name another array, or reshape it"
    elif 0 in array.shape:
        found, remedy = f"none, in an array of the shape {array.shape}", "name an array with values"
    else:
        return
    raise DataError(where, expected=expected, found=found, remedy=remedy)


def vector(array: Array | np.ndarray, where: object) -> np.ndarray:
    """Values of an array in which one axis at most is longer than 1, (n,) in the array's dtype.

    MATLAB has no array of fewer than two dimensions. Raises DataError for any other array.
    """
    numbers(array, where, tuple(range(1, max(array.ndim, 1) + 1)))
    if math.prod(array.shape) != max(array.shape):
        raise DataError(
            where,
            expected="one number after the other, in 1 dimension",
            found=f"an array of the shape {array.shape}",
            remedy="name another array",
        )
    return np.asarray(array).reshape(-1)


def rows_of(array: Array | np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of an array in any order, each as often as it is asked for: (len(rows), ...) float32.

    The file is read once, from front to back, and no chunk of it twice; what is held besides the result stays below
    some 100 MB (or one row of chunks, where that is more).

    Raises DataError for a row that the array does not have.
    """
    rows = np.asarray(rows, dtype=np.int64)
    _refuse_strange_rows(array, rows)
    refuse_too_large(getattr(array, "place", "array"), 4 * len(rows) * math.prod(array.shape[1:]))
    result = np.empty((len(rows), *array.shape[1:]), dtype=np.float32)
    order = np.argsort(rows, kind="stable")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which callers refuse
        _read_sorted(array, rows[order], order, result)
    return result


def _refuse_strange_rows(array: Array | np.ndarray, rows: np.ndarray) -> None:
    strange = rows[(rows < 0) | (rows >= len(array))]
    if len(strange):
        raise DataError(
            getattr(array, "place", "array"),
            expected=f"rows from 0 to {len(array) - 1}",
            found=f"row {strange[0]}",
            remedy="name the file that these rows are of, or correct their numbers",
        )


def _read_sorted(array: Array | np.ndarray, rows: np.ndarray, targets: np.ndarray, result: np.ndarray) -> None:
    """Write sorted rows into `result` at their targets; of joined arrays, one after the other."""
    if isinstance(array, Joined):
        for part, start, stop in zip(array.parts, array.starts[:-1], array.starts[1:], strict=True):
            own = slice(*np.searchsorted(rows, (start, stop)))
            _read_sorted(part, rows[own] - start, targets[own], result)
        return
    chunks = _chunks(array)
    tile = _tile(array.shape, chunks, array.dtype.itemsize)
    for run in _runs(rows, chunks[0], tile[0]):
        span = slice(int(rows[run][0]), int(rows[run][-1]) + 1)
        for columns in _grid(array.shape[1:], tile[1:]):
            block = np.asarray(array[(span, *columns)])
            target: tuple[Any, ...] = (targets[run], *columns)
            result[target] = block[rows[run] - span.start]


def _chunks(array: Array | np.ndarray) -> tuple[int, ...]:
    """Shape of what is read at once: a file's chunk, a column, or rows so near that one read is quicker than two."""
    chunks = array.chunks if isinstance(array, Array) else _column_chunks(array)
    if chunks is not None:
        return chunks
    row = array.dtype.itemsize * math.prod(array.shape[1:])
    return (max(1, _NEAR // max(row, 1)), *array.shape[1:])


def _column_chunks(array: np.ndarray) -> tuple[int, ...] | None:
    """Chunks of an array whose columns are contiguous, as MATLAB and Fortran have them; None where rows are."""
    columns = array.ndim > 1 and array.flags.f_contiguous and not array.flags.c_contiguous
    return (*array.shape[:-1], 1) if columns else None


def _tile(shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int) -> list[int]:
    """Whole chunks, and as many as a block has room for: along the last axes first, where they lie side by side."""
    tile = [min(chunk, n) or 1 for chunk, n in zip(chunks, shape, strict=True)]
    for axis in reversed(range(len(shape))):
        room = _BLOCK // (itemsize * math.prod(tile))
        tile[axis] = min(tile[axis] * max(room, 1), max(shape[axis], 1))
    return tile


def _runs(rows: np.ndarray, chunk: int, most: int) -> Iterator[slice]:
    """Slices of sorted rows that are read together: they lie in neighbouring chunks, and within `most` rows."""
    start = 0
    while start < len(rows):
        first = rows[start] // chunk
        near = int(np.searchsorted(rows, (first + max(most // chunk, 1)) * chunk))
        of_chunk = rows[start:near] // chunk
        gaps = np.flatnonzero(np.diff(of_chunk) > 1)
        stop = start + int(gaps[0]) + 1 if len(gaps) else near
        yield slice(start, stop)
        start = stop


def _grid(shape: tuple[int, ...], tile: Sequence[int]) -> Iterator[Slices]:
    """Tiles of the axes after the first."""
    axes = [
        [slice(start, min(start + size, n)) for start in range(0, n, size)] for n, size in zip(shape, tile, strict=True)
    ]
    yield from product(*axes)


def of_numpy(place: Place, array: np.ndarray) -> Array:
    return Array(place, array.shape, array.dtype, array.__getitem__, _column_chunks(array))


def in_memory(place: Place, n_bytes: int, instead: str) -> None:
    """Raise DataError where an array that has to be read whole takes more than half of free memory."""
    if n_bytes > free_memory() / 2:
        raise DataError(
            place,
            expected="an array that fits into memory, as this format is read whole",
            found=size_of(n_bytes),
            remedy=f"save it as {instead}, which is read row by row",
        )


def refuse_too_large(where: object, n_bytes: int) -> None:
    """Raise DataError where values that are about to be read take more than the free memory."""
    if n_bytes > _SURELY_FREE and n_bytes > free_memory():
        raise DataError(
            where,
            expected="values that fit into memory",
            found=size_of(n_bytes),
            remedy="free memory, or copy the file again if it is smaller than that",
        )


def refuse_large_chunks(place: Place, chunks: Sequence[int] | None, dtype: np.dtype) -> None:
    """Raise DataError where one chunk of a file, which is read as a whole, takes more than half of free memory.

    Raises ValueError for a chunk of nothing.
    """
    if chunks is not None:
        if min(chunks, default=1) < 1:
            raise ValueError(f"chunks of {tuple(chunks)}")
        in_memory(place, dtype.itemsize * math.prod(map(int, chunks)), "an array of smaller chunks")


def chosen(place: Place, names: Sequence[str], numeric: Callable[[str], bool]) -> str:
    """Name of the array that is meant: the one that is named, or the only one of numbers."""
    if place.array in names:
        return place.array
    candidates = [name for name in names if numeric(name)]
    if place.array:
        found, remedy = f"no {place.array!r}; there is {some_of(names, 20) or 'nothing'}", "name an array of the file"
    elif len(candidates) == 1:
        return candidates[0]
    elif candidates:
        found, remedy = some_of(candidates, 20), f"name one: {place.path}:{candidates[0]}"
    else:
        found, remedy = f"none of numbers among {some_of(names, 20) or 'nothing'}", "name another file"
    raise DataError(place.path, expected="one array of numbers", found=found, remedy=remedy)
