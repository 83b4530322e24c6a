"""Differences of two models at each vertex: what they add up to, uniform nulls, and planted effects."""

import numpy as np
import pytest
from scipy.stats import kstest

from heads.scores.metrics import pearson_r
from heads.scores.resampling import standardised
from heads.statistics.difference import contributions, swap_p, swaps
from support.statistics import out_of_fold

N = 150
IDS = np.random.default_rng(1).permutation(9_000)[:N]


def d_of(predictions, others, responses):
    return contributions(*(standardised(values) for values in (predictions, others, responses)))


def test_contributions_add_up_to_the_difference_and_a_swap_turns_their_sign():
    y, a, b = np.random.default_rng(0).normal(size=(3, N, 5)).astype(np.float32)
    a, b = 3 * (a + y) + 7, b - y / 2
    b[:, 4] = 2
    d = d_of(a, b, y)
    np.testing.assert_allclose(d.mean(0), pearson_r(a, y) - pearson_r(b, y), atol=1e-5)
    np.testing.assert_allclose(d_of(b, a, y), -d, atol=1e-5)


def test_p_values_are_those_of_a_loop_over_swaps():
    y, a, b = np.random.default_rng(0).normal(size=(3, N, 8)).astype(np.float32)
    d, signs = d_of(a + 0.3 * y, b, y), swaps(IDS, 300, 0)
    sums = np.array([(sign[:, None].astype(float) * d).sum(0) for sign in signs])
    for cross_fitted, spread in ((True, np.sqrt(2)), (False, 1)):
        expected = (1 + (spread * np.abs(sums) >= np.abs(d.sum(0, dtype=float))).sum(0)) / 301
        np.testing.assert_allclose(swap_p(signs, d, cross_fitted), expected)


def test_a_picture_is_swapped_for_all_who_saw_it():
    signs = swaps(IDS, 50, 0)
    np.testing.assert_array_equal(swaps(IDS[[5, 3]], 50, 0), signs[:, [5, 3]])
    assert set(np.unique(signs)) == {-1, 1} and abs(signs.mean()) < 0.05
    assert not np.array_equal(swaps(IDS, 50, 1), signs)


def test_equal_models_do_not_differ_and_a_planted_difference_is_found():
    y, noise = np.random.default_rng(0).normal(size=(2, N, 20)).astype(np.float32)
    good, bad = y + noise, y + 4 * noise[:, ::-1]
    signs = swaps(IDS, 199, 0)
    assert (swap_p(signs, d_of(good, 5 * good + 2, y)) == 1).all()
    assert (swap_p(signs, d_of(good, bad, y)) <= 0.02).all()


@pytest.mark.slow
def test_nulls_are_uniform_for_given_predictions_and_for_heads_that_are_equally_good():
    given, fitted, narrow = [], [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ids, folds, signs = rng.permutation(50_000)[:N], rng.integers(0, 5, N), None
        signs = swaps(ids, 199, seed)
        y, a, b = rng.normal(size=(3, N, 40)).astype(np.float32)
        given.append(swap_p(signs, d_of(a + y, b + y, y), cross_fitted=False))
        features = rng.normal(size=(2, N, 20))
        responses = (0.1 * features.sum((0, 2))[:, None] / np.sqrt(20) + y).astype(np.float32)
        d = d_of(*(out_of_fold(one, responses, folds, 20) for one in features), responses)
        fitted.append(swap_p(signs, d))
        narrow.append(swap_p(signs, d, cross_fitted=False))
    jitter = rng.uniform(size=30 * 40) / 200
    assert kstest(np.concatenate(given) - jitter, "uniform").pvalue > 0.01
    assert np.mean(np.concatenate(fitted) <= 0.05) < 0.07 < np.mean(np.concatenate(narrow) <= 0.05)
