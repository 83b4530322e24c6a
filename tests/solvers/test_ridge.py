"""Axes and errors of ridge regression equal the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heads.config import RidgeConfig
from heads.solvers.ridge import (
    centre_kernel,
    decomposed_on,
    eigenbasis,
    eigh_of,
    is_exact,
    penalty_errors,
    squared_errors,
)
from support.linear import (
    all_shapes,
    errors_of,
    planted,
    slow_gcv,
    slow_loo,
    slow_ridge,
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


def test_a_centred_kernel_is_that_of_features_centred_over_the_training_images():
    train, new = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0)).double() + 3
    centred = centre_kernel(new[:7] @ train.T, (train @ train.T).mean(0))
    np.testing.assert_allclose(centred, (new[:7] - train.mean(0)) @ (train - train.mean(0)).T, atol=1e-12)
    stacked = centre_kernel(torch.stack([new @ train.T, train @ train.T]), (train @ train.T).mean(0).expand(2, -1))
    np.testing.assert_allclose(stacked[0, :7], centred, atol=1e-12)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, 3), (torch.float64, 5)])
def test_eigenvalues_are_kept_as_far_as_products_are_right(dtype, kept):
    values = torch.tensor([1.0, 1e-2, 1e-6, 1e-9, 1e-12, 1e-15], dtype=dtype)
    assert len(eigh_of(torch.diag(values))[0]) == kept


def test_squared_errors_are_those_of_the_formula():
    features, responses, _ = planted(30, 6, n_vertices=3)
    x, y = torch.from_numpy(features).double(), torch.from_numpy(responses).double()
    basis = eigenbasis(x[:20])
    mean = y[:20].mean(0)
    rotated = basis.train_scores(x[:20]).T @ (y[:20] - mean)
    errors = squared_errors(basis.values, rotated, torch.tensor([0.5, 5.0]), basis.scores(x[20:]), y[20:] - mean)
    for penalty, of_vertices in zip([0.5, 5.0], errors, strict=True):
        weights, intercept = slow_ridge(features[:20], responses[:20], [penalty] * 3)
        expected = np.square(responses[20:] - features[20:] @ weights - intercept).sum(0)
        np.testing.assert_allclose(of_vertices, expected, rtol=1e-9)


@pytest.mark.parametrize(("n", "where"), [(511, "cpu"), (512, "cuda")])
def test_large_matrices_are_taken_apart_on_the_device_and_small_ones_beside_it(pretended_cuda, monkeypatch, n, where):
    assert decomposed_on(torch.empty(n, n, device="cuda")).type == where
    assert decomposed_on(torch.empty(n, n)).type == "cpu"


@pytest.mark.parametrize("large", [1, 100], ids=["on the device", "beside it"])
def test_axes_come_back_to_the_device_as_the_cpu_has_them(pretended_cuda, monkeypatch, large):
    monkeypatch.setattr("heads.solvers.ridge._LARGE", large)
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    gram = rows.T @ rows  # five of nine axes are null
    found, expected = eigh_of(gram.cuda()), eigh_of(gram)
    assert [part.is_cuda for part in found] == [True, True] and len(found[0]) == 4
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
    assert found[0].dtype == torch.float32


def test_a_fit_waits_for_nothing_but_its_penalties_once_axes_are_there(pretended_cuda):
    """With the axes given, a host that ran ahead would have every step of a fit waiting for the device."""
    rng = torch.Generator().manual_seed(0)
    values, rotated = torch.rand(6, generator=rng) + 1, torch.randn(6, 5, generator=rng)
    squares, offered = rotated.square().sum(0) + 1, torch.tensor([0.1, 1.0, 10.0])
    arguments = [tensor.cuda() for tensor in (values, rotated, squares, offered)]
    pretended_cuda.forget()
    errors = penalty_errors(arguments[0], 9, *arguments[1:], None)
    assert pretended_cuda.waits == []
    assert torch.equal(errors.cpu(), penalty_errors(values, 9, rotated, squares, offered, None))
