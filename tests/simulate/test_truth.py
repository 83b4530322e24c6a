"""Responses are what the written truth says: its signals, its ceilings, and white noise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featcache.dataset.rois import HEMISPHERES
from featcache.simulate.features import ANALYSIS_SIDE, CHANNELS, N_FEATURES, encode
from featcache.simulate.scenes import Scene, compose, draw
from featcache.simulate.truth import plant
from support.simulated import TINY, ids_of, load_planted, load_responses, load_truth


def squared_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Column by column, in float64."""
    a, b = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64) for x in (a, b))
    return (a * b).sum(axis=0) ** 2 / ((a**2).sum(axis=0) * (b**2).sum(axis=0))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_ceilings_agree_between_subjects_through_the_masks():
    config = replace(TINY, n_vertices=(4_000, 4_000))
    bank = np.random.default_rng(0).standard_normal((10, N_FEATURES))
    first, other = (plant(config, subject, "lh", bank, np.ones(len(CHANNELS))) for subject in (1, 6))
    columns = np.searchsorted(first.vertices.index, other.vertices.index)
    assert 0.18 < correlation(first.ceiling[columns], other.ceiling) < 0.32  # normal scores: 0.25


def test_ceilings_are_percent_with_the_means_of_their_subjects(tree):
    means = [np.load(tree / "noise_ceiling" / f"subj{s:02d}" / "lh.npy").mean() for s in TINY.subjects]
    assert np.argmin(means) == 7 and min(means) > 12 and max(means) < 50


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
            np.stack([encode(draw(scene, ANALYSIS_SIDE), scene) for scene in chosen])
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
