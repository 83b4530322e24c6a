"""One Zarr format for every matrix with a row per image: features and predictions.

A store is a Zarr v3 group with an array per layer (or hemisphere). Chunks hold whole rows, uncompressed, each with a
crc32c checksum. Rows are appended in whole chunks and then recorded in `committed.json`, which is replaced in one step:
whatever is recorded is whole, and whatever is not recorded is written again. Rows that were never written read as NaN
and are refused.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from featcache.cache.chunks import read_rows
from featcache.config import differences, fingerprint
from featcache.errors import StoreError
from featcache.machine.files import only_writer, refuse_full_disk, replace_json

FORMAT = 1
_CHUNK_BYTES = 16 << 20  # upper bound of a chunk: large enough to read at disk speed
_CHUNK_ROWS = 256  # upper bound of what an interruption can cost, in images
_COMMITTED = "committed.json"


@dataclass(frozen=True)
class Row:
    """What a row of an array is: (n_columns,), or (height, width, n_channels) of a layer with places."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Store:
    """An open store. `arrays` maps a layer or hemisphere to its (n_rows, ...) Zarr array.

    key : what decided the rows; its fingerprint is in the store's name
    image_ids : (n_rows,) int64; the first n_train rows are training images, the others test images
    facts : what else the writer recorded (origin of the weights, versions, scores)
    """

    path: Path
    key: Mapping[str, Any]
    image_ids: np.ndarray
    n_train: int
    facts: Mapping[str, Any]
    arrays: Mapping[str, zarr.Array]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def committed(self) -> dict[str, int]:
        """Rows of each array that are there for good."""
        try:
            return self._whole(json.loads((self.path / _COMMITTED).read_text()))
        except FileNotFoundError:
            return dict.fromkeys(self.arrays, 0)
        except ValueError as error:  # not JSON, or not text
            raise _damaged(self.path, f"{_COMMITTED} cannot be read") from error

    def _whole(self, committed: Any) -> dict[str, int]:
        if not isinstance(committed, dict) or committed.keys() != self.arrays.keys():
            raise ValueError("another store's record")
        return committed

    @property
    def complete(self) -> bool:
        return all(self.committed.get(name, 0) == len(self.image_ids) for name in self.arrays)

    def chunk_rows(self, name: str) -> int:
        return self.arrays[name].chunks[0]

    def widen(self, name: str) -> None:
        """Empty an array and make it float32: what float16 cannot hold is written again, from its first row."""
        replace_json(self.path / _COMMITTED, self.committed | {name: 0})
        old = self.arrays[name]
        partial = self.path / f".{name}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        _create_array(zarr.open_group(self.path, mode="r+"), partial.name, old.shape[0], Row(old.shape[1:]))
        # at every moment between these the store can be opened, and the array is empty
        shutil.rmtree(self.path / name / "c", ignore_errors=True)
        os.replace(partial / "zarr.json", self.path / name / "zarr.json")
        shutil.rmtree(partial)

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Write the next rows of some arrays, {name: (n, ...)}, and commit them together.

        n must be a multiple of the array's chunk rows, unless the rows reach the end: a chunk is never written twice.
        Raises StoreError where a value is not finite, and names the array.
        """
        committed = self.committed
        for name, values in rows.items():
            start, array = committed[name], self.arrays[name]
            stop = start + len(values)
            if values.shape[1:] != array.shape[1:] or stop > array.shape[0]:
                raise ValueError(f"{name}: rows of shape {values.shape} do not fit {array.shape} from row {start}")
            if len(values) % array.chunks[0] and stop != array.shape[0]:
                raise ValueError(f"{name}: {len(values)} rows do not fill chunks of {array.chunks[0]}")
            if not np.isfinite(values).all():
                raise StoreError(
                    self.path,
                    expected="finite values",
                    found=f"NaN or infinity in {name}, rows {start} to {stop}",
                    remedy="use --dtype float32, or other weights",
                )
            array[start:stop] = values
            committed[name] = stop
        replace_json(self.path / _COMMITTED, committed)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows start to stop of one array, in `out`, contiguous and of its dtype, if it is given.

        Raises StoreError for rows not committed, lost or damaged.
        """
        stop = len(self.image_ids) if stop is None else stop
        if stop > self.committed.get(name, 0):
            raise StoreError(
                self.path,
                expected=f"{stop} rows of {name}",
                found=self.committed.get(name, 0),
                remedy="run the command that writes it again, it goes on from there",
            )
        array = self.arrays[name]
        rows = np.empty((stop - start, *array.shape[1:]), array.dtype) if out is None else out
        if rows.shape != (stop - start, *array.shape[1:]) or rows.dtype != array.dtype:
            raise ValueError(f"{name}: {rows.dtype} {rows.shape} is no place for rows {start} to {stop} of {array}")
        try:
            read_rows(self.path / name, rows, self.chunk_rows(name), start)
            return rows
        except FileNotFoundError as error:
            raise _damaged(self.path, f"a chunk of {name} is missing") from error
        except (ValueError, OSError) as error:
            raise _damaged(self.path, f"a chunk of {name} fails its checksum ({error})") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store for one writer; a second process is told so instead of mixing its rows in."""
        with only_writer(self.path):
            yield


def create_store(
    folder: Path,
    label: str,
    key: Mapping[str, Any],
    image_ids: np.ndarray,
    n_train: int,
    rows: Mapping[str, int | Row],
    facts: Mapping[str, Any],
) -> Store:
    """Make the store for a key, empty: arrays {name: (len(image_ids), ...)}; a number of columns is float32 rows.

    It is built under another name and renamed, so that a store either has everything or is not there.
    """
    path = store_path(folder, label, key)
    arrays = {name: Row((row,)) if isinstance(row, int) else row for name, row in rows.items()}
    refuse_full_disk(folder, len(image_ids) * sum(row.n_bytes for row in arrays.values()))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    about = {"format": FORMAT, "recipe": key, "facts": facts, "n_train": n_train, "image_ids": image_ids.tolist()}
    about["arrays"] = list(arrays)
    group = zarr.create_group(partial, zarr_format=3, attributes={"featcache": about})
    for name, row in arrays.items():
        _create_array(group, name, len(image_ids), row)
    os.replace(partial, path)
    return open_store(path)


def stored_bytes(row: Row, n_rows: int) -> int:
    """What so many rows take on the disk: the last chunk is as large as the others."""
    step = min(_chunk_rows(math.prod(row.shape)), n_rows)
    return math.ceil(n_rows / step) * step * row.n_bytes if n_rows else 0


def _create_array(group: zarr.Group, name: str, n_rows: int, row: Row) -> None:
    group.create_array(
        name,
        shape=(n_rows, *row.shape),
        chunks=(min(_chunk_rows(math.prod(row.shape)), n_rows), *(max(side, 1) for side in row.shape)),
        dtype=row.dtype,
        compressors=[Crc32cCodec()],
        fill_value=float("nan"),
    )


def _chunk_rows(n_columns: int) -> int:
    """A power of two, so that the largest of several is a multiple of the others; the same in float16 and float32."""
    rows = _CHUNK_BYTES // max(4 * n_columns, 1)
    return 1 << (min(max(rows, 1), _CHUNK_ROWS).bit_length() - 1)


def open_store(path: Path) -> Store:
    """Open a store. Raises StoreError if it is damaged or of another format."""
    try:
        group = zarr.open_group(path, mode="r+", zarr_format=3)
        about: Any = group.attrs["featcache"]
        if about["format"] != FORMAT:
            raise StoreError(
                path,
                expected=f"store format {FORMAT}",
                found=about["format"],
                remedy="delete it and run the command that writes it again, or choose another --work",
            )
        ids = np.array(about["image_ids"], dtype=np.int64)
        return Store(
            path,
            about["recipe"],
            ids,
            about["n_train"],
            about["facts"],
            {name: zarr.open_array(path / name, mode="r+", zarr_format=3) for name in about["arrays"]},
        )
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its description cannot be read ({error})") from error


def store_path(folder: Path, label: str, key: Mapping[str, Any]) -> Path:
    return folder / f"{label}-{fingerprint(key)}"


def list_stores(folder: Path) -> list[Store]:
    """Every store in a folder, by name."""
    return [open_store(path) for path in sorted(folder.glob("[!.]*")) if path.is_dir()]


def nearest(key: Mapping[str, Any], stores: Sequence[Store]) -> tuple[Store, dict[str, tuple[Any, Any]]] | None:
    """Of the stores there are, the one whose key differs least, and in what: why a look-up missed."""
    candidates = [(store, differences(key, store.key)) for store in stores]
    return min(candidates, key=lambda pair: len(pair[1]), default=None)


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        path,
        expected="a whole store",
        found=f"that {why}",
        remedy="delete it and run the command that writes it again",
    )
