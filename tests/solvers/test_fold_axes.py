"""Targets and predictions on the axes of each fold are those of plain linear algebra, for more and for fewer images."""

import numpy as np
import pytest
import torch

from heads.solvers.base import mean_of_tests
from heads.solvers.fold_axes import FoldAxes

N_TRAIN, N_TEST, N_VERTICES, N_FOLDS = 40, 6, 3, 4
SHAPES = pytest.mark.parametrize("n_features", [5, 60], ids=["more images than features", "fewer"])


def made_up(n_features, seed=0):
    """Features (n_train + n_test, n_features), responses and folds; each fold on a level of its own."""
    rng = np.random.default_rng(seed)
    folds = rng.permutation(N_TRAIN) % N_FOLDS
    features = rng.normal(size=(N_TRAIN + N_TEST, n_features)) + 2
    features[:N_TRAIN] += folds[:, None]
    responses = rng.normal(size=(N_TRAIN, N_VERTICES)) + 3 * folds[:, None]
    return features.astype(np.float32), responses.astype(np.float32), folds


def axes_of(features, folds, by_rows=True):
    return FoldAxes(torch.from_numpy(features), folds, lambda n_images: by_rows)


@SHAPES
def test_scores_are_of_held_out_and_test_images_about_the_trained_mean(n_features):
    features, _, folds = made_up(n_features)
    for k, fold in enumerate(axes_of(features, folds).folds):
        assert fold.held_out.tolist() == np.flatnonzero(folds == k).tolist()
        assert fold.train_rows.tolist() == np.flatnonzero(folds != k).tolist()
        x = features.astype(np.float64)
        mean = x[:N_TRAIN][folds != k].mean(0)
        others = np.concatenate([x[:N_TRAIN][folds == k], x[N_TRAIN:]]) - mean
        trained = x[:N_TRAIN][folds != k] - mean
        # axes may be turned; products of scores may not
        np.testing.assert_allclose(fold.train_scores @ fold.train_scores.T, trained @ trained.T, atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(fold.scores @ fold.train_scores.T, others @ trained.T, atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(fold.train_scores, axis=0) ** 2, fold.basis.values, rtol=1e-3)


@SHAPES
@pytest.mark.parametrize("by_rows", [True, False])
def test_targets_are_of_the_images_that_a_fold_trains_on(n_features, by_rows):
    features, responses, folds = made_up(n_features)
    axes = axes_of(features, folds, by_rows)
    own = [fold.train_scores for fold in axes_of(features, folds).folds]
    for k, target in enumerate(axes.targets(torch.from_numpy(responses.copy()))):
        trained = responses[folds != k].astype(np.float64)
        centred = trained - trained.mean(0)
        np.testing.assert_allclose(target.mean, trained.mean(0), rtol=1e-5)
        np.testing.assert_allclose(target.squares, (centred**2).sum(0), rtol=1e-4)
        np.testing.assert_allclose(target.rotated, own[k].numpy().T @ centred, atol=2e-3, rtol=1e-3)
        if target.rows is not None:
            np.testing.assert_allclose(target.rows, centred, atol=1e-5)
        assert target.rows is not None or (not by_rows and n_features < N_TRAIN)


@SHAPES
def test_responses_are_left_as_they_were(n_features):
    features, responses, folds = made_up(n_features)
    given = torch.from_numpy(responses.copy())
    for target in axes_of(features, folds).targets(given):
        target.rotated.zero_()
    assert np.array_equal(given, responses)


@SHAPES
def test_predictions_are_those_of_the_weights_that_are_saved(n_features):
    """The heads of each fold, formed on the features, say the same; what is saved is their mean, at one spread."""
    features, responses, folds = made_up(n_features)
    axes = axes_of(features, folds)
    targets = list(axes.targets(torch.from_numpy(responses)))
    solved = [
        (target.rotated / (fold.basis.values[:, None] + 3.0), target.mean)
        for fold, target in zip(axes.folds, targets, strict=True)
    ]
    fits = axes.predict(iter(solved), True)
    weights = []
    for k, fit in enumerate(fits.folds):
        x, y = features[:N_TRAIN][folds != k].astype(np.float64), responses[folds != k].astype(np.float64)
        centred = x - x.mean(0)
        head = np.linalg.solve(centred.T @ centred + 3.0 * np.eye(n_features), centred.T @ (y - y.mean(0)))
        level = y.mean(0) - x.mean(0) @ head
        ((rows, predictions, mean, spread),) = fit.held_out
        assert rows.tolist() == np.flatnonzero(folds == k).tolist()
        np.testing.assert_allclose(predictions, features[rows] @ head + level, atol=5e-3, rtol=1e-3)
        np.testing.assert_allclose(fit.test, features[N_TRAIN:] @ head + level, atol=5e-3, rtol=1e-3)
        np.testing.assert_allclose(mean, (x @ head + level).mean(0), atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(spread, (x @ head + level).std(0), atol=1e-3, rtol=1e-3)
        weights.append(head)
    saved = features[N_TRAIN:] @ fits.saved["", "weights"].numpy() + fits.saved["", "intercept"].numpy()
    np.testing.assert_allclose(saved, mean_of_tests(fits.folds), atol=5e-3)
    stds = np.array([fit.held_out[0].std.numpy() for fit in fits.folds])
    expected = np.mean([head * ratio for head, ratio in zip(weights, stds.mean(0) / stds, strict=True)], 0)
    np.testing.assert_allclose(fits.saved["", "weights"], expected, atol=2e-3)
    assert axes.predict(iter(solved), False).saved == {}


@SHAPES
def test_heads_that_say_one_thing_have_a_spread_of_1(n_features):
    features, responses, folds = made_up(n_features)
    axes = axes_of(features, folds)
    solved = [(torch.zeros_like(target.rotated), target.mean) for target in axes.targets(torch.from_numpy(responses))]
    for fit in axes.predict(iter(solved), False).folds:
        assert (fit.held_out[0].std == 1).all()


@SHAPES
def test_a_held_out_fold_has_no_say_in_its_own_axes_and_targets(n_features):
    """Not in the last digit: sums are added up over the other folds, and nothing is taken off a whole."""
    features, responses, folds = made_up(n_features)
    other_features, other_responses = features.copy(), responses.copy()
    other_features[:N_TRAIN][folds == 1] *= 1e3
    other_responses[folds == 1] -= 1e4
    found = []
    for x, y in ((features, responses), (other_features, other_responses)):
        axes = axes_of(x, folds)
        found.append((axes.folds[1], list(axes.targets(torch.from_numpy(y)))[1]))
    (fold, target), (other_fold, other_target) = found
    assert torch.equal(fold.basis.values, other_fold.basis.values)
    assert torch.equal(fold.basis.mixing, other_fold.basis.mixing)
    assert torch.equal(target.rotated, other_target.rotated) and torch.equal(target.squares, other_target.squares)
