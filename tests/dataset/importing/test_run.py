"""What was imported is not imported again, and what changed is."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.files import read_material
from featcache.dataset.importing.run import import_files, import_into
from featcache.dataset.open import open_imported
from featcache.errors import DataError
from featcache.formats.brain_maps import voxels_of
from support.lab import N_IMAGES, N_TEST, N_VERTICES, Lab, import_one

N = N_IMAGES + N_TEST


@pytest.fixture
def own(lab, tmp_path) -> Lab:
    """A copy of the lab's folder, for changing, with responses and an ROI."""
    shutil.copytree(lab.photos, tmp_path / "lab/photos")
    copy = Lab(tmp_path / "lab", lab.signal)
    copy.save("responses.npy", lab.signal)
    copy.save("V1.npy", np.arange(N_VERTICES) < 3)
    return copy


def settings(lab: Lab, **more) -> ImportConfig:
    options = {"images": str(lab.photos), "responses": (str(lab.folder / "responses.npy"),)}
    return ImportConfig(**options | {"roi": (str(lab.folder / "V1.npy"),)} | more)


def times(work: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (work / "dataset/subj01").rglob("*")}


def repaint(path: Path) -> None:
    """Other pixels, at a later time."""
    Image.effect_noise((32, 32), 80).save(path)
    os.utime(path, (2e9, 2e9))


