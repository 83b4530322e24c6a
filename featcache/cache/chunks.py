"""Rows of a store's array, read from its chunk files straight into the array that is asked for.

zarr copies what it reads several times. A chunk of a store is whole rows of little-endian numbers and their crc32c, so
that it can be read into the rows that it fills (benchmarks/store_read.py). Only reading is done here, and zarr reads
the same numbers.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c  # zarr's own
import numpy as np

from featcache.machine.files import open_regular

_CHECKSUM_BYTES = 4


def read_rows(folder: Path, rows: np.ndarray, chunk: int, start: int, checksums: Sequence[int] | None = None) -> None:
    """Fill `rows` with the rows of a stored array, from row `start` on.

    folder : of the array
    rows : (n, ...) contiguous, of the dtype of the array; they are overwritten
    chunk : rows in each chunk file
    checksums : that each chunk of the array was written with; None: the chunks alone say it

    Raises FileNotFoundError for a chunk that is missing, ValueError for one that is cut short, was changed, or belongs
    to another place.
    """
    stop = start + len(rows)
    if not rows.size:
        return

    def fill(index: int) -> None:
        chunk_start = index * chunk
        first, last = max(start, chunk_start), min(stop, chunk_start + chunk)
        wanted = rows[first - start : last - start]
        whole = len(wanted) == chunk
        values = wanted if whole else np.empty((chunk, *rows.shape[1:]), rows.dtype)
        stored = _read_chunk(chunk_file(folder, index, rows.ndim), values)
        if checksums is not None and stored != checksums[index]:
            raise ValueError(f"chunk {index} is of another array, or of other rows")
        if not whole:
            wanted[:] = values[first - chunk_start : last - chunk_start]

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as threads:  # Python lets them read side by side
        list(threads.map(fill, range(start // chunk, -(-stop // chunk))))


@dataclass(frozen=True)
class Chunk:
    """The file of a chunk of an array.

    n_bytes : of its numbers, after which the checksum comes
    checksum : that the store recorded; None in stores of earlier versions
    """

    path: Path
    n_bytes: int
    checksum: int | None

    @property
    def fault(self) -> str:
        """What is wrong with the file, which is read; '' where nothing is."""
        try:
            stored = _read_chunk(self.path, np.empty(self.n_bytes, np.uint8))
        except FileNotFoundError:
            return "it is missing"
        except (OSError, ValueError) as error:
            return f"it fails its checksum ({error})"
        known = self.checksum in (None, stored)
        return "" if known else "it is of another array, or of other rows"


def chunk_file(folder: Path, index: int, ndim: int) -> Path:
    """The file of a chunk. folder, ndim : of the array and of its dimensions."""
    return folder.joinpath("c", str(index), *["0"] * (ndim - 1))


def stored_checksum(path: Path) -> int:
    """The crc32c that the file of a chunk ends with. Raises OSError for one that cannot be read."""
    with open_regular(path) as file:
        file.seek(-_CHECKSUM_BYTES, os.SEEK_END)
        return int.from_bytes(file.read(_CHECKSUM_BYTES), "little")


def _read_chunk(path: Path, values: np.ndarray) -> int:
    """Fill `values` with a whole chunk, check them against its checksum, and return that."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size != values.nbytes + _CHECKSUM_BYTES:
            raise ValueError(f"{path.name} is {os.fstat(file.fileno()).st_size} bytes")
        content = values.ravel().view(np.uint8)
        done = 0
        while n := file.readinto(content.data[done:]):  # nothing once all is read, or where the file was cut meanwhile
            done += n
        stored = int.from_bytes(file.read(_CHECKSUM_BYTES), "little")
    if (computed := google_crc32c.value(content)) != stored:
        raise ValueError(f"stored {stored}, computed {computed}")
    return stored
