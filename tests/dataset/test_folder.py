"""A subject in the project's own form is read back as it was written, and each kind of damage is one fault."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from featcache.dataset.folder import about_subject, check_name, is_folder, scan_folder, writing
from featcache.dataset.rois import FSAVERAGE_VERTICES
from featcache.dataset.subject import ArrayImage, Images
from featcache.errors import DataError
from featcache.formats.volumes import Grid

N_TRAIN, N_TEST = 6, 3
TRAIN = Images(
    (*(Path(f'/photos/{n} é,".png') for n in range(4)), *(ArrayImage(Path("/p.h5"), "all/x", n) for n in range(2))),
    np.array([5, 2**62, 3, 0, 8, 9]),
)
TEST = Images(tuple(ArrayImage(Path("/p.npy"), "", n) for n in range(N_TEST)), np.array([4, 7, 1]))
WIDTHS = {"V4": 4, "left (hemi) é": 3}
RNG = np.random.default_rng(0)
RESPONSES = {
    split: {surface: RNG.normal(size=(n, width)).astype(np.float32) for surface, width in WIDTHS.items()}
    for split, n in (("responses", N_TRAIN), ("test_responses", N_TEST))
}
CEILING = np.linspace(0, 1, 4, dtype=np.float32)
ROIS = {"V1": np.array([True, False, True, False]), "none": np.zeros(4, bool)}
POSITIONS = RNG.normal(size=(3, 3)).astype(np.float32)
GRID = Grid((4, 5, 6), np.array([[-2, 0, 0.3, 10], [0, 1.8, 0, -20], [0.1, 0, 2.5, 5], [0, 0, 0, 1]]))
FSAVERAGE = np.isin(np.arange(FSAVERAGE_VERTICES), [3, 7, 70_000, 163_841])
COLUMNS = {"kind": [*"abcdef", "", "g", 'multi\nline, "q"']}


def write(root: Path, name: str = "subj01") -> None:
    with writing(root, name) as writer:
        for part, of_part in RESPONSES.items():
            for surface, values in of_part.items():
                writer.new_array(part, surface, values.shape)[:] = values
        writer.save_rois("V4", ROIS)
        writer.save("noise_ceiling", "V4", CEILING)
        writer.save("test_noise_ceiling", "V4", CEILING[::-1])
        writer.save("positions", "left (hemi) é", POSITIONS)
        writer.grids["left (hemi) é"] = GRID
        writer.save("fsaverage", "V4", FSAVERAGE)
        writer.finish({"train": TRAIN, "test": TEST}, COLUMNS, {"made": "here"})


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    write(root)
    return root


@pytest.fixture
def root(written, tmp_path) -> Path:
    """A copy, for damaging, as an earlier version wrote it, without checksums: what files say is looked at."""
    copy = Path(shutil.copytree(written, tmp_path / "dataset"))
    path = copy / "subj01/subject.json"
    record = json.loads(path.read_text())
    del record["files"], record["digest"]
    path.write_text(json.dumps(record))
    return copy


def test_a_changed_file_is_named_where_it_is_read(written, tmp_path):
    copy = Path(shutil.copytree(written, tmp_path / "dataset"))
    changed = copy / "subj01/responses/V4.npy"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x7f")
    dataset, faults = scan_folder(copy)
    assert not faults
    np.testing.assert_array_equal(dataset.subjects[0].test_responses("V4"), RESPONSES["test_responses"]["V4"])
    with pytest.raises(DataError, match="expected the responses that were imported; found others; run 'import' again"):
        dataset.subjects[0].responses("V4")
    for name in ("rois/V4.npy", "images.csv", "noise_ceiling/V4.npy"):
        (copy / "subj01" / name).write_bytes((written / "subj01" / name).read_bytes() + b" ")
        _, (fault,) = scan_folder(copy)
        assert (str(fault.where), fault.expected) == (str(copy / "subj01" / name), "the file that was written")
        (copy / "subj01" / name).write_bytes((written / "subj01" / name).read_bytes())


def test_a_subject_is_read_as_it_was_written(written):
    dataset, faults = scan_folder(written)
    (subject,) = dataset.subjects
    assert not faults and is_folder(written) and about_subject(written, "subj01") == {"made": "here"}
    assert subject.name == "subj01" and subject.n_vertices == WIDTHS and subject.surfaces == tuple(WIDTHS)
    for images, expected in ((subject.train, TRAIN), (subject.test, TEST)):
        assert images.sources == expected.sources
        np.testing.assert_array_equal(images.ids, expected.ids)
    for surface in WIDTHS:
        np.testing.assert_array_equal(subject.responses(surface), RESPONSES["responses"][surface])
        np.testing.assert_array_equal(subject.test_responses(surface), RESPONSES["test_responses"][surface])
    np.testing.assert_array_equal(subject.noise_ceiling["V4"], CEILING)
    np.testing.assert_array_equal(subject.test_noise_ceiling["V4"], CEILING[::-1])
    np.testing.assert_array_equal(subject.positions["left (hemi) é"], POSITIONS)
    assert list(subject.grids) == ["left (hemi) é"] and subject.grids["left (hemi) é"].shape == GRID.shape
    np.testing.assert_array_equal(subject.grids["left (hemi) é"].affine, GRID.affine)
    assert np.flatnonzero(subject.fsaverage["V4"]).tolist() == [3, 7, 70_000, 163_841]
    assert subject.fsaverage["left (hemi) é"] is None
    assert subject.noise_ceiling["left (hemi) é"] is None and list(subject.positions) == ["left (hemi) é"]
    assert list(subject.rois["V4"]) == ["V1", "none"] and not subject.rois["left (hemi) é"]
    np.testing.assert_array_equal(subject.rois["V4"]["V1"], ROIS["V1"])
    assert subject.columns == {"kind": tuple(COLUMNS["kind"])}


def test_test_responses_may_be_missing_as_a_whole(root):
    shutil.rmtree(root / "subj01/test_responses")
    dataset, faults = scan_folder(root)
    assert not faults and not dataset.subjects[0].has_test_responses and not dataset.subjects[0].test_noise_ceiling


def edit_record(root: Path, **changes: object) -> None:
    path = root / "subj01/subject.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(root: Path, old: str, new: str) -> None:
    path = root / "subj01/images.csv"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def save(root: Path, name: str, values: np.ndarray) -> None:
    np.save(root / "subj01" / name, values)


# {damage: (what does it, file of the fault, what is found)}
DAMAGE = {
    "record that is no JSON": (lambda r: (r / "subj01/subject.json").write_text("{"), "subject.json", "another file"),
    "record that is a list": (lambda r: (r / "subj01/subject.json").write_text("[]"), "subject.json", "another file"),
    "record of another format": (lambda r: edit_record(r, format=2), "subject.json", "another file"),
    "record of another subject": (lambda r: edit_record(r, name="subj02"), "subject.json", "another file"),
    "record without surfaces": (lambda r: edit_record(r, surfaces={}), "subject.json", "another file"),
    "surfaces that are a list": (lambda r: edit_record(r, surfaces=["V4"]), "subject.json", "another file"),
    "surface that leads out": (lambda r: edit_record(r, surfaces={"../x": {"rois": []}}), "subject.json", "another"),
    "ROI that is a number": (lambda r: edit_record(r, surfaces={"V4": {"rois": [1]}}), "subject.json", "another file"),
    "no table": (lambda r: (r / "subj01/images.csv").unlink(), "images.csv", "another file"),
    "empty table": (lambda r: (r / "subj01/images.csv").write_text(""), "images.csv", "another file"),
    "table of other columns": (lambda r: edit_table(r, "split,id", "id,split"), "images.csv", "another file"),
    "table that is cut off": (lambda r: edit_table(r, ",,,b", ""), "images.csv", "another file"),
    "table in another encoding": (
        lambda r: (r / "subj01/images.csv").write_bytes(b"split,id,file,array,row\ntrain,1,\xe9,,"),
        "images.csv",
        "another file",
    ),
    "split of another name": (lambda r: edit_table(r, "train,5", "valid,5"), "images.csv", "another file"),
    "id that is no number": (lambda r: edit_table(r, "train,5", "train,five"), "images.csv", "another file"),
    "id that is too large": (lambda r: edit_table(r, "train,5", f"train,{2**64}"), "images.csv", "another file"),
    "id below 0": (lambda r: edit_table(r, "train,5", "train,-5"), "images.csv", "-5"),
    "row that is no number": (lambda r: edit_table(r, "all/x,0", "all/x,first"), "images.csv", "another file"),
    "id twice": (lambda r: edit_table(r, "train,5", "train,3"), "images.csv", "3 more than once"),
    "id in train and test": (lambda r: edit_table(r, "test,4", "test,3"), "images.csv", "1 in both: 3"),
    "no training image": (
        lambda r: (r / "subj01/images.csv").write_text("split,id,file,array,row\ntest,4,/x.png,,\n"),
        "images.csv",
        "none",
    ),
    "no responses": (lambda r: (r / "subj01/responses/V4.npy").unlink(), "responses/V4.npy", "none"),
    "responses that are cut off": (
        lambda r: (r / "subj01/responses/V4.npy").write_bytes((r / "subj01/responses/V4.npy").read_bytes()[:-5]),
        "responses/V4.npy",
        "one that cannot",
    ),
    "empty responses": (
        lambda r: (r / "subj01/responses/V4.npy").write_bytes(b""),
        "responses/V4.npy",
        "0 bytes",
    ),
    "responses of fewer images": (
        lambda r: save(r, "responses/V4.npy", np.zeros((5, 4), np.float32)),
        "responses/V4.npy",
        "shape (5, 4)",
    ),
    "responses of float64": (
        lambda r: save(r, "responses/V4.npy", np.zeros((6, 4))),
        "responses/V4.npy",
        "float64",
    ),
    "test responses of other vertices": (
        lambda r: save(r, "test_responses/V4.npy", np.zeros((3, 5), np.float32)),
        "test_responses/V4.npy",
        "shape (3, 5)",
    ),
    "test responses of one surface": (
        lambda r: (r / "subj01/test_responses/V4.npy").unlink(),
        "test_responses/V4.npy",
        "none",
    ),
    "ceilings of other vertices": (
        lambda r: save(r, "noise_ceiling/V4.npy", CEILING[:2]),
        "noise_ceiling/V4.npy",
        "(2,)",
    ),
    "ceilings in percent": (
        lambda r: save(r, "test_noise_ceiling/V4.npy", 100 * CEILING),
        "test_noise_ceiling/V4.npy",
        "33.33",
    ),
    "ceilings of NaN": (
        lambda r: save(r, "noise_ceiling/V4.npy", CEILING * np.nan),
        "noise_ceiling/V4.npy",
        "nan",
    ),
    "ceilings of text": (
        lambda r: save(r, "noise_ceiling/V4.npy", np.array(list("abcd"))),
        "noise_ceiling/V4.npy",
        "<U1",
    ),
    "no file of ROIs": (lambda r: (r / "subj01/rois/V4.npy").unlink(), "rois/V4.npy", "none"),
    "ROIs of other vertices": (lambda r: save(r, "rois/V4.npy", np.ones((2, 3), bool)), "rois/V4.npy", "(2, 3)"),
    "ROIs of numbers": (lambda r: save(r, "rois/V4.npy", np.ones((2, 4))), "rois/V4.npy", "float64"),
    "positions in a plane": (
        lambda r: save(r, "positions/left (hemi) é.npy", POSITIONS[:, :2]),
        "positions/left (hemi) é.npy",
        "(3, 2)",
    ),
    "fsaverage of other vertices": (
        lambda r: save(r, "fsaverage/V4.npy", FSAVERAGE & (np.arange(FSAVERAGE_VERTICES) != 3)),
        "fsaverage/V4.npy",
        "another number",
    ),
    "positions of text": (
        lambda r: save(r, "positions/left (hemi) é.npy", POSITIONS.astype(str)),
        "positions/left (hemi) é.npy",
        "<U",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_damage_is_one_fault_and_other_subjects_are_read(damage, root):
    write(root, "whole")
    change, file, found = DAMAGE[damage]
    change(root)
    dataset, faults = scan_folder(root)
    assert [subject.name for subject in dataset.subjects] == ["whole"]
    (fault,) = faults
    assert Path(fault.where) == root / "subj01" / file and found in fault.found and "\n" not in str(fault)


def test_what_a_killed_import_left_is_no_subject(root):
    shutil.copytree(root / "subj01", root / ".subj02.new")
    assert [subject.name for subject in scan_folder(root)[0].subjects] == ["subj01"] and not scan_folder(root)[1]


def test_an_older_subject_is_replaced_as_a_whole(root):
    (root / "subj01/old file").write_text("x")
    write(root)
    assert not (root / "subj01/old file").exists()
    assert {path.name for path in root.iterdir()} == {"subj01", ".writing.lock"}


def test_an_error_while_writing_leaves_the_older_subject(root):
    before = {path: path.read_bytes() for path in (root / "subj01").rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError), writing(root, "subj01") as writer:
        writer.new_array("responses", "V4", (2, 2))
        raise RuntimeError
    assert {path: path.read_bytes() for path in (root / "subj01").rglob("*") if path.is_file()} == before
    assert {path.name for path in root.iterdir()} == {"subj01", ".writing.lock"}


@pytest.mark.parametrize("name", ["V4", "subj01", "Näme 2", "a", "m0_V1 (left)", "x" * 64, "3.5+1"])
def test_names_of_files(name, tmp_path):
    assert check_name(name, "it") == name
    (tmp_path / f"{name}.npy").write_text("x")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "a\\b", "a:b", "a=b", "a\nb", "a\0", "a ", "a.", "-a", "x" * 65, "a*", "a,b"],
)
def test_names_that_no_file_should_have(name):
    with pytest.raises(DataError, match="it: expected at most 64 letters"):
        check_name(name, "it")


def test_notes_say_what_is_missing(root):
    assert not scan_folder(root)[0].notes
    shutil.rmtree(root / "subj01/noise_ceiling")
    (note,) = scan_folder(root)[0].notes
    assert "no noise ceilings (subj01)" in note
