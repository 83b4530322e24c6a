"""Whether one model is better than another at a vertex: p values by swapping the two at random images.

The null: at every image the two predictions of a vertex could be swapped. With z the standardised predictions, y the
standardised responses and r the mean of both r, image i adds

    d_i = y_i (z_ai - z_bi) - r (z_ai**2 - z_bi**2) / 2

to n (r_a - r_b). The sum of the second term is 0; it is what an image adds by way of the scale of the predictions. A
swap turns the sign of d_i. A picture is swapped for all subjects that saw it, and at all vertices.
"""

import numpy as np

from heads.scores.resampling import CROSS_FITTED_SPREAD

_AT_ONCE = 256  # permutations whose sums are held at once


def swaps(ids: np.ndarray, n_permutations: int, seed: int) -> np.ndarray:
    """Signs, (n_permutations, n_images) float32, -1 where an image's predictions are swapped; of the image id alone."""
    signs = np.empty((n_permutations, len(ids)), np.float32)
    for column, image_id in enumerate(ids.tolist()):
        signs[:, column] = 2 * np.random.default_rng((seed, 3, image_id)).integers(2, size=n_permutations) - 1
    return signs


def contributions(predictions: np.ndarray, others: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """d of every image, (n_images, n_vertices) float32, whose mean over images is the difference of r.

    predictions, others, responses : (n_images, n_vertices) float32, `standardised`
    """
    both = predictions + others
    mean_r = (np.einsum("iv,iv->v", both, responses, dtype=np.float64) / len(both) / 2).astype(np.float32)
    mean_r *= predictions.any(0) & others.any(0)  # the scale of a constant is not estimated
    both *= mean_r / -2
    both += responses
    both *= predictions - others
    return np.asarray(both)


def swap_p(signs: np.ndarray, d: np.ndarray, cross_fitted: bool = True) -> np.ndarray:
    """Two-sided p values, (n_vertices,), of sums of d as far from 0 as they are.

    signs : from `swaps`
    d : from `contributions`
    cross_fitted : whether predictions are out of fold, so that their difference varies more (`CROSS_FITTED_SPREAD`)
    """
    observed = np.abs(d.sum(0, dtype=np.float64))
    rounding = 1e-6 * (len(d) + np.abs(d).sum(0, dtype=np.float64))
    spread = CROSS_FITTED_SPREAD if cross_fitted else 1.0
    counts = np.zeros(d.shape[1], dtype=np.int64)
    for start in range(0, len(signs), _AT_ONCE):
        counts += (np.abs(signs[start : start + _AT_ONCE] @ d) * spread >= observed - rounding).sum(0)
    return np.asarray((1 + counts) / (1 + len(signs)))
