"""Out-of-fold predictions of different heads are put on one level and scale, from what their heads saw alone."""

import numpy as np
import pytest
import torch

from featcache.cache.store import Row, create_store
from featcache.dataset.splits import assign_folds
from heads.config import RidgeConfig
from heads.features.rows import LayerRows
from heads.modules.linear import LinearMap
from heads.scores.metrics import pearson_r
from heads.solvers.base import LinearFits, Piece, comparable, level_and_spread
from heads.solvers.held_out import TrainedFolds, TunedRidge
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import prior_set
from heads.solvers.layers.ridge import DualFolds

N_FOLDS, N_TRAIN, N_TEST, N_FEATURES, N_VERTICES = 3, 90, 8, 10, 4
IDS = np.random.default_rng(2).permutation(73_000)[:N_TRAIN]
FOLDS = assign_folds(IDS, N_FOLDS, 0)


def pieces(seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for k in range(N_FOLDS):
        rows = np.flatnonzero(k == FOLDS)
        parts = (rng.normal(size=(len(rows), N_VERTICES)), rng.normal(size=N_VERTICES), rng.uniform(0.1, 2, N_VERTICES))
        found.append(Piece(rows, *(torch.tensor(part, dtype=torch.float32) for part in parts)))
    return found


def test_pieces_are_given_one_level_and_the_mean_spread():
    given, level = pieces(), torch.tensor([1.0, -2.0, 0.0, 5.0])
    common = np.mean([piece.spread.numpy() for piece in given], 0)
    for piece, found in zip(given, comparable(given, level), strict=True):
        for vertex in range(N_VERTICES):
            z = (piece.predictions[:, vertex] - piece.mean[vertex]) / piece.spread[vertex]
            np.testing.assert_allclose(found[:, vertex], level[vertex] + z * common[vertex], rtol=1e-4, atol=1e-5)


def test_r_within_a_fold_does_not_change():
    rng, given = np.random.default_rng(1), pieces()
    for piece, found in zip(given, comparable(given, torch.zeros(N_VERTICES)), strict=True):
        responses = rng.normal(size=found.shape)
        np.testing.assert_allclose(
            pearson_r(found.numpy(), responses), pearson_r(piece.predictions.numpy(), responses), atol=1e-5
        )


def test_heads_that_differ_in_level_and_scale_alone_become_the_same():
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(N_TRAIN, N_VERTICES)), dtype=torch.float32)
    given = []
    for k in range(N_FOLDS):
        rows = np.flatnonzero(k == FOLDS)
        given.append(
            Piece(
                rows,
                k + (k + 1) * z[rows],
                torch.full((N_VERTICES,), float(k)),
                torch.full((N_VERTICES,), float(k + 1)),
            )
        )
    for piece, found in zip(given, comparable(given, torch.ones(N_VERTICES)), strict=True):
        torch.testing.assert_close(found, 1 + 2 * z[piece.rows])


def test_level_and_spread_are_mean_and_deviation_and_1_where_nothing_varies():
    rng = np.random.default_rng(0)
    values = torch.tensor(rng.normal(size=(30, 3)), dtype=torch.float64)
    values[:, 1] = 4.0
    mean, spread = level_and_spread(values)
    np.testing.assert_allclose(mean, values.numpy().mean(0))
    np.testing.assert_allclose(spread, [values[:, 0].numpy().std(), 1, values[:, 2].numpy().std()])


def planted(seed=0, n_features=N_FEATURES):
    rng = np.random.default_rng(seed)
    features = torch.tensor(rng.normal(size=(N_TRAIN + N_TEST, n_features)) + 2, dtype=torch.float32)
    weights = torch.tensor(rng.normal(size=(n_features, N_VERTICES)), dtype=torch.float32)
    noise = torch.tensor(rng.normal(size=(N_TRAIN, N_VERTICES)), dtype=torch.float32)
    return features, features[:N_TRAIN] @ weights + noise


