"""One Zarr format for every matrix with a row per image: features and predictions.

A store is a Zarr v3 group with an array per layer, or per surface. Chunks hold whole rows, uncompressed, and each has a
crc32c checksum. Rows are appended in whole chunks and then recorded in `committed.json`, which is replaced in one step.
So rows that are recorded are whole, and rows that are not recorded are written again. Rows that were never written
cannot be read. The record has the checksum of every chunk, so that a whole chunk of another place or store is noticed.
"""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from featcache.cache.chunks import Chunk, chunk_file, read_rows, stored_checksum
from featcache.cache.records import COMMITTED, DESCRIPTION, FORMAT, Committed, Description, refuse_other_array
from featcache.config import differences, fingerprint
from featcache.errors import StoreError
from featcache.machine.documents import (
    DocumentError,
    read_document,
    read_json,
    sealed,
    typed,
    unsealed,
    write_document,
)
from featcache.machine.files import only_writer, partial_path, refuse_full_disk
from featcache.workdir import inside

_CHUNK_BYTES = 16 << 20  # largest chunk: large enough to be read at the speed of the disk
_CHUNK_ROWS = 256  # most rows of a chunk: what an interruption can cost, in images
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
                refuse_other_array(read_json(self._path / name / DESCRIPTION))
                array = zarr.open_array(self._path / name, mode="r+", zarr_format=3)
            except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
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

    description : as the store has it, or without ids and facts, which are then read where they are asked for
    """

    path: Path
    description: Description = field(repr=False)

    @property
    def key(self) -> Mapping[str, Any]:
        """What decided the rows, as JSON has it; its fingerprint is in the store's name."""
        return self.description.recipe

    @property
    def n_train(self) -> int:
        """Number of rows of training images, which come first; the others are of test images."""
        return self.description.n_train

    @cached_property
    def image_ids(self) -> np.ndarray:
        """Id of the image of each row, (n_rows,) int64."""
        return np.array(self._whole.image_ids, dtype=np.int64)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else the writer wrote down, as JSON has it: origin of the weights, versions, scores."""
        return self._whole.facts or {}

    @cached_property
    def arrays(self) -> "Mapping[str, zarr.Array[Any]]":
        """{layer or surface: (n_rows, ...) Zarr array}"""
        return _Arrays(self.path, self.description.arrays)

    @cached_property
    def _whole(self) -> Description:
        return self.description if self.description.image_ids is not None else open_store(self.path).description

    @property
    def name(self) -> str:
        """Name of its folder: a label and the fingerprint of its key."""
        return self.path.name

    @property
    def committed(self) -> Mapping[str, int]:
        """Number of rows of each array that are whole, {array: n}. Raises StoreError for a damaged record."""
        return self._record.rows

    @property
    def _record(self) -> Committed:
        try:
            return self._checked(read_document(self.path / COMMITTED, dict[str, Any]))
        except FileNotFoundError:
            return Committed(self._digits, dict.fromkeys(self.arrays, 0), {name: [] for name in self.arrays})
        except (OSError, ValueError) as error:
            raise _damaged(self.path, f"{COMMITTED} cannot be read ({error})") from error

    @cached_property
    def _digits(self) -> str:
        return fingerprint(self.key)

    def _checked(self, content: dict[str, Any]) -> Committed:
        """The record of this store. Raises DocumentError for that of another, or of more rows than there are."""
        if content.keys() == self.arrays.keys():  # of an earlier version
            content = {"key": self._digits, "rows": content, "checksums": {}}
        record = typed(content, Committed)
        n_rows = len(self.image_ids) if any(record.rows.values()) else 0  # a list of stores does not read the ids
        if record.key != self._digits or record.rows.keys() != self.arrays.keys():
            raise DocumentError("it is another store's")
        if any(n > n_rows for n in record.rows.values()):
            raise DocumentError(f"it is of more than {n_rows} rows")
        return record

    @property
    def complete(self) -> bool:
        """Whether every row of every array is whole."""
        return all(n_rows == len(self.image_ids) for n_rows in self.committed.values())

    def chunk_rows(self, name: str) -> int:
        """Rows in a chunk of an array."""
        return self.arrays[name].chunks[0]

    @property
    def commit_rows(self) -> int:
        """Rows that `extract` commits at once: of the largest chunk, a multiple of the others, all powers of two."""
        return max(map(self.chunk_rows, self.arrays))

    def widen(self, name: str) -> None:
        """Empty an array and make it float32, so that values beyond float16 can be written, from its first row on."""
        self.commit({name: 0})
        old = self.arrays[name]
        partial = partial_path(self.path / name)
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
        self._refuse_gone()
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
        for row in range(start, stop, array.chunks[0]):
            self._clear(name, row)
        array[start:stop] = values

    def link(self, name: str, start: int, other: "Store") -> None:
        """Have another store's chunk from row `start` on, which is the same, without a copy, and commit nothing.

        Raises OSError where the file system cannot link it.
        """
        path = self._chunk(name, start)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clear(name, start)
        os.link(other._chunk(name, start), path)

    def commit(self, stops: Mapping[str, int]) -> None:
        """Record that some arrays are whole up to a row, {name: row}, all in one step."""
        self._record_rows(stops, keep_behind=False)

    def take_back(self, stops: Mapping[str, int]) -> None:
        """Have some arrays end before a row, {name: row}, where a commit begins; see `keeps` of what is behind it."""
        starts = {name: row - row % self.commit_rows for name, row in stops.items()}
        self._record_rows(starts, keep_behind=True)

    def keeps(self, name: str, rows: range) -> bool:
        """Whether rows that were taken back are as they were committed. Their chunks are read."""
        chunks = self._chunks(name, rows)
        return all(chunk.checksum is not None and not chunk.fault for chunk in chunks)

    def _record_rows(self, stops: Mapping[str, int], keep_behind: bool) -> None:
        """Record up to where arrays are whole. keep_behind : of an array that gets shorter, all its checksums stay"""
        self._refuse_gone()
        record = self._record
        checksums = dict(record.checksums)
        for name, stop in stops.items():
            # of a record of an earlier version, the checksums of all its chunks are taken now
            before = checksums.get(name, [])
            known = before[: min(record.rows[name], stop) // self.chunk_rows(name)]
            starts = self._starts(name, range(len(known) * self.chunk_rows(name), stop))
            known += [stored_checksum(self._chunk(name, start)) for start in starts]
            checksums[name] = known + (before[len(known) :] if keep_behind or stop >= record.rows[name] else [])
        whole = Committed(self._digits, {**record.rows, **stops}, checksums)
        write_document(self.path / COMMITTED, msgspec.to_builtins(whole))

    def _refuse_gone(self) -> None:
        """Raise StoreError where somebody removed the store: what is written would make a part of it again."""
        if not (self.path / DESCRIPTION).exists():
            raise StoreError(
                self.path, expected="the store that was opened", found="that it is gone", remedy="run the command again"
            )

    def _chunk(self, name: str, row: int) -> Path:
        """The file that has a row."""
        array = self.arrays[name]
        return chunk_file(self.path / name, row // array.chunks[0], array.ndim)

    def _clear(self, name: str, row: int) -> None:
        """Remove what an interrupted run left of a chunk: a link to another store's, and parts that Zarr had begun."""
        path = self._chunk(name, row)
        for one in (path, *path.parent.glob(f"{path.name}.*.partial")):
            one.unlink(missing_ok=True)

    def chunks(self, name: str) -> list[Chunk]:
        """The chunks of an array that have its committed rows, in order."""
        return self._chunks(name, range(self._record.rows[name]))

    def _chunks(self, name: str, rows: range) -> list[Chunk]:
        """The chunks of an array that have some rows, the first of which is the first of its chunk."""
        array, checksums = self.arrays[name], dict(enumerate(self._record.checksums.get(name, ())))
        n_bytes, n_rows = math.prod(array.chunks) * array.dtype.itemsize, array.chunks[0]
        starts = self._starts(name, rows)
        return [Chunk(self._chunk(name, row), n_bytes, checksums.get(row // n_rows)) for row in starts]

    def _starts(self, name: str, rows: range) -> range:
        """First rows of the chunks that have some rows; none where rows have no numbers: Zarr writes no such chunk."""
        array = self.arrays[name]
        return rows[:: array.chunks[0]] if math.prod(array.shape[1:]) else rows[:0]

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start` to `stop` of one array, all of them by default.

        out : contiguous array of the rows' shape and dtype to read into, instead of a new one

        Raises StoreError for rows that are not committed, lost or damaged, ValueError for an `out` that does not fit.
        """
        stop = len(self.image_ids) if stop is None else stop
        record = self._record
        if stop > record.rows[name]:
            raise StoreError(
                self.path,
                expected=f"{stop} rows of {name}",
                found=record.rows[name],
                remedy="run the command that writes it again, it goes on from there",
            )
        checksums = record.checksums.get(name)
        if checksums is not None and len(checksums) < len(self._starts(name, range(stop))):
            raise _damaged(self.path, f"{COMMITTED} has not a checksum for each chunk of {name}")
        array = self.arrays[name]
        rows = np.empty((stop - start, *array.shape[1:]), array.dtype) if out is None else out
        if rows.shape != (stop - start, *array.shape[1:]) or rows.dtype != array.dtype:
            raise ValueError(f"{name}: {rows.dtype} {rows.shape} is no place for rows {start} to {stop} of {array}")
        try:
            read_rows(self.path / name, rows, self.chunk_rows(name), start, checksums)
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
    partial = partial_path(path)
    description = {
        "format": FORMAT,
        "recipe": key,
        "facts": facts,
        "n_train": n_train,
        "image_ids": image_ids.tolist(),
        "arrays": list(arrays),
    }
    try:
        group = zarr.create_group(partial, zarr_format=3, attributes={"featcache": sealed(DESCRIPTION, description)})
        for name, row in arrays.items():
            _create_array(group, name, len(image_ids), row)
        nothing = Committed(fingerprint(key), dict.fromkeys(arrays, 0), {name: [] for name in arrays})
        write_document(partial / COMMITTED, msgspec.to_builtins(nothing))
        os.replace(partial, path)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
    """Open a store; its arrays are opened as they are used.

    Raises StoreError if there is none, or if it is damaged or of another format.
    """
    try:
        document = read_json(path / DESCRIPTION)
        content = document["attributes"]["featcache"]
        if isinstance(version := content["format"], int) and version != FORMAT:
            raise StoreError(
                path,
                expected=f"store format {FORMAT}",
                found=version,
                remedy="use the version of featcache that wrote it, or write it again under another --work",
            )
        if document["node_type"] != "group" or document["zarr_format"] != 3:
            raise DocumentError("it is no group of Zarr 3")
        content = unsealed(DESCRIPTION, content)
        store = Store(path, typed(content, Description))
        if store.description.facts is None or store.description.image_ids is None:
            raise DocumentError("it has no facts or no ids")
        store.description.refuse_other(path)
        return store
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_dir() and any(path.glob(f"*/{DESCRIPTION}")):
            raise _damaged(path, f"its description, {DESCRIPTION}, is missing") from error
        raise StoreError(
            path,
            expected="a store, as 'extract' and 'fit-heads' write it",
            found="no such folder" if not path.exists() else f"no {DESCRIPTION} in it",
            remedy="name a folder in features.zarr or predictions.zarr",
        ) from error
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise _damaged(path, f"its description cannot be read ({error})") from error


def store_path(folder: Path, label: str, key: Mapping[str, Any]) -> Path:
    """Where the store of a key is, or would be. Raises StoreError for a label that leads out of the folder."""
    return inside(folder, f"{label}-{fingerprint(key)}")


def list_stores(folder: Path) -> list[Store]:
    """Every store in a folder, in the order of their names; hidden folders are stores that were never finished.

    Of stores that did not change, descriptions are in an index beside the folder. Without it they are read once more.
    Raises StoreError for a damaged one.
    """
    index, known = folder.with_suffix(".index.json"), _read_index(folder)
    stores: list[Store] = []
    entries: dict[str, tuple[Any, Description]] = {}
    for path in sorted(folder.glob("[!.]*")):
        if (stamp := _stamp(path)) is None and not path.is_dir():
            continue
        entry = known.get(path.name)
        if entry is None or entry[0] != stamp:
            stores.append(open_store(path))
            if stamp is not None:
                entries[path.name] = stamp, msgspec.structs.replace(stores[-1].description, image_ids=None, facts=None)
        else:
            stores.append(Store(path, entry[1]))
            entries[path.name] = entry
    if sum(known.get(name) is not entry for name, entry in entries.items()) > _UNINDEXED:
        with suppress(OSError):  # a folder that cannot be written to has no index
            write_document(index, msgspec.to_builtins(entries))
    return stores


def _read_index(folder: Path) -> dict[str, tuple[tuple[int, int], Description]]:
    """{name of a store: (stamp, what the index has of its description)}; none where there is no index that is whole."""
    try:
        return read_document(folder.with_suffix(".index.json"), dict[str, tuple[tuple[int, int], Description]])
    except (OSError, ValueError):
        return {}


def _stamp(path: Path) -> tuple[int, int] | None:
    """Time and size of a store's description, which change with it; None where there is none."""
    try:
        status = os.stat(path / DESCRIPTION)
        return status.st_mtime_ns, status.st_size
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
