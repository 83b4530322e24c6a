"""Digests follow contents, and nothing else."""

import os
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.config import differences
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.digests import (
    DigestIndex,
    file_digest,
    id_digest,
    image_digest,
    response_digest,
    subject_digests,
    whole_digest,
)
from featcache.dataset.image_lists import SubjectDigests
from featcache.dataset.rois import HEMISPHERES, read_mapping
from featcache.dataset.subject import ArrayImage
from featcache.errors import DataError


def test_digest_follows_content_and_order_but_not_names_or_dates(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"one"), b.write_bytes(b"two"), c.write_bytes(b"one")
    digest = DigestIndex(tmp_path / "index.json").digest
    assert digest([a, b]) == digest([c, b]) != digest([b, a])
    before = digest([a, b])
    os.utime(a, (1, 1))
    assert digest([a, b]) == before
    a.write_bytes(b"One")
    assert digest([a, b]) != before


def test_the_digest_of_several_contents_is_that_of_their_digests_in_a_row(tmp_path):
    """As stores of earlier versions are named by it."""
    one, other = (blake2b(content, digest_size=16) for content in (b"one", b"two"))
    expected = blake2b(one.digest() + other.digest(), digest_size=16).hexdigest()
    assert whole_digest([one.hexdigest(), other.hexdigest()]) == expected


def test_digest_reads_a_file_once(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    first = DigestIndex(tmp_path / "index.json").digest([file])
    monkeypatch.setattr("featcache.dataset.digests.file_digest", lambda path: pytest.fail("the file was read again"))
    assert DigestIndex(tmp_path / "index.json").digest([file]) == first


def test_a_broken_index_costs_a_reading_and_changes_nothing(tmp_path):
    file, index = tmp_path / "a", tmp_path / "index.json"
    file.write_bytes(b"one")
    first = DigestIndex(index).digest([file])
    index.write_text("{")
    assert DigestIndex(index).digest([file]) == first


def test_rows_of_an_array_have_the_digests_of_their_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    for name, array in {"a": pixels, "b": pixels[::-1]}.items():
        np.save(tmp_path / f"{name}.npy", array)
    a, b = ([ArrayImage(tmp_path / f"{name}.npy", "", row) for row in range(6)] for name in "ab")
    digest = DigestIndex(tmp_path / "index.json").digest
    assert digest(a) == digest(b[::-1]) != digest(a[::-1]) and digest(a[:2]) != digest([a[0], a[0]])
    changed = pixels.copy()
    changed[3, 0, 0, 0] ^= 1
    before = [digest([one]) for one in a]
    np.save(tmp_path / "a.npy", changed)
    os.utime(tmp_path / "a.npy", (1, 1))
    assert [row for row in range(6) if digest([a[row]]) != before[row]] == [3]


def test_a_file_of_many_pictures_is_read_once_and_asked_for_its_time_once_a_digest(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((50, 2, 2, 3), np.uint8))
    sources = [ArrayImage(tmp_path / "a.npy", "", row) for row in range(50)]
    first = DigestIndex(tmp_path / "index.json").digest(sources)
    monkeypatch.setattr("featcache.dataset.digests.array_row", lambda source: pytest.fail("a row was read again"))
    asked, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: asked.append(path) or stat(path, **options))
    assert DigestIndex(tmp_path / "index.json").digest(sources) == first
    assert asked.count(tmp_path / "a.npy") == 1


def digests_of(tree: Path, work: Path) -> list[dict[str, str]]:
    return [SubjectDigests.of(subject, work).to_json() for subject in open_challenge(tree).subjects]


def test_digests_of_a_subject_follow_one_pixel_file(tree, tmp_path):
    before = digests_of(tree, tmp_path / "work")
    path = open_challenge(tree).subjects[0].test.sources[-1]
    Image.fromarray(np.asarray(Image.open(path)) ^ 1).save(path)
    first, second = digests_of(tree, tmp_path / "work")
    assert first["images"] != before[0]["images"] and first["responses"] == before[0]["responses"]
    assert second == before[1]


