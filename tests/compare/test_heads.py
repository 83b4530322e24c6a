"""Predictions, products and pulls agree with ridge regression that is solved image by image."""

import numpy as np
import pytest
import torch

from heads.compare.heads import Heads, Images, all_images
from heads.compare.spaces import Candidate
from heads.solvers.layers.priors import Prior
from support.bands import planted_bands, spaces_of_features

N, N_FIT, PENALTY = 60, 45, 3.0
WEIGHTS = (0.7, 0.3)
ROWS, HELD = np.arange(N_FIT), np.arange(N_FIT, N)


@pytest.fixture
def planted():
    return planted_bands(np.random.default_rng(0), N, (0.2, 0.1), 0.3, n_own=3, n_vertices=4)


def scaled(features):
    """Bands side by side, each scaled as in its kernel and by the root of its weight; (N, n_features)"""
    parts = [
        np.sqrt(weight) * (one - one.mean(0)) / one.std(0) / np.sqrt(one.shape[1])
        for one, weight in zip(features, WEIGHTS, strict=True)
    ]
    return np.concatenate(parts, 1)


def slow_fit(x, y, image_weights):
    """Weights, mean of features and intercept of weighted ridge regression, in float64."""
    w = image_weights / image_weights.sum()
    x_mean, y_mean = w @ x, w @ y
    xc, yc = x - x_mean, y - y_mean
    gram = xc.T @ (image_weights[:, None] * xc) + PENALTY * np.eye(x.shape[1])
    return np.linalg.solve(gram, xc.T @ (image_weights[:, None] * yc)), x_mean, y_mean


def heads_of(features, responses, landmarks=None):
    spaces, candidate = spaces_of_features(features, landmarks), Candidate(Prior(), WEIGHTS)
    basis = spaces.basis(candidate, ROWS)
    y = torch.from_numpy(responses.astype(np.float32))
    mean = y[ROWS].mean(0)
    target = y[ROWS] - mean
    penalty = torch.full((y.shape[1],), PENALTY)
    return Heads(basis, basis.rotated(target), penalty, target, HELD, y[HELD] - mean), spaces, candidate


@pytest.mark.parametrize("landmarks", [None, np.arange(0, N_FIT, 2)])
def test_predictions_and_products_are_those_of_ridge_on_scaled_bands(planted, landmarks):
    features, responses = planted
    heads, spaces, candidate = heads_of(features, responses, landmarks)
    x = scaled(features)
    beta, x_mean, y_mean = slow_fit(x[ROWS], responses[ROWS], np.ones(N_FIT))
    expected = (x[HELD] - x_mean) @ beta
    np.testing.assert_allclose(heads.predictions, expected, atol=2e-4)
    y, n_first = responses[HELD] - y_mean, features[0].shape[1]
    parts = [(x[HELD] - x_mean)[:, part] @ beta[part] for part in (slice(n_first), slice(n_first, None))]
    products = heads.products(spaces, candidate)
    np.testing.assert_allclose(products, [part * (2 * y - expected) for part in parts], atol=2e-3)
    np.testing.assert_allclose(products.sum(0), y**2 - (y - expected) ** 2, atol=2e-3)


def test_a_pull_is_what_a_little_more_weight_of_an_image_adds_to_the_sum_of_squared_errors(planted):
    features, responses = planted
    errors, x = heads_of(features, responses)[0].errors(), scaled(features)

    def sum_of_errors(image, more):
        weights = np.ones(N_FIT)
        weights[image] += more
        beta, x_mean, y_mean = slow_fit(x[ROWS], responses[ROWS], weights)
        return ((responses[HELD] - y_mean - (x[HELD] - x_mean) @ beta) ** 2).sum(0)

    np.testing.assert_allclose(errors.values.sum(0), sum_of_errors(0, 0), rtol=1e-4)
    slow = [(sum_of_errors(image, 1e-4) - sum_of_errors(image, -1e-4)) / 2e-4 for image in range(N_FIT)]
    np.testing.assert_allclose(errors.pulls, slow, atol=2e-3 * np.abs(slow).max())


def test_parts_of_a_fold_have_their_own_values_and_pull_together():
    parts = [Images(torch.full((n, 2), float(n)), torch.ones(3, 2)) for n in (1, 2)]
    together = all_images(parts)
    assert together.values[:, 0].tolist() == [1, 2, 2] and together.pulls.tolist() == [[2, 2]] * 3
    assert together.at(torch.tensor([True, False])).values.shape == (3, 1)
