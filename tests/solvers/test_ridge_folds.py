"""Closed-form heads fold by fold equal the plain formula in float64, and see nothing of what they are scored on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featcache.dataset.splits import assign_folds
from heads.config import RidgeConfig
from heads.scores.metrics import pearson_r
from heads.solvers.base import mean_of_tests
from heads.solvers.estimator import RidgeHead
from heads.solvers.ridge_folds import RidgeFolds
from support.linear import both_selections, planted
from support.plans import block_of, plan_of

MULTIPLES = (0.03, 0.3, 3.0, 30.0)


def slow_fold(features, responses, trained, config):
    """(all predictions, second best error / best error of each vertex) in float64, by the singular values."""
    x, y = features.astype(np.float64), responses.astype(np.float64)
    mean, level, n_images = x[trained].mean(0), y[trained].mean(0), int(trained.sum())
    left, singular, right = np.linalg.svd(x[trained] - mean, full_matrices=False)
    kept = singular**2 > 1e-7 * singular.max() ** 2 if singular.max() > 0 else singular > 0
    left, singular, right = left[:, kept], singular[kept], right[kept]
    scale = (singular**2).mean() if kept.any() else 1.0
    exact = config.selection == "loo" or (config.selection == "auto" and n_images <= 1024)
    errors, predictions = [], []
    for penalty in sorted(config.penalties):
        h = singular**2 / (singular**2 + penalty * scale)
        residuals = y[trained] - level - left @ (h[:, None] * (left.T @ (y[trained] - level)))
        left_out = 1 - 1 / n_images - left**2 @ h if exact else np.full(n_images, 1 - (h.sum() + 1) / n_images)
        errors.append(((residuals / np.maximum(left_out, 1e-6)[:, None]) ** 2).mean(0))
        weights = right.T @ ((h / singular)[:, None] * (left.T @ (y[trained] - level)))
        predictions.append((x - mean) @ weights + level)
    errors = np.array(errors)
    best = errors.argmin(0)
    least = np.sort(errors, 0)
    sure = least[1] > least[0] * 1.001 + 1e-9
    return np.array(predictions)[best, :, np.arange(y.shape[1])].T, sure


def every_fold(features, responses, folds, config, **options):
    """Each fold's fit, with all training images once more as test images."""
    x = torch.from_numpy(np.concatenate([features, features]))
    return RidgeFolds(x, plan_of(len(folds), folds=folds), config, **options).fit(block_of(responses))


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    n_images=st.integers(12, 70),
    n_features=st.integers(1, 60),
    n_vertices=st.integers(1, 5),
    n_folds=st.integers(2, 6),
    selection=st.sampled_from(["auto", "loo", "gcv"]),
    constant=st.booleans(),
    repeated=st.booleans(),
    offset=st.sampled_from([0, 30]),
    seed=st.integers(0, 2**32 - 1),
)
@example(45, 52, 2, 2, "auto", False, True, 30, 43)  # a vertex whose predictions hardly vary
@example(12, 57, 2, 3, "auto", False, True, 30, 7745)  # rounding leaves 1.0e-7 of the largest eigenvalue
def test_formula_holds_for_any_shape(
    n_images, n_features, n_vertices, n_folds, selection, constant, repeated, offset, seed
):
    features, responses, _ = planted(n_images, n_features, n_vertices, noise=1, seed=seed)
    features, responses = features + np.float32(offset), responses - np.float32(offset)
    if constant:
        features[:, 0], responses[:, 0] = 2.5, -3.0
    if repeated:
        features[: n_images // 2] = features[0]  # one image, over and over
    folds = np.random.default_rng(seed).permutation(n_images) % n_folds  # one image over in some of them
    config = RidgeConfig(penalties=MULTIPLES, selection=selection)
    fits = every_fold(features, responses, folds, config)
    for k, fold in enumerate(fits.folds):
        expected, sure = slow_fold(features, responses, folds != k, config)
        ((rows, predictions, mean, spread),) = fold.held_out
        assert rows.tolist() == np.flatnonzero(folds == k).tolist()
        np.testing.assert_allclose(predictions[:, sure], expected[rows][:, sure], atol=5e-3, rtol=1e-3)
        np.testing.assert_allclose(fold.test[:, sure], expected[:, sure], atol=5e-3, rtol=1e-3)
        own = expected[folds != k]
        np.testing.assert_allclose(mean, own.mean(0), atol=1e-3, rtol=1e-4)
        varies = sure & (own.std(0) > 1e-2)
        # two series that differ by 5e-3 at most, as predictions may above, have spreads that differ no more
        np.testing.assert_allclose(spread.numpy()[varies], own.std(0)[varies], atol=5e-3, rtol=2e-2)
        assert (spread > 0).all()
    saved = torch.from_numpy(features) @ fits.saved["", "weights"] + fits.saved["", "intercept"]
    test = mean_of_tests(fits.folds)
    np.testing.assert_allclose(saved, test, atol=5e-3, rtol=1e-3)


@both_selections
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize(("n_images", "n_features"), [(120, 10), (40, 60), (40, 32), (40, 33), (40, 31)])
def test_every_fold_is_fitted_as_if_alone(n_images, n_features, offset, selection):
    features, responses, _ = planted(n_images, n_features, noise=1)
    features, responses = features + np.float32(offset), responses - np.float32(offset)
    folds = np.arange(n_images) % 5  # equal folds, so that 32 training images meet 31, 32 and 33 features
    config = RidgeConfig(penalties=(0.1, 1.0, 10.0), selection=selection)
    fits = every_fold(features, responses, folds, config)
    assert len(fits.folds) == 5
    for k, fold in enumerate(fits.folds):
        alone = RidgeHead(config.penalties, selection).fit(features[folds != k], responses[folds != k])
        expected = alone.predict(features)
        np.testing.assert_allclose(fold.test, expected, atol=2e-2 if offset else 1e-3)
        np.testing.assert_allclose(fold.held_out[0].predictions, expected[folds == k], atol=2e-2 if offset else 1e-3)


@both_selections
@pytest.mark.parametrize(("n_images", "n_features"), [(120, 10), (40, 60)])
@pytest.mark.parametrize("size", [1.0, 1e6])
def test_held_out_responses_do_not_reach_their_fold(n_images, n_features, selection, size):
    features, responses, _ = planted(n_images, n_features, noise=1)
    folds, config = np.arange(n_images) % 4, RidgeConfig(penalties=MULTIPLES, selection=selection)
    before = every_fold(features, responses, folds, config)
    other = responses.copy()
    other[folds == 2] = size * np.random.default_rng(5).normal(size=other[folds == 2].shape)
    after = every_fold(features, other, folds, config)
    torch.testing.assert_close(after.folds[2].test, before.folds[2].test, rtol=0, atol=0)
    assert (after.folds[1].test - before.folds[1].test).abs().max() > 0.01


def test_vertices_do_not_depend_on_their_block():
    features, responses, _ = planted(60, 8, n_vertices=10)
    x = torch.from_numpy(np.concatenate([features, features]))
    solver = RidgeFolds(x, plan_of(60, folds=np.arange(60) % 3), RidgeConfig())
    together = solver.fit(block_of(responses))
    parts = [solver.fit(block_of(responses[:, vertices])) for vertices in (slice(0, 4), slice(4, 10))]
    for fold, whole in enumerate(together.folds):
        test = torch.cat([part.folds[fold].test for part in parts], 1)
        np.testing.assert_allclose(test, whole.test, atol=1e-5)


def test_weights_that_are_not_wanted_are_not_formed():
    features, responses, _ = planted(40, 5)
    folds = np.arange(40) % 4
    without, with_them = (every_fold(features, responses, folds, RidgeConfig(), save=save) for save in (False, True))
    assert without.saved == {} and set(with_them.saved) == {("", "weights"), ("", "intercept")}
    for one, other in zip(without.folds, with_them.folds, strict=True):
        torch.testing.assert_close(one.test, other.test, rtol=0, atol=0)


@pytest.mark.parametrize(("n_images", "n_features"), [(400, 20), (150, 200)])
@both_selections
def test_shuffled_responses_cannot_be_predicted(n_images, n_features, selection):
    features, responses, _ = planted(n_images, n_features, n_vertices=60)
    folds, config = assign_folds(np.arange(n_images), 5, 0), RidgeConfig(selection=selection)
    shuffled = responses[np.random.default_rng(3).permutation(n_images)]
    assert mean_r_in_folds(features, responses, folds, config) > 0.4
    assert abs(mean_r_in_folds(features, shuffled, folds, config)) < 0.05


def mean_r_in_folds(features, responses, folds, config):
    """Fold by fold: across folds, the mean of the training images is below where that of the held-out ones is above."""
    pieces = [fold.held_out[0] for fold in every_fold(features, responses, folds, config).folds]
    return np.mean([pearson_r(piece.predictions.numpy(), responses[piece.rows]) for piece in pieces])
