"""Brain volumes and surfaces: responses and ROI labels of NIfTI, MGH, GIFTI and CIFTI files."""

import binascii
import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError
from featcache.formats.files import MOST_INFLATED, inflates_beyond, reading, regular_file
from featcache.formats.lazy import Array, Joined, Place, Slices, in_memory
from featcache.machine.extra import needed
from featcache.machine.memory import free_memory

_SAME_PLACE = 1e-3  # mm by which the same voxel of two files may lie apart: affines are rounded in files
_BLOCK = 32 * 2**20  # bytes of whole volumes, as float64, that are held at once
_PER_VOXEL = 24  # bytes: its number, its value as float64, and as much again while these are made
_HEADER = 348  # bytes of a NIfTI-1 file; that of a NIfTI-2 file is longer
_POINTS, _TRIANGLES = 1008, 1009  # NIfTI's numbers for arrays of coordinates and of triangles
_ENDINGS = (".nii", ".nii.gz", ".mgh", ".mgz", ".gii")

Mask = Path | np.ndarray | None  # a file, or true and false in the shape of one volume; None: all voxels are inside


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid that voxels are of.

    shape : of one volume
    affine : (4, 4) float64 from numbers of voxels to mm
    """

    shape: tuple[int, ...]
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class Volumes:
    """Responses of voxels (or of vertices, or of both) inside a mask.

    rows : (n_volumes, n_voxels) float32, read from the files when rows are asked for
    positions : (n_voxels, 3) float32, mm in the space of the file; None where the files do not say where vertices are
    n_of_files : (n_files,) number of volumes of each file
    grid : that all of them are of; None where some are vertices of a surface
    """

    rows: Array
    positions: np.ndarray | None
    n_of_files: tuple[int, ...]
    grid: Grid | None = None


@dataclass(frozen=True, eq=False)
class Labels:
    """One label for each voxel inside a mask.

    values : (n_voxels,) int64
    names : {value: name}, of the label table of a GIFTI or CIFTI file; empty for other formats
    shape : of the whole volume
    """

    values: np.ndarray
    names: dict[int, str]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Image:
    """One file of volumes.

    shape : of one volume: three axes of voxels, or one of vertices or grayordinates
    affine : (4, 4) from voxels to mm; None for surfaces
    structures : models of the brain of a CIFTI file, or None
    read : (rows, places) -> their values, for a slice of volumes and places numbered in the file's own order
    by_column : whether the values of one place are contiguous in the file, and not those of one volume
    names : {label: name}
    """

    path: Path
    n_volumes: int
    shape: tuple[int, ...]
    read: Callable[[slice, np.ndarray], np.ndarray]
    affine: np.ndarray | None = None
    structures: Any = None
    positions: np.ndarray | None = None
    by_column: bool = False
    names: dict[int, str] | None = None


def is_volume(path: Path) -> bool:
    """Whether the ending of a file name is that of a format read here."""
    return path.name.lower().endswith(_ENDINGS)


def read_volumes(paths: Sequence[Path], mask: Mask = None) -> Volumes:
    """Volumes of one or more files (such as one a session), each below those of the file before it.

    mask : file of one volume in the space of the responses: a voxel is inside where it is above 0; or true and false,
        in the shape of one volume. None: all are.

    Voxels are in the order of `responses[mask]`, the last axis of the volume fastest. Values are scaled as the file
    says (`scl_slope`, `scl_inter`). A NaN stays what it is. Blocks of volumes are read when rows are asked for; a
    compressed file is read from front to back, so ask for rows in increasing order.

    Raises DataError for a file that cannot be read, files or a mask of unequal shape or whose voxels lie more than
    1e-3 mm apart, and a mask that is empty or has NaN or values below 0; ConfigError where nibabel is missing.
    """
    images = [_open(Path(path)) for path in paths]
    for image in images[1:]:
        _refuse_other_space(image, images[0])
    places = _inside(mask, images[0])
    parts = [_rows(image, places) for image in images]
    rows = parts[0] if len(parts) == 1 else Joined(parts)
    n_of_files = tuple(image.n_volumes for image in images)
    return Volumes(rows, _positions(images[0], places), n_of_files, _grid(images[0]))


def read_labels(path: Path, mask: Mask = None) -> Labels:
    """Labels of a file of one volume, for the voxels inside a mask, in the order of `read_volumes`.

    Raises DataError as `read_volumes` does, and for labels that are not whole numbers.
    """
    image = _open(Path(path))
    _refuse_several(image, "labels")
    places = _inside(mask, image)
    with reading(path, "labels"):
        values = image.read(slice(0, 1), places)[0]  # in the file's own type: float32 would round large labels
    strange = values[~(np.isfinite(values) & (values == np.round(values)))]
    if len(strange):
        raise DataError(path, expected="whole numbers as labels", found=strange[0], remedy="name a file of labels")
    return Labels(values.astype(np.int64), dict(image.names or {}), image.shape)


def _rows(image: _Image, places: np.ndarray) -> Array:
    """Array of the places of one file, which reads a block of whole volumes at a time."""

    def read(key: Slices) -> np.ndarray:
        span, columns = key
        result = np.empty((span.stop - span.start, columns.stop - columns.start), dtype=np.float32)
        n_read = len(result) if image.by_column else max(1, _BLOCK // (8 * math.prod(image.shape)))
        for start in range(span.start, span.stop, n_read):
            stop = min(start + n_read, span.stop)
            result[start - span.start : stop - span.start] = image.read(slice(start, stop), places[columns])
        return result

    chunks = (image.n_volumes, 1) if image.by_column else (1, len(places))
    return Array(image.path, (image.n_volumes, len(places)), np.dtype(np.float32), read, chunks)


def _grid(image: _Image) -> Grid | None:
    structures = image.structures
    if structures is not None and image.positions is not None:  # of voxels alone
        return Grid(tuple(structures.volume_shape), np.asarray(structures.affine, dtype=np.float64))
    return None if image.affine is None else Grid(image.shape[:3], image.affine)


def _positions(image: _Image, places: np.ndarray) -> np.ndarray | None:
    """mm of places, (n_places, 3) float32; None where the file does not say."""
    if image.positions is not None:
        return np.asarray(image.positions[places], dtype=np.float32)
    if image.affine is None:
        return None
    voxels = np.stack(np.unravel_index(places, image.shape, order="F"), axis=1)
    return np.asarray(voxels @ image.affine[:3, :3].T + image.affine[:3, 3], dtype=np.float32)


def _inside(mask: Mask, image: _Image) -> np.ndarray:
    """Places inside the mask, (n_voxels,), as numbers in the file's own order; see `read_volumes`."""
    order = np.arange(math.prod(image.shape)).reshape(image.shape, order="F").ravel()
    if mask is None:
        return order
    if isinstance(mask, np.ndarray):
        _refuse_shape(image, mask.shape)
        return np.asarray(order[mask.ravel()])
    return np.asarray(order[_read_mask(Path(mask), image, order)])


