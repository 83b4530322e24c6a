"""Pictures are told by their pixels: planted duplicates share an id and a fold; an id of two pictures is a fault."""

import os
import struct
import zipfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from featcache.dataset.identity import (
    UNSEEN,
    identified,
    in_both_splits,
    look,
    near_copy_notes,
    remembered,
    same_pictures,
    two_pictures,
)
from featcache.dataset.pictures import look_at, picture_id
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import ArrayImage, Dataset, Images, Subject
from featcache.machine.files import only_writer
from featcache.workdir import Workdir
from support.pictures import scene

Shown = list[tuple[int, Image.Image]]  # ids, each with the picture that it means


def images(folder: Path, shown: Shown) -> Images:
    folder.mkdir(parents=True)
    for row, (_, image) in enumerate(shown):
        image.save(folder / f"{row}.png", compress_level=row % 3)
    return Images(tuple(folder / f"{row}.png" for row in range(len(shown))), np.array([one for one, _ in shown], int))


def person(folder: Path, train: Shown, test: Shown = ()) -> Subject:
    nothing = {"V4": None}
    splits = images(folder / "train", train), images(folder / "test", test)
    return Subject(folder.name, *splits, {"V4": folder / "V4.npy"}, {"V4": 2}, {"V4": {}}, nothing, nothing)


def dataset(*subjects: Subject) -> Dataset:
    return Dataset(Path("root"), subjects, ("a note",))


def looked(data: Dataset, work: Path) -> dict:
    return {subject.name: look(subject, work, 2) for subject in data.subjects}


S = [scene(seed, 24) for seed in range(8)]


@pytest.fixture
def copies(tmp_path) -> Dataset:
    """Picture 0 under 3 and 9 in one subject; picture 1 under 5 and 2 in two; picture 2 tested on by the other."""
    first = person(tmp_path / "a", [(9, S[0]), (5, S[1]), (3, S[0]), (8, S[3])], [(11, S[2])])
    second = person(tmp_path / "b", [(2, S[1]), (7, S[2]), (8, S[3])], [(6, S[4])])
    return dataset(first, second)


def test_look_sees_each_picture_as_it_is(copies, tmp_path):
    seen = look(copies.subjects[0], tmp_path / "work", 2)
    for row, image in enumerate([S[0], S[1], S[0], S[3], S[2]]):
        picture = look_at(image)
        assert (seen.pictures[row], seen.hashes[row]) == (picture.id, picture.hash)
        assert np.array_equal(seen.thumbnails[row], picture.thumbnail)
    assert not seen.faults and not len(seen.unseen)


def test_every_image_is_counted_whether_decoded_or_remembered(copies, tmp_path):
    for _ in range(2):
        done = []
        look(copies.subjects[0], tmp_path / "work", 2, done.append)
        assert sum(done) == 5


def test_images_that_are_remembered_and_those_that_are_not_are_counted_together(copies, tmp_path):
    subject = copies.subjects[0]
    look(subject, tmp_path / "work", 2)
    os.utime(subject.train.sources[1], (1, 1))
    done = []
    look(subject, tmp_path / "work", 2, done.append)
    assert done == [4, 1]


def test_of_several_who_look_at_once_one_looks_and_the_others_wait(copies, tmp_path):
    work, seen = tmp_path / "work", []
    waiting = Thread(target=lambda: seen.append(look(copies.subjects[0], work, 2)))
    with only_writer(Workdir(work).index, wait=True):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not seen
    waiting.join(60)
    assert len(seen[0].pictures) == 5 and not len(seen[0].unseen)


def test_pictures_are_decoded_once_until_their_files_change(copies, tmp_path, monkeypatch):
    subject, work = copies.subjects[0], tmp_path / "work"
    before, decoded = look(subject, work, 2), []
    monkeypatch.setattr("featcache.dataset.identity.look_at", lambda image: decoded.append(image) or look_at(image))
    assert np.array_equal(look(subject, work, 2).pictures, before.pictures) and not decoded
    S[5].save(subject.train.sources[1])
    os.utime(subject.train.sources[1], (1, 1))
    assert remembered(subject, work).unseen.tolist() == [1]
    after = look(subject, work, 2)
    assert len(decoded) == 1 and np.flatnonzero(after.pictures != before.pictures).tolist() == [1]
    assert after.pictures[1] == picture_id(S[5]) and np.array_equal(remembered(subject, work).hashes, after.hashes)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"{}"])
