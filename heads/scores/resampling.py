"""The Bayesian bootstrap over images: weights that belong to pictures, and r under them."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from heads.scores.metrics import r_from_sums

N_DRAWS = 400
LEVEL = 0.95  # of intervals
_CONSTANT = 1e-7  # parts of the largest value: less variation is the rounding of float32

# Out-of-fold predictions of one fold were learnt from the responses of the others: a linear head's prediction times
# the response is a sum over pairs of images, and each pair of two folds is in the sum twice, once from either side. So
# a score varies up to twice as much, in variance, as images that were drawn independently would let it
# (docs/decisions/0029).
CROSS_FITTED_SPREAD = math.sqrt(2)


class ResponseSums(NamedTuple):
    """Sums over weighted images of what does not depend on a model: weights (n_draws, 1), responses and squares."""

    n: np.ndarray
    y: np.ndarray
    yy: np.ndarray


def image_weights(image_ids: np.ndarray, seed: int, n_draws: int = N_DRAWS) -> np.ndarray:
    """Weights of the Bayesian bootstrap, (n_draws, n_images), exponential with mean 1 (Rubin 1981).

    They depend on the image id alone: an image that several subjects saw has one weight for all of them.
    """
    unique, places = np.unique(image_ids, return_inverse=True)
    drawn = np.stack([np.random.default_rng((seed, int(i))).exponential(size=n_draws) for i in unique], axis=1)
    return drawn[:, places]


def with_all_alike(weights: np.ndarray) -> np.ndarray:
    """Weights, (1 + n_draws, n_images) float32, of which the first row has every image as it is."""
    return np.concatenate([np.ones((1, weights.shape[1])), weights]).astype(np.float32)


def standardised(values: np.ndarray) -> np.ndarray:
    """Columns, (n_images, n_columns), with mean 0 and standard deviation 1, float32; a constant column is exactly 0."""
    centred = np.subtract(values, values[:1], dtype=np.float32)  # of a constant column exactly 0
    centred -= centred.mean(0, dtype=np.float64).astype(np.float32)
    scale = np.sqrt(np.einsum("iv,iv->v", centred, centred, dtype=np.float64) / len(values))
    constant = scale <= _CONSTANT * np.abs(values).max(0)
    centred *= np.where(constant, 0, 1 / np.where(constant, 1, scale)).astype(np.float32)
    return np.asarray(centred)


@dataclass(frozen=True, eq=False)
class Columns:
    """Predictions or responses, (n_images, n_vertices), and the same standardised, once for all who read them."""

    values: np.ndarray

    @cached_property
    def z(self) -> np.ndarray:
        """float32; see `standardised`."""
        return standardised(self.values)


def response_sums(weights: np.ndarray, responses: np.ndarray) -> ResponseSums:
    """Sums of responses, (n_images, n_vertices), for each draw of weights, (n_draws, n_images)."""
    return ResponseSums(weights.sum(1, dtype=np.float64)[:, None], weights @ responses, weights @ responses**2)


def weighted_r(
    weights: np.ndarray, predictions: np.ndarray, responses: np.ndarray, sums: ResponseSums | None = None
) -> np.ndarray:
    """r over weighted images, (n_draws, n_vertices).

    weights : (n_draws, n_images) float32
    predictions, responses : (n_images, n_vertices) float32, standardised or nearly so: sums are float32
    sums : of the responses, where several models share them
    """
    n, y, yy = response_sums(weights, responses) if sums is None else sums
    p, pp, py = weights @ predictions, weights @ predictions**2, weights @ (predictions * responses)
    return r_from_sums(n, p, pp, py, y, yy)
