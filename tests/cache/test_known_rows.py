"""Rows of images that another store has are not computed again, and are those that a fresh extraction gives."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.backbone.network import TorchBackbone
from featcache.cache import extract as extract_module
from featcache.cache import store as store_module
from featcache.cache.extract import Extracted, extract
from featcache.cache.known_rows import KnownRows
from featcache.cache.store import Store, create_store, list_stores, open_store
from featcache.config import BackboneConfig, ExtractConfig
from featcache.dataset.algonauts import open_challenge
from featcache.errors import CheckpointError, LeakError, StoreError
from featcache.simulate import simulate
from support.checkpoints import write_checkpoint
from support.images import add_test_image, remove_test_image, test_images, turn_test_images
from support.simulated import TINY

CONFIG = ExtractConfig(
    backbone=BackboneConfig(name="test_resnet", weights="none", size=48), batch_size=3, workers=2, dtype="float32"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit every 8 images, so that a small tree has several commits."""
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 8)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def read_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that a network reads for the rows of a store."""
    honest, sizes = extract_module._forward, []

    def counting(source, pixels, *rest):
        sizes.append(len(pixels))
        return honest(source, pixels, *rest)

    monkeypatch.setattr(extract_module, "_forward", counting)
    return sizes


def run(tree: Path, work: Path, config: ExtractConfig = CONFIG) -> list[Extracted]:
    return extract(open_challenge(tree).subjects[:1], config, work)


def rows_of(store: Store) -> dict[str, np.ndarray]:
    return {name: store.read(name) for name in store.arrays}


def assert_as_fresh(tree: Path, fresh: Path, results: list[Extracted], config: ExtractConfig = CONFIG) -> None:
    """The rows are those of a work folder that knows nothing: float32 to rounding, float16 to its last bit."""
    for found, expected in zip(results, run(tree, fresh, config), strict=True):
        store, other = open_store(found.path), open_store(expected.path)
        assert found.path.name == expected.path.name and store.image_ids.tolist() == other.image_ids.tolist()
        assert store.complete and expected.n_new == expected.n_images
        for name, rows in rows_of(store).items():
            wanted = other.read(name)
            assert rows.dtype == wanted.dtype
            tolerance = 1e-6 if rows.dtype == np.float32 else 1e-3
            np.testing.assert_allclose(rows, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def links(store: Store, name: str = "pooled") -> list[int]:
    """How many names each chunk file of an array has."""
    files = sorted((store.path / name / "c").rglob("*"), key=lambda path: path.parts)
    return [path.stat().st_nlink for path in files if path.is_file()]


def test_an_added_test_image_alone_is_computed(tree, work, tmp_path, read_images, said):
    (before,) = run(tree, work)
    add_test_image(tree)
    del read_images[:]
    (after,) = run(tree, work)
    assert sum(read_images) == after.n_new == 1 and after.n_images == before.n_images + 1 == 36
    assert f"subj01: 35 of 36 images are in {before.path.name}; 1 to compute" in said
    # 35 rows in chunks of 8: four of them are whole in both
    assert links(open_store(after.path)) == [2, 2, 2, 2, 1] and links(open_store(before.path)) == [2, 2, 2, 2, 1]
    old, new = rows_of(open_store(before.path)), rows_of(open_store(after.path))
    assert all(np.array_equal(old[name], new[name][:35]) for name in old)
    assert_as_fresh(tree, tmp_path / "fresh", [after])


def test_going_back_and_forth_between_two_datasets_computes_nothing(tree, work, read_images):
    first = run(tree, work)
    added = add_test_image(tree)
    second = run(tree, work)
    added.rename(tree / "kept.png")
    del read_images[:]
    back = run(tree, work)
    (tree / "kept.png").rename(added)
    forth = run(tree, work)
    assert [back[0].path, forth[0].path] == [first[0].path, second[0].path] and not read_images


CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "added in the middle": (lambda tree: add_test_image(tree, place=2), 1),
    "removed": (lambda tree: remove_test_image(tree, 1), 0),
    "in another order": (turn_test_images, 0),
    "another picture under the same name": (
        lambda tree: Image.fromarray(np.asarray(Image.open(test_images(tree)[2])) ^ 255).save(test_images(tree)[2]),
        1,
    ),
    "from test to training": (lambda tree: from_test_to_training(tree), 0),
}


def from_test_to_training(tree: Path) -> None:
    """Make the last test image the first training image."""
    last = test_images(tree)[-1]
    folder = tree / "subj01/training_split/training_images"
    for number, path in reversed(list(enumerate(sorted(folder.iterdir())))):
        path.rename(path.with_name(f"train-{number + 2:04d}_{path.name.partition('_')[2]}"))
    last.rename(folder / f"train-0001_{last.name.partition('_')[2]}")
    for path in (tree / "subj01/training_split/training_fmri").iterdir():
        responses = np.load(path)
        np.save(path, np.concatenate([responses[:1], responses]))


@pytest.mark.parametrize("change", CHANGES)
def test_images_are_found_wherever_they_are(tree, work, tmp_path, read_images, change):
    run(tree, work)
    alter, n_new = CHANGES[change]
    alter(tree)
    del read_images[:]
    results = run(tree, work)
    assert sum(read_images) == results[0].n_new == n_new
    assert_as_fresh(tree, tmp_path / "fresh", results)


def test_an_old_work_folder_without_lists_of_images_is_served_too(tree, work, tmp_path, read_images):
    run(tree, work)
    shutil.rmtree(work / "images")
    add_test_image(tree, place=1)
    del read_images[:]
    results = run(tree, work)
    assert sum(read_images) == 1
    assert_as_fresh(tree, tmp_path / "fresh", results)


def test_without_a_list_a_store_with_an_image_that_is_gone_is_not_guessed(tree, work, read_images):
    run(tree, work)
    shutil.rmtree(work / "images")
    remove_test_image(tree, 0)
    del read_images[:]
    assert run(tree, work)[0].n_new == 34 == sum(read_images)


@pytest.mark.parametrize("settings", [{"backbone": replace(CONFIG.backbone, size=64)}, {"dtype": "bfloat16"}])
def test_rows_of_other_settings_are_not_taken(tree, work, settings):
    run(tree, work)
    add_test_image(tree)
    assert run(tree, work, replace(CONFIG, **settings))[0].n_new == 36


def test_a_file_system_without_hard_links_gets_copies(tree, work, tmp_path, monkeypatch, read_images):
    run(tree, work)
    add_test_image(tree)

    honest = os.link

    def refuse(source, target):  # zarr makes links of its own for the descriptions of arrays
        if "c" in Path(target).parts:
            raise OSError("Operation not permitted")
        honest(source, target)

    monkeypatch.setattr(os, "link", refuse)
    del read_images[:]
    (after,) = run(tree, work)
    assert sum(read_images) == 1 and set(links(open_store(after.path))) == {1}
    assert_as_fresh(tree, tmp_path / "fresh", [after])


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_an_interrupted_run_goes_on_and_ends_bit_equal(tree, work, tmp_path, monkeypatch, steps):
    run(tree, work)
    add_test_image(tree)
    shutil.copytree(work, tmp_path / "whole")
    honest, commits = Store.commit, []

    def stopping(self, stops):
        if len(commits) == steps:
            raise KeyboardInterrupt
        commits.append(stops)
        honest(self, stops)

    monkeypatch.setattr(Store, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tree, work)
    monkeypatch.setattr(Store, "commit", honest)
    (after,), (whole,) = run(tree, work), run(tree, tmp_path / "whole")
    assert after.n_new == 1
    expected = rows_of(open_store(whole.path))
    assert all(np.array_equal(rows, expected[name]) for name, rows in rows_of(open_store(after.path)).items())


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_rows_of_a_damaged_chunk_are_computed(tree, work, tmp_path, said, damage):
    (before,) = run(tree, work)
    add_test_image(tree)
    chunk = before.path / "layer2/c/1/0/0/0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.unlink() if damage == "gone" else chunk.write_bytes(content[:100] if damage == "cut" else content)
    (after,) = run(tree, work)
    assert after.n_new == 8 + 1
    assert any("a chunk of layer2" in line and line.endswith("its rows are computed") for line in said)
    assert_as_fresh(tree, tmp_path / "fresh", [after])


def test_what_is_written_leaves_the_linked_store_as_it_is(tree, work):
    """A chunk that a killed run linked and did not commit is written anew, and not through the link."""
    (before,) = run(tree, work)
    add_test_image(tree)
    (after,) = run(tree, work)
    old, new = rows_of(open_store(before.path)), open_store(after.path)
    (after.path / "committed.json").unlink()
    new.append({name: np.ones(array.shape, array.dtype) for name, array in new.arrays.items()})
    assert all(np.array_equal(rows, old[name]) for name, rows in rows_of(open_store(before.path)).items())
    assert set(links(open_store(before.path))) == {1}


LARGE = 1e6


@pytest.fixture
def large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer beyond float16, on images whose first pixel is 255."""
    honest, normalise = TorchBackbone.read, TorchBackbone.normalise
    marked: list[torch.Tensor] = []

    def marking(self, images):
        marked[:] = [images[:, :, 0, 0].eq(255).all(1)]
        return normalise(self, images)

    def reading(self, images, taps):
        rows = honest(self, images, taps)
        n_filled = len(images) - len(marked[0]) if marked else -1  # a short batch is filled up with its last image
        large = torch.zeros(len(images), dtype=bool)
        if n_filled >= 0:
            large = torch.cat([marked[0], marked[0][-1:].expand(n_filled)])
        rows["layer2"] = rows["layer2"] + LARGE * large[:, None, None, None]
        return rows

    monkeypatch.setattr(TorchBackbone, "normalise", marking)
    monkeypatch.setattr(TorchBackbone, "read", reading)


