"""Weights of images, and r under them."""

import numpy as np
import pytest

from heads.scores.metrics import pearson_r
from heads.scores.resampling import N_DRAWS, image_weights, response_sums, standardised, weighted_r, with_all_alike

IDS = np.random.default_rng(9).permutation(73_000)[:150]


def slow_r(p, y, weights):
    p, y = p - np.average(p, weights=weights), y - np.average(y, weights=weights)
    return (weights * p * y).sum() / np.sqrt((weights * p**2).sum() * (weights * y**2).sum())


def test_an_image_has_its_weight_whoever_saw_it():
    drawn = image_weights(IDS, 0)
    some = np.array([5, 80, 3])
    np.testing.assert_array_equal(image_weights(IDS[some], 0), drawn[:, some])
    assert not np.array_equal(image_weights(IDS, 1), drawn) and len(drawn) == N_DRAWS
    assert (drawn > 0).all() and drawn.mean() == pytest.approx(1, abs=0.02)
    assert np.abs(np.corrcoef(drawn.T)[np.triu_indices(len(IDS), 1)]).mean() < 0.06  # as 400 draws leave by chance


def test_weighted_r_is_that_of_weighted_images_and_of_all_alike_first():
    p, y = np.random.default_rng(0).normal(size=(2, 150, 4)).astype(np.float32)
    p += y
    weights = with_all_alike(image_weights(IDS, 3, 5))
    r = weighted_r(weights, p, y)
    expected = [[slow_r(p[:, v].astype(float), y[:, v].astype(float), w) for v in range(4)] for w in weights]
    np.testing.assert_allclose(r, expected, atol=1e-4)
    np.testing.assert_allclose(r[0], pearson_r(p, y), atol=1e-5)
    np.testing.assert_array_equal(weighted_r(weights, p, y, response_sums(weights, y)), r)


def test_a_constant_is_standardised_to_0_and_has_r_0():
    p, y = np.random.default_rng(0).normal(size=(2, 150, 3)).astype(np.float32)
    p[:, 0], y[:, 1] = 1000.3, -2
    z, responses = standardised(p + 5), standardised(y)
    assert not z[:, 0].any() and not responses[:, 1].any()
    np.testing.assert_allclose(z[:, 1:].std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-6)
    r = weighted_r(with_all_alike(image_weights(IDS, 0, 3)), z, responses)
    assert not r[:, :2].any() and r[:, 2].all()
