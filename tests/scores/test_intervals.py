"""Intervals of paired differences are those of the t test."""

import numpy as np
import pytest
from scipy import stats

from heads.scores.intervals import paired_interval


@pytest.mark.parametrize("n_pairs", [2, 3, 9])
def test_an_interval_is_that_of_the_paired_t_test(n_pairs):
    first, second = np.random.default_rng(0).normal(size=(2, n_pairs))
    found = paired_interval(list(first - second))
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high)) and found.n_pairs == n_pairs
    assert found.mean == pytest.approx((first - second).mean())


def test_one_pair_has_no_interval():
    found = paired_interval([0.5])
    assert (found.mean, found.low, found.high, found.n_pairs) == (0.5, None, None, 1)
