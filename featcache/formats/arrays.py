"""Arrays of many file formats, opened without being read: rows come from the disk when they are asked for."""

import csv
import io
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from featcache.errors import DataError
from featcache.formats.files import reading, regular_file
from featcache.formats.hdf5 import open_hdf5, open_mat
from featcache.formats.lazy import NUMERIC, Array, Place, chosen, in_memory, of_numpy, refuse_large_chunks
from featcache.formats.npy import open_npy
from featcache.formats.tables import delimiter_of, rows_of_parquet
from featcache.machine.extra import needed
from featcache.machine.progress import size_of

_MOST_HEADER = 1 << 17  # bytes of a .npy file's header: twice what NumPy reads


def open_array(place: Place | Path | str) -> Array:
    """The array at a place, in a format that the ending of the file name tells.

    .npy, .npz, .h5, .hdf5, .nc (netCDF 4), .mat, .zarr, .safetensors, and .csv, .tsv and .parquet of numbers alone.
    Axes are in the order that the program which wrote the file shows them in: for MATLAB's HDF5, the reverse of the
    file's. A compressed member of an .npz, an array of an older .mat, .csv, .tsv and .parquet are read whole, where
    they fit into free memory.

    Raises DataError for a file that cannot be read, for an array that is not in it, and where several are and none is
    named; ConfigError where a library is missing.
    """
    place = Place.of(place) if isinstance(place, str) else Place(place) if isinstance(place, Path) else place
    if is_zarr(place.path):
        return _open_zarr(place)
    suffix = place.path.suffix.lower()
    if suffix not in _OPENERS:
        _refuse_ending(place.path, suffix)
    regular_file(place.path)
    what, opener = _OPENERS[suffix]
    with reading(place, what):
        return opener(place)


def _refuse_ending(path: Path, suffix: str) -> NoReturn:
    there = "a folder that is none" if os.path.isdir(path) else f"another, {suffix!r}"
    raise DataError(
        path,
        expected=f"a Zarr store, or a file with one of the endings {', '.join(array_endings())}",
        found=there if os.path.exists(path) else "no such file",
        remedy="name a file of one of these formats",
    )


def array_endings() -> list[str]:
    """Endings of the names of files that arrays are read from, in lower case and in order: ['.csv', '.h5', ...]."""
    return sorted(_OPENERS)


def is_zarr(path: Path) -> bool:
    """Whether a path is of a Zarr store, or of a group or an array inside one."""
    markers = ("zarr.json", ".zarray", ".zgroup")
    named = path.suffix.lower() == ".zarr"
    return os.path.isdir(path) and (named or any(os.path.isfile(path / name) for name in markers))


def _only(place: Place) -> None:
    """Raise DataError where an array is named in a file that is one array."""
    if place.array:
        raise DataError(
            place.path,
            expected="no name after the file's, which is one array",
            found=f":{place.array}",
            remedy=f"name {place.path}",
        )


def _open_npy(place: Place) -> Array:
    _only(place)
    return of_numpy(place, open_npy(place.path))


def _open_npz(place: Place) -> Array:
    with zipfile.ZipFile(place.path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if is_npy(info)}
        headers = {name: npy_header(archive, info) for name, info in members.items()}
        name = chosen(place, list(headers), lambda name: headers[name][2].kind in NUMERIC)
        (shape, fortran, dtype, start), member, place = headers[name], members[name], Place(place.path, name)
        if dtype.hasobject:
            raise ValueError(f"{name} is a pickle, which is not opened")
        n_bytes = dtype.itemsize * math.prod(map(int, shape))
        if n_bytes > member.file_size - start:
            raise ValueError(f"{name} is said to be {size_of(n_bytes)}, in {member.file_size} bytes")
        if member.compress_type == zipfile.ZIP_STORED and 0 not in shape:
            offset = _content_of(place.path, member) + start
            return of_numpy(place, np.memmap(place.path, dtype, "r", offset, shape, "F" if fortran else "C"))
        in_memory(place, n_bytes, "a .npy file")
        with archive.open(member) as file:
            return of_numpy(place, np.lib.format.read_array(file, allow_pickle=False))


def is_npy(member: zipfile.ZipInfo) -> bool:
    return member.filename.endswith(".npy")


