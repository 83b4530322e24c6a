"""Responses, masks and ceilings of each surface are those that numpy would give."""

from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest

from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.responses import as_fractions, as_ratios, by_surface, read_responses, recordings_of
from featcache.errors import ConfigError, DataError

A, B, T = (np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32) for seed, n in enumerate((6, 4, 3)))


def save(folder: Path, **arrays: np.ndarray) -> list[str]:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return [str(folder / f"{name}.npy") for name in arrays]


def nifti(path: Path, values: np.ndarray) -> str:
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2, 2, 2, 1])), path)
    return str(path)


def test_files_are_of_the_surface_that_is_named_or_of_the_only_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, **{"a=b": A})
    (tmp_path / "k=1").mkdir()
    save(tmp_path / "k=1", x=A)
    assert by_surface(["x.npy"], "--responses") == {"all": ["x.npy"]}
    assert by_surface(["lh=x.npy", "rh=y.h5:b", "lh=z.npy"], "--responses") == {
        "lh": ["x.npy", "z.npy"],
        "rh": ["y.h5:b"],
    }
    assert by_surface(["a=b.npy"], "--responses") == {"all": ["a=b.npy"]}  # a file that is there
    assert by_surface(["V4=a=b.npy"], "--responses") == {"V4": ["a=b.npy"]}
    assert by_surface(["k=1/x.npy:betas"], "--responses") == {"all": ["k=1/x.npy:betas"]}
    assert by_surface(["/no/k=1/x.npy"], "--responses") == {"all": ["/no/k=1/x.npy"]}
    assert by_surface(["x.npy"], "--roi", ["V4"]) == {"V4": ["x.npy"]}
    with pytest.raises(ConfigError, match="one of lh, rh; found no name"):
        by_surface(["x.npy"], "--roi", ["lh", "rh"])
    with pytest.raises(DataError, match="name of a surface"):
        by_surface([f"a/b={tmp_path / 'a=b.npy'}"], "--responses")


def test_files_of_a_surface_follow_one_another(tmp_path):
    a, b, t = save(tmp_path, a=A, b=B, t=T)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["one/betas"], file["two/betas"], file["test"] = A[:, :2], B[:, :2], T[:, :2]
    other = str(tmp_path / "other.h5")
    config = ImportConfig(
        responses=(a, f"V4={other}:one/betas", b, f"V4={other}:two/betas"),
        test_responses=(f"V4={other}:test", f"all={t}"),
    )
    found = read_responses(config)
    assert found.per_file == (6, 4) and found.n_test == 3 and list(found.rows) == ["all", "V4"]
    np.testing.assert_array_equal(found.rows["all"], np.concatenate([A, B, T]))
    np.testing.assert_array_equal(found.rows["V4"], np.concatenate([A, B, T])[:, :2])
    assert not found.positions and found.masks == {"all": None, "V4": None}


def test_volumes_are_read_inside_their_mask_and_test_volumes_below(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(2, 3, 4, 2)).astype(np.float32)
    mask = rng.random((2, 3, 4)) < 0.5
    config = ImportConfig(
        volume=(f"V1={nifti(tmp_path / 'a.nii.gz', train)}",),
        test_responses=(nifti(tmp_path / "t.nii.gz", test),),
        mask=(nifti(tmp_path / "mask.nii", mask.astype(np.uint8)),),
    )
    found = read_responses(config)
    np.testing.assert_array_equal(found.rows["V1"], np.concatenate([train[mask].T, test[mask].T]))
    assert found.per_file == (5,) and found.n_test == 2 and found.masks == {"V1": tmp_path / "mask.nii"}
    np.testing.assert_array_equal(found.positions["V1"], 2 * np.argwhere(mask))


def test_ceilings_and_rois_go_to_their_surface(tmp_path):
    a, b = save(tmp_path, a=A, b=A[:, :3])
    ceiling, ncsnr, v1 = save(tmp_path, c=np.array([10, 20, 90.0]), n=np.arange(5.0), V1=np.arange(3) < 2)
    config = ImportConfig(
        responses=(f"lh={a}", f"rh={b}"), ceiling=(f"rh={ceiling}",), ncsnr=(f"lh={ncsnr}",), roi=(f"rh={v1}",)
    )
    found = recordings_of(config, read_responses(config))
    np.testing.assert_allclose(found["rh"].noise_ceiling, [0.1, 0.2, 0.9])
    np.testing.assert_array_equal(found["lh"].ncsnr, np.arange(5))
    assert found["lh"].noise_ceiling is None and found["rh"].ncsnr is None and not found["lh"].rois
    assert found["rh"].rois["V1"].tolist() == [True, True, False]


@pytest.mark.parametrize("scale", [1, 100])
def test_ceilings_in_percent_and_as_fractions_are_the_same(scale):
    fractions = np.array([0, 0.01, 0.4, 1])
    np.testing.assert_allclose(as_fractions(fractions * scale, "here"), fractions)


@pytest.mark.parametrize("bad", [-0.1, 1.01, 100.5, np.nan, np.inf])
def test_other_ceilings_are_refused(bad):
    with pytest.raises(DataError, match=r"ceilings from 0 to (1|100); found .* at vertex 1"):
        as_fractions(np.array([0.5, bad]), "here")


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf])
def test_ratios_below_0_or_that_are_not_finite_are_refused(bad):
    assert as_ratios(np.array([0, 3.0]), "here").tolist() == [0, 3]
    with pytest.raises(DataError, match=r"ratios of 0 or more; found .* at vertex 1"):
        as_ratios(np.array([0.5, bad]), "here")


@pytest.mark.parametrize("name", ["image_id", "Trial", "index"])
def test_a_table_of_responses_has_no_column_that_is_no_vertex(name, tmp_path):
    """It would be one more vertex, without a word."""
    (tmp_path / "r.csv").write_text(f"{name},v0,v1\n7,0.5,1.5\n8,2.5,3.5\n")
    with pytest.raises(DataError, match=f"expected columns of responses alone; found a column '{name}'"):
        read_responses(ImportConfig(images=str(tmp_path), responses=(str(tmp_path / "r.csv"),)))
    (tmp_path / "r.csv").write_text("v0,v1\n0.5,1.5\n2.5,3.5\n")
    read = read_responses(ImportConfig(images=str(tmp_path), responses=(str(tmp_path / "r.csv"),)))
    assert read.rows["all"][:].tolist() == [[0.5, 1.5], [2.5, 3.5]]
