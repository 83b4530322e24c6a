"""Axes of images, of features and of landmarks are those of plain matrices in float64."""

import numpy as np
import pytest
import torch

import heads.solvers.layers.axes
from featcache.cache.store import Row, create_store
from heads.features.rows import LayerRows
from heads.solvers.layers.axes import method_for, view_under
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior

N, N_TRAIN, N_LANDMARKS = 90, 80, 20
ROWS = np.delete(np.arange(N_TRAIN), np.arange(3, 60, 4))
PRIOR = Prior(0.3, 0.7, 0.4, 0.5)
METHODS = ("images", "features", "landmarks")


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Of 33 features, so that there are fewer than images."""
    monkeypatch.setattr(heads.solvers.layers.axes, "LANDMARKS", N_LANDMARKS)
    rng = np.random.default_rng(0)
    values = {
        "low": (rng.normal(size=(N, 3, 3, 3)) + 2).astype(np.float16),
        "deep": rng.normal(size=(N, 6)).astype(np.float32),
    }
    rows = {name: Row(one.shape[1:], str(one.dtype)) for name, one in values.items()}
    store = create_store(tmp_path, "f", {"x": 1}, np.arange(N), N_TRAIN, rows, {})
    store.append(values)
    return LayerKernels(LayerRows(store, tuple(values), "cpu", np.inf), np.arange(N_TRAIN))


def features_of(kernels, method, landmarks):
    """(N, n) float64 whose inner products are what the method takes for the kernel."""
    x = kernels.features(PRIOR).double().numpy()
    if method != "landmarks":
        return x
    values, vectors = np.linalg.eigh(x[landmarks] @ x[landmarks].T)
    keep = values > 1e-7 * values[-1]
    return x @ (x[landmarks].T @ vectors[:, keep] / np.sqrt(values[keep]))


@pytest.mark.parametrize("method", METHODS)
def test_ridge_on_the_axes_is_plain_ridge(kernels, method):
    view = view_under(PRIOR, kernels, method)
    x = features_of(kernels, method, view.span[0] if view.span else None)
    basis = view.basis(ROWS)
    y = torch.randn(len(ROWS), 4, generator=torch.Generator().manual_seed(0))
    y -= y.mean(0)
    centred = x - x[ROWS].mean(0)
    expected = centred @ np.linalg.solve(
        centred[ROWS].T @ centred[ROWS] + 0.7 * np.eye(x.shape[1]), centred[ROWS].T @ y.double().numpy()
    )
    weights = basis.rotated(y) / (basis.values[:, None] + 0.7)
    np.testing.assert_allclose(basis.predictions(basis.on_features(weights)), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(basis.scores(np.arange(N)) @ weights, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_dual_weights_on_the_kernel_predict_the_same_up_to_a_level(kernels, method):
    basis = view_under(PRIOR, kernels, method).basis(ROWS)
    weights = torch.randn(len(basis.values), 3, generator=torch.Generator().manual_seed(1))
    index, dual = basis.dual(weights)
    assert method == "landmarks" or np.array_equal(index, ROWS)
    x = kernels.features(PRIOR).double().numpy()
    found = x @ x[index].T @ dual.double().numpy()
    expected = basis.predictions(basis.on_features(weights)).double().numpy()
    np.testing.assert_allclose(found - found.mean(0), expected - expected.mean(0), rtol=1e-3, atol=1e-3)


def test_axes_are_of_what_there_is_least(monkeypatch):
    monkeypatch.setattr(heads.solvers.layers.axes, "LANDMARKS", N_LANDMARKS)
    assert method_for(20, 33) == "images"
    assert method_for(80, 33) == "landmarks"  # 20 of them
    monkeypatch.setattr(heads.solvers.layers.axes, "LANDMARKS", 40)
    assert method_for(33, 33) == "images"
    assert method_for(80, 33) == "features"


def test_landmarks_are_training_images_and_the_same_for_every_fold(kernels):
    first, second = (view_under(PRIOR, kernels, "landmarks").span[0] for _ in range(2))
    assert np.array_equal(first, second) and len(np.unique(first)) == N_LANDMARKS and first.max() < N_TRAIN


def test_as_many_landmarks_as_training_images_are_exact(kernels, monkeypatch):
    monkeypatch.setattr(heads.solvers.layers.axes, "LANDMARKS", N_TRAIN)
    y = torch.randn(len(ROWS), 4, generator=torch.Generator().manual_seed(0))
    y -= y.mean(0)
    found = []
    for method in ("images", "landmarks"):
        basis = view_under(PRIOR, kernels, method).basis(ROWS)
        found.append(basis.predictions(basis.on_features(basis.rotated(y) / (basis.values[:, None] + 0.7))))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
