"""Arrays that a program has at hand give the same subject as files of them, bit for bit."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from featcache.dataset.folder import scan_folder
from featcache.dataset.importing.arrays import material_of
from featcache.dataset.subject import Dataset
from featcache.errors import DataError
from featcache.formats.arrays import open_array
from support.lab import N_IMAGES, N_TEST, N_VERTICES, Lab, import_one

N = N_IMAGES + N_TEST
RESPONSES = np.random.default_rng(0).normal(size=(N, N_VERTICES)).astype(np.float32)
V1 = np.arange(N_VERTICES) < 3


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.suffix in (".npy", ".csv")
    }


def test_the_same_bytes_as_an_import_of_files(lab, tmp_path):
    here = Lab(tmp_path, lab.signal)
    rng = np.random.default_rng(1)
    shown = [*range(N_IMAGES), *rng.integers(0, N_IMAGES, 40)]
    trials = rng.normal(size=(len(shown), N_VERTICES)).astype(np.float32)
    runs, kinds = rng.integers(1, 4, len(shown)), [f"kind {number % 3}" for number in shown]
    test = [lab.photos / name for name in lab.names[N_IMAGES:]]
    names = [lab.names[number] for number in shown]
    ncsnr = np.linspace(0, 2, N_VERTICES)
    dataset = Dataset.from_arrays(
        [lab.photos / name for name in names],
        {"V4": trials},
        work=tmp_path / "a",
        rois={"V1": V1},
        sessions=runs,
        ncsnr=ncsnr,
        test_images=test,
        columns={"kind": kinds},
    )
    (tmp_path / "test").mkdir()
    for path in test:
        (tmp_path / "test" / path.name).symlink_to(path)
    imported = import_one(
        tmp_path / "b",
        images=str(lab.photos),
        test_images=str(tmp_path / "test"),
        table=here.table("t.csv", image=names, kind=kinds, run=runs.tolist()),
        session_column="run",
        responses=(f"V4={here.save('trials.npy', trials)}",),
        roi=(str(here.save("V1.npy", V1)),),
        ncsnr=(str(here.save("n.npy", ncsnr)),),
    )
    (subject,) = dataset.subjects
    assert subject.image_ids.tolist() == imported.image_ids.tolist() and len(subject.test) == N_TEST
    assert subject.columns["kind"] == imported.columns["kind"]
    ours, theirs = (files_of(tmp_path / work / "dataset/subj01") for work in "ab")
    for path in (tmp_path / "test").iterdir():  # links to the photos that were passed
        theirs["images.csv"] = theirs["images.csv"].replace(str(path).encode(), str(lab.photos / path.name).encode())
    assert ours == theirs and len(ours) == 4


def test_every_way_to_give_responses_is_the_same(lab, tmp_path):
    images = [str(lab.photos / name) for name in lab.names]
    np.save(tmp_path / "r.npy", RESPONSES)
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file["betas"], file["other"] = RESPONSES, RESPONSES
    given = [
        RESPONSES,
        RESPONSES.tolist(),
        tmp_path / "r.npy",
        f"{tmp_path / 'r.h5'}:betas",
        open_array(tmp_path / "r.npy"),
        np.load(tmp_path / "r.npy", mmap_mode="r"),
        np.asfortranarray(RESPONSES),
        RESPONSES.astype(">f8"),
    ]
    for responses in given:
        material = material_of(images, responses)
        assert list(material.recordings) == ["all"]
        np.testing.assert_array_equal(np.asarray(material.recordings["all"].trials, np.float32), RESPONSES)


def test_pictures_may_be_rows_of_an_array_and_surfaces_several(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 255, (6, 8, 8, 3)).astype(np.uint8)
    np.save(tmp_path / "pictures.npy", pixels)
    responses = {"lh": RESPONSES[:4], "rh": RESPONSES[:4, :5]}
    tests = {"rh": RESPONSES[4:6, :5], "lh": RESPONSES[4:6]}
    np.save(tmp_path / "test.npy", pixels[4:])
    np.save(tmp_path / "train.npy", pixels[:4])
    Dataset.from_arrays(
        tmp_path / "train.npy",
        responses,
        test_images=tmp_path / "test.npy",
        test_responses=tests,
        noise_ceiling={"rh": [10, 20, 30, 40, 100]},
        rois={"lh": {"V1": V1.astype(int)}},
        work=tmp_path,
        subject="m0",
    )
    (subject,) = scan_folder(tmp_path / "dataset")[0].subjects
    assert subject.name == "m0" and subject.surfaces == ("lh", "rh")
    for surface in ("lh", "rh"):
        np.testing.assert_array_equal(subject.responses(surface), responses[surface])
        np.testing.assert_array_equal(subject.test_responses(surface), tests[surface])
    np.testing.assert_allclose(subject.noise_ceiling["rh"], [0.1, 0.2, 0.3, 0.4, 1])
    assert subject.noise_ceiling["lh"] is None and not subject.rois["rh"]
    np.testing.assert_array_equal(subject.rois["lh"]["V1"], V1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"responses": RESPONSES[:-1]}, "responses of all: expected one for each of 30 images; found 29"),
        ({"responses": RESPONSES[0]}, "responses of all: expected real numbers in 2 dimension"),
        ({"responses": RESPONSES.astype(str)}, "responses of all: .* found text"),
        ({"responses": {"a": RESPONSES, "b": RESPONSES[1:]}}, "responses of b: expected one for each of 30"),
        ({"responses": {}}, "responses: expected .* one surface or more"),
        ({"images": []}, "responses of all: expected one for each of 0 images; found 30"),
        ({"sessions": [1, 2]}, "sessions: expected one for each of 30 images; found 2"),
        ({"ids": range(3)}, "ids: expected one for each of 30"),
        ({"ids": np.arange(N) / 2}, "ids: expected integers of 0 or more"),
        ({"ids": np.arange(N) - 1}, "ids: expected integers of 0 or more.*-1"),
        ({"ids": np.arange(N, dtype=np.uint64) + 2**63}, "ids: expected integers of 0 or more, below"),
        ({"columns": {"kind": ["a"]}}, "kind: expected one for each of 30"),
        ({"columns": {"row": ["a"] * N}}, "columns: expected other names than .*row"),
        ({"columns": {"session": ["a"] * N}, "sessions": range(N)}, "columns: expected other names than .*session"),
        ({"images": ["a.png"] * N, "columns": {"k": range(N)}}, "column k: expected one value for all trials"),
        ({"rois": {"V1": V1[:4]}}, "ROI V1 of all: expected one for each of 12 vertices; found 4"),
        ({"rois": {"V1": np.arange(N_VERTICES)}}, "ROI V1 of all: expected a mask of True and False"),
        ({"rois": {"V1": np.ones((N_VERTICES, 2))}}, "ROI V1 of all: expected"),
        ({"noise_ceiling": [1]}, "noise_ceiling of all: expected one for each of 12 vertices"),
        ({"noise_ceiling": V1 - 2.0}, "noise_ceiling of all: expected ceilings from 0 to 1; found"),
        ({"ncsnr": [np.nan] * N_VERTICES}, "ncsnr of all: expected ratios of 0 or more; found nan"),
        ({"test_responses": RESPONSES}, "test responses of all: expected one for each of 0 test images; found 30"),
        ({"test_responses": {"V1": RESPONSES}}, "test_responses: expected a value for each of all; found V1"),
    ],
)
def test_what_does_not_fit_is_said_by_the_name_of_the_argument(change, words, lab):
    given = {"images": [lab.photos / name for name in lab.names], "responses": RESPONSES} | change
    with pytest.raises(DataError, match=words):
        material_of(given.pop("images"), given.pop("responses"), **given)


def test_of_several_surfaces_each_value_says_which_it_is_of(lab):
    images, both = [lab.photos / name for name in lab.names], {"lh": RESPONSES, "rh": RESPONSES}
    for more in ({"noise_ceiling": [50] * N_VERTICES}, {"rois": {"V1": V1}}):
        with pytest.raises(DataError, match=f"{next(iter(more))}: expected a dict with one or more of lh, rh"):
            material_of(images, both, **more)


def test_a_folder_is_no_list_of_images(lab):
    with pytest.raises(DataError, match=r"found a folder; pass sorted\(folder.iterdir"):
        material_of(lab.photos, RESPONSES)


def test_missing_images_are_named(lab, tmp_path):
    images = [lab.photos / name for name in lab.names[:-1]] + [lab.photos / "nowhere.png"]
    with pytest.raises(DataError, match=r"nowhere.png: .* found"):
        Dataset.from_arrays(images, RESPONSES, work=tmp_path)
    assert not (tmp_path / "dataset").exists()
