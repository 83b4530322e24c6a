"""Maps of scores: at the fsaverage vertices, in the voxels of an import, and one line where places are not known."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest

from featcache.dataset.rois import FSAVERAGE_VERTICES
from featcache.errors import DataError
from featcache.formats.volumes import Grid
from heads.statistics.maps import file_name, write_maps
from support.scored import WIDTHS, made, scored


@pytest.fixture
def found(tmp_path, monkeypatch):
    given = made(tmp_path)
    return next(iter(given)), scored(given, monkeypatch, permutations=20, against="bad", intervals=False).vertices


def test_each_vertex_is_at_its_place_on_fsaverage_and_in_the_volume(found, tmp_path):
    subject, scores = found
    inside = np.zeros(FSAVERAGE_VERTICES, dtype=bool)
    inside[np.random.default_rng(0).choice(FSAVERAGE_VERTICES, WIDTHS["lh"], replace=False)] = True
    grid = Grid((3, 4, 5), np.diag([2.0, 2, 2, 1]))
    voxels = np.argwhere(np.ones(grid.shape))[np.random.default_rng(1).permutation(60)[: WIDTHS["rh"]]]
    placed = replace(
        subject,
        fsaverage={"lh": inside, "rh": None},
        positions={"rh": (2 * voxels).astype(np.float32)},
        grids={"rh": grid},
    )
    paths = write_maps(tmp_path / "maps", [placed], scores)
    names = {path.relative_to(tmp_path / "maps").as_posix() for path in paths}
    both = {f"subj01/{s}.{m}.{k}" for s in ("lh", "rh") for m in ("good", "bad") for k in ("r", "q")}
    both |= {f"subj01/{s}.good.{k}" for s in ("lh", "rh") for k in ("difference", "difference_q")}
    endings = {"lh": ".func.gii", "rh": ".nii.gz"}
    expected = {f"{one}{endings[one[7:9]]}" for one in both} | {
        f"subj01/lh.{m}.accuracy.func.gii" for m in ("good", "bad")
    }
    assert names == expected
    surface = nibabel.load(tmp_path / "maps/subj01/lh.good.r.func.gii").darrays[0].data
    np.testing.assert_allclose(surface[inside], scores[0].r, atol=1e-6)
    assert np.isfinite(surface).sum() == WIDTHS["lh"]
    volume = nibabel.load(tmp_path / "maps/subj01/rh.good.r.nii.gz").get_fdata()
    np.testing.assert_allclose(volume[tuple(voxels.T)], scores[1].r, atol=1e-6)
    assert np.isfinite(volume).sum() == WIDTHS["rh"]


def test_surfaces_without_places_are_named_and_the_others_written(found, tmp_path, capfd):
    subject, scores = found
    inside = np.arange(FSAVERAGE_VERTICES) < WIDTHS["lh"]
    placed = replace(subject, fsaverage={"lh": inside, "rh": None}, positions={"rh": np.zeros((20, 3), np.float32)})
    assert all(path.name.startswith("lh.") for path in write_maps(tmp_path / "maps", [placed], scores))
    assert "subj01 rh: no maps, for positions without a grid of voxels" in capfd.readouterr().err


def test_one_line_says_that_no_place_is_known(found, tmp_path):
    with pytest.raises(DataError, match=r"--maps-to, subj01 lh: .* no fsaverage mask and no positions"):
        write_maps(tmp_path / "maps", [found[0]], found[1])


def test_names_of_models_become_names_of_files():
    assert (
        file_name("tf_net@224 6 layers 7x7/3x3 linear ridge 55ad50")
        == "tf_net-224-6-layers-7x7-3x3-linear-ridge-55ad50"
    )
