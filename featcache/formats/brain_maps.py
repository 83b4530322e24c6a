"""Values of vertices and voxels as files that viewers of brains open: GIFTI and NIfTI."""

from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError
from featcache.formats.volumes import Grid
from featcache.machine.extra import needed
from featcache.machine.files import whole_file

_STRUCTURES = {"lh": "CortexLeft", "rh": "CortexRight"}  # GIFTI's names of hemispheres
_OFF_GRID = 0.01  # parts of a voxel: positions are float32


def write_gifti(path: Path, values: np.ndarray, name: str, hemisphere: str, inside: np.ndarray) -> None:
    """Write one map of a surface as .func.gii; NaN at the vertices that have no value.

    values : (n_vertices,), of the vertices where `inside` is true, in rising order
    inside : (n_mesh,) bool, such as the 163,842 vertices of fsaverage
    """
    nibabel = needed("nibabel", "brain maps")
    whole = np.full(len(inside), np.nan, np.float32)
    whole[inside] = values
    gifti = nibabel.gifti
    meta = {"Name": name} | (
        {"AnatomicalStructurePrimary": _STRUCTURES[hemisphere]} if hemisphere in _STRUCTURES else {}
    )
    array = gifti.GiftiDataArray(whole, "NIFTI_INTENT_NONE", "NIFTI_TYPE_FLOAT32", meta=gifti.GiftiMetaData(meta))
    _save(nibabel, gifti.GiftiImage(darrays=[array], meta=gifti.GiftiMetaData(meta)), path)


def write_nifti(path: Path, values: np.ndarray, name: str, positions: np.ndarray, grid: Grid) -> None:
    """Write one volume as .nii.gz; NaN at the voxels that have no value.

    values : (n_voxels,)
    positions : (n_voxels, 3) mm, of the centres of voxels of the grid

    Raises DataError for positions that are not of the grid.
    """
    nibabel = needed("nibabel", "brain maps")
    whole = np.full(grid.shape, np.nan, np.float32)
    whole[tuple(voxels_of(positions, grid).T)] = values
    image = nibabel.Nifti1Image(whole, grid.affine)
    image.header["descrip"] = name.encode("ascii", "replace")[:79]
    image.header.set_xyzt_units("mm")
    _save(nibabel, image, path)


def voxels_of(positions: np.ndarray, grid: Grid) -> np.ndarray:
    """Numbers of the voxels at some positions, (n_voxels, 3) int64. Raises DataError for positions off the grid."""
    there = (positions.astype(np.float64) - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    voxels: np.ndarray = np.round(there).astype(np.int64)
    off = (np.abs(there - voxels) > _OFF_GRID).any(1) | (voxels < 0).any(1) | (voxels >= grid.shape).any(1)
    if off.any() or len(np.unique(voxels, axis=0)) < len(voxels):
        raise DataError(
            "positions of voxels",
            expected=f"one in each of some voxels of a grid of {' x '.join(map(str, grid.shape))}",
            found=f"{int(off.sum())} that are at none" if off.any() else "several at one",
            remedy="run 'import' again",
        )
    return voxels


def _save(nibabel: Any, image: Any, path: Path) -> None:
    with whole_file(path) as partial:
        nibabel.save(image, partial)