def _refuse_shape(image: _Image, shape: tuple[int, ...]) -> None:
    if image.shape != shape:
        raise DataError(
            image.path,
            expected=f"volumes of the shape {shape}, as the mask",
            found=f"{image.shape}",
            remedy="name a mask of this space",
        )


def _read_mask(path: Path, image: _Image, order: np.ndarray) -> np.ndarray:
    """Whether each place is inside the mask of a file, (n_places,) bool."""
    mask = _open(path)
    _refuse_several(mask, "a mask")
    _refuse_other_space(mask, image)
    with reading(path, "a mask"):
        values = mask.read(slice(0, 1), order)[0]
    expected, remedy = "a mask of 0 and 1, with voxels inside", "name another mask"
    if np.isnan(values).any() or (values < 0).any():
        found = "NaN" if np.isnan(values).any() else f"{values.min():g}"
        raise DataError(path, expected=expected, found=found, remedy=remedy)
    if not (inside := (values > 0) & np.isfinite(values)).any():
        raise DataError(path, expected=expected, found="no voxel inside", remedy=remedy)
    return np.asarray(inside)


def _refuse_several(image: _Image, what: str) -> None:
    if image.n_volumes != 1:
        raise DataError(
            image.path, expected=f"{what} in one volume", found=f"{image.n_volumes}", remedy="name a file of one volume"
        )


