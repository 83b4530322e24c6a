"""Saved weights predict what the mean over folds predicts, although folds have other scales of features."""

import numpy as np
import pytest
import torch

import heads.solvers.layers.sizes
from featcache.cache.store import Row, create_store
from heads.config import RidgeConfig
from heads.features.rows import LayerRows
from heads.solvers.base import mean_of_tests
from heads.solvers.layers.priors import Prior
from heads.solvers.layers.ridge import LayeredRidge, scaled_kernels
from support.plans import block_of, plan_of

N_TRAIN, N_TEST = 60, 7
SHAPES = {"pooled": (6,), "low": (4, 4, 3)}


@pytest.mark.parametrize("at_once", [1024, 2])
def test_saved_weights_are_the_test_predictions(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(heads.solvers.layers.sizes, "AT_ONCE", at_once)  # vertices that one core fits
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.2, 5, N_TRAIN + N_TEST)  # so that the halves of the folds have other scales
    values = {
        name: (rng.normal(size=(N_TRAIN + N_TEST, *shape)) * spread.reshape(-1, *[1] * len(shape)) + 2).astype("f4")
        for name, shape in SHAPES.items()
    }
    rows = {name: Row(one.shape[1:], str(one.dtype)) for name, one in values.items()}
    store = create_store(tmp_path, "f", {"x": 1}, np.arange(N_TRAIN + N_TEST), N_TRAIN, rows, {})
    store.append(values)
    plan = plan_of(rng.permutation(73_000)[:N_TRAIN], 5)
    kernels = scaled_kernels([LayerRows(store, tuple(SHAPES), "cpu", np.inf)], plan)
    assert len(kernels) == 2
    priors = [Prior(), Prior(0.3, 0.3, 0.5), Prior(0.7, 0.5, 0.35, 0.5)]
    config = RidgeConfig(penalties=(0.01, 1.0, 10.0))
    solver = LayeredRidge(kernels, plan, config, priors)
    flat = np.concatenate([one.reshape(len(one), -1) for one in values.values()], 1).astype(np.float64)
    y = torch.tensor(flat[:N_TRAIN, :5] + rng.normal(size=(N_TRAIN, 5)), dtype=torch.float32)
    fits = solver.fit(block_of(y))
    weights = np.concatenate([fits.saved["", f"{name}.weights"].double().numpy() for name in SHAPES])
    predicted = flat[N_TRAIN:] @ weights + fits.saved["", "intercept"].double().numpy()
    np.testing.assert_allclose(mean_of_tests(fits.folds), predicted, rtol=1e-3, atol=5e-3)
