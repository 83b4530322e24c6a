"""A dataset that is opened has one id for each picture, and what is wrong with its pictures is told."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.dataset.algonauts import open_challenge
from featcache.dataset.identity import look
from featcache.dataset.open import (
    deep_faults,
    deep_notes,
    of_subjects,
    open_dataset,
    open_imported,
    scan_dataset,
    with_known_pictures,
)
from featcache.dataset.subject import Dataset, Fault
from featcache.errors import DataError
from support.lab import import_one
from support.pictures import scene
from support.shown import seen


def files(tree: Path, subject: str, split: str) -> list[Path]:
    return sorted((tree / subject).glob(f"{split}_split/*_images/*.png"))


def ids_of(path: Path) -> int:
    return int(path.stem[-5:])


@pytest.fixture
def own(tree: Path) -> tuple[list[Path], list[Path]]:
    """Training images that one subject alone saw, of each of both."""
    seen = [files(tree, subject, "training") for subject in ("subj01", "subj02")]
    ids = [{ids_of(path) for path in tree.glob(f"{subject}/*/*/*.png")} for subject in ("subj01", "subj02")]
    one, other = ([path for path in seen[i] if ids_of(path) not in ids[1 - i]] for i in range(2))
    return one, other


def put(source: Path, *targets: Path) -> None:
    """The picture of a file in others, as files with other bytes."""
    for target in targets:
        with Image.open(source) as image:
            image.save(target, compress_level=0)


def test_a_sound_tree_has_no_fault_and_no_note(tiny, tmp_path):
    dataset, done = open_challenge(tiny), []
    assert list(deep_faults(dataset, tmp_path, 2, done.append)) == [] == deep_notes(dataset, tmp_path)
    assert sum(done) == sum(len(subject.image_ids) for subject in dataset.subjects)
    opened = with_known_pictures(dataset, tmp_path, None)
    assert opened.subjects == dataset.subjects and opened.notes == dataset.notes and opened.challenge


def test_a_subject_that_cannot_be_read_can_be_asked_for_by_its_folder(tmp_path):
    dataset = Dataset(tmp_path, (seen("subj01", [1]), seen("subj02", [2])))
    faults = [
        Fault(tmp_path / "subj01" / "images", "a", "b"),
        Fault(tmp_path / "monkey" / "subject.json", "a", "b"),
        Fault("image 3", "a", "b"),
        Fault(tmp_path.parent / "ceilings" / "subj02" / "lh.npy", "a", "b"),
    ]

    def chosen(names):
        some, theirs = of_subjects(names, dataset, faults)
        return [one.name for one in some.subjects], [faults.index(fault) for fault in theirs]

    assert chosen("all") == (["subj01", "subj02"], [0, 1, 2, 3])
    assert chosen("1") == (["subj01"], [0, 2]) and chosen("2") == (["subj02"], [2, 3])
    assert chosen("monkey") == ([], [1, 2])
    with pytest.raises(DataError, match="--subject: expected one of subj01, subj02, monkey; found 'subj03'"):
        chosen("3")


def test_an_id_of_two_pictures_is_a_fault_and_the_dataset_does_not_open(tree, tmp_path):
    shared = {path.name[-9:]: path for path in files(tree, "subj01", "training")}
    path = next(path for path in files(tree, "subj02", "training") if path.name[-9:] in shared)
    scene(0, 32).save(path)
    dataset = open_challenge(tree)
    (fault,) = deep_faults(dataset, tmp_path)
    assert str(fault) == (
        f"{tree}: expected one picture for each image id; found an id means two: {ids_of(path)}; "
        f"{ids_of(path)} is {shared[path.name[-9:]]} and {path}"
    )
    with pytest.raises(
        DataError, match=r"expected one picture for each image id; .* give each picture an id of its own"
    ):
        with_known_pictures(dataset, tmp_path, 1)


def test_a_picture_of_two_ids_has_one_once_it_was_looked_at(tree, own, tmp_path):
    (first, second, *_), (other, *_) = own
    put(first, second, other)
    dataset, work = open_challenge(tree), tmp_path / "work"
    assert with_known_pictures(dataset, work, None).subjects == dataset.subjects  # nobody has looked
    opened = with_known_pictures(dataset, work, 2)
    smallest = min(map(ids_of, (first, second, other)))
    for subject, paths in zip(opened.subjects, ([first, second], [other]), strict=True):
        rows = [subject.train.sources.index(path) for path in paths]
        assert (subject.train.ids[rows] == smallest).all()
    again = with_known_pictures(dataset, work, None)
    assert [s.image_ids.tolist() for s in again.subjects] == [s.image_ids.tolist() for s in opened.subjects]
    assert any(note.startswith("1 picture has several ids, such as ") for note in again.notes)
    assert list(deep_faults(dataset, work)) == []
    (note,) = deep_notes(dataset, work)
    assert note.startswith("1 picture has several ids, such as ") and "each goes by its smallest id" in note


def test_a_picture_in_both_splits_is_a_fault_and_the_dataset_opens_with_a_note(tree, own, tmp_path):
    (path, *_), _ = own
    target = files(tree, "subj01", "test")[-1]
    put(path, target)
    dataset = open_challenge(tree)
    (fault,) = deep_faults(dataset, tmp_path)
    assert (
        str(fault)
        == f"subj01: expected each picture in training or in test; found 1 in both, such as {path} and {target}"
    )
    opened = with_known_pictures(dataset, tmp_path, None)
    assert opened.notes[-1].startswith("pictures in training and test, subj01: 1 in both, such as ")
    subject = opened.subjects[0]
    assert not set(subject.train.ids.tolist()) & set(subject.test.ids.tolist())


def test_near_copies_are_noted(tree, own, tmp_path):
    (first, second, *_), _ = own
    image = scene(1, 64)
    image.save(first)
    image.resize((40, 40)).save(second)
    dataset = open_challenge(tree)
    assert list(deep_faults(dataset, tmp_path)) == []
    (note,) = deep_notes(dataset, tmp_path)
    assert note.startswith(f"subj01: 1 pair of near copies, such as {first} and {second}")


def test_an_image_that_cannot_be_decoded_hinders_no_other_subject(tree, own, tmp_path):
    (first, second, damaged, *_), _ = own
    put(first, second)
    damaged.write_bytes(b"no picture")
    opened = with_known_pictures(open_challenge(tree), tmp_path, 2)
    ids = opened.subjects[0].train.ids
    assert len(set(ids.tolist())) == len(ids) - 1
    (fault,) = deep_faults(open_challenge(tree), tmp_path)
    assert fault.where == damaged


def test_responses_that_are_not_finite_are_faults_in_training_and_in_test(tiny, tmp_path):
    dataset = open_challenge(tiny)
    for name in ("train", "test"):
        responses = np.zeros((300, 3), np.float32)
        responses[270, 1:] = np.nan
        np.save(tmp_path / f"{name}.npy", responses)
    subject = dataset.subjects[0]
    paths = {split: dict.fromkeys(subject.surfaces, tmp_path / f"{split}.npy") for split in ("train", "test")}
    subject.response_paths.update(paths["train"])
    subject.test_response_paths.update(paths["test"])
    faults = [
        fault
        for fault in deep_faults(dataset, tmp_path)
        if fault.where in (tmp_path / "train.npy", tmp_path / "test.npy")
    ]
    assert [fault.where.stem for fault in faults] == ["train", "test"] * 2
    assert {fault.found for fault in faults} == {"nan at row 270, vertex 1 (and 1 more nearby)"}


def test_a_subject_is_remembered_by_what_one_look_wrote(tiny, tmp_path, monkeypatch):
    dataset = open_challenge(tiny)
    for subject in dataset.subjects:
        look(subject, tmp_path, 2)
    monkeypatch.setattr("featcache.dataset.identity.load_image", lambda source: pytest.fail("decoded again"))
    assert with_known_pictures(dataset, tmp_path, 2).subjects == dataset.subjects


def test_the_layout_is_told_by_what_the_folder_has(lab, tiny, tmp_path):
    np.save(tmp_path / "r.npy", lab.signal)
    import_one(tmp_path, images=str(lab.photos), responses=(str(tmp_path / "r.npy"),), subject="anna")
    imported, challenge = open_dataset(tmp_path / "dataset"), open_dataset(str(tiny))
    assert [subject.name for subject in imported.subjects] == ["anna"] and not imported.challenge
    assert [subject.name for subject in challenge.subjects] == ["subj01", "subj02"] and challenge.challenge
    assert not scan_dataset(tmp_path / "dataset")[1] and not scan_dataset(tiny)[1]
    assert open_imported(tmp_path).subjects[0].image_ids.tolist() == imported.subjects[0].image_ids.tolist()


def test_images_that_were_moved_are_one_fault(lab, tmp_path):
    photos = shutil.copytree(lab.photos, tmp_path / "photos")
    import_one(tmp_path / "work", images=str(photos), responses=(str(lab.save("all.npy", lab.signal)),))
    photos.rename(tmp_path / "elsewhere")
    _, (fault,) = scan_dataset(tmp_path / "work/dataset")
    n = len(lab.names)
    assert f"{n} of {n} files that are not there, such as {photos / lab.names[0]}; import again" in str(fault)
    with pytest.raises(DataError, match="expected images where they were when they were imported"):
        open_imported(tmp_path / "work")


def test_the_first_of_several_faults_is_raised(lab, tmp_path):
    np.save(tmp_path / "r.npy", lab.signal)
    for name in ("a", "b", "c"):
        import_one(tmp_path, images=str(lab.photos), responses=(str(tmp_path / "r.npy"),), subject=name)
    for name in ("a", "c"):
        (tmp_path / "dataset" / name / "images.csv").unlink()
    dataset, faults = scan_dataset(tmp_path / "dataset")
    assert [subject.name for subject in dataset.subjects] == ["b"] and len(faults) == 2
    with pytest.raises(DataError, match=r"a/images.csv: .* \(and 1 more\); run 'check'"):
        open_dataset(tmp_path / "dataset")


def test_one_picture_of_two_subjects_has_one_id_although_they_call_it_otherwise(lab, tmp_path):
    names = lab.names[:6]
    for subject, ids in (("a", range(6)), ("b", range(100, 106))):
        (tmp_path / f"{subject}.csv").write_text(
            "image,key\n" + "".join(f"{name},{key}\n" for name, key in zip(names, ids, strict=True)), encoding="utf-8"
        )
        np.save(tmp_path / "r.npy", lab.signal[:6])
        table = tmp_path / f"{subject}.csv"
        options = {"images": str(lab.photos), "table": table, "id_column": "key", "subject": subject}
        import_one(tmp_path, responses=(str(tmp_path / "r.npy"),), **options)
    a, b = open_imported(tmp_path).subjects
    assert a.image_ids.tolist() == b.image_ids.tolist() == list(range(6))
