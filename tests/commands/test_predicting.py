"""predict and export as a user runs them: by the model that was named and by no other."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from featcache.dataset.algonauts import open_challenge
from heads.encoder.folder import load_encoder
from heads.encoder.work import encoder_of_work
from support.commands import fails, run


@pytest.fixture
def photos(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures, in the folder in which commands run."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in open_challenge(tiny).subjects[0].test.sources[:2]:
        shutil.copy(path, folder)
    monkeypatch.chdir(tmp_path)
    return folder


def read(path: Path, name: str) -> np.ndarray:
    """The predictions of a subject, all surfaces side by side."""
    arrays = dict(zarr.open_group(path, mode="r")[name].arrays())
    return np.concatenate([arrays[surface][:] for surface in ("lh", "rh") if surface in arrays], 1)


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def encoder(work: Path, tiny: Path):
    return encoder_of_work(open_challenge(tiny).subjects, work)


def test_bare_predict_takes_the_blend_of_the_work_folder(work, photos, encoder, capfd):
    said = run(capfd, "predict", "photos", "--table")
    assert said["images"] == 2 and said["out"] == "predicted.zarr" and said["table"] == "predicted.csv"
    assert said["models"] == dict.fromkeys(encoder.subjects, "blend")
    for name in encoder.subjects:
        close(read(Path("predicted.zarr"), name), encoder.predict(photos, subject=name))
    with open("predicted.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(encoder.subjects)
    assert "found one that exists" in fails(capfd, "predict", "photos")


def test_a_model_is_named_by_its_digits_and_no_other_predicts(work, photos, encoder, capfd):
    names = [name for name in encoder.models() if name != "blend"]
    chosen = next(name for name in names if "test_vit" in name)
    said = run(capfd, "predict", "photos", "--model", chosen[-6:], "--subject", "2", "--out", "one.zarr")
    assert said["models"] == {"subj02": chosen} and said["table"] is None
    close(read(Path("one.zarr"), "subj02"), encoder.predict(photos, subject="subj02", model=chosen))
    assert set(dict(zarr.open_group("one.zarr", mode="r").groups())) == {"subj02"}
    for wrong in ("123456", "test_vit", chosen[-5:]):
        assert repr(wrong) in fails(capfd, "predict", "photos", "--model", wrong, "--out", "none.zarr")
    assert not Path("none.zarr").exists()


def test_an_exported_folder_predicts_without_work_folder_and_data(exported, photos, monkeypatch, capfd):
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    monkeypatch.delenv("FEATCACHE_WORK", raising=False)
    encoder = load_encoder(exported)
    roi = next(roi for roi in encoder.rois("subj01"))
    given = ("predict", str(photos), "--encoder", str(exported), "--subject", "subj01")
    said = run(capfd, *given, "--roi", roi, "--out", "roi.zarr")
    assert said["models"] == {"subj01": "blend"}
    close(read(Path("roi.zarr"), "subj01"), encoder.predict(photos, subject="subj01", roi=roi))
    assert "roi: expected one of" in fails(capfd, *given, "--roi", "FFA-9")
    assert "--subject" in fails(capfd, *given[:-1], "subj07")
    assert "model: expected one of" in fails(capfd, *given, "--model", "123456")
    assert "no encoder.json" in fails(capfd, "predict", str(photos), "--encoder", str(photos))


def test_images_that_are_none_are_one_line(exported, photos, capfd):
    for path in photos.iterdir():
        path.unlink()
    for given in ("photos", "gone.png", "photos/gone.hdf5:stimuli"):
        fails(capfd, "predict", given, "--encoder", str(exported))
    assert not Path("predicted.zarr").exists()


def test_export_writes_what_predicts_the_same(work, photos, encoder, capfd):
    model = next(name for name in encoder.models() if "test_vit" in name)
    said = run(capfd, "export", "handed", "--model", model[-6:])
    size = sum(path.stat().st_size for path in Path("handed").rglob("*") if path.is_file())
    assert said["folder"] == "handed" and said["url"] is None and said["bytes"] == size
    handed = load_encoder("handed")
    assert handed.models() == [model]
    for name in encoder.subjects:
        np.testing.assert_array_equal(
            handed.predict(photos, subject=name), encoder.predict(photos, subject=name, model=model)
        )
    assert "new or empty" in fails(capfd, "export", "handed", "--model", model[-6:])
    assert "'123456'" in fails(capfd, "export", "other", "--model", "123456") and not Path("other").exists()
