"""One Zarr format for every matrix with a row per image: features and predictions.

A store is a Zarr v3 group with an array per layer, or per surface. Chunks hold whole rows, uncompressed, and each has a
crc32c checksum. Rows are appended in whole chunks and then recorded in `committed.json`, which is replaced in one step.
So rows that are recorded are whole, and rows that are not recorded are written again. Rows that were never written
cannot be read.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from featcache.cache.chunks import chunk_file, read_rows
from featcache.config import differences, fingerprint
from featcache.errors import StoreError
from featcache.machine.files import only_writer, refuse_full_disk, replace_json

FORMAT = 1
_CHUNK_BYTES = 16 << 20  # largest chunk: large enough to be read at the speed of the disk
_CHUNK_ROWS = 256  # most rows of a chunk: what an interruption can cost, in images
_COMMITTED, _DESCRIPTION = "committed.json", "zarr.json"
_UNINDEXED = 32  # stores, at most, whose descriptions are read rather than put into the index


@dataclass(frozen=True)
class Row:
    """Shape and type of one row of an array: (n_columns,), or (height, width, n_channels) of a layer with places."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def n_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class NotFiniteError(StoreError):
    """Rows with NaN or infinity, which no store takes. Who writes them says what can be done."""


class _Arrays(Mapping[str, "zarr.Array[Any]"]):
    """The arrays of a store, each opened where it is first asked for. Raises StoreError for a damaged one."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._opened = path, dict[str, "zarr.Array[Any] | None"].fromkeys(names)

    def __getitem__(self, name: str) -> "zarr.Array[Any]":
        array = self._opened[name]
        if array is None:
            try:
                array = zarr.open_array(self._path / name, mode="r+", zarr_format=3)
            except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
                raise _damaged(self._path, f"the description of {name} cannot be read ({error})") from error
            self._opened[name] = array
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)


@dataclass(frozen=True, eq=False)
class Store:
    """An open store.

    description : as the store has it, or without 'image_ids' and 'facts', which are then read where they are asked for
    """

    path: Path
    description: Mapping[str, Any] = field(repr=False)

    @property
    def key(self) -> Mapping[str, Any]:
        """What decided the rows, as JSON has it; its fingerprint is in the store's name."""
        key: Mapping[str, Any] = self.description["recipe"]
        return key

    @property
    def n_train(self) -> int:
        """Number of rows of training images, which come first; the others are of test images."""
        return int(self.description["n_train"])

    @cached_property
    def image_ids(self) -> np.ndarray:
        """Id of the image of each row, (n_rows,) int64."""
        return np.array(self._whole["image_ids"], dtype=np.int64)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else the writer wrote down, as JSON has it: origin of the weights, versions, scores."""
        facts: Mapping[str, Any] = self._whole["facts"]
        return facts

    @cached_property
    def arrays(self) -> "Mapping[str, zarr.Array[Any]]":
        """{layer or surface: (n_rows, ...) Zarr array}"""
        return _Arrays(self.path, self.description["arrays"])

    @cached_property
    def _whole(self) -> Mapping[str, Any]:
        return self.description if "image_ids" in self.description else open_store(self.path).description

    @property
    def name(self) -> str:
        """Name of its folder: a label and the fingerprint of its key."""
        return self.path.name

    @property
    def committed(self) -> dict[str, int]:
        """Number of rows of each array that are whole, {array: n}. Raises StoreError for a damaged record."""
        try:
            return self._checked(json.loads((self.path / _COMMITTED).read_text()))
        except FileNotFoundError:
            return dict.fromkeys(self.arrays, 0)
        except ValueError as error:  # not JSON, or not text
            raise _damaged(self.path, f"{_COMMITTED} cannot be read") from error

    def _checked(self, committed: Any) -> dict[str, int]:
        if not isinstance(committed, dict) or committed.keys() != self.arrays.keys():
            raise ValueError("another store's record")
        return committed

    @property
    def complete(self) -> bool:
        """Whether every row of every array is whole."""
        return all(n_rows == len(self.image_ids) for n_rows in self.committed.values())

    def chunk_rows(self, name: str) -> int:
        """Rows in a chunk of an array."""
        return self.arrays[name].chunks[0]

    def widen(self, name: str) -> None:
        """Empty an array and make it float32, so that values beyond float16 can be written, from its first row on."""
        replace_json(self.path / _COMMITTED, self.committed | {name: 0})
        old = self.arrays[name]
        partial = self.path / f".{name}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        _create_array(zarr.open_group(self.path, mode="r+"), partial.name, old.shape[0], Row(old.shape[1:]))
        # between any two of these steps the store can be opened, and the array is empty
        shutil.rmtree(self.path / name / "c", ignore_errors=True)
        os.replace(partial / "zarr.json", self.path / name / "zarr.json")
        shutil.rmtree(partial)

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Write the next rows of some arrays, {name: (n, ...)}, and commit them together.

        n must be a multiple of the array's chunk rows, unless the rows reach the end: a chunk is never written twice.
        Raises ValueError for rows that do not fit, and NotFiniteError for values that are not finite.
        """
        committed = self.committed
        for name, values in rows.items():
            self.put(name, committed[name], values)
        self.commit({name: committed[name] + len(values) for name, values in rows.items()})

    def put(self, name: str, start: int, values: np.ndarray) -> None:
        """Write rows of an array from row `start` on, as `append` does, and leave it to `commit` to make them count."""
        array = self.arrays[name]
        stop = start + len(values)
        if values.shape[1:] != array.shape[1:] or stop > array.shape[0]:
            raise ValueError(f"{name}: rows of shape {values.shape} do not fit {array.shape} from row {start}")
        if start % array.chunks[0] or (len(values) % array.chunks[0] and stop != array.shape[0]):
            raise ValueError(f"{name}: {len(values)} rows do not fill chunks of {array.chunks[0]}")
        if not np.isfinite(values).all():
            bad = np.argwhere(~np.isfinite(values))[0]
            raise NotFiniteError(
                self.path,
                expected="finite values",
                found=f"{values[tuple(bad)]} in {name}[{', '.join(map(str, [start + bad[0], *bad[1:]]))}]",
                remedy="correct what they were made from",
            )
        for row in range(start, stop, array.chunks[0]):  # an interrupted run may have left a link to another store's
            self._chunk(name, row).unlink(missing_ok=True)
        array[start:stop] = values

    def link(self, name: str, start: int, other: "Store") -> None:
        """Have another store's chunk from row `start` on, which is the same, without a copy, and commit nothing.

        Raises OSError where the file system cannot link it.
        """
        path = self._chunk(name, start)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(other._chunk(name, start), path)

    def commit(self, stops: Mapping[str, int]) -> None:
        """Record that some arrays are whole up to a row, {name: row}, all in one step."""
        replace_json(self.path / _COMMITTED, self.committed | dict(stops))

    def _chunk(self, name: str, row: int) -> Path:
        """The file that has a row."""
        array = self.arrays[name]
        return chunk_file(self.path / name, row // array.chunks[0], array.ndim)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start` to `stop` of one array, all of them by default.

        out : contiguous array of the rows' shape and dtype to read into, instead of a new one

        Raises StoreError for rows that are not committed, lost or damaged, ValueError for an `out` that does not fit.
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
        """Hold the store for one writer. Raises StoreError while another process writes to it."""
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
    """Make an empty store for a key, with an array of len(image_ids) rows for each name in `rows`.

    rows : {array: what a row of it is}; a number stands for a float32 row of so many columns

    The store is made under another name and renamed, so that it is whole or not there. If another process has made it
    meanwhile, that one is opened, with the rows that it has. Raises StoreError if the disk has no room for the rows.
    """
    path = store_path(folder, label, key)
    arrays = {name: Row((row,)) if isinstance(row, int) else row for name, row in rows.items()}
    refuse_full_disk(folder, len(image_ids) * sum(row.n_bytes for row in arrays.values()))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    description = {
        "format": FORMAT,
        "recipe": key,
        "facts": facts,
        "n_train": n_train,
        "image_ids": image_ids.tolist(),
        "arrays": list(arrays),
    }
    try:
        group = zarr.create_group(partial, zarr_format=3, attributes={"featcache": description})
        for name, row in arrays.items():
            _create_array(group, name, len(image_ids), row)
        os.replace(partial, path)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not path.is_dir():
            raise
    return open_store(path)


def stored_bytes(row: Row, n_rows: int) -> int:
    """Bytes that so many rows take on the disk, where the last chunk is as large as the others."""
    chunk = min(_chunk_rows(math.prod(row.shape)), n_rows)
    return math.ceil(n_rows / chunk) * chunk * row.n_bytes if n_rows else 0


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
    """Rows of a chunk: a power of two, so that the largest of several numbers is a multiple of the others.

    It is the same in float16 and float32, because an array may become float32 later.
    """
    rows = _CHUNK_BYTES // max(4 * n_columns, 1)
    return 1 << (min(max(rows, 1), _CHUNK_ROWS).bit_length() - 1)


def open_store(path: Path) -> Store:
    """Open a store; its arrays are opened as they are used. Raises StoreError if it is damaged or of another format."""
    try:
        description = json.loads((path / _DESCRIPTION).read_bytes())["attributes"]["featcache"]
        if description["format"] != FORMAT:
            raise StoreError(
                path,
                expected=f"store format {FORMAT}",
                found=description["format"],
                remedy="delete it and run the command that writes it again, or choose another --work",
            )
        store = Store(path, description)
        _ = store.key, store.n_train, store.facts, store.image_ids, store.arrays
        return store
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its description cannot be read ({error})") from error


def store_path(folder: Path, label: str, key: Mapping[str, Any]) -> Path:
    """Where the store of a key is, or would be."""
    return folder / f"{label}-{fingerprint(key)}"


def list_stores(folder: Path) -> list[Store]:
    """Every store in a folder, in the order of their names; hidden folders are stores that were never finished.

    Of stores that did not change, descriptions are in an index beside the folder. Without it they are read once more.
    Raises StoreError for a damaged one.
    """
    index, known = folder.with_suffix(".index.json"), _read_index(folder)
    stores: list[Store] = []
    entries: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("[!.]*")):
        if (stamp := _stamp(path)) is None and not path.is_dir():
            continue
        entry = known.get(path.name)
        if stamp is not None and entry and entry[0] == stamp:
            stores.append(Store(path, entry[1]))
        else:
            stores.append(open_store(path))
            left_out = ("image_ids", "facts")  # which may be long
            entry = [stamp, {name: value for name, value in stores[-1].description.items() if name not in left_out}]
        entries[path.name] = entry
    if sum(known.get(name) is not entry for name, entry in entries.items()) > _UNINDEXED:
        with suppress(OSError):  # a folder that cannot be written to has no index
            replace_json(index, entries)
    return stores


def _read_index(folder: Path) -> dict[str, list[Any]]:
    """{name of a store: [stamp, what the index has of its description]}; none where there is no index."""
    try:
        index = json.loads(folder.with_suffix(".index.json").read_bytes())
        return index if isinstance(index, dict) else {}
    except (OSError, ValueError):
        return {}


def _stamp(path: Path) -> list[int] | None:
    """Time and size of a store's description, which change with it; None where there is none."""
    try:
        status = os.stat(path / _DESCRIPTION)
        return [status.st_mtime_ns, status.st_size]
    except OSError:
        return None


def nearest(key: Mapping[str, Any], stores: Sequence[Store]) -> tuple[Store, dict[str, tuple[Any, Any]]] | None:
    """The store whose key differs least, and the settings in which it differs; None where there is no store.

    It explains why no store was found for a key.
    """
    candidates = [(store, differences(key, store.key)) for store in stores]
    return min(candidates, key=lambda pair: len(pair[1]), default=None)


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        path,
        expected="a whole store",
        found=f"that {why}",
        remedy="delete it and run the command that writes it again",
    )
