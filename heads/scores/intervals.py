"""Intervals of differences between paired scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % interval.

    low, high : its ends; None for fewer than two pairs
    """

    mean: float
    low: float | None
    high: float | None
    n_pairs: int


def paired_interval(differences: Sequence[float]) -> Interval:
    """Mean of the differences of some pairs, with Student's interval: mean ± t(0.975, n - 1) sd / sqrt(n).

    differences : one or more, one for each pair
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, n_pairs = float(values.mean()), len(values)
    if n_pairs < 2:
        return Interval(mean, None, None, n_pairs)
    half = float(stdtrit(n_pairs - 1, 0.975) * values.std(ddof=1) / np.sqrt(n_pairs))
    return Interval(mean, mean - half, mean + half, n_pairs)