def _refuse_other_space(image: _Image, first: _Image) -> None:
    """Raise DataError where the places of a file are not those of the first."""
    if image.shape != first.shape:
        expected, found = f"the shape {first.shape}, as in {first.path}", f"{image.shape}"
    elif image.affine is not None and first.affine is not None and _apart(image, first) > _SAME_PLACE:
        expected, found = f"voxels where those of {first.path} are", f"some {_apart(image, first):.4g} mm away"
    elif image.structures is not None and first.structures is not None and image.structures != first.structures:
        expected, found = f"the brain structures of {first.path}", "others, or their vertices in another order"
    else:
        return
    raise DataError(image.path, expected=expected, found=found, remedy="bring both into one space first")


def _apart(image: _Image, first: _Image) -> float:
    """Largest distance between the same corner of two grids, mm."""
    assert image.affine is not None and first.affine is not None
    corners = np.array(np.meshgrid(*([0, n - 1] for n in image.shape), indexing="ij")).reshape(3, -1)
    shift = image.affine - first.affine
    return float(np.linalg.norm(shift[:3, :3] @ corners + shift[:3, 3:], axis=0).max())


def _open(path: Path) -> _Image:
    nibabel = needed("nibabel", "brain volumes")
    if not is_volume(path):
        found = repr(path.suffix) if os.path.exists(path) else "another, and no such file"
        raise DataError(path, expected=f"one of the endings {', '.join(_ENDINGS)}", found=found, remedy="convert it")
    regular_file(path)
    with reading(path, "a brain volume"):
        if path.suffix.lower() in (".mgh", ".mgz"):
            return _of_voxels(path, _mgh(path, nibabel))
        _refuse_inflated(path)
        # The open file of a compressed image remembers where it is: the next block needs no reading from the start.
        image = nibabel.load(path, **({"keep_file_open": True} if path.suffix.lower() == ".gz" else {}))
        if isinstance(image, nibabel.GiftiImage):
            return _of_gifti(path, image)
        if isinstance(image, nibabel.Cifti2Image):
            return _of_cifti(path, image)
        return _of_voxels(path, image)


def _refuse_inflated(path: Path) -> None:
    """Raise DataError where what stands before the values, or all of a GIFTI file, takes too much memory.

    nibabel reads it whole, whatever its length. A compressed header may say that 2 GB follow, and have them.
    """
    if path.suffix.lower() == ".gii":
        _refuse_inflated_gifti(path)
        return
    if path.suffix.lower() != ".gz":
        return
    with gzip.open(path) as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER:
        raise ValueError("its header is cut off")
    for order in "<>":
        if struct.unpack_from(f"{order}i", header)[0] == 540:  # NIfTI-2
            in_memory(Place(path), 2 * struct.unpack_from(f"{order}q", header, 168)[0], "a file without extensions")
            return
    for order in "<>":
        offset = struct.unpack_from(f"{order}f", header, 108)[0]
        if math.isfinite(offset) and struct.unpack_from(f"{order}i", header)[0] == 348:
            in_memory(Place(path), 2 * int(offset), "a file without extensions")


def _refuse_inflated_gifti(path: Path) -> None:
    most = free_memory() // 2
    in_memory(Place(path), 4 * path.stat().st_size, "NIfTI")  # text, and the values beside it
    if MOST_INFLATED * path.stat().st_size <= most:
        return
    for data in re.finditer(rb"<Data>\s*([A-Za-z0-9+/=\s]+?)\s*</Data>", path.read_bytes()):
        with suppress(binascii.Error, zlib.error):  # of another encoding, or broken: nibabel says so
            if inflates_beyond([binascii.a2b_base64(data[1])], most):
                in_memory(Place(path), MOST_INFLATED * len(data[1]), "NIfTI")


def _mgh(path: Path, nibabel: Any) -> Any:
    """Image of an MGH or MGZ file; nibabel's own way leaves the file of the header to the garbage collector."""
    with nibabel.openers.ImageOpener(path) as file:
        header = nibabel.MGHImage.header_class.from_fileobj(file)
    data = nibabel.MGHImage.ImageArrayProxy(path, header, keep_file_open=path.suffix.lower() == ".mgz")
    return nibabel.MGHImage(data, header.get_affine(), header)