def test_a_damaged_index_is_looked_at_again(copies, tmp_path, content):
    subject, work = copies.subjects[0], tmp_path / "work"
    before = look(subject, work, 2)
    path = Workdir(work).picture_index(subject.name)
    for damaged in (content, path.read_bytes()[:-200]):
        path.write_bytes(damaged)
        assert len(remembered(subject, work).unseen) == 5
        assert np.array_equal(look(subject, work, 2).pictures, before.pictures)


@pytest.mark.parametrize("header", ["{'descr': '<f4', 'shape': (", "{'shape': (1" + "0" * 30 + ",)}"])
def test_an_index_whose_header_lies_is_looked_at_again(copies, tmp_path, header):
    subject, work = copies.subjects[0], tmp_path / "work"
    look(subject, work, 2)
    path = Workdir(work).picture_index(subject.name)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text = f"{header}\n".encode()
    members["pictures.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert len(remembered(subject, work).unseen) == 5


def test_an_index_that_is_a_pipe_is_not_waited_for(copies, tmp_path):
    subject, work = copies.subjects[0], tmp_path / "work"
    look(subject, work, 2)
    path = Workdir(work).picture_index(subject.name)
    path.unlink()
    os.mkfifo(path)
    assert len(remembered(subject, work).unseen) == 5


def test_an_index_of_another_decoder_is_not_believed(copies, tmp_path, monkeypatch):
    look(copies.subjects[0], tmp_path, 2)
    monkeypatch.setattr("featcache.dataset.identity._FORMAT", "1, Pillow 1.0")
    assert len(remembered(copies.subjects[0], tmp_path).unseen) == 5


def test_what_cannot_be_decoded_is_a_fault_and_the_rest_is_seen(copies, tmp_path):
    subject = copies.subjects[0]
    subject.train.sources[2].write_bytes(b"no picture")
    subject.test.sources[0].unlink()
    for _ in range(2):
        seen = look(subject, tmp_path / "work", 2)
        assert [fault.where for fault in seen.faults] == [subject.train.sources[2], subject.test.sources[0]]
        assert seen.unseen.tolist() == [2, 4] and (seen.pictures[[2, 4]] == UNSEEN).all()


def test_rows_of_an_array_are_the_pictures_of_files(copies, tmp_path):
    subject = copies.subjects[0]
    np.save(tmp_path / "a.npy", np.stack([np.asarray(image) for image in (S[0], S[1], S[0], S[3])]))
    rows = tuple(ArrayImage(tmp_path / "a.npy", "", row) for row in range(4))
    stored = replace(subject, name="c", train=replace(subject.train, sources=rows))
    assert np.array_equal(look(stored, tmp_path, 2).pictures, look(subject, tmp_path, 2).pictures)


def test_pictures_of_several_ids_are_found_within_and_between_subjects(copies, tmp_path):
    assert same_pictures(copies, looked(copies, tmp_path)) == [(2, 5), (3, 9), (7, 11)]


def test_each_picture_goes_by_its_smallest_id(copies, tmp_path):
    renamed = identified(copies, looked(copies, tmp_path))
    first, second = renamed.subjects
    assert first.train.ids.tolist() == [3, 2, 3, 8] and first.test.ids.tolist() == [7]
    assert second.train.ids.tolist() == [2, 7, 8] and second.test.ids.tolist() == [6]
    assert first.train.ids.dtype == np.int64 and first.train.sources == copies.subjects[0].train.sources
    assert renamed.notes[0] == "a note" and renamed.notes[1].startswith(
        "3 pictures have several ids, such as 2 and 5 ("
    )
    files = [subject.train.sources[row] for subject, row in zip(copies.subjects, (1, 0), strict=True)]
    assert renamed.notes[1].endswith(f" ({files[0]} and {files[1]}): each goes by its smallest id")
    assert renamed.notes[2].startswith("1 of them are test images of one subject and training images of another")
    assert same_pictures(renamed, looked(copies, tmp_path)) == []


@pytest.mark.parametrize(("n", "some"), [(1, "1 picture has several ids"), (2, "2 pictures have several ids")])
def test_pictures_of_several_ids_are_counted(tmp_path, n, some):
    data = dataset(person(tmp_path / "a", [(10 * i + k, S[i]) for i in range(n) for k in (0, 1)]))
    (_, note) = identified(data, looked(data, tmp_path)).notes
    assert note.startswith(f"{some}, such as 0 and 1 (")


def test_without_equal_pictures_nothing_changes(tmp_path):
    data = dataset(person(tmp_path / "a", [(4, S[0]), (1, S[1])]), person(tmp_path / "b", [(4, S[0])], [(2, S[2])]))
    seen = looked(data, tmp_path)
    assert identified(data, seen) is data and two_pictures(data, seen) == [] and not in_both_splits(data, seen)


def test_what_nobody_looked_at_keeps_its_ids(copies, tmp_path):
    assert identified(copies, {}) is copies and not two_pictures(copies, {}) and not near_copy_notes(copies, {})
    only_first = {"a": look(copies.subjects[0], tmp_path, 2)}
    renamed = identified(copies, only_first)
    assert [s.train.ids.tolist() for s in renamed.subjects] == [[3, 5, 3, 8], [2, 7, 8]]


def test_ids_that_share_pictures_in_a_chain_are_one(tmp_path):
    """Two files of one scene under one id, each with another id elsewhere."""
    jpeg = tmp_path / "jpeg.jpg"
    S[0].save(jpeg, quality=90)
    other = Image.open(jpeg).convert("RGB")
    data = dataset(person(tmp_path / "a", [(4, S[0]), (6, S[0])]), person(tmp_path / "b", [(6, other), (1, other)]))
    seen = looked(data, tmp_path)
    assert not two_pictures(data, seen) and same_pictures(data, seen) == [(1, 4, 6)]
    assert [s.train.ids.tolist() for s in identified(data, seen).subjects] == [[1, 1], [1, 1]]


def test_a_picture_in_training_and_test_of_one_subject_is_a_fault_and_keeps_two_ids(tmp_path):
    first = person(tmp_path / "a", [(9, S[0]), (2, S[1])], [(4, S[0]), (5, S[2])])
    data = dataset(first, person(tmp_path / "b", [(4, S[0])]))
    seen = looked(data, tmp_path)
    (fault,) = in_both_splits(data, seen)
    assert fault.where == "a" and fault.expected == "each picture in training or in test"
    assert fault.found == f"1 in both, such as {first.train.sources[0]} and {first.test.sources[0]}"
    first, second = identified(data, seen).subjects
    assert first.train.ids.tolist() == [4, 2] and second.train.ids.tolist() == [4]  # one fold
    assert first.test.ids[1] == 5 and first.test.ids[0] not in {2, 4, 5, 9, picture_id(S[0])}


def test_each_picture_in_training_and_test_keeps_an_id_of_its_own(tmp_path):
    data = dataset(person(tmp_path / "a", [(20 + i, S[i]) for i in range(4)], [(10 + i, S[i]) for i in range(4)]))
    seen = looked(data, tmp_path)
    (fault,) = in_both_splits(data, seen)
    pairs = [f"{a} and {b}" for a, b in zip(data.subjects[0].train.sources, data.subjects[0].test.sources, strict=True)]
    lowest = int(np.argmin([picture_id(image) for image in S[:4]]))
    assert fault.found == f"4 in both, such as {pairs[lowest]}"
    (subject,) = identified(data, seen).subjects
    assert subject.train.ids.tolist() == [10, 11, 12, 13] and len(set(subject.image_ids.tolist())) == 8


@pytest.mark.parametrize("across", [False, True])
def test_an_id_that_means_two_pictures_is_a_fault(tmp_path, across):
    a = [(4, S[0]), (7, S[1])]
    b = [(7, S[2]), (8, S[3])]
    people = [person(tmp_path / "a", a), person(tmp_path / "b", b)] if across else [person(tmp_path / "a", a + b)]
    data = dataset(*people)
    (fault,) = two_pictures(data, looked(data, tmp_path))
    other = data.subjects[1].train.sources[0] if across else people[0].train.sources[2]
    assert fault.where == Path("root") and fault.expected == "one picture for each image id"
    assert fault.found == f"an id means two: 7; 7 is {people[0].train.sources[1]} and {other}"


def test_subjects_who_each_count_their_own_images_are_one_fault(tmp_path):
    people = [person(tmp_path / name, [(i, S[i + k]) for i in range(4)]) for k, name in ((0, "a"), (4, "b"))]
    (fault,) = two_pictures(data := dataset(*people), looked(data, tmp_path))
    files = " and ".join(str(subject.train.sources[0]) for subject in people)
    assert fault.found == f"4 ids mean two: 0, 1, 2, 3; 0 is {files}"


def test_one_scene_in_other_files_under_one_id_is_no_fault(tmp_path):
    larger = S[0].resize((60, 60))
    data = dataset(person(tmp_path / "a", [(4, S[0])]), person(tmp_path / "b", [(4, larger)]))
    seen = looked(data, tmp_path)
    assert not two_pictures(data, seen) and not near_copy_notes(data, seen)


@pytest.mark.parametrize("seed", range(6))
def test_equal_pictures_share_a_fold_whatever_the_ids_the_folds_and_the_seed(tmp_path, seed):
    rng = np.random.default_rng(seed)
    people = []
    for name in "abc":
        meant = rng.integers(0, len(S), 14)
        ids = 100 * meant + rng.integers(0, 4, 14)  # up to four ids for each picture
        people.append(person(tmp_path / name, [(int(i), S[m]) for i, m in zip(ids, meant, strict=True)][:10]))
    data = dataset(*people)
    renamed = identified(data, looked(data, tmp_path))
    for n_folds, fold_seed in ((2, 0), (5, 1), (10, 77)):
        folds, before = defaultdict(set), defaultdict(set)
        for given, subject in zip(data.subjects, renamed.subjects, strict=True):
            ids = zip(
                assign_folds(given.train.ids, n_folds, fold_seed),
                assign_folds(subject.train.ids, n_folds, fold_seed),
                strict=True,
            )
            for image_id, (was, fold) in zip(given.train.ids.tolist(), ids, strict=True):
                folds[image_id // 100].add(int(fold)), before[image_id // 100].add(int(was))
        assert all(len(one) == 1 for one in folds.values()) and any(len(one) > 1 for one in before.values())


def test_a_near_copy_is_in_training_and_test_whichever_of_the_two_another_subject_saw_first(tmp_path):
    large, small = scene(0, 96), scene(0, 96).resize((64, 64), Image.Resampling.BICUBIC)
    data = dataset(person(tmp_path / "a", [(1, large)]), person(tmp_path / "b", [(2, small)], [(1, large)]))
    (note,) = near_copy_notes(data, looked(data, tmp_path))
    assert note.startswith("b: 1 pair of near copies") and note.endswith("1 of them in training and test")


def test_near_copies_are_held_against_the_folds_that_are_usual(tmp_path):
    """Eight pairs, in whose folds another seed would show."""
    scenes = [scene(seed, 96) for seed in range(8)]
    copies = [(one, image.resize((80, 80), Image.Resampling.BICUBIC)) for one, image in enumerate(scenes)]
    data = dataset(person(tmp_path / "a", [*copies, *((30 + one, image) for one, image in enumerate(scenes))]))
    (note,) = near_copy_notes(data, looked(data, tmp_path))
    folds = assign_folds(range(40), 5, 0)
    n_apart = sum(folds[one] != folds[30 + one] for one in range(8))
    assert note.endswith(f"{n_apart} of them in different folds of 5")
    others = [assign_folds(range(40), 5, seed) for seed in (1, -1)]
    assert all(n_apart != sum(one[i] != one[30 + i] for i in range(8)) for one in others)


def test_near_copies_are_told_by_subject_and_between_subjects(tmp_path):
    def copy(image: Image.Image, size: int) -> Image.Image:
        return image.resize((size, size), Image.Resampling.BICUBIC)

    scenes = [scene(seed, 96) for seed in range(5)]
    first = person(
        tmp_path / "a",
        [(1, scenes[0]), (2, copy(scenes[0], 80)), (3, copy(scenes[0], 120)), (4, scenes[1]), (5, scenes[2])],
        [(6, copy(scenes[1], 64))],
    )
    data = dataset(
        first,
        person(tmp_path / "b", [(5, scenes[2]), (7, copy(scenes[2], 64)), (8, scenes[3])], [(9, copy(scenes[0], 64))]),
    )
    seen = looked(data, tmp_path)
    a, b, between = near_copy_notes(data, seen, n_folds=2, seed=3)
    folds = assign_folds([1, 2, 3], 2, 3)
    apart = sum(folds[i] != folds[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    assert a == (
        f"a: 4 pairs of near copies, such as {first.train.sources[0]} and {first.train.sources[1]}; "
        f"{apart} of them in different folds of 2; 1 of them in training and test"
    )
    assert b.startswith("b: 1 pair of near copies, such as ") and "training and test" not in b
    assert between.startswith("between subjects: 3 pairs of near copies, such as ")
