"""The simulated tree: complete, reproducible, and true to what its truth folder says was planted."""

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
from featcache.simulate import SimulateConfig, simulate
from featcache.simulate.anatomy import FIELD_REACH, Vertices, mapping, roi_labels
from featcache.simulate.features import ANALYSIS_SIDE, CHANNELS, GROUPS, N_FEATURES, RIM, encode
from featcache.simulate.scenes import CATEGORIES, Scene, compose, draw
from featcache.simulate.tree import image_ids
from featcache.simulate.truth import Planted, plant

TINY = SimulateConfig(
    n_train=6, n_test=3, n_shared=4, n_vertices=(120, 130), n_dead=2, image_size=32, n_reference=50, workers=1
)
SMALLEST = replace(TINY, n_subjects=2, n_vertices=(40, 44), n_train=(5, 6))
VERTEX_ARRAYS = ("index", "position", "area", "level", "field_x", "field_y", "field_size")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight subjects, a few images each."""
    root = tmp_path_factory.mktemp("simulate") / "tree"
    simulate(TINY, root)
    return root


@pytest.fixture(scope="module")
def long_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One subject with enough images to estimate a variance."""
    root = tmp_path_factory.mktemp("simulate") / "tree"
    simulate(replace(TINY, n_subjects=1, n_train=400, n_test=20, n_reference=400), root)
    return root


def load_truth(root: Path, subject: str, hemisphere: str) -> dict[str, np.ndarray]:
    with np.load(root / "truth" / subject / f"{hemisphere}.npz") as file:
        return dict(file)


def load_planted(root: Path, subject: str, hemisphere: str) -> Planted:
    truth = load_truth(root, subject, hemisphere)
    vertices = Vertices(*(truth[name] for name in VERTEX_ARRAYS))
    return Planted(vertices, truth["weights"], truth["offset"], truth["ceiling"], truth["dead"])


def load_responses(root: Path, subject: str, hemisphere: str) -> np.ndarray:
    return np.load(root / subject / "training_split" / "training_fmri" / f"{hemisphere}_training_fmri.npy")


def load_mask(root: Path, subject: str, name: str) -> np.ndarray:
    return np.load(root / subject / "roi_masks" / f"{name}.npy")