def make_large(path: Path) -> None:
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)


def test_a_new_image_beyond_float16_has_all_computed_as_float32(tree, work, tmp_path, large_images):
    run(tree, work)
    make_large(add_test_image(tree))
    (after,) = run(tree, work)
    assert open_store(after.path).arrays["layer2"].dtype == np.float32 and after.n_new == 36
    assert_as_fresh(tree, tmp_path / "fresh", [after])


@pytest.mark.parametrize("stays", [True, False])
def test_rows_of_a_store_that_was_widened_are_taken(tree, work, tmp_path, large_images, stays):
    """Where the image that needed float32 is gone, they are float16, as a fresh extraction has them."""
    make_large(test_images(tree)[-1])
    (before,) = run(tree, work)
    assert open_store(before.path).arrays["layer2"].dtype == np.float32
    add_test_image(tree) if stays else remove_test_image(tree, 4)
    (after,) = run(tree, work)
    assert after.n_new == int(stays)
    assert open_store(after.path).arrays["layer2"].dtype == (np.float32 if stays else np.float16)
    assert_as_fresh(tree, tmp_path / "fresh", [after])


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_features_of_a_trained_backbone_are_found_too(tree, work, read_images, stage):
    subjects = open_challenge(tree).subjects
    write_checkpoint(subjects[: 1 if stage == "finetune" else 2], work, stage=stage)
    config = replace(CONFIG, checkpoint="auto")
    (before,) = run(tree, work, config)
    add_test_image(tree)
    del read_images[:]
    (after,) = run(tree, work, config)
    assert sum(read_images) == after.n_new == 1
    old, new = open_store(before.path), open_store(after.path)
    assert old.key["fold"] == new.key["fold"] is not None and old.facts == new.facts
    assert np.array_equal(old.read("pooled"), new.read("pooled", 0, 35))


