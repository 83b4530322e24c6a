"""Maps of the brain, read back with nibabel: the value of each vertex lies at its place, and nothing lies elsewhere."""

import nibabel
import numpy as np
import pytest

from featcache.errors import DataError
from featcache.formats.brain_maps import voxels_of, write_gifti, write_nifti
from featcache.formats.volumes import Grid, read_volumes

AFFINE = np.array([[-1.8, 0.1, 0, 90], [0, 1.8, 0.2, -126], [0.1, 0, 1.8, -72], [0, 0, 0, 1]])
GRID = Grid((5, 6, 4), AFFINE)


def test_a_surface_has_each_value_at_its_vertex(tmp_path):
    inside = np.random.default_rng(0).uniform(size=500) < 0.2
    values = np.arange(inside.sum()) / 7
    write_gifti(tmp_path / "lh.func.gii", values, "r, model a", "lh", inside)
    image = nibabel.load(tmp_path / "lh.func.gii")
    (array,) = image.darrays
    np.testing.assert_array_equal(array.data[inside], values.astype(np.float32))
    assert np.isnan(array.data[~inside]).all() and array.meta["Name"] == "r, model a"
    assert image.meta["AnatomicalStructurePrimary"] == "CortexLeft"


def test_a_volume_has_each_value_at_its_voxel_and_comes_back_as_an_import_reads_it(tmp_path):
    mask = np.random.default_rng(0).uniform(size=GRID.shape) < 0.3
    source = tmp_path / "betas.nii.gz"
    betas = np.random.default_rng(1).normal(size=(*GRID.shape, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(betas, AFFINE), source)
    read = read_volumes([source], mask)
    assert read.grid.shape == GRID.shape
    np.testing.assert_allclose(read.grid.affine, AFFINE, atol=1e-5)
    write_nifti(tmp_path / "r.nii.gz", read.rows[:][1], "r", read.positions, read.grid)
    image = nibabel.load(tmp_path / "r.nii.gz")
    np.testing.assert_array_equal(image.get_fdata()[mask], betas[..., 1][mask])
    assert np.isnan(image.get_fdata()[~mask]).all()
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda p: p + 0.5, "that are at none"),
        (lambda p: p + np.array([[400, 0, 0]]), "that are at none"),
        (lambda p: p[[0, 1, 0]], "several at one"),
    ],
)
def test_positions_off_the_grid_are_refused(change, found):
    positions = nibabel.affines.apply_affine(AFFINE, np.argwhere(np.ones((2, 2, 2))))
    np.testing.assert_array_equal(voxels_of(positions.astype(np.float32), GRID), np.argwhere(np.ones((2, 2, 2))))
    with pytest.raises(DataError, match=found):
        voxels_of(change(positions), GRID)