def ids_of(root: Path, subject: str, split: str) -> list[int]:
    folder = root / subject / f"{split}_split"
    return [int(path.stem[-5:]) for path in sorted(folder.glob("*_images/*.png"))]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def squared_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Column by column, in float64."""
    a, b = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64) for x in (a, b))
    return (a * b).sum(axis=0) ** 2 / ((a**2).sum(axis=0) * (b**2).sum(axis=0))


# ------------------------------------------------------------------------------------------- reproducibility


def test_same_seed_writes_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    simulate(SMALLEST, tmp_path / "one")
    simulate(replace(SMALLEST, workers=2), tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_no_file_carries_the_time_of_writing(tree):
    with zipfile.ZipFile(tree / "truth" / "subj01" / "lh.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with Image.open(next(tree.glob("subj01/*/training_images/*.png"))) as image:
        assert image.info == {}


def test_another_seed_writes_other_images_ceilings_and_responses(tmp_path):
    for seed in (0, 1):
        simulate(replace(SMALLEST, seed=seed), tmp_path / str(seed))
    first, second = digests(tmp_path / "0"), digests(tmp_path / "1")
    images = [set(found[name] for name in found if name.endswith(".png")) for found in (first, second)]
    assert images[0].isdisjoint(images[1])
    assert (draw(compose(0, 5), 32) != draw(compose(1, 5), 32)).any()
    for name in ("noise_ceiling/subj01/lh.npy", "subj02/training_split/training_fmri/rh_training_fmri.npy"):
        assert first[name] != second[name]


def test_torch_is_not_imported():
    script = "import sys, featcache.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0


# --------------------------------------------------------------------------------------------------- layout


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


def test_counts_may_differ_between_subjects(tmp_path):
    simulate(SMALLEST, tmp_path / "tree")
    assert [len(ids_of(tmp_path / "tree", f"subj{s:02d}", "training")) for s in (1, 2)] == [5, 6]


def test_subjects_six_and_eight_lack_vertices_of_the_common_set(tree):
    for hemisphere in HEMISPHERES:
        masks = [load_mask(tree, f"subj{s:02d}", f"{hemisphere}.all-vertices_fsaverage_space") for s in TINY.subjects]
        for subject, mask in zip(TINY.subjects, masks, strict=True):
            lacking = int((masks[0] & ~mask & 1).sum())
            assert lacking == TINY.n_deleted(subject, hemisphere) == int(masks[0].sum()) - int(mask.sum())
            assert (lacking > 0) == (subject in (6, 8))


def test_full_counts_are_the_challenge_s():
    full = SimulateConfig.full()
    n_vertices = [
        tuple(n - full.n_deleted(subject, h) for n, h in zip(full.n_vertices, HEMISPHERES, strict=True))
        for subject in full.subjects
    ]
    common = (19_004, 20_544)
    assert n_vertices == [*[common] * 5, (18_978, 20_220), common, (18_981, 20_530)]
    assert [full.train_count(s) + full.test_count(s) for s in full.subjects].count(10_000) == 4


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


def test_every_subject_lacks_a_rare_roi_in_both_hemispheres():
    position = (np.arange(2_000) + 0.5) / 2_000
    for subject, seed in ((subject, seed) for subject in range(1, 9) for seed in range(5)):
        both = [roi_labels(replace(TINY, seed=seed), subject, hemisphere, position) for hemisphere in HEMISPHERES]
        empty = [
            {
                name
                for roi_class in CLASSES
                for label, name in mapping(roi_class).items()
                if not (labels[roi_class] == label).any()
            }
            for labels in both
        ]
        assert empty[0] & empty[1] & {"aTL-faces", "mTL-bodies", "mTL-faces", "mTL-words"}
        assert not (empty[0] | empty[1]) & {"V1v", "hV4", "FFA-1", "PPA", "early", "parietal"}


def test_rois_overlap_between_classes_and_differ_between_subjects(tree):
    streams = load_mask(tree, "subj01", "lh.streams_challenge_space") > 0
    visual = load_mask(tree, "subj01", "lh.prf-visualrois_challenge_space")
    assert (streams & (visual > 0)).sum() > 10
    assert not streams.all()
    others = [load_mask(tree, f"subj{s:02d}", "lh.prf-visualrois_challenge_space") for s in (2, 3, 4)]
    assert any((other != visual).any() for other in others)
    assert all((other != visual).mean() < 0.2 for other in others)


# --------------------------------------------------------------------------------------------------- images


def test_shared_images_are_the_same_in_all_subjects_and_others_are_nobody_else_s(tree):
    found: dict[int, list[bytes]] = {}
    for path in tree.glob("subj*/*_split/*_images/*.png"):
        found.setdefault(int(path.stem[-5:]), []).append(path.read_bytes())
    assert sorted({len(copies) for copies in found.values()}) == [1, 8]
    assert sum(len(copies) == 8 for copies in found.values()) == TINY.n_shared
    assert all(len(set(copies)) == 1 for copies in found.values())
    assert len({copies[0] for copies in found.values()}) == len(found) == TINY.n_drawn


def test_test_images_are_no_training_images(tree):
    trained = {one for s in TINY.subjects for one in ids_of(tree, f"subj{s:02d}", "training")}
    tested = {one for s in TINY.subjects for one in ids_of(tree, f"subj{s:02d}", "test")}
    assert trained and tested and trained.isdisjoint(tested)


def test_a_file_holds_the_image_of_its_id(tree):
    path = next((tree / "subj03/test_split/test_images").iterdir())
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), draw(compose(TINY.seed, int(path.stem[-5:])), 32))


def test_images_differ_in_content_and_place():
    scenes = [compose(0, image_id) for image_id in range(60)]
    things = [thing for scene in scenes for thing in scene.objects]
    assert {thing.category for thing in things} == set(CATEGORIES)
    assert len({scene.background for scene in scenes}) == 5
    for coordinate in ("x", "y"):
        at = np.array([getattr(thing, coordinate) for thing in things])
        assert at.min() < 0.2 and at.max() > 0.8 and at.std() > 0.15


# ------------------------------------------------------------------------------------------------ responses


def training_signals(root: Path, subject: str, hemisphere: str) -> np.ndarray:
    """Signals of the training images, computed from the written bank and the written weights."""
    bank, ids = (np.load(root / "truth" / f"{name}.npy") for name in ("features", "feature_ids"))
    return load_planted(root, subject, hemisphere).signals(
        bank[np.searchsorted(ids, ids_of(root, subject, "training"))]
    )


def training_noise(root: Path, subject: str, hemisphere: str) -> np.ndarray:
    """What is left of the responses without their signal, at standard deviation 1, without dead vertices."""
    truth = load_truth(root, subject, hemisphere)
    signal = training_signals(root, subject, hemisphere) * np.sqrt(truth["ceiling"])
    noise = (load_responses(root, subject, hemisphere) - signal) / np.sqrt(1 - truth["ceiling"])
    return noise[:, ~truth["dead"]]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("hemisphere", HEMISPHERES)
def test_the_written_ceiling_is_what_a_perfect_model_reaches(long_tree, hemisphere):
    truth = load_truth(long_tree, "subj01", hemisphere)
    percent = np.load(long_tree / "noise_ceiling" / "subj01" / f"{hemisphere}.npy")
    np.testing.assert_allclose(percent / 100, truth["ceiling"], rtol=1e-6)
    ceiling, alive = percent[~truth["dead"]] / 100, ~truth["dead"]
    signals = training_signals(long_tree, "subj01", hemisphere)[:, alive]
    responses = load_responses(long_tree, "subj01", hemisphere)[:, alive]
    reached = squared_correlation(signals, responses)
    # The bound for 400 images and 400 reference images: over seeds the mean difference has standard deviation 0.008,
    # as the variance of a signal over so few images moves in many vertices at once.
    assert abs(np.mean(reached - ceiling)) < 0.03
    # Given the variance that the signals have over these very images, only each vertex's own noise is left.
    variance = signals.var(axis=0, dtype=np.float64)
    expected = ceiling * variance / (ceiling * variance + 1 - ceiling)
    assert abs(np.mean(reached - expected)) < 0.012
    assert np.mean(np.abs(reached - expected)) < 0.04
    np.testing.assert_allclose(responses.std(axis=0), 1, atol=0.25)


def test_noise_is_white_over_images_hemispheres_and_subjects(long_tree, tree):
    noise = training_noise(long_tree, "subj01", "lh")
    assert noise.std() == pytest.approx(1, abs=0.02)
    # 256 rows come from one random stream: the next must not repeat it.
    assert abs(correlation(noise[256:], noise[: 400 - 256])) < 0.05
    assert abs(correlation(noise[1:], noise[:-1])) < 0.05
    left, right, other = (
        training_noise(tree, *who)[:, :110] for who in (("subj01", "lh"), ("subj01", "rh"), ("subj02", "lh"))
    )
    assert abs(correlation(left, right)) < 0.15 and abs(correlation(left, other)) < 0.15


def test_signals_are_standard_over_the_reference_images(long_tree):
    planted = load_planted(long_tree, "subj01", "lh")
    signals = planted.signals(np.load(long_tree / "truth" / "features.npy")[-400:])
    np.testing.assert_allclose(signals.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(signals.std(axis=0), 1, atol=1e-3)


def test_the_test_truth_is_signal_and_signal_with_noise(long_tree):
    planted = load_planted(long_tree, "subj01", "lh")
    features = np.load(long_tree / "truth" / "features.npy")
    rows = np.searchsorted(np.load(long_tree / "truth" / "feature_ids.npy"), ids_of(long_tree, "subj01", "test"))
    signal, responses = (np.load(long_tree / "truth/subj01" / f"lh_test_{n}.npy") for n in ("signal", "responses"))
    np.testing.assert_allclose(signal, planted.signals(features[rows]) * np.sqrt(planted.ceiling), atol=1e-4)
    noise = (responses - signal)[:, ~planted.dead] / np.sqrt(1 - planted.ceiling[~planted.dead])
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(noise[:10].ravel(), noise[10:].ravel())[0, 1]) < 0.1


def test_dead_vertices_are_constant_and_silent_ones_pure_noise(long_tree):
    for hemisphere in HEMISPHERES:
        truth = load_truth(long_tree, "subj01", hemisphere)
        percent = np.load(long_tree / "noise_ceiling" / "subj01" / f"{hemisphere}.npy")
        responses = load_responses(long_tree, "subj01", hemisphere)
        silent = (percent == 0) & ~truth["dead"]
        assert truth["dead"].sum() == 2 and silent.sum() >= 1
        assert (responses[:, truth["dead"]] == 0).all() and (percent[truth["dead"]] == 0).all()
        assert (responses[:, ~truth["dead"]].std(axis=0) > 0.5).all()
        signals = np.load(long_tree / "truth" / "subj01" / f"{hemisphere}_test_signal.npy")
        assert (signals[:, silent] == 0).all() and (signals[:, percent > 0].std(axis=0) > 0).all()


@pytest.mark.parametrize("subject", ["subj06", "subj08"])
@pytest.mark.parametrize("hemisphere", HEMISPHERES)
def test_deleted_vertices_do_not_shift_the_dead_ones(tree, subject, hemisphere):
    truth = load_truth(tree, subject, hemisphere)
    assert truth["dead"].sum() == 2 and (truth["ceiling"][truth["dead"]] == 0).all()
    np.testing.assert_array_equal((load_responses(tree, subject, hemisphere) == 0).all(axis=0), truth["dead"])


def test_ceilings_agree_between_subjects_through_the_masks():
    config = replace(TINY, n_vertices=(4_000, 4_000))
    bank = np.random.default_rng(0).standard_normal((10, N_FEATURES))
    first, other = (plant(config, subject, "lh", bank, np.ones(len(CHANNELS))) for subject in (1, 6))
    columns = np.searchsorted(first.vertices.index, other.vertices.index)
    assert 0.18 < correlation(first.ceiling[columns], other.ceiling) < 0.32  # normal scores: 0.25


def test_ceilings_are_percent_with_the_means_of_their_subjects(tree):
    means = [np.load(tree / "noise_ceiling" / f"subj{s:02d}" / "lh.npy").mean() for s in TINY.subjects]
    assert np.argmin(means) == 7 and min(means) > 12 and max(means) < 50


def test_a_vertex_is_the_same_in_all_subjects_through_the_masks(tree):
    first, other = load_truth(tree, "subj01", "rh"), load_truth(tree, "subj06", "rh")
    mask = load_mask(tree, "subj06", "rh.all-vertices_fsaverage_space")
    np.testing.assert_array_equal(np.flatnonzero(mask), other["index"])
    columns = np.searchsorted(first["index"], other["index"])
    for name in VERTEX_ARRAYS:
        np.testing.assert_array_equal(first[name][columns], other[name])
    together = np.corrcoef(first["weights"][columns].ravel(), other["weights"].ravel())[0, 1]
    assert 0.5 < together < 0.99
    # Padding at the end instead of aligning puts most columns beside another vertex.
    assert (first["field_x"][: len(other["index"])] != other["field_x"]).mean() > 0.3


# ------------------------------------------------------------------------------------------------- planted


def test_left_hemispheres_look_right_and_ventral_areas_up(tree):
    for hemisphere, side in (("lh", 1), ("rh", -1)):
        truth = load_truth(tree, "subj01", hemisphere)
        early = truth["level"] == "early"
        assert (side * (truth["field_x"][early] - 0.5) >= 0).all()
        assert (truth["field_y"][truth["area"] == "V1v"] <= 0.5).all()
        assert (truth["field_y"][truth["area"] == "V1d"] >= 0.5).all()


def test_fields_grow_from_early_to_late(tree):
    truth = load_truth(tree, "subj01", "lh")
    sizes = [np.mean(truth["field_size"][truth["area"] == area]) for area in ("V1v", "V2v", "V3v", "hV4", "ventral")]
    assert sizes == sorted(sizes) and sizes[-1] > 5 * sizes[0]


def pixels_seen(truth: dict[str, np.ndarray], vertex: int) -> np.ndarray:
    """Pixels of an image of ANALYSIS_SIDE that a pixel-driven vertex can depend on: its field's cells and their rim."""
    at = (np.arange(ANALYSIS_SIDE) + 0.5) / ANALYSIS_SIDE
    reach = FIELD_REACH * truth["field_size"][vertex] + 0.5 / GROUPS[0].grid + RIM / ANALYSIS_SIDE
    near_x = np.abs(at - truth["field_x"][vertex]) <= reach
    near_y = np.abs(at - truth["field_y"][vertex]) <= reach
    return near_y[:, None] & near_x[None, :]