def test_an_import_of_volumes_keeps_the_place_of_each_voxel(own, tmp_path):
    mask = np.random.default_rng(0).uniform(size=(3, 4, 5)) < 0.5
    affine = np.array([[-2, 0, 0.3, 10], [0, 1.8, 0, -20], [0.1, 0, 2.5, 5], [0, 0, 0, 1.0]])
    betas = np.random.default_rng(1).normal(size=(*mask.shape, N)).astype(np.float32)
    for name, values in (("betas", betas), ("mask", mask.astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(values, affine), own.folder / f"{name}.nii.gz")
    files = {"volume": (str(own.folder / "betas.nii.gz"),), "mask": (str(own.folder / "mask.nii.gz"),)}
    import_files(settings(own, responses=(), roi=(), **files), tmp_path / "work", workers=1)
    (subject,) = open_imported(tmp_path / "work").subjects
    ((surface, grid),) = subject.grids.items()
    assert grid.shape == mask.shape
    np.testing.assert_allclose(grid.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(voxels_of(subject.positions[surface], grid), np.argwhere(mask))


def test_importing_twice_writes_nothing(own, tmp_path):
    first = import_files(settings(own), tmp_path / "work", workers=1)
    before = times(tmp_path / "work")
    second = import_files(settings(own), tmp_path / "work", workers=1)
    assert first.new and not second.new and times(tmp_path / "work") == before
    facts = ("name", "folder", "n_train", "n_test", "n_trials", "n_vertices")
    assert [getattr(first, fact) for fact in facts] == [getattr(second, fact) for fact in facts]
    assert first.n_vertices == {"all": N_VERTICES} and first.n_train == N == first.n_trials
    assert set(second.notes) <= set(first.notes)


def move_photo(lab: Lab) -> None:
    (lab.photos / lab.names[-1]).rename(lab.photos / "zebra.png")


CHANGES = {
    "responses": lambda lab: lab.save("responses.npy", 2 * lab.signal + 1),
    "a photo": lambda lab: repaint(lab.photos / lab.names[3]),
    "name of a photo": move_photo,
    "an ROI": lambda lab: lab.save("V1.npy", np.arange(N_VERTICES) < 4),
    "what is left": lambda lab: shutil.rmtree(lab.folder.parent / "work/dataset/subj01/responses"),
    "a file that is damaged": lambda lab: (lab.folder.parent / "work/dataset/subj01/images.csv").write_text("x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_is_imported_again(change, own, tmp_path):
    work = tmp_path / "work"
    import_files(settings(own), work, workers=1)
    change(own)
    again = import_files(settings(own), work, workers=1)
    assert again.new
    subject = import_one(work, images=str(own.photos), responses=settings(own).responses, roi=settings(own).roi)
    assert all(source.is_file() for source in subject.train.sources)
    np.testing.assert_allclose(subject.responses("all"), np.load(own.folder / "responses.npy"), rtol=1e-6)
    assert int(subject.rois["all"]["V1"].sum()) == int(np.load(own.folder / "V1.npy").sum())


def test_photos_that_only_a_table_names_are_looked_at_too(own, tmp_path):
    table = own.table("t.csv", image=[f"photos/{name}" for name in own.names])
    before = import_one(tmp_path / "work", table=table, responses=settings(own).responses)
    repaint(own.photos / own.names[3])
    after = import_one(tmp_path / "work", table=table, responses=settings(own).responses)
    assert np.flatnonzero(before.train.ids != after.train.ids).tolist() == [3]


def test_other_settings_are_another_import(own, tmp_path):
    two = (*settings(own).responses, *settings(own).responses)
    table = own.table("t.csv", image=own.names * 2)
    options = {"table": table, "images": str(own.photos), "responses": two}
    scaled = np.array(import_one(tmp_path, **options).responses("all"))
    plain = import_one(tmp_path, **options, zscore=False).responses("all")
    z = (own.signal - own.signal.mean(0)) / own.signal.std(0)
    np.testing.assert_allclose(scaled, z, atol=1e-5)
    np.testing.assert_allclose(plain, own.signal, rtol=1e-5, atol=1e-5)


def test_ids_and_responses_go_by_the_pictures_and_not_by_names_or_order(lab, tmp_path):
    first = Lab(tmp_path, lab.signal)
    order = np.random.default_rng(0).permutation(N)
    (tmp_path / "photos").mkdir()
    for place, number in enumerate(order):
        shutil.copy(lab.photos / lab.names[number], tmp_path / "photos" / f"{place:03d}.png")
    a = import_one(
        tmp_path / "a", images=str(lab.photos), responses=(str(first.save("a.npy", lab.signal)),), subject="1"
    )
    b = import_one(
        tmp_path / "b", images=str(first.photos), responses=(str(first.save("b.npy", lab.signal[order])),), subject="2"
    )
    np.testing.assert_array_equal(a.train.ids[order], b.train.ids)
    np.testing.assert_array_equal(a.responses("all")[order], b.responses("all"))
    assert len(set(a.train.ids.tolist())) == N


def test_every_photo_that_is_broken_is_counted(own, tmp_path):
    for name in own.names[2:5]:
        (own.photos / name).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"photo 02é.png: .* \(and 2 more images\)"):
        import_files(settings(own), tmp_path / "work", workers=1)
    assert not (tmp_path / "work/dataset/subj01").exists()


def test_two_subjects_in_one_work_folder_share_their_pictures(own, tmp_path):
    first = import_one(tmp_path / "work", images=str(own.photos), responses=settings(own).responses)
    few = own.table("t.csv", image=own.names[4:9])
    second = import_one(
        tmp_path / "work",
        images=str(own.photos),
        table=few,
        responses=(str(own.save("few.npy", own.signal[4:9])),),
        subject="anna",
    )
    np.testing.assert_array_equal(second.train.ids, first.train.ids[4:9])
    assert (tmp_path / "work/dataset/subj01").is_dir() and (tmp_path / "work/dataset/anna").is_dir()


def test_a_subject_whose_name_leads_elsewhere_leaves_no_file(own, tmp_path):
    with pytest.raises(DataError, match=r"the name of the subject: expected .* found '\.\./\.\./elsewhere'"):
        import_files(settings(own, subject="../../elsewhere"), tmp_path / "a/work", workers=1)
    with pytest.raises(DataError, match="the name of the subject: expected at most 64 letters"):
        import_into(replace(read_material(settings(own)), name="../../elsewhere"), tmp_path / "a/work", workers=1)
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob("*elsewhere*"))