@pytest.mark.parametrize("hemisphere", HEMISPHERES)
def test_digests_of_a_subject_follow_one_response(tree, tmp_path, hemisphere):
    before = digests_of(tree, tmp_path / "work")
    path = open_challenge(tree).subjects[1].response_paths[hemisphere]
    responses = np.load(path)
    responses[3, 5] += 1
    np.save(path, responses)
    first, second = digests_of(tree, tmp_path / "work")
    assert second["responses"] != before[1]["responses"] and second["images"] == before[1]["images"]
    assert first == before[0]


def test_digests_of_subjects_differ_and_stay_when_the_tree_moves(tree, tmp_path):
    before = digests_of(tree, tmp_path / "work")
    assert before[0]["images"] != before[1]["images"] and before[0]["responses"] != before[1]["responses"]
    moved = tree.rename(tmp_path / "moved")
    assert digests_of(moved, tmp_path / "work") == digests_of(moved, tmp_path / "other") == before
    subject = open_challenge(moved).subjects[0]
    assert SubjectDigests.of(subject, tmp_path / "work").to_json() == {
        "images": image_digest(subject, tmp_path / "new"),
        "image_ids": id_digest(subject),
        "responses": response_digest(subject, tmp_path / "new"),
    }


def test_the_same_pictures_under_other_ids_are_another_tree(tree, tmp_path):
    """Folds go by id: a checkpoint would hold out other pictures."""
    before = digests_of(tree, tmp_path)
    path = open_challenge(tree).subjects[0].train.sources[0]
    path.rename(path.with_name("train-0001_nsd-72999.png"))
    after = digests_of(tree, tmp_path)
    assert after[0]["images"] == before[0]["images"] and after[0]["image_ids"] != before[0]["image_ids"]


def test_a_moved_vertex_is_another_surface(tree):
    before = subject_digests(open_challenge(tree).subjects[0])
    path = tree / "subj01/roi_masks/lh.all-vertices_fsaverage_space.npy"
    np.save(path, np.roll(np.load(path), 1))
    after = subject_digests(open_challenge(tree).subjects[0])
    assert (
        after["fsaverage"]["lh"] != before["fsaverage"]["lh"] and after["fsaverage"]["rh"] == before["fsaverage"]["rh"]
    )


def test_images_in_another_order_have_another_digest(tiny, tmp_path):
    subject = open_challenge(tiny).subjects[0]
    turned = replace(subject, train=replace(subject.train, sources=subject.train.sources[::-1]))
    assert image_digest(turned, tmp_path) != image_digest(subject, tmp_path)


def test_subject_digests_follow_a_ceiling_and_nothing_else_does(tree):
    before = subject_digests(open_challenge(tree).subjects[0])
    path = tree / "noise_ceiling/subj01/rh.npy"
    ceiling = np.load(path)
    ceiling[4] /= 2
    np.save(path, ceiling)
    after = subject_digests(open_challenge(tree).subjects[0])
    assert set(differences(before, after)) == {"noise_ceiling.rh"}


def test_subject_digests_follow_one_vertex_of_an_roi(tree):
    before = subject_digests(open_challenge(tree).subjects[0])
    path = tree / "subj01/roi_masks/lh.streams_challenge_space.npy"
    labels = np.load(path)
    label = labels[np.flatnonzero(labels)[0]]
    name = read_mapping(tree / "subj01/roi_masks/mapping_streams.npy")[int(label)]
    labels[np.flatnonzero(labels)[0]] = 0
    np.save(path, labels)
    after = subject_digests(open_challenge(tree).subjects[0])
    assert set(differences(before, after)) == {f"rois.lh.{name}"}


def test_subject_digests_tell_a_ceiling_that_is_not_given_from_any_that_is(tree):
    before = subject_digests(open_challenge(tree).subjects[0])
    (tree / "noise_ceiling/subj01/lh.npy").unlink()
    after = subject_digests(open_challenge(tree).subjects[0])
    assert after["noise_ceiling"] == before["noise_ceiling"] | {"lh": None} and after["rois"] == before["rois"]


def test_subject_digests_stay_when_the_tree_moves(tree, tmp_path):
    before = [subject_digests(subject) for subject in open_challenge(tree).subjects]
    moved = open_challenge(tree.rename(tmp_path / "moved")).subjects
    assert [subject_digests(subject) for subject in moved] == before and before[0] != before[1]


def test_what_has_no_end_has_no_digest(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(DataError, match=f"{name}: expected a file; found something that is no file"):
            file_digest(tmp_path / name)