def test_an_early_vertex_sees_nothing_outside_its_field(tree):
    planted, truth = load_planted(tree, "subj01", "lh"), load_truth(tree, "subj01", "lh")
    scene = compose(0, 7)
    pixels = draw(scene, ANALYSIS_SIDE)
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    before = planted.signals(encode(pixels, scene)[None])[0]
    local = [v for v in np.flatnonzero(truth["level"] == "early") if not pixels_seen(truth, v).all()]
    assert len(local) > 10
    for vertex in local:
        seen = pixels_seen(truth, vertex)[..., None]
        outside, inside = (np.where(where, noise, pixels) for where in (~seen, seen))
        assert planted.signals(encode(outside, scene)[None])[0, vertex] == before[vertex]
        assert abs(planted.signals(encode(inside, scene)[None])[0, vertex] - before[vertex]) > 0.05


def with_faces(scene: Scene, dx: float, opacity: float) -> Scene:
    """The scene with its faces moved to the side and faded."""
    changed = [
        replace(thing, x=thing.x + dx, contrast=thing.contrast * opacity) if thing.category == "face" else thing
        for thing in scene.objects
    ]
    return replace(scene, objects=tuple(changed))


def test_a_face_vertex_wants_a_face_and_hardly_minds_where(tree):
    planted, truth = load_planted(tree, "subj01", "lh"), load_truth(tree, "subj01", "lh")
    faces = np.isin(truth["area"], ["FFA-1", "FFA-2"])
    early = truth["level"] == "early"
    scenes = [compose(0, image_id) for image_id in range(40)]
    scenes = [scene for scene in scenes if any(thing.category == "face" for thing in scene.objects)]

    def change(dx: float, opacity: float) -> np.ndarray:
        rows = [
            np.stack([encode(draw(one, ANALYSIS_SIDE), one) for one in chosen])
            for chosen in (scenes, [with_faces(scene, dx, opacity) for scene in scenes])
        ]
        return np.abs(planted.signals(rows[1]) - planted.signals(rows[0])).mean(axis=0)

    moved, removed = change(0.2, 1.0), change(0.0, 0.01)
    assert removed[faces].mean() > 0.5
    assert moved[faces].mean() < 0.3 * removed[faces].mean()
    assert moved[early].mean() > removed[early].mean() * 0.8