def test_a_checkpoint_that_saw_the_new_test_image_is_refused(tree, work, said):
    first, second = open_challenge(tree).subjects
    made = write_checkpoint([first, second], work)
    seen = next(one for one in second.train.ids.tolist() if one in made.seen_ids and one not in first.train.ids)
    add_test_image(tree, image_id=seen)
    with pytest.raises(LeakError, match=f"id {seen}"):
        run(tree, work, replace(CONFIG, checkpoint=made.name))
    run(tree, work, replace(CONFIG, checkpoint="auto"))
    assert any(f"left out {made.name}: expected a checkpoint that saw no test image of subj01" in line for line in said)
    assert [store.key["fold"] for store in list_stores(work / "features.zarr")] == [None]


def test_a_checkpoint_of_other_training_images_is_refused_as_ever(tree, work):
    made = write_checkpoint(open_challenge(tree).subjects, work)
    from_test_to_training(tree)
    with pytest.raises(CheckpointError, match="one of other images and image ids"):
        run(tree, work, replace(CONFIG, checkpoint=made.name))


def test_two_processes_at_once_leave_one_whole_store(tree, work, tmp_path):
    run(tree, work)
    add_test_image(tree)
    root = Path(__file__).parents[2]
    code = (
        "import sys; from pathlib import Path; from featcache.cache import store; store._CHUNK_ROWS = 8\n"
        "from featcache.cache.extract import extract; from featcache.config import *\n"
        "from featcache.dataset.algonauts import open_challenge\n"
        "b = BackboneConfig(name='test_resnet', weights='none', size=48)\n"
        "c = ExtractConfig(backbone=b, batch_size=3, workers=2, dtype='float32')\n"
        "extract(open_challenge(sys.argv[1]).subjects[:1], c, Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tree), str(work)]
    env = os.environ | {"PYTHONPATH": str(root)}
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    for text, code in ends:
        assert code == 0 or "another process writing" in text
    assert 0 in [code for _, code in ends]
    (after,) = run(tree, work)
    assert after.n_new == 0
    assert_as_fresh(tree, tmp_path / "fresh", [after])


def test_each_row_is_taken_from_the_first_store_of_most_images(tmp_path):
    def store(name: str) -> Store:
        return create_store(tmp_path, name, {"name": name}, np.arange(4), 4, {"a": 2}, {})

    small, large = store("small"), store("large")
    found = [(small, np.array([0, -1, -1, 3])), (large, np.array([-1, 2, 1, 0]))]
    known = KnownRows.of(found, 4)
    assert known.sources == ["large-" + large.name[6:], small.name] and len(known) == 4
    assert [known.stores[number].name for number in known.numbers] == [small.name, *[large.name] * 3]
    assert known.rows.tolist() == [0, 2, 1, 0] and known.missing(range(4)) == []
    assert KnownRows.nothing(3).missing(range(1, 3)) == [1, 2]


def test_a_link_is_refused_by_the_file_system_alone(tmp_path):
    store = create_store(tmp_path, "a", {}, np.arange(4), 4, {"a": 2}, {})
    with pytest.raises(FileNotFoundError):
        store.link("a", 0, store)
    with pytest.raises(StoreError, match="expected 4 rows of a"):
        store.read("a")


def distinct(tree: Path) -> int:
    """Number of pictures of all subjects that differ."""
    return len({path.read_bytes() for path in tree.glob("subj*/*/*_images/*.png")})


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """Eight subjects who share half of their training images."""
    simulate(replace(TINY, n_train=12, n_shared=6), tmp_path / "eight")
    return tmp_path / "eight"


def test_an_image_that_several_subjects_saw_is_computed_once(eight, work, tmp_path, read_images):
    subjects = open_challenge(eight).subjects
    results = extract(subjects, CONFIG, work)
    assert sum(read_images) == distinct(eight) < sum(result.n_images for result in results)
    for subject, found in zip(subjects, results, strict=True):
        (alone,) = extract([subject], CONFIG, tmp_path / subject.name)
        for name, rows in rows_of(open_store(found.path)).items():
            wanted = open_store(alone.path).read(name)
            np.testing.assert_allclose(rows, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_in_any_order_of_subjects_and_runs_an_image_is_computed_once(eight, work, read_images):
    subjects = open_challenge(eight).subjects
    for subject in (subjects[5], subjects[1], *subjects[::-1]):
        extract([subject], CONFIG, work)
    assert sum(read_images) == distinct(eight)


@pytest.mark.parametrize("batch_size", [7, 8])
def test_rows_are_the_same_to_the_bit_in_any_order_of_subjects(eight, work, tmp_path, batch_size):
    """Which images are known already decides which are in a batch together, and no row depends on that."""
    config = replace(CONFIG, batch_size=batch_size)
    subjects = open_challenge(eight).subjects
    forward, backward, alone = tmp_path / "forward", tmp_path / "backward", tmp_path / "alone"
    extract(subjects, config, forward)
    extract(subjects[::-1], config, backward)
    for number, subject in enumerate(subjects):
        extract([subject], config, alone / str(number))
        stores = [
            next(store for store in list_stores(folder / "features.zarr") if store.key["subject"] == subject.name)
            for folder in (forward, backward, alone / str(number))
        ]
        for name in stores[0].arrays:
            rows = [store.read(name).tobytes() for store in stores]
            assert rows[0] == rows[1] == rows[2]


def test_a_run_of_all_subjects_that_was_interrupted_computes_an_image_once_but_for_what_was_not_committed(
    eight, work, tmp_path, monkeypatch, read_images
):
    subjects = open_challenge(eight).subjects
    whole = extract(subjects, CONFIG, tmp_path / "whole")
    n_whole, honest, passes = sum(read_images), extract_module._forward, []
    for stop_at in (2, 9, 3):  # passes of each attempt

        def stopping(*args, stop_at=stop_at):
            passes.append(1)
            if len(passes) == stop_at:
                raise KeyboardInterrupt
            return honest(*args)

        del passes[:]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(extract_module, "_forward", stopping)
            extract(subjects, CONFIG, work)
    again = extract(subjects, CONFIG, work)
    assert sum(read_images) - n_whole <= n_whole + 3 * 8  # a commit is 8 images
    for found, expected in zip(again, whole, strict=True):
        wanted = rows_of(open_store(expected.path))
        assert all(np.array_equal(rows, wanted[name]) for name, rows in rows_of(open_store(found.path)).items())


def test_a_checkpoint_that_serves_several_subjects_reads_an_image_once(eight, work, read_images):
    subjects = open_challenge(eight).subjects
    write_checkpoint(subjects, work, stage="pretrain")
    results = extract(subjects, replace(CONFIG, checkpoint="auto"), work)
    assert sum(read_images) == distinct(eight) and len(results) == 8
    assert all(open_store(result.path).key["fold"] is not None for result in results)
