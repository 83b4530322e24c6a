"""Axes and errors of ridge regression equal the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heads.config import RidgeConfig
from heads.solvers.ridge import eigenbasis, is_exact
from support.linear import (
    all_shapes,
    errors_of,
    planted,
    slow_gcv,
    slow_loo,
)


@pytest.mark.parametrize(("exact", "slow_error"), [(True, slow_loo), (False, slow_gcv)], ids=["loo", "gcv"])
@pytest.mark.parametrize(("n_images", "n_features"), [(30, 6), (12, 25), (16, 15), (15, 15)])
def test_errors_are_those_of_refits_and_of_the_hat_matrix(n_images, n_features, exact, slow_error):
    features, responses, _ = planted(n_images, n_features, n_vertices=3)
    penalties = [0.5, 5.0, 50.0]
    errors = errors_of(features, responses, penalties, exact)
    expected = [slow_error(features, responses, penalty) for penalty in penalties]
    np.testing.assert_allclose(errors, expected, rtol=1e-3)


@all_shapes
def test_scores_are_the_features_on_orthogonal_axes(n_images, n_features):
    features, _, _ = planted(n_images, n_features)
    x = torch.from_numpy(features)
    basis = eigenbasis(x)
    axes = basis.weights(torch.eye(len(basis.values)))
    np.testing.assert_allclose(axes.T @ axes, np.eye(len(basis.values)), atol=1e-4)
    for scores in (basis.scores(x), basis.train_scores(x), (x - x.mean(0)) @ axes):
        np.testing.assert_allclose(scores.T @ scores, torch.diag(basis.values), atol=1e-4 * basis.values.max())


@pytest.mark.parametrize(("n_images", "exact"), [(1024, True), (1025, False)])
def test_auto_is_exact_as_long_as_it_is_cheap(n_images, exact):
    assert is_exact(RidgeConfig(), n_images) is exact
    assert is_exact(RidgeConfig(selection="loo"), n_images)
    assert not is_exact(RidgeConfig(selection="gcv"), n_images)