def test_weights_stay_within_the_groups_of_the_level(tree):
    truth = load_truth(tree, "subj01", "lh")
    assert tuple(truth["channels"]) == CHANNELS
    groups = np.array([channel.partition("/")[0] for channel in CHANNELS])
    early = truth["level"] == "early"
    assert (truth["weights"][np.ix_(early, groups == "early")] != 0).all()
    assert (truth["weights"][np.ix_(early, groups != "early")] == 0).all()
    assert (truth["weights"][np.ix_(truth["level"] == "late", groups == "early")] == 0).all()


# ------------------------------------------------------------------------------------------------- mistakes


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or empty folder; found something in it"):
        simulate(SMALLEST, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


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


def test_progress_runs_to_its_total(tmp_path):
    seen: list[tuple[int, int]] = []
    simulate(SMALLEST, tmp_path / "tree", lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == SMALLEST.n_drawn + SMALLEST.n_reference + 4
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"n_subjects": 9}, "n_subjects to be a whole number from 1 to 8, found 9"),
        ({"n_subjects": 3, "n_train": (5, 6)}, "n_train to be one count or 3 .* found 2"),
        ({"n_train": 4.5}, "n_train to be a whole number .* found 4.5"),
        ({"n_train": 20, "n_shared": 21}, "n_shared to be a whole number from 0 to 20, found 21"),
        ({"n_image_ids": 1_000}, "n_image_ids .* found 1000"),
        ({"n_vertices": (500,)}, r"n_vertices to be \(left, right\)"),
        ({"n_vertices": (500, 200_000)}, "n_vertices .* found 200000"),
        ({"n_dead": 400}, "n_dead .* found 400"),
        ({"image_size": 8}, "image_size .* found 8"),
        ({"seed": -1}, "seed .* found -1"),
        ({"workers": 0}, "workers .* found 0"),
    ],
)
def test_impossible_counts_are_refused_in_one_line(options, found):
    with pytest.raises(ConfigError, match=found) as error:
        SimulateConfig(**options)
    assert "\n" not in str(error.value)
