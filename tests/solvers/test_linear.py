"""Linear maps are applied to the features that they were fitted to, and saved as one map or as one of each fold."""

import numpy as np
import pytest
import torch

from heads.modules.linear import LinearMap
from heads.solvers.base import comparable, mean_of_tests
from heads.solvers.linear import FoldHeads, LinearPredictions
from support.plans import plan_of

N_FOLDS, N_TRAIN, N_TEST, N_FEATURES, N_VERTICES = 3, 90, 8, 10, 4
IDS = np.random.default_rng(2).permutation(73_000)[:N_TRAIN]
FROZEN, TRAINED = (plan_of(IDS, N_FOLDS, trained=trained) for trained in (False, True))


def features_of(seed=0, n_features=N_FEATURES):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(N_TRAIN + N_TEST, n_features)) + 2, dtype=torch.float32)


def map_of(seed=0, n_features=N_FEATURES):
    generator = torch.Generator().manual_seed(seed)
    return LinearMap(*(torch.randn(*shape, generator=generator) for shape in ((n_features, N_VERTICES), (N_VERTICES,))))


def assert_is_applied(piece, head, features, trained):
    """In float64, with the level and the spread of the rows that are trained on."""
    everything = features.double() @ head.weights.double() + head.intercept.double()
    own = everything[:N_TRAIN][trained].numpy()
    np.testing.assert_allclose(piece.predictions, everything[piece.rows], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(piece.mean, own.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(piece.std, own.std(0), rtol=1e-3)


@pytest.mark.parametrize("n_features", [N_FEATURES, 120], ids=["few features", "many"])
def test_linear_heads_of_shared_features_are_applied_as_they_are(n_features):
    features, maps = features_of(n_features=n_features), [map_of(k, n_features) for k in range(N_FOLDS)]
    heads = [FoldHeads([(FROZEN.inside(k), head)], head) for k, head in enumerate(maps)]
    fits = LinearPredictions([features], FROZEN).fits(heads)
    for k, (fold, head) in enumerate(zip(fits.folds, maps, strict=True)):
        (piece,) = fold.held_out
        assert np.array_equal(piece.rows, FROZEN.inside(k))
        assert_is_applied(piece, head, features, FROZEN.outside(k))
        torch.testing.assert_close(fold.test, head(features[N_TRAIN:]), rtol=1e-4, atol=1e-4)
    test = mean_of_tests(fits.folds)
    assert set(fits.saved) == {("", "weights"), ("", "intercept")}
    saved = features[N_TRAIN:] @ fits.saved["", "weights"] + fits.saved["", "intercept"]
    torch.testing.assert_close(saved, test, rtol=1e-4, atol=1e-4)


def test_linear_heads_of_each_folds_features_are_applied_to_those():
    features = [features_of(seed) for seed in range(N_FOLDS)]
    heads = []
    for k in range(N_FOLDS):
        parts = TRAINED.parts(k)
        maps = [map_of(10 * k + choice) for choice in range(len(parts) + 1)]
        heads.append(FoldHeads(list(zip(parts, maps, strict=False)), maps[-1]))
    fits = LinearPredictions(features, TRAINED).fits(heads)
    for k, (fold, own) in enumerate(zip(fits.folds, heads, strict=True)):
        assert len(fold.held_out) == len(own.held_out) > 1
        for piece, (rows, head) in zip(fold.held_out, own.held_out, strict=True):
            assert np.array_equal(piece.rows, rows)
            assert_is_applied(piece, head, features[k], TRAINED.outside(k))
        saved = features[k][N_TRAIN:] @ fits.saved[f"fold{k}.", "weights"] + fits.saved[f"fold{k}.", "intercept"]
        torch.testing.assert_close(saved, fold.test)
        torch.testing.assert_close(fold.test, own.final(features[k][N_TRAIN:]))


def test_a_head_that_says_one_thing_of_every_image_has_a_spread_that_can_be_divided_by():
    flat = LinearMap(torch.zeros(N_FEATURES, N_VERTICES), torch.ones(N_VERTICES))
    heads = [FoldHeads([(FROZEN.inside(k), flat)], flat) for k in range(N_FOLDS)]
    fits = LinearPredictions([features_of()], FROZEN).fits(heads)
    pieces, level = [piece for fold in fits.folds for piece in fold.held_out], torch.arange(N_VERTICES) + 0.5
    for found in comparable(pieces, level):
        torch.testing.assert_close(found, level.expand_as(found))
