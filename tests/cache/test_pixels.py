import errno
import json
import os
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.backbone.network import Backbone, load_backbone
from featcache.cache import pixels as pixels_module
from featcache.cache.pixels import Pixels, cache_pixels, find_pixels
from featcache.config import BackboneConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.images import load_image
from featcache.dataset.subject import Subject
from featcache.errors import DataError, StoreError
from featcache.workdir import Workdir

SIZE = 48


def backbone_of(name: str = "test_resnet", size: int = SIZE) -> Backbone:
    return load_backbone(BackboneConfig(name=name, weights="none", size=size))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbone_of()


@pytest.fixture
def subjects(tiny: Path) -> tuple[Subject, ...]:
    return open_challenge(tiny).subjects


@pytest.fixture
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit every 8 images, so that a small tree has several commits."""
    monkeypatch.setattr(pixels_module, "_COMMIT", 8)


def cache(subjects: tuple[Subject, ...], backbone: Backbone, work: Path, limit_gb: float = 1) -> list[Pixels]:
    return cache_pixels(subjects, backbone, work, limit_gb, workers=2)


def n_bytes(subjects: tuple[Subject, ...], size: int) -> int:
    return sum(len(subject.image_ids) for subject in subjects) * size * size * 3


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.cache.pixels.load_image", lambda path: pytest.fail(f"decoded {path}"))


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: Path | None = None) -> list[Path]:
    """The images that are decoded from now on; a person stops the run at one of them."""
    decoded: list[Path] = []

    def load(path: Path) -> Image.Image:
        if path == stop_at:
            raise KeyboardInterrupt
        decoded.append(path)
        return load_image(path)

    monkeypatch.setattr("featcache.cache.pixels.load_image", load)
    return decoded


def files(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Workdir(work).pixels.glob("[!.]*")}


def used_at(found: list[Pixels], time: int) -> None:
    for one in found:
        os.utime(one.path.with_suffix(".json"), (time, time))


def test_rows_are_what_the_backbone_reads_training_then_test(subjects, backbone, tmp_path):
    for subject, found in zip(subjects, cache(subjects, backbone, tmp_path), strict=True):
        assert found.array.shape == (len(subject.image_ids), SIZE, SIZE, 3) and found.array.dtype == np.uint8
        for row, path in enumerate(subject.train.sources + subject.test.sources):
            expected = backbone.pixels(Image.open(path).convert("RGB"))
            assert np.array_equal(found.array[row], expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("rows", [np.array([7, 0, 33, 7]), [2], range(30, 35)])
def test_read_gives_any_rows_as_the_network_takes_them(subjects, backbone, tmp_path, rows):
    (found,) = cache(subjects[:1], backbone, tmp_path)
    images = found.read(rows)
    assert images.dtype == torch.uint8 and images.shape == (len(rows), 3, SIZE, SIZE)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for image, row in zip(images, rows, strict=True):
        assert torch.equal(image, backbone.pixels(load_image(subjects[0].image_sources[row])))


def test_what_is_read_can_be_changed_and_the_file_stays(subjects, backbone, tmp_path):
    (found,) = cache(subjects[:1], backbone, tmp_path)
    before = files(tmp_path)
    found.read([0, 1]).zero_()
    assert files(tmp_path) == before


def test_a_second_call_decodes_nothing(subjects, backbone, tmp_path, monkeypatch, said):
    first, before = cache(subjects, backbone, tmp_path), files(tmp_path)
    said.clear()
    no_decoding(monkeypatch)
    second = cache(subjects, backbone, tmp_path)
    assert [one.path for one in second] == [one.path for one in first] and files(tmp_path) == before and not said


def test_a_tree_that_moved_decodes_nothing(tree, backbone, tmp_path, monkeypatch):
    first = cache(open_challenge(tree).subjects, backbone, tmp_path / "work")
    moved = open_challenge(tree.rename(tmp_path / "moved")).subjects
    no_decoding(monkeypatch)
    assert [one.path for one in cache(moved, backbone, tmp_path / "work")] == [one.path for one in first]


def test_one_changed_image_makes_the_subjects_pixels_anew(tree, backbone, tmp_path):
    first = cache(open_challenge(tree).subjects, backbone, tmp_path / "work")
    path = open_challenge(tree).subjects[0].train.sources[3]
    changed = np.asarray(Image.open(path)) ^ 1
    Image.fromarray(changed).save(path)
    second = cache(open_challenge(tree).subjects, backbone, tmp_path / "work")
    assert second[0].path != first[0].path and second[1].path == first[1].path
    assert torch.equal(second[0].read([3])[0], backbone.pixels(Image.fromarray(changed)))


@pytest.mark.parametrize("stop_at", [0, 5, 8, 23, 34, 35, 50, 64])
def test_an_interrupted_run_goes_on_after_its_last_commit(
    subjects, backbone, tmp_path, monkeypatch, small_commits, stop_at
):
    """Subjects have 35 and 30 images, so from image 35 on it is the second one that was interrupted."""
    cache(subjects, backbone, tmp_path / "whole")
    paths = [path for subject in subjects for path in subject.image_sources]
    counted(monkeypatch, stop_at=paths[stop_at])
    with pytest.raises(KeyboardInterrupt):
        cache(subjects, backbone, tmp_path / "stopped")
    unfinished = subjects[stop_at // 35]
    assert find_pixels(unfinished, backbone, tmp_path / "stopped") is None
    decoded = counted(monkeypatch)
    cache(subjects, backbone, tmp_path / "stopped")
    first = 35 * (stop_at // 35)
    assert sorted(decoded) == sorted(paths[first + 8 * ((stop_at - first) // 8) :])
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_an_image_that_cannot_be_decoded_is_named_and_keeps_what_was_committed(tree, backbone, tmp_path, small_commits):
    path = open_challenge(tree).subjects[0].train.sources[20]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=path.name):
        cache(open_challenge(tree).subjects, backbone, tmp_path)
    (record,) = Workdir(tmp_path).pixels.glob("*.json")
    assert json.loads(record.read_text())["images"] == 16


def test_backbones_that_differ_in_mean_and_deviation_share_a_file(subjects, tmp_path, monkeypatch):
    one, other = backbone_of("test_convnext"), backbone_of("test_efficientnet")
    assert one.transform_settings["mean"] != other.transform_settings["mean"]
    first = cache(subjects, one, tmp_path)
    no_decoding(monkeypatch)
    second = cache(subjects, other, tmp_path)
    assert [found.path for found in second] == [found.path for found in first]
    monkeypatch.undo()
    expected = other.pixels(load_image(subjects[1].image_sources[4]))
    assert torch.equal(second[1].read([4])[0], expected)


@pytest.mark.parametrize("other", [("test_convnext", 64), ("test_resnet", SIZE)])
def test_another_size_or_interpolation_is_another_file(subjects, tmp_path, other):
    first = cache(subjects, backbone_of("test_convnext"), tmp_path)
    second = cache(subjects, backbone_of(*other), tmp_path)
    assert {found.path for found in first}.isdisjoint(found.path for found in second)
    assert all(found.path.exists() for found in first)


def test_pixels_are_found_only_when_they_are_whole_and_of_this_size(subjects, backbone, tmp_path):
    assert find_pixels(subjects[0], backbone, tmp_path) is None
    (made,) = cache(subjects[:1], backbone, tmp_path)
    assert find_pixels(subjects[0], backbone, tmp_path).path == made.path
    assert find_pixels(subjects[1], backbone, tmp_path) is None
    assert find_pixels(subjects[0], backbone_of(size=64), tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"null", b'{"images": null}', b'{"images": "x"}', b"\xff"]
)
def test_a_damaged_record_means_made_again(subjects, backbone, tmp_path, monkeypatch, content):
    (made,) = cache(subjects[:1], backbone, tmp_path)
    before = files(tmp_path)
    made.path.with_suffix(".json").write_bytes(content)
    assert find_pixels(subjects[0], backbone, tmp_path) is None
    decoded = counted(monkeypatch)
    cache(subjects[:1], backbone, tmp_path)
    assert sorted(decoded) == sorted(subjects[0].image_sources) and files(tmp_path) == before


@pytest.mark.parametrize("lost", [".npy", ".json"])
def test_a_lost_file_means_made_again(subjects, backbone, tmp_path, monkeypatch, lost):
    (made,) = cache(subjects[:1], backbone, tmp_path)
    before = files(tmp_path)
    made.path.with_suffix(lost).unlink()
    assert find_pixels(subjects[0], backbone, tmp_path) is None
    decoded = counted(monkeypatch)
    cache(subjects[:1], backbone, tmp_path)
    assert len(decoded) == len(subjects[0].image_ids) and files(tmp_path) == before


def test_more_than_the_limit_is_refused_in_one_line_and_removes_nothing(subjects, backbone, tmp_path, monkeypatch):
    cache(subjects, backbone_of(size=32), tmp_path)
    before = files(tmp_path)
    no_decoding(monkeypatch)
    with pytest.raises(StoreError, match=r"into --image-cache 0.0004 GB; found .* lower --size") as found:
        cache(subjects, backbone, tmp_path, limit_gb=0.0004)
    assert "\n" not in str(found.value) and files(tmp_path) == before


def test_the_limit_removes_what_was_not_used_for_longest(subjects, tmp_path, said):
    sizes = (32, 40, 48)
    old = {size: cache(subjects, backbone_of(size=size), tmp_path) for size in sizes}
    for time, size in enumerate(sizes, start=1):
        used_at(old[size], time)
    for subject in subjects:
        find_pixels(subject, backbone_of(size=32), tmp_path)
    said.clear()
    room = n_bytes(subjects, 56) + n_bytes(subjects, 48) + n_bytes(subjects, 32) + 10_000
    new = cache(subjects, backbone_of(size=56), tmp_path, room / 1e9)
    kept = {one.path for one in [*new, *old[48], *old[32]]}
    assert set(Workdir(tmp_path).pixels.glob("[!.]*")) == kept | {path.with_suffix(".json") for path in kept}
    assert sorted(line for line in said if "removed" in line) == sorted(
        f"removed {one.path}, to keep the images below {room / 1e9:g} GB" for one in old[40]
    )


def test_the_limit_never_removes_what_is_asked_for(subjects, backbone, tmp_path, monkeypatch):
    used_at(cache(subjects[:1], backbone, tmp_path), 1)
    used_at(cache(subjects, backbone_of(size=32), tmp_path), 2)
    decoded = counted(monkeypatch)
    found = cache(subjects, backbone, tmp_path, n_bytes(subjects, SIZE) / 1e9)
    assert len(found) == 2 and sorted(decoded) == sorted(subjects[1].image_sources)
    assert set(Workdir(tmp_path).pixels.glob("*.npy")) == {one.path for one in found}


def test_images_that_are_there_are_served_below_any_limit(subjects, backbone, tmp_path):
    first = cache(subjects, backbone, tmp_path)
    assert [one.path for one in cache(subjects, backbone, tmp_path, 1e-9)] == [one.path for one in first]


def test_a_disk_without_room_is_refused_before_anything_is_made(subjects, backbone, tmp_path, monkeypatch):
    free = SimpleNamespace(free=n_bytes(subjects, SIZE) - 1)
    monkeypatch.setattr("featcache.cache.pixels.shutil.disk_usage", lambda path: free)
    no_decoding(monkeypatch)
    with pytest.raises(StoreError, match=r"kB of free disk for the images; found .* kB; make room") as found:
        cache(subjects, backbone, tmp_path)
    assert "\n" not in str(found.value) and files(tmp_path) == {}


def test_what_an_interrupted_run_claimed_is_not_asked_of_the_disk_again(
    subjects, backbone, tmp_path, monkeypatch, small_commits
):
    counted(monkeypatch, stop_at=subjects[0].image_sources[9])
    with pytest.raises(KeyboardInterrupt):
        cache(subjects[:1], backbone, tmp_path)
    (path,) = Workdir(tmp_path).pixels.glob("*.npy")
    assert path.stat().st_blocks * 512 >= n_bytes(subjects[:1], SIZE)
    counted(monkeypatch)
    monkeypatch.setattr("featcache.cache.pixels.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert len(cache(subjects[:1], backbone, tmp_path)) == 1


def test_a_lost_file_whose_remaking_is_interrupted_is_not_taken_for_whole(
    subjects, backbone, tmp_path, monkeypatch, small_commits
):
    (made,) = cache(subjects[:1], backbone, tmp_path)
    made.path.unlink()
    counted(monkeypatch, stop_at=subjects[0].image_sources[3])
    with pytest.raises(KeyboardInterrupt):
        cache(subjects[:1], backbone, tmp_path)
    assert find_pixels(subjects[0], backbone, tmp_path) is None


def test_a_file_cut_short_is_made_again(subjects, backbone, tmp_path):
    (made,) = cache(subjects[:1], backbone, tmp_path)
    whole = made.path.read_bytes()
    made.path.write_bytes(whole[:-100])
    assert find_pixels(subjects[0], backbone, tmp_path) is None
    assert cache(subjects[:1], backbone, tmp_path)[0].path.read_bytes() == whole


def test_a_disk_that_fills_while_room_is_claimed_is_one_line(subjects, backbone, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("featcache.cache.pixels.os.posix_fallocate", full)
    with pytest.raises(StoreError, match="kB of free disk for the images"):
        cache(subjects[:1], backbone, tmp_path)
    assert not list(Workdir(tmp_path).pixels.glob("*.npy"))


def test_a_file_system_that_promises_nothing_serves_all_the_same(subjects, backbone, tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("featcache.cache.pixels.os.posix_fallocate", unable)
    assert cache(subjects[:1], backbone, tmp_path)[0].array.any()


def test_a_file_that_another_process_writes_to_without_a_lock_is_shared(subjects, backbone, tmp_path):
    """Both write the same bytes to the same places; a file that was cut off under the other would end it (SIGBUS)."""
    (first,) = cache_pixels(subjects[:1], backbone, tmp_path, 1, 2)
    before, other = first.path.stat().st_ino, np.lib.format.open_memmap(first.path, mode="r+")
    whole = other.copy()
    other[:] = 0  # as when it has just begun
    first.path.with_suffix(".json").unlink()
    (again,) = cache_pixels(subjects[:1], backbone, tmp_path, 1, 2)
    assert again.path.stat().st_ino == before
    assert np.array_equal(other, whole) and np.array_equal(again.array, whole)


def test_a_file_of_another_shape_is_replaced_and_not_cut_off(subjects, backbone, tmp_path):
    (first,) = cache_pixels(subjects[:1], backbone, tmp_path, 1, 2)
    whole = first.array.copy()
    np.save(first.path, np.ones((5000, 7, 3), np.uint8))
    first.path.with_suffix(".json").unlink()
    reader = np.load(first.path, mmap_mode="r")
    (again,) = cache_pixels(subjects[:1], backbone, tmp_path, 1, 2)
    assert int(reader.sum()) == 5000 * 7 * 3  # which would be a signal and no number
    assert np.array_equal(again.array, whole)


def test_a_second_process_waits_for_the_first(subjects, backbone, tmp_path, monkeypatch):
    """Two trainings that start together decode each image once."""
    honest, threads, seen = pixels_module.load_image, [], []

    def meanwhile(path):
        if not threads:
            threads.append(Thread(target=lambda: cache(subjects, backbone, tmp_path)))
            threads[0].start()
        seen.append(path)
        return honest(path)

    monkeypatch.setattr(pixels_module, "load_image", meanwhile)
    cache(subjects, backbone, tmp_path)
    threads[0].join()
    assert sorted(seen) == sorted(path for subject in subjects for path in subject.image_sources)
