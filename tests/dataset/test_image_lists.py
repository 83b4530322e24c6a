"""Lists of images: remembered by the digests that keys have, or guessed and checked by them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featcache.dataset.algonauts import open_challenge
from featcache.dataset.digests import digest_of_ids, id_digest, image_digest, whole_digest
from featcache.dataset.image_lists import ImageList, SubjectDigests


def some(work: Path, digests: str, n_train: int, ids: list[int] | None = None) -> ImageList:
    """Images with these contents, a letter each."""
    contents = tuple(letter.encode().hex() * 16 for letter in digests)
    numbers = tuple(range(len(contents)) if ids is None else ids)
    return ImageList("subj01", numbers, contents, n_train, work)


def test_the_list_of_a_subject_has_the_digests_of_its_keys(tiny, tmp_path):
    subject = open_challenge(tiny).subjects[0]
    images = ImageList.of(subject, tmp_path)
    assert images.key == {"images": image_digest(subject, tmp_path), "image_ids": id_digest(subject)}
    assert images.ids == tuple(subject.image_ids.tolist()) and images.test_ids == tuple(subject.test.ids.tolist())
    assert images.training.ids == tuple(subject.train.ids.tolist()) and images.training.n_train == images.n_train


def test_a_remembered_list_is_found_by_its_key_whatever_has_changed(tiny, tmp_path):
    before = ImageList.of(open_challenge(tiny).subjects[0], tmp_path)
    now = some(tmp_path, "abc", 2)
    assert now.earlier(before.key) == before and now.earlier(now.key) is now
    shutil.rmtree(tmp_path / "images")
    assert now.earlier(before.key) is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"n_train": 1, "ids": [1], "digests": []}', None])
def test_a_damaged_list_counts_as_none(tiny, tmp_path, damage):
    before = ImageList.of(open_challenge(tiny).subjects[0], tmp_path)
    (path,) = (tmp_path / "images").iterdir()
    path.write_text(path.read_text().replace(before.digests[3], before.digests[4]) if damage is None else damage)
    assert some(tmp_path, "abc", 2).earlier(before.key) is None


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0, 1, 3, 4], [0, 1, 2, 4]])
def test_a_list_without_some_test_images_is_guessed_checked_and_remembered(tmp_path, kept):
    now = some(tmp_path, "abcde", 2)
    ids, digests = tuple(now.ids[row] for row in kept), tuple(now.digests[row] for row in kept)
    before = replace(now, ids=ids, digests=digests)
    assert now.earlier(before.key) == before
    assert some(tmp_path, "xyz", 1).earlier(before.key) == before  # which could not be guessed from these
    changed = replace(before, digests=(now.digests[4], *digests[1:]))
    assert now.earlier(changed.key) is None


def test_a_store_says_the_order_of_its_images(tmp_path):
    now = some(tmp_path, "abcd", 2, [7, 5, 3, 1])
    before = some(tmp_path, "dbc", 2, [1, 5, 3])
    assert now.earlier(before.key) is None and now.earlier(before.key, np.array([1, 5, 9]), 2) is None
    assert now.earlier(before.key, np.array([1, 5, 3]), 2) == before


def test_rows_are_found_by_content_and_in_place_where_two_are_the_same(tmp_path):
    earlier = some(tmp_path, "abcaa", 3)
    assert some(tmp_path, "abcaxa", 3).rows_in(earlier).tolist() == [0, 1, 2, 3, -1, 0]
    assert some(tmp_path, "cbaaa", 3).rows_in(earlier).tolist() == [2, 1, 0, 3, 4]
    assert some(tmp_path, "cba", 3).rows_in(earlier, 2).tolist() == [-1, 1, 0]


@pytest.mark.parametrize(
    ("now", "ids", "n_train", "changed"),
    [
        ("abcd", None, 2, []),
        ("abcde", None, 2, []),
        ("abdc", None, 2, []),
        ("ab", None, 2, []),
        ("bacd", None, 2, ["images"]),
        ("abcd", [1, 0, 2, 3], 2, ["image_ids"]),
        ("abcd", None, 3, ["image_ids"]),
        ("xbcd", None, 2, ["images"]),
    ],
)
def test_training_is_concerned_by_training_images_alone(tmp_path, now, ids, n_train, changed):
    before = some(tmp_path, "abcd", 2)
    before._remember()
    trained = SubjectDigests(before, "responses").to_json()
    assert SubjectDigests(some(tmp_path, now, n_train, ids), "responses").changed_for_training(trained) == changed
    other = SubjectDigests(some(tmp_path, now, n_train, ids), "others").changed_for_training(trained)
    assert "responses" in other


def test_digests_of_lists_are_those_that_keys_have_always_had():
    """Of the first version: a work folder must be found again."""
    assert digest_of_ids([5, 1, 2], 2) == "54e047e18f2b"
    assert whole_digest(["00" * 16, "ff" * 16]) == "ac2b8b37d9f3851f8370a32f8fd17c15"
