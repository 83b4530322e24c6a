"""Responses that a linear map of features made, and ridge regression by its plain formulas."""

import numpy as np
import pytest
import torch

from heads.solvers.ridge import eigenbasis, penalty_errors, sum_of_squares

SHAPES = [(60, 10), (10, 60), (21, 20), (20, 20), (20, 21), (22, 20), (5, 1), (3, 4)]
MULTIPLES = (1e-3, 1e-2, 0.1, 1.0, 10.0)

all_shapes = pytest.mark.parametrize(("n_images", "n_features"), SHAPES)
both_selections = pytest.mark.parametrize("selection", ["loo", "gcv"])


def planted(n_images, n_features, n_vertices=6, noise=0.5, seed=0):
    """Features, responses, and the weights that made them; float32, as the cache has them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_images, n_features))
    weights = rng.normal(size=(n_features, n_vertices)) / np.sqrt(n_features)
    responses = features @ weights + noise * rng.normal(size=(n_images, n_vertices))
    return features.astype(np.float32), responses.astype(np.float32), weights


def slow_ridge(features, responses, penalties):
    """Weights and intercepts, a vertex at a time: solve (X'X + p I) w = X'y in float64, X and y centred."""
    features, responses = features.astype(np.float64), responses.astype(np.float64)
    centred, weights = features - features.mean(0), []
    for y, penalty in zip(responses.T, penalties, strict=True):
        gram = centred.T @ centred + penalty * np.eye(centred.shape[1])
        weights.append(np.linalg.solve(gram, centred.T @ (y - y.mean())))
    weights = np.stack(weights, axis=1)
    return weights, responses.mean(0) - features.mean(0) @ weights


def slow_hat(features, penalty):
    """(n_images, n_images) H with H y the predictions of the training images, intercept and all."""
    centred = features.astype(np.float64) - features.astype(np.float64).mean(0)
    gram = centred.T @ centred + penalty * np.eye(centred.shape[1])
    return centred @ np.linalg.solve(gram, centred.T) + 1 / len(features)


def slow_gcv(features, responses, penalty):
    hat, n_images = slow_hat(features, penalty), len(features)
    residuals = responses - hat @ responses.astype(np.float64)
    return (residuals**2).mean(0) / (1 - np.trace(hat) / n_images) ** 2


def slow_loo(features, responses, penalty):
    """Refit without each image in turn."""
    errors = []
    for left_out in range(len(features)):
        kept = np.arange(len(features)) != left_out
        weights, intercept = slow_ridge(features[kept], responses[kept], [penalty] * responses.shape[1])
        errors.append((responses[left_out] - features[left_out].astype(np.float64) @ weights - intercept) ** 2)
    return np.mean(errors, axis=0)


def errors_of(features, responses, penalties, exact):
    """(n_penalties, n_vertices), as heads choose by them."""
    x, y = torch.from_numpy(features), torch.from_numpy(responses)
    basis, centred = eigenbasis(x), y - y.mean(0)
    scores, squares = basis.train_scores(x), sum_of_squares(centred)
    rows = (scores, centred) if exact else None
    return penalty_errors(basis.values, len(x), scores.T @ centred, squares, torch.tensor(penalties), rows)