@pytest.mark.parametrize("n_features", [N_FEATURES, 120], ids=["few features", "many"])
def test_linear_heads_of_shared_features_are_applied_as_they_are(n_features):
    features, responses = planted(n_features=n_features)
    maps = [LinearMap(torch.randn(n_features, N_VERTICES), torch.randn(N_VERTICES)) for _ in range(N_FOLDS)]
    solver = TrainedFolds({"lh": maps}, FOLDS, list(range(N_FOLDS)))
    fits = LinearFits(solver, [features], N_TRAIN, [""]).fit(responses, hemisphere="lh")
    for k, (fold, head) in enumerate(zip(fits.folds, maps, strict=True)):
        everything = features.double() @ head.weights.double() + head.intercept.double()
        ((rows, predictions, mean, spread),) = fold.held_out
        assert rows.tolist() == np.flatnonzero(k == FOLDS).tolist()
        np.testing.assert_allclose(predictions, everything[rows], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(fold.test, everything[N_TRAIN:], rtol=1e-4, atol=1e-4)
        own = everything[:N_TRAIN][k != FOLDS].numpy()
        np.testing.assert_allclose(mean, own.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(spread, own.std(0), rtol=1e-3)
    test = torch.stack([fold.test for fold in fits.folds]).mean(0)
    saved = features[N_TRAIN:] @ fits.saved["", "weights"] + fits.saved["", "intercept"]
    torch.testing.assert_close(saved, test, rtol=1e-4, atol=1e-4)


def test_linear_heads_of_each_folds_features_are_applied_to_those():
    features = [planted(seed)[0] for seed in range(N_FOLDS)]
    responses = planted(0)[1]
    solver = TunedRidge([x[:N_TRAIN] for x in features], FOLDS, list(range(N_FOLDS)), IDS, RidgeConfig())
    names = [f"fold{k}." for k in range(N_FOLDS)]
    fits = LinearFits(solver, features, N_TRAIN, names).fit(responses)
    for k, (fold, heads) in enumerate(zip(fits.folds, solver.fit(responses), strict=True)):
        assert len(fold.held_out) == len(heads.held_out) > 1
        for piece, (rows, head) in zip(fold.held_out, heads.held_out, strict=True):
            torch.testing.assert_close(piece.predictions, head(features[k][rows]))
            own = head(features[k][:N_TRAIN][k != FOLDS])
            torch.testing.assert_close(piece.spread, own.std(0, correction=0), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(piece.mean, own.mean(0), rtol=1e-3, atol=1e-4)
        saved = features[k][N_TRAIN:] @ fits.saved[f"fold{k}.", "weights"] + fits.saved[f"fold{k}.", "intercept"]
        torch.testing.assert_close(saved, fold.test)


def test_a_head_that_says_one_thing_of_every_image_has_a_spread_that_can_be_divided_by():
    features, responses = planted()
    maps = [LinearMap(torch.zeros(N_FEATURES, N_VERTICES), torch.ones(N_VERTICES)) for _ in range(N_FOLDS)]
    solver = TrainedFolds({"lh": maps}, FOLDS, list(range(N_FOLDS)))
    fits = LinearFits(solver, [features], N_TRAIN, [""]).fit(responses, hemisphere="lh")
    given = [piece for fold in fits.folds for piece in fold.held_out]
    level = responses.mean(0)
    for found in comparable(given, level):
        torch.testing.assert_close(found, level.expand_as(found))


N_NOISE = 60


def pooled_r(fits, responses):
    given = [piece for fold in fits.folds for piece in fold.held_out]
    raw, even = np.empty(responses.shape), np.empty(responses.shape)
    for piece, values in zip(given, comparable(given, responses.mean(0)), strict=True):
        raw[piece.rows], even[piece.rows] = piece.predictions, values
    return pearson_r(raw, responses.numpy()).mean(), pearson_r(even, responses.numpy()).mean()


def test_predictions_of_noise_have_an_r_of_zero_and_not_below(tmp_path):
    """Responses that have nothing to do with the images: pooled as they are, predictions correlate below 0."""
    rng = np.random.default_rng(4)
    shapes = {"low": (3, 3, 6), "deep": (2, 2, 8)}
    rows = {name: Row(shape, "float16") for name, shape in shapes.items()}
    store = create_store(tmp_path, "f", {"x": 1}, np.arange(N_NOISE + 2), N_NOISE, rows, {})
    store.append({n: rng.normal(size=(N_NOISE + 2, *shape)).astype(np.float16) for n, shape in shapes.items()})
    kernels = LayerKernels(LayerRows(store, tuple(shapes), "cpu", np.inf), N_NOISE, 1e9)
    ids = rng.permutation(73_000)[:N_NOISE]
    folds = assign_folds(ids, 3, 0)
    responses = torch.tensor(rng.normal(size=(N_NOISE, 1500)), dtype=torch.float32)
    priors = prior_set(kernels.rows.grids, (None, 0.0, 1.0))[::5]
    heads = DualFolds([kernels], folds, [0, 1, 2], ids, RidgeConfig(), priors, False, 1e9)
    raw, even = pooled_r(heads.fit(responses), responses)
    assert abs(even) < 0.02 and raw < even - 0.05
