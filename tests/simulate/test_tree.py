"""The simulated tree on the disk: complete, the same for the same seed, or not there at all."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.dataset.algonauts import scan_tree
from featcache.dataset.rois import CLASSES, FSAVERAGE_VERTICES, HEMISPHERES, read_mapping
from featcache.errors import ConfigError
from featcache.simulate import simulate
from featcache.simulate.scenes import compose, draw
from featcache.simulate.tree import image_ids
from support.simulated import SMALLEST, TINY, ids_of, load_mask, load_responses


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_same_seed_writes_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    simulate(SMALLEST, tmp_path / "one worker")
    simulate(replace(SMALLEST, workers=2), tmp_path / "two workers")
    assert digests(tmp_path / "one worker") == digests(tmp_path / "two workers")


def test_no_file_carries_the_time_of_writing(tree):
    with zipfile.ZipFile(tree / "truth" / "subj01" / "lh.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with Image.open(next(tree.glob("subj01/*/training_images/*.png"))) as image:
        assert image.info == {}


@pytest.mark.slow
def test_another_seed_writes_other_images_ceilings_and_responses(tmp_path):
    for seed in (0, 1):
        simulate(replace(SMALLEST, seed=seed), tmp_path / str(seed))
    first, second = digests(tmp_path / "0"), digests(tmp_path / "1")
    images = [{digest for name, digest in files.items() if name.endswith(".png")} for files in (first, second)]
    assert images[0].isdisjoint(images[1])
    assert (draw(compose(0, 5), 32) != draw(compose(1, 5), 32)).any()
    for name in ("noise_ceiling/subj01/lh.npy", "subj02/training_split/training_fmri/rh_training_fmri.npy"):
        assert first[name] != second[name]


@pytest.mark.slow
def test_torch_is_not_imported():
    script = "import sys, featcache.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0


def test_the_tree_has_no_fault_for_the_reader(tree):
    challenge, faults = scan_tree(tree)
    assert faults == []
    assert [subject.name for subject in challenge.subjects] == [f"subj{s:02d}" for s in range(1, 9)]


@pytest.mark.parametrize("subject", ["subj01", "subj06", "subj08"])
@pytest.mark.parametrize("hemisphere", HEMISPHERES)
def test_shapes_follow_the_masks(tree, subject, hemisphere):
    surface = load_mask(tree, subject, f"{hemisphere}.all-vertices_fsaverage_space")
    n_vertices = int(surface.sum())
    assert surface.shape == (FSAVERAGE_VERTICES,)
    assert load_responses(tree, subject, hemisphere).shape == (6, n_vertices)
    assert load_responses(tree, subject, hemisphere).dtype == np.float32
    assert np.load(tree / "noise_ceiling" / subject / f"{hemisphere}.npy").shape == (n_vertices,)
    for name in ("test_signal", "test_responses"):
        assert np.load(tree / "truth" / subject / f"{hemisphere}_{name}.npy").shape == (3, n_vertices)
    for roi_class in CLASSES:
        labels = load_mask(tree, subject, f"{hemisphere}.{roi_class}_challenge_space")
        on_surface = load_mask(tree, subject, f"{hemisphere}.{roi_class}_fsaverage_space")
        np.testing.assert_array_equal(on_surface[surface == 1], labels)
        assert not on_surface[surface == 0].any()


def test_image_names_count_from_one_and_hold_the_id(tree):
    names = [path.name for path in sorted((tree / "subj02/training_split/training_images").iterdir())]
    expected = image_ids(TINY)[2].train
    assert names == [f"train-{row:04d}_nsd-{image_id:05d}.png" for row, image_id in enumerate(expected, start=1)]
    with Image.open(tree / "subj02/training_split/training_images" / names[0]) as image:
        assert (image.mode, image.size) == ("RGB", (32, 32))


@pytest.mark.slow
def test_counts_may_differ_between_subjects(tmp_path):
    simulate(SMALLEST, tmp_path / "tree")
    assert [len(ids_of(tmp_path / "tree", f"subj{s:02d}", "training")) for s in (1, 2)] == [5, 6]


def test_mappings_name_every_roi_even_where_it_is_empty(tree):
    sizes: dict[str, list[int]] = {}
    for subject in TINY.subjects:
        for roi_class in CLASSES:
            folder = tree / f"subj{subject:02d}" / "roi_masks"
            names = read_mapping(folder / f"mapping_{roi_class}.npy")
            assert names[0] == "Unknown"
            labels = load_mask(tree, f"subj{subject:02d}", f"lh.{roi_class}_challenge_space")
            for label, name in names.items():
                sizes.setdefault(name, []).append(int((labels == label).sum()))
    assert len(sizes) == 1 + 7 + 4 + 5 + 3 + 5 + 7
    assert min(sizes["V1v"]) > 0


def test_shared_images_are_the_same_in_all_subjects_and_others_are_nobody_else_s(tree):
    copies_of: dict[int, list[bytes]] = {}
    for path in tree.glob("subj*/*_split/*_images/*.png"):
        copies_of.setdefault(int(path.stem[-5:]), []).append(path.read_bytes())
    assert sorted({len(copies) for copies in copies_of.values()}) == [1, 8]
    assert sum(len(copies) == 8 for copies in copies_of.values()) == TINY.n_shared
    assert all(len(set(copies)) == 1 for copies in copies_of.values())
    assert len({copies[0] for copies in copies_of.values()}) == len(copies_of) == TINY.n_drawn


def test_test_images_are_no_training_images(tree):
    trained = {image_id for s in TINY.subjects for image_id in ids_of(tree, f"subj{s:02d}", "training")}
    tested = {image_id for s in TINY.subjects for image_id in ids_of(tree, f"subj{s:02d}", "test")}
    assert trained and tested and trained.isdisjoint(tested)


def test_a_file_holds_the_image_of_its_id(tree):
    path = next((tree / "subj03/test_split/test_images").iterdir())
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), draw(compose(TINY.seed, int(path.stem[-5:])), 32))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or empty folder; found something in it"):
        simulate(SMALLEST, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_an_empty_folder_is_filled(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    simulate(SMALLEST, root)
    assert (root / "subj02").is_dir()


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(SMALLEST, tmp_path / "tree", interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_progress_runs_to_its_total(tmp_path):
    seen: list[tuple[int, int]] = []
    simulate(SMALLEST, tmp_path / "tree", lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == SMALLEST.n_drawn + SMALLEST.n_reference + 4
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