def _of_voxels(path: Path, image: Any) -> _Image:
    """NIfTI or MGH: (x, y, z) or (x, y, z, volume)."""
    _refuse_kind(path, image)
    data, shape = image.dataobj, tuple(map(int, image.shape))
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(
            path, expected="3 axes of voxels and one of volumes", found=f"the shape {shape}", remedy="reshape it"
        )
    in_memory(Place(path), _PER_VOXEL * math.prod(shape[:3]), "several files of fewer voxels")
    if path.suffix.lower() in (".nii", ".mgh"):
        data[tuple(slice(n - 1, n) for n in shape)]  # the last value: a file that was cut off is found here

    def read(rows: slice, places: np.ndarray) -> np.ndarray:
        block = np.asarray(data[..., rows] if len(shape) == 4 else data).reshape(
            (-1, rows.stop - rows.start), order="F"
        )
        return np.asarray(block[places].T)

    surface = sum(n > 1 for n in shape[:3]) < 2  # an overlay of vertices, whose affine says nothing
    affine = None if surface else np.asarray(image.affine, dtype=np.float64)
    return _Image(path, shape[3] if len(shape) == 4 else 1, shape[:3], read, affine)


def _refuse_kind(path: Path, image: Any) -> None:
    """Raise DataError where voxels are no real numbers."""
    if (dtype := image.get_data_dtype()).kind not in "fiu":
        raise DataError(path, expected="voxels of real numbers", found=f"{dtype}", remedy="convert it to floats")


def _of_cifti(path: Path, image: Any) -> _Image:
    """CIFTI: rows of scalars, series or labels, and columns of grayordinates."""
    rows, structures = (image.header.get_axis(axis) for axis in range(2))
    if not isinstance(structures, needed("nibabel.cifti2", "CIFTI files").BrainModelAxis):
        raise DataError(
            path,
            expected="rows of brain structures (.dscalar.nii, .dtseries.nii or .dlabel.nii)",
            found=f"axes of the kinds {type(rows).__name__} and {type(structures).__name__}",
            remedy="name another file",
        )

    if image.shape != (len(rows), len(structures)):
        raise DataError(
            path,
            expected=f"{len(rows)} rows of {len(structures)} values, as its axes say",
            found=f"the shape {image.shape}",
            remedy="write it again with the program that made it",
        )

    def read(span: slice, places: np.ndarray) -> np.ndarray:
        first, last = int(places.min()), int(places.max()) + 1
        return np.asarray(image.dataobj[span, first:last])[:, places - first]

    voxels = structures.volume_mask.all()
    homogeneous = np.column_stack([structures.voxel, np.ones(len(structures))]) if voxels else None
    positions = homogeneous @ structures.affine[:3].T if homogeneous is not None else None
    names = {int(key): name for key, (name, _) in rows.label[0].items()} if hasattr(rows, "label") else None
    return _Image(path, len(rows), (len(structures),), read, None, structures, positions, True, names)


def _of_gifti(path: Path, image: Any) -> _Image:
    """GIFTI: one array of values for each volume, held in memory; a POINTSET beside them says where vertices are."""
    points = [array.data for array in image.darrays if array.intent == _POINTS]
    values = [array.data for array in image.darrays if array.intent not in (_POINTS, _TRIANGLES)]
    shapes = {array.shape for array in values}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or not shape[0]:
        raise DataError(
            path,
            expected="arrays of one value for each vertex, of the same length",
            found="none" if not values else f"shapes such as {values[0].shape} and {values[-1].shape}",
            remedy="name a file of values (.func.gii, .shape.gii or .label.gii)",
        )

    def read(rows: slice, places: np.ndarray) -> np.ndarray:
        return np.stack([array[places] for array in values[rows]])

    positions = points[0] if points and len(points[0]) == shape[0] else None
    names = {int(key): name for key, name in image.labeltable.get_labels_as_dict().items()}
    return _Image(path, len(values), shape, read, positions=positions, names=names)
