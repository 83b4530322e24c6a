"""Every fault that can be planted in a tree is found, with its file, and a tree without faults has none."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from featcache.dataset.algonauts import image_folder, image_name, list_images, open_challenge, scan_tree
from featcache.dataset.open import deep_faults
from featcache.errors import DataError

TRAIN, TEST = "subj01/training_split/training_images", "subj01/test_split/test_images"
RESPONSES, MASKS = "subj02/training_split/training_fmri/rh_training_fmri.npy", "subj01/roi_masks"


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    np.save(path, change(np.load(path)))
    return path


def first(folder: Path) -> Path:
    return sorted(folder.iterdir())[0]


def set_value(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return change


def drop_row(root: Path) -> Path:
    return rewrite(root / "subj01/training_split/training_fmri/lh_training_fmri.npy", lambda a: a[:-1])


def leave_gap(root: Path) -> Path:
    sorted((root / TEST).iterdir())[1].unlink()
    return root / TEST


def truncate_image(root: Path) -> Path:
    path = first(root / TEST)
    path.write_bytes(path.read_bytes()[:-60])
    return path


def replace_image_by_text(root: Path) -> Path:
    path = sorted((root / TRAIN).iterdir())[3]
    path.write_text("no image")
    return path


def put_id_in_both(root: Path) -> Path:
    trained = first(root / TRAIN).name.partition("nsd-")[2]
    path = sorted((root / TEST).iterdir())[-1]
    path.write_bytes(first(root / TRAIN).read_bytes())  # else one id would mean two pictures
    path.rename(path.with_name(f"{path.name[:9]}_nsd-{trained}"))
    return root / "subj01"


def misname(root: Path) -> Path:
    """Give one image a number so large that a list of those before it fills any memory."""
    path = sorted((root / TRAIN).iterdir())[-1]
    path.rename(path.with_name("train-20230001000000_nsd-00013.png"))
    return root / TRAIN


def repeat_id(root: Path) -> Path:
    paths = sorted((root / TRAIN).iterdir())
    paths[5].rename(paths[5].with_name(f"{paths[5].name[:15]}{paths[2].name[15:]}"))
    return root / TRAIN


def pipe(path: Path) -> Path:
    path.unlink()
    os.mkfifo(path)
    return path


def name_twice(root: Path) -> Path:
    path = root / MASKS / "mapping_streams.npy"
    names = np.load(path, allow_pickle=True).item()
    np.save(path, np.array(names | {2: names[1]}, dtype=object), allow_pickle=True)
    return path


def copy_subject(root: Path, name: str) -> Path:
    (root / name).symlink_to(root / "subj01", target_is_directory=True)
    return root / name


FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "rows and images differ": (drop_row, "expected a row for each of 30 training images; found 29 rows"),
    "gap in numbering": (leave_gap, "expected images numbered 1 to 5; found 1 missing: 2"),
    "truncated image": (truncate_image, "expected a whole PNG or JPEG"),
    "unreadable image": (replace_image_by_text, "expected a whole PNG or JPEG"),
    "id in both splits": (put_id_in_both, "found 1 in both"),
    "NaN response": (
        lambda root: rewrite(root / RESPONSES, set_value((20, 3), np.nan)),
        "finite responses, up to 1e+15; found nan at row 20, vertex 3",
    ),
    "infinite response": (
        lambda root: rewrite(root / RESPONSES, set_value((0, 0), -np.inf)),
        "finite responses, up to 1e+15; found -inf at row 0, vertex 0",
    ),
    "ROI labels too few": (
        lambda root: rewrite(root / MASKS / "lh.streams_challenge_space.npy", lambda a: a[:-1]),
        "expected a label for each of 40 vertices; found 39",
    ),
    "ROI label without a name": (
        lambda root: rewrite(root / MASKS / "rh.streams_challenge_space.npy", set_value((0,), 99)),
        "expected labels named in mapping_streams.npy; found 99",
    ),
    "fsaverage labels too few": (
        lambda root: rewrite(root / MASKS / "lh.streams_fsaverage_space.npy", lambda a: a[:-1]),
        "expected 163842 labels; found 163841",
    ),
    "fsaverage mask of other vertices": (
        lambda root: rewrite(root / MASKS / "lh.all-vertices_fsaverage_space.npy", lambda a: np.zeros_like(a)),
        "expected 40 ones, the columns of the responses; found 0",
    ),
    "ceiling out of range": (
        lambda root: rewrite(root / "noise_ceiling/subj01/lh.npy", set_value((2,), 101)),
        "expected ceilings from 0 to 100; found 101 at vertex 2",
    ),
    "ceiling NaN": (
        lambda root: rewrite(root / "noise_ceiling/subj01/rh.npy", set_value((2,), np.nan)),
        "expected ceilings from 0 to 100; found nan at vertex 2",
    ),
    "ceiling of other vertices": (
        lambda root: rewrite(root / "noise_ceiling/subj02/lh.npy", lambda a: a[:-2]),
        "expected a ceiling for each of 40 vertices; found 38",
    ),
}


# each in a tree of its own: they hide others, or have more than one line
ALONE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "number of one image wrong": (
        misname,
        "found 20230000999970 missing: 30, 31, 32, 33, 34, ...; the number of train-",
    ),
    "two images of one id": (repeat_id, "expected an image id once in a split; found 1 more than once: "),
    "pipe for responses": (lambda root: pipe(root / RESPONSES), "something that is no file"),
    "pipe for a mapping": (lambda root: pipe(root / MASKS / "mapping_streams.npy"), "something else (no regular file)"),
    "pipe for labels": (lambda root: pipe(root / MASKS / "lh.streams_challenge_space.npy"), "that is no file"),
    "pipe for a ceiling": (lambda root: pipe(root / "noise_ceiling/subj01/rh.npy"), "something that is no file"),
    "pipe for an image": (lambda root: pipe(first(root / TEST)), "cannot be decoded (no regular file)"),
    "two labels of one name": (name_twice, "expected a name once; found 'early' for several labels"),
    "subj1 beside subj01": (lambda root: copy_subject(root, "subj1"), "found one more of that number, subj01"),
    "other letters": (
        lambda root: copy_subject(root, "Subj07"),
        "a number of up to nine digits from 0 to 9",
    ),
    "digits of another script": (
        lambda root: copy_subject(root, "subj\u0660\u0663"),
        "a number of up to nine digits from 0 to 9",
    ),
}


def faults_of(root: Path) -> list[str]:
    challenge, faults = scan_tree(root)
    with TemporaryDirectory() as work:
        return [str(fault) for fault in [*faults, *deep_faults(challenge, Path(work))]]


def test_a_good_tree_has_no_fault(tiny):
    assert faults_of(tiny) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_its_file_named(tree, name):
    plant, problem = FAULTS[name]
    path = plant(tree)
    assert [str(path) in fault and problem in fault for fault in faults_of(tree)] == [True]


@pytest.mark.parametrize("name", ALONE)
def test_a_fault_of_names_and_files_is_found_in_bounded_time_and_memory(tree, name):
    plant, problem = ALONE[name]
    path = plant(tree)
    assert any(str(path) in fault and problem in fault for fault in faults_of(tree))


def test_all_faults_are_listed_at_once(tree):
    together = [name for name in FAULTS if name != "infinite response"]  # in the file that has a NaN already
    expected = []
    for name in together:
        plant, problem = FAULTS[name]
        expected.append((str(plant(tree)), problem))
    found = faults_of(tree)
    missed = [pair for pair in expected if not any(pair[1] in fault for fault in found)]
    assert missed == [] and len(found) == len(together)


def test_every_command_refuses_a_tree_with_a_cheap_fault(tree):
    drop_row(tree)
    with pytest.raises(DataError, match=r"expected a row for each of 30 .* run 'check'"):
        open_challenge(tree)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00v\x00", b"text"])
def test_a_damaged_array_is_a_fault_and_not_a_crash(tree, content):
    (tree / RESPONSES).write_bytes(content)
    assert any("rh_training_fmri.npy: expected a whole .npy file" in fault for fault in faults_of(tree))


def test_an_object_array_is_never_unpickled(tree):
    np.save(tree / RESPONSES, np.array([[{}]], dtype=object))
    assert any("rh_training_fmri.npy: expected a whole .npy file of numbers" in fault for fault in faults_of(tree))


def test_an_empty_folder_is_one_fault(tmp_path):
    _, faults = scan_tree(tmp_path)
    assert ["expected folders subj01, subj02" in str(fault) for fault in faults] == [True]


def test_the_folder_of_one_subject_is_named(tree):
    _, (fault,) = scan_tree(tree / "subj01")
    assert (
        str(fault) == f"{tree / 'subj01'}: expected folders subj01, subj02, ... in it; found the folder of one subject"
    )


def test_masks_and_ceilings_may_be_absent_and_are_announced(tree):
    shutil.rmtree(tree / "noise_ceiling")
    shutil.rmtree(tree / "subj01/roi_masks")
    challenge = open_challenge(tree)
    assert faults_of(tree) == []
    subject = challenge.subjects[0]
    assert subject.rois == {"lh": {}, "rh": {}} and subject.fsaverage["lh"] is None
    assert subject.noise_ceiling == {"lh": None, "rh": None}
    notes = "\n".join(challenge.notes)
    for absent in ("no noise ceilings", "no fsaverage masks (subj01)", "no ROI masks (subj01)"):
        assert absent in notes


def test_fractions_and_percent_give_the_same_ceilings(tree, tmp_path):
    percent = open_challenge(tree)
    for path in (tree / "noise_ceiling").glob("*/*.npy"):
        target = tmp_path / "fractions" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, np.load(path) / 100)
    fractions = open_challenge(tree, tmp_path / "fractions")
    assert "read as percent" in percent.notes[0] and "read as fractions" in fractions.notes[0]
    for a, b in zip(percent.subjects, fractions.subjects, strict=True):
        np.testing.assert_allclose(a.noise_ceiling["lh"], b.noise_ceiling["lh"], rtol=1e-6)
        assert 0.05 < a.noise_ceiling["lh"].max() <= 1


def test_a_ceiling_folder_that_is_not_there_is_refused(tree, tmp_path):
    with pytest.raises(DataError, match=r"--noise-ceiling: expected a folder of subj01/lh.npy .* found no folder"):
        open_challenge(tree, tmp_path / "nowhere")


def test_subjects_hold_what_the_files_say(tiny):
    challenge = open_challenge(tiny)
    assert [subject.name for subject in challenge.subjects] == ["subj01", "subj02"]
    subject = challenge.subjects[1]
    assert (len(subject.train), len(subject.test)) == (TINY.train_count(2), TINY.test_count(2))
    assert subject.n_vertices == {"lh": 40, "rh": 44} and subject.responses("rh").shape == (24, 44)
    assert subject.image_ids.tolist() == [*subject.train.ids, *subject.test.ids]
    assert subject.fsaverage["rh"].sum() == 44
    labels = np.load(tiny / "subj02/roi_masks/lh.prf-visualrois_challenge_space.npy")
    mapping = np.load(tiny / "subj02/roi_masks/mapping_prf-visualrois.npy", allow_pickle=True).item()
    for label, name in mapping.items():
        if label:
            assert np.array_equal(subject.rois["lh"][name], labels == label)


def test_images_of_any_mode_and_size_are_no_fault(tree):
    elsewhere = {path.name[-9:] for path in tree.glob("subj02/*/*_images/*")}  # ids of pictures of another subject
    paths = [path for path in sorted((tree / TRAIN).iterdir()) if path.name[-9:] not in elsewhere]
    Image.new("L", (7, 300)).save(paths[0])
    Image.new("RGBA", (425, 425)).save(paths[1])
    Image.new("CMYK", (9, 9)).save(paths[2].with_suffix(".jpg"))
    paths[2].unlink()
    assert faults_of(tree) == []


def test_responses_that_cannot_be_read_are_not_called_masks_that_are_missing(tree):
    (tree / "subj01/training_split/training_fmri/lh_training_fmri.npy").write_bytes(b"no array")
    dataset, faults = scan_tree(tree)
    assert len(faults) == 1 and "cannot be read" in faults[0].found
    assert not [note for note in dataset.notes if "masks" in note]


def test_a_test_image_that_another_subject_trains_on_is_noted(tree):
    subjects = open_challenge(tree).subjects
    image_id = next(number for number in subjects[1].train.ids if number not in subjects[0].train.ids)
    path = first(tree / TEST)
    path.rename(path.with_name(image_name("test", 1, image_id)))
    assert any(note.startswith("1 test images of one subject") for note in open_challenge(tree).notes)


def test_real_recordings_have_no_fault(v4, tmp_path):
    challenge = open_challenge(v4)
    assert [len(s.train) for s in challenge.subjects] == [720, 960, 960, 960, 640, 320, 960, 959]
    assert set(challenge.subjects[0].rois["lh"]) == {"hV4"}
    assert list(deep_faults(challenge, tmp_path)) == []


def test_one_ceiling_above_1_does_not_turn_fractions_into_percent(tree):
    for path in (tree / "noise_ceiling").glob("*/*.npy"):
        rewrite(path, lambda a: a / 100)
    path = rewrite(tree / "noise_ceiling/subj01/lh.npy", set_value((5,), 1.02))
    found = faults_of(tree)
    assert "ncsnr are no ceilings" in found[0]
    assert len(found) == 1 and str(path) in found[0] and "expected ceilings from 0 to 1; found 1.0" in found[0]


def test_a_file_of_the_other_unit_is_a_fault(tree):
    path = rewrite(tree / "noise_ceiling/subj02/rh.npy", lambda a: a / 100)
    found = faults_of(tree)
    assert len(found) == 1 and str(path) in found[0] and "expected percent" in found[0]


def test_a_ceiling_folder_without_ceilings_is_refused(tree):
    with pytest.raises(DataError, match=r"--noise-ceiling: expected a folder .* found none of these in"):
        open_challenge(tree, tree / "subj01")


@pytest.mark.parametrize("content", [b"PK\x03\x04garbage", b"\x93NUMPY\x01\x00v\x00{'descr': ('<f4', (" + b" " * 120])
@pytest.mark.parametrize("name", [RESPONSES, f"{MASKS}/lh.streams_challenge_space.npy"])
def test_other_bytes_under_an_array_s_name_are_a_fault(tree, name, content):
    (tree / name).write_bytes(content)
    assert any(f"{name}: expected a whole .npy file of numbers" in fault for fault in faults_of(tree))


def test_images_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("train-0010_nsd-00001.png", "train-0002_nsd-00011.jpeg", "train-0001_nsd-72999.JPG", ".DS_Store"):
        (tmp_path / name).touch()
    for number in range(3, 10):
        (tmp_path / f"train-{number:04d}_nsd-{number:05d}.png").touch()
    images, faults = list_images(tmp_path, "train")
    assert not faults
    assert images.ids.tolist() == [72999, 11, *range(3, 10), 1]
    assert [path.name[6:10] for path in images.sources] == [f"{n:04d}" for n in range(1, 11)]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["train-0001_nsd-00001.png", "train-\u0660\u0662_nsd-00002.png"], "expected a name such as train-0001"),
        (["train-0001_nsd-00001.png", f"train-0002_nsd-{10**20}.png"], "expected a name such as"),
        (["train-0001_nsd-00001.png", "train-0002_nsd-00001.png"], "found 1 more than once: 1 of train-0001"),
        (["train-0001_nsd-00001.png", "train-0003_nsd-00002.png"], "found 1 missing: 2"),
        (["train-0000_nsd-00001.png", "train-0001_nsd-00002.png"], "numbered from 1; found number 0"),
        (["train-0001_nsd-00001.png", "train-0001_nsd-00002.png"], "found number 1 in train-0001_nsd-00001.png"),
        (["train-0001_nsd-00001.png", "picture.png"], "expected a name such as train-0001_nsd-00013.png"),
        (["train-0001_nsd-00001.png", "test-0002_nsd-00002.png"], "expected a name such as train-0001_nsd-00013.png"),
    ],
)
def test_wrong_names_are_faults(tmp_path, names, problem):
    for name in names:
        (tmp_path / name).touch()
    _, faults = list_images(tmp_path, "train")
    assert [problem in str(fault) for fault in faults] == [True]


def test_names_are_read_as_they_are_made(tmp_path):
    folder = image_folder(tmp_path, "test")
    assert folder == tmp_path / "test_split" / "test_images"
    assert image_folder(tmp_path, "train") == tmp_path / "training_split" / "training_images"
    folder.mkdir(parents=True)
    names = [image_name("test", number, image_id) for number, image_id in enumerate((13, 72_999), start=1)]
    assert names == ["test-0001_nsd-00013.png", "test-0002_nsd-72999.png"]
    for name in names:
        (folder / name).touch()
    images, faults = list_images(folder, "test")
    assert not faults and images.ids.tolist() == [13, 72_999]
    assert images.sources == tuple(folder / name for name in names)


def test_ratios_of_signal_to_noise_are_no_ceilings(tree, tmp_path):
    """Up to 2.3, which is no percentage of any recording, and by the name of their folder."""
    for path in (tree / "noise_ceiling").glob("*/*.npy"):
        rewrite(path, lambda a: np.linspace(0, 2.3, len(a), dtype=np.float32))
    assert all("expected ceilings from 0 to 1; found 1." in fault for fault in faults_of(tree))
    (tree / "noise_ceiling").rename(tmp_path / "ncsnr")
    with pytest.raises(
        DataError, match=r"--noise-ceiling: .*ratios of signal to noise.* ncsnr\^2 / \(ncsnr\^2 \+ 1/n\)"
    ):
        open_challenge(tree, tmp_path / "ncsnr")