def npy_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and length of the header of a .npy file in an archive."""
    with archive.open(member) as opened:
        file = io.BytesIO(opened.read(_MOST_HEADER))  # a header may say that it is 4 GB long
    old = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype, file.tell()


def _content_of(path: Path, member: zipfile.ZipInfo) -> int:
    """Byte at which an uncompressed member begins, after its local header of 30 bytes, its name and an extra field."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    return member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _open_zarr(place: Place) -> Array:
    import zarr

    from featcache.formats.zarr_folder import open_zarr

    with reading(place.path, "a Zarr store"):
        node = open_zarr(place.path)
        if isinstance(node, zarr.Array):
            _only(place)
        else:
            arrays = {name: one for name, one in node.members(max_depth=None) if isinstance(one, zarr.Array)}
            named = Place(place.path, place.array.strip("/"))
            name = chosen(named, sorted(arrays), lambda name: arrays[name].dtype.kind in NUMERIC)
            place, node = Place(place.path, name), arrays[name]
        refuse_large_chunks(place, node.chunks, node.dtype)
        return Array(place, node.shape, node.dtype, lambda key: np.asarray(node[key]), node.chunks)


_TENSORS = {f"I{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)}
_TENSORS |= {f"U{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)}
_TENSORS |= {"F16": "f2", "F32": "f4", "F64": "f8", "BOOL": "?", "BF16": "f4"}


def _open_safetensors(place: Place) -> Array:
    from safetensors import safe_open

    file: Any = safe_open(place.path, framework="numpy")
    name = chosen(place, list(file.keys()), lambda name: file.get_slice(name).get_dtype() in _TENSORS)
    part = file.get_slice(name)
    shape, kind = part.get_shape(), part.get_dtype()
    if kind not in _TENSORS:
        raise ValueError(f"{name} is of {kind}")
    if kind == "BF16":  # numpy has no such number
        return _of_bfloat16(Place(place.path, name), shape)
    return Array(Place(place.path, name), shape, np.dtype(_TENSORS[kind]), part.__getitem__)


def _of_bfloat16(place: Place, shape: Sequence[int]) -> Array:
    from safetensors import safe_open

    file: Any = safe_open(place.path, framework="pt")
    part = file.get_slice(place.array)
    return Array(place, shape, np.dtype(np.float32), lambda key: np.asarray(part[key].float().numpy()))


def _open_text(place: Place) -> Array:
    _only(place)
    in_memory(place, 2 * place.path.stat().st_size, "a .npy file")
    with open(place.path, encoding="utf-8-sig", newline="") as file:
        line = file.readline()
        delimiter = delimiter_of(place.path, line)
        first = next(csv.reader([line], delimiter=delimiter), [""])
        n_numbers = sum(map(_is_number, first))
        header = n_numbers < len(first)
        if header and 2 * n_numbers > len(first):  # a row of numbers that is broken must not be taken for names
            strange = next(cell for cell in first if not _is_number(cell))
            raise ValueError(f"{strange[:50]!r} in the first row, whose other cells are numbers")
        if header and not first[0].strip():
            raise ValueError("the first column has no name: save the table without the index of its rows")
        file.seek(0)
        return of_numpy(place, np.loadtxt(file, delimiter=delimiter, skiprows=int(header), ndmin=2, quotechar='"'))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _open_parquet(place: Place) -> Array:
    _only(place)
    parquet = needed("pyarrow.parquet", "Parquet files")
    file = parquet.ParquetFile(place.path)
    for column in file.schema_arrow:  # texts may be many times as large in memory as in the file
        if not _is_numeric(column.type):
            raise ValueError(f"column {column.name} is of {column.type}, and not of numbers")
    in_memory(place, 8 * rows_of_parquet(file) * file.metadata.num_columns, "a .npy file")
    table = file.read()
    return of_numpy(place, np.stack([column.to_numpy().astype(np.float64) for column in table.columns], axis=1))


def _is_numeric(kind: Any) -> bool:
    types = needed("pyarrow.types", "Parquet files")
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


_OPENERS: dict[str, tuple[str, Callable[[Place], Array]]] = {
    ".npy": ("a .npy file of numbers", _open_npy),
    ".npz": ("an .npz file of numbers", _open_npz),
    ".h5": ("an HDF5 file", open_hdf5),
    ".hdf5": ("an HDF5 file", open_hdf5),
    ".nc": ("a netCDF 4 file", open_hdf5),
    ".mat": ("a MATLAB file", open_mat),
    ".safetensors": ("a safetensors file", _open_safetensors),
    ".csv": ("a CSV file of numbers", _open_text),
    ".tsv": ("a TSV file of numbers", _open_text),
    ".parquet": ("a Parquet file of numbers", _open_parquet),
}
