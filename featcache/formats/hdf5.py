"""Arrays of HDF5 and MATLAB files, with the axes in the order of the program that wrote them."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from featcache.errors import DataError
from featcache.formats.files import MOST_INFLATED, inflates_beyond
from featcache.formats.lazy import NUMERIC, Array, Place, chosen, in_memory, of_numpy, refuse_large_chunks
from featcache.machine.extra import needed
from featcache.machine.memory import free_memory

_MOST_DEPTH = 64  # of groups in groups
_ORDERS = {b"IM": "<", b"MI": ">"}  # the last two bytes of the header of MATLAB's version 5, and the order of bytes
_COMPRESSED = 15  # kind of an element
_PIECE = 1 << 20  # bytes of a file that are read at a time
MATLAB_NUMBERS = {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
MATLAB_NUMBERS |= {"double": 8, "single": 4, "logical": 1}


def open_hdf5(place: Place) -> Array:
    h5py = needed("h5py", "HDF5 files")
    file = h5py.File(place.path, "r")
    datasets = hdf5_datasets(file, h5py)
    name = place.array.strip("/")
    if name not in datasets:  # a link, which the walk does not follow
        dataset = _linked(file, name, place)
        if not isinstance(dataset, h5py.Dataset):
            name = chosen(place, list(datasets), lambda name: _numeric_dataset(datasets[name]))
            dataset = datasets[name]
    else:
        dataset = datasets[name]
    return _of_hdf5(Place(place.path, name), dataset)


def hdf5_datasets(file: Any, h5py: Any) -> dict[str, Any]:
    """{name: dataset}, without what MATLAB and netCDF keep for themselves."""
    datasets: dict[str, Any] = {}
    waiting, seen = [("", file, 0)], set()
    while waiting:  # HDF5's own walk takes stack for each level, and crashes where there are too many
        prefix, group, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise ValueError(f"more than {_MOST_DEPTH} groups inside each other")
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            node, whole = group[name], f"{prefix}{name}"
            if isinstance(node, h5py.Dataset) and not whole.startswith("#"):
                datasets[whole] = node
            elif isinstance(node, h5py.Group) and (place := h5py.h5o.get_info(node.id).addr) not in seen:
                seen.add(place)
                waiting.append((f"{whole}/", node, depth + 1))
    return dict(sorted(datasets.items()))


def _linked(file: Any, name: str, place: Place) -> Any:
    """What a name in an HDF5 file leads to; None where there is no such name."""
    if not name or file.get(name, getlink=True) is None:
        return None
    try:
        return file[name]
    except (KeyError, OSError) as error:
        raise DataError(
            place,
            expected="an array",
            found="a link to one that is missing",
            remedy="put the file that it leads to into its place, or name the array in that file",
        ) from error


def _numeric_dataset(dataset: Any) -> bool:
    scale = dataset.attrs.get("CLASS") == b"DIMENSION_SCALE"
    text = dataset.attrs.get("MATLAB_class") == b"char"
    return dataset.dtype.kind in NUMERIC and bool(dataset.shape) and not scale and not text


def _of_hdf5(place: Place, dataset: Any) -> Array:
    """Array of an HDF5 dataset, in MATLAB's order of axes where MATLAB wrote it."""
    _refuse_unfaithful(place, dataset)
    refuse_large_chunks(place, dataset.chunks, dataset.dtype)
    if "MATLAB_class" not in dataset.attrs:
        return Array(place, dataset.shape, dataset.dtype, dataset.__getitem__, dataset.chunks)
    shape = dataset.shape[::-1]
    chunks = dataset.chunks[::-1] if dataset.chunks else (*shape[:-1], 1)
    return Array(place, shape, dataset.dtype, lambda key: dataset[key[::-1]].T, chunks)


def _refuse_unfaithful(place: Place, dataset: Any) -> None:
    """Raise DataError where the values that HDF5 would give are not those that the writer meant."""
    attributes = dataset.attrs
    if dataset.shape is None or "MATLAB_empty" in attributes:
        found, remedy = "an empty one", "name an array with values"
    elif attributes.get("MATLAB_class") == b"char":
        found, remedy = "text", "name an array of numbers"
    elif {"scale_factor", "add_offset"} & set(attributes):
        found, remedy = "packed values (scale_factor, add_offset)", "save it unpacked, as floats"
    elif dataset.is_virtual and (missing := _missing_sources(place.path, dataset)):
        found, remedy = f"one of other files, without {missing}", "put these files beside it"
    elif not dataset.is_virtual and not dataset.external and not dataset.id.get_storage_size() and dataset.size:
        found, remedy = "one that was never written", "write it again with the program that made it"
    else:
        return
    raise DataError(place, expected="an array of values", found=found, remedy=remedy)


def _missing_sources(path: Path, dataset: Any) -> str:
    """First file that a virtual dataset is made of and that is missing: HDF5 would give zeros for it."""
    names = [source.file_name for source in dataset.virtual_sources()]
    return next((name for name in names if name != "." and not (path.parent / name).exists()), "")


def open_mat(place: Place) -> Array:
    from scipy import io

    if _is_hdf5(place.path):
        return open_hdf5(place)
    _refuse_inflated(place)
    classes = {name: (shape, kind) for name, shape, kind in io.whosmat(str(place.path), appendmat=False)}
    name = chosen(place, list(classes), lambda name: classes[name][1] in MATLAB_NUMBERS)
    shape, kind = classes[name]
    place = Place(place.path, name)
    if kind not in (*MATLAB_NUMBERS, "char", "sparse"):  # cells and structures may be nested without end
        remedy = "name an array of numbers"
        raise DataError(place, expected="real numbers", found=f"a {kind} array", remedy=remedy)
    in_memory(place, MATLAB_NUMBERS.get(kind, 8) * math.prod(map(int, shape)), "MATLAB's version 7.3")
    array = io.loadmat(str(place.path), appendmat=False, variable_names=[name])[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is a {kind} array")
    return of_numpy(place, array)


def _refuse_inflated(place: Place) -> None:
    """Raise DataError where compressed data becomes too large for memory, whatever its headers say.

    The elements of MATLAB's version 5 follow a header of 128 bytes; each has its kind and length before it.
    """
    most = free_memory() // 2
    with open(place.path, "rb") as file:
        order = _ORDERS.get(file.read(128)[126:])
        while order is not None and len(tag := file.read(8)) == 8:
            kind, n_bytes = struct.unpack(f"{order}II", tag)
            start = file.tell()
            may = kind == _COMPRESSED and MOST_INFLATED * n_bytes > most
            if may and inflates_beyond(_pieces(file, n_bytes), most):
                in_memory(place, MOST_INFLATED * n_bytes, "MATLAB's version 7.3")
            file.seek(start + n_bytes)


def _pieces(file: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    """The next bytes of a file, some at a time."""
    while n_bytes > 0 and (piece := file.read(min(_PIECE, n_bytes))):
        n_bytes -= len(piece)
        yield piece


def _is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, whose signature comes first, or after 512 bytes of MATLAB's own."""
    with open(path, "rb") as file:
        start = file.read(520)
    return b"\x89HDF\r\n\x1a\n" in (start[:8], start[512:])
