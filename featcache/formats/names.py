"""Names of the arrays in a file of several."""

import zipfile
from collections.abc import Callable
from pathlib import Path

from featcache.formats.arrays import is_npy, is_zarr, npy_header
from featcache.formats.files import reading, regular_file
from featcache.formats.hdf5 import MATLAB_NUMBERS, hdf5_datasets
from featcache.formats.lazy import NUMERIC
from featcache.machine.extra import needed


def array_names(path: Path) -> list[str]:
    """Names of the arrays of numbers in a file or a store; [''] where it is one array.

    Raises DataError for a file that cannot be read, ConfigError where a library is missing.
    """
    listed = _list_zarr if is_zarr(path) else _LISTED.get(path.suffix.lower())
    if listed is None:
        return [""]
    if listed is not _list_zarr:
        regular_file(path)
    with reading(path, "a file of arrays"):
        return listed(path)


def _list_zarr(path: Path) -> list[str]:
    import zarr

    from featcache.formats.zarr_folder import open_zarr

    node = open_zarr(path)
    if isinstance(node, zarr.Array):
        return [""]
    members = dict(node.members(max_depth=None))
    return sorted(name for name, one in members.items() if isinstance(one, zarr.Array) and one.dtype.kind in NUMERIC)


def _list_npz(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if is_npy(info)]
        return [info.filename.removesuffix(".npy") for info in members if npy_header(archive, info)[2].kind in NUMERIC]


def _list_safetensors(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return list(file.keys())


def _list_hdf5(path: Path) -> list[str]:
    h5py = needed("h5py", "HDF5 files")
    with h5py.File(path, "r") as file:
        return [name for name, one in hdf5_datasets(file, h5py).items() if one.dtype.kind in NUMERIC]


def _list_mat(path: Path) -> list[str]:
    from scipy import io

    try:
        return [name for name, _, kind in io.whosmat(str(path), appendmat=False) if kind in MATLAB_NUMBERS]
    except NotImplementedError:  # version 7.3, which is HDF5
        return _list_hdf5(path)


_LISTED: dict[str, Callable[[Path], list[str]]] = {
    ".npz": _list_npz,
    ".safetensors": _list_safetensors,
    ".h5": _list_hdf5,
    ".hdf5": _list_hdf5,
    ".nc": _list_hdf5,
    ".mat": _list_mat,
}
