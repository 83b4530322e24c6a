"""Rows of a store's array, read from its chunk files straight into place.

zarr copies what it reads several times. A chunk here is whole rows of little-endian numbers and their crc32c, and can
be read into the rows that it fills (benchmarks/store_read.py). What zarr writes is unchanged, and it reads the same.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c  # zarr's own
import numpy as np

_CHECKSUM = np.dtype("<u4")


def read_rows(folder: Path, rows: np.ndarray, chunk: int, start: int) -> None:
    """Fill contiguous `rows` with those from `start` on of the array in `folder`, `chunk` of them in each of its files.

    Raises FileNotFoundError for a chunk that is missing, ValueError for one that is cut short or was changed.
    """
    stop = start + len(rows)
    if not rows.size:
        return

    def fill(index: int) -> None:
        first = index * chunk
        own = slice(max(start, first), min(stop, first + chunk))
        place = rows[own.start - start : own.stop - start]
        whole = len(place) == chunk
        values = place if whole else np.empty((chunk, *rows.shape[1:]), rows.dtype)
        _read_chunk(folder.joinpath("c", str(index), *["0"] * (rows.ndim - 1)), values)
        if not whole:
            place[:] = values[own.start - first : own.stop - first]

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as threads:  # reading lets go of the interpreter
        list(threads.map(fill, range(start // chunk, -(-stop // chunk))))


def _read_chunk(path: Path, values: np.ndarray) -> None:
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != values.nbytes + _CHECKSUM.itemsize:
            raise ValueError(f"{path.name} is {os.fstat(file.fileno()).st_size} bytes")
        content = values.reshape(-1).view(np.uint8)
        done = 0
        while done < len(content) and (n := file.readinto(content.data[done:])):
            done += n
        stored = np.frombuffer(file.read(_CHECKSUM.itemsize), _CHECKSUM)[0]
    if (computed := google_crc32c.value(content)) != stored:
        raise ValueError(f"stored {stored}, computed {computed}")
