"""Banded ridge regression: a penalty for every band of features and every vertex, by kernels of the bands.

A band is a group of features. Let K_b be the kernel X_b X_b' of band b, centred over the training images and divided
by its mean diagonal, so that bands of any number of features and of any unit count alike. Under weights w of the bands
(from 0, with sum 1) and a penalty p, the dual coefficients of a vertex are

    c = (sum_b w_b K_b + p I)^-1 (y - mean y)

and the prediction of an image x is mean y + sum_b w_b K_b(x, .) c: one summand for each band. This is ridge regression
with the penalty p / w_b on the weights of band b, if X_b X_b' has a mean diagonal of 1. Since the mean diagonal of
sum_b w_b K_b is 1 too, p is in units of it: the ratio of noise to signal that the fit expects.

Each vertex takes the weights and the penalty with the least error on held-out images of inner folds. One
eigendecomposition for each candidate and inner fold serves all penalties and vertices (random search of
Dupré la Tour et al. 2022, https://doi.org/10.1016/j.neuroimage.2022.119728).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from featcache.errors import ConfigError
from heads.solvers.ridge import VERTEX_BLOCK, centre_kernel, eigh_of, squared_errors, weighted_mean

_CONCENTRATIONS = (0.1, 1.0)  # of the random weights, in turn: few bands with most of the weight, and any weights

Fold = tuple[np.ndarray, np.ndarray]  # rows to fit to, and rows held out, as scikit-learn's splitters give them


@dataclass(frozen=True)
class BandedFit:
    """Heads of all vertices, on the bands' kernels.

    weights : (n_bands, n_vertices) of the bands, from 0, with sum 1 over bands
    penalty : (n_vertices,) in units of the mean diagonal of the weighted kernel, which is 1
    coefficients : (n_images, n_vertices) dual, in the unit of the responses
    mean : (n_vertices,) mean of the responses of the training images
    error : (n_vertices,) mean squared error on the held-out images of the inner folds, in the responses' unit squared
    kernel_means : (n_bands, n_images) mean over training images of each column of the kernels as given
    scales : (n_bands,) mean diagonal of the centred kernels of the training images; 1 for a band that is constant
    shares : (n_images,) weights of the images in all means, with sum 1; None: all alike
    """

    weights: torch.Tensor
    penalty: torch.Tensor
    coefficients: torch.Tensor
    mean: torch.Tensor
    error: torch.Tensor
    kernel_means: torch.Tensor
    scales: torch.Tensor
    shares: torch.Tensor | None = None

    def centred(self, across: torch.Tensor) -> torch.Tensor:
        """Kernels of any images with the training images, centred and scaled as those of the training images.

        across : (n_bands, n, n_images), as the kernels given to `fit_bands` were made
        """
        return centre_kernel(across, self.kernel_means, self.shares) / self.scales[:, None, None]


def candidates(n_bands: int, n_random: int, seed: int) -> torch.Tensor:
    """(n_candidates, n_bands) float64 weights of bands, from 0, each row with sum 1.

    The first row has equal weights, the next n_bands rows have one band each, and n_random rows are drawn from
    Dirichlet distributions with concentrations of 0.1 and 1 in turn. One band has one candidate.
    """
    if n_bands < 1 or n_random < 0:
        raise ConfigError(
            "candidates",
            expected="one band or more, and a number of random weights from 0",
            found=f"{n_bands} and {n_random}",
            remedy="correct it",
        )
    if n_bands == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    rng = np.random.default_rng(seed)
    drawn = [rng.dirichlet([_CONCENTRATIONS[k % 2]] * n_bands) for k in range(n_random)]
    return torch.from_numpy(np.stack([np.full(n_bands, 1 / n_bands), *np.eye(n_bands), *drawn]))


def fit_bands(
    kernels: torch.Tensor,
    responses: torch.Tensor,
    *,
    weights: torch.Tensor,
    penalties: Sequence[float],
    inner_folds: Sequence[Fold],
    image_weights: torch.Tensor | None = None,
) -> BandedFit:
    """Fit every vertex under the weights and the penalty that predict held-out images best.

    Parameters
    ----------
    kernels : (n_bands, n_images, n_images) inner products of the features of each band, float32 or float64. They need
        not be centred, but rounding is least if the features were
    responses : (n_images, n_vertices), of the kernels' dtype and device, not centred
    weights : (n_candidates, n_bands) to choose from, from 0, each row with sum 1; see `candidates`
    penalties : to choose from, above 0, in units of the mean diagonal of the weighted kernels
    inner_folds : rows to fit to and rows held out, of each fold. Rows of one group (such as one picture) must be in one
        of the two. Centring and fit use the rows to fit to alone
    image_weights : (n_images,) above 0, with a mean of 1, of the squared errors; None: all alike

    Raises
    ------
    ConfigError : shapes that do not match, or no penalty above 0
    """
    _check(kernels, responses, weights, penalties, inner_folds)
    n_images, n_vertices = responses.shape
    shares = None if image_weights is None else image_weights / image_weights.sum()
    kernel_means = kernels.mean(1) if shares is None else shares @ kernels
    centred = centre_kernel(kernels, kernel_means, shares)
    scales = _scales(rooted_kernel(centred, image_weights))
    centred /= scales[:, None, None]
    weights = weights.to(kernels)
    offered = torch.as_tensor(penalties, dtype=kernels.dtype, device=kernels.device)
    chosen, penalty, error = _choose(centred, responses, weights, offered, inner_folds, image_weights)
    mean = weighted_mean(responses, image_weights)
    coefficients = responses.new_zeros(n_images, n_vertices)
    for candidate in chosen.unique().tolist():
        values, vectors = eigh_of(rooted_kernel(_mixed(centred, weights[candidate]), image_weights))
        vectors = by_root(vectors, image_weights)
        for columns in torch.nonzero(chosen == candidate)[:, 0].split(VERTEX_BLOCK):
            rotated = vectors.T @ (responses[:, columns] - mean[columns])
            coefficients[:, columns] = vectors @ (rotated / (values[:, None] + penalty[columns]))
    return BandedFit(weights[chosen].T, penalty, coefficients, mean, error, kernel_means, scales, shares)


def contributions(fit: BandedFit, across: torch.Tensor) -> torch.Tensor:
    """(n_bands, n, n_vertices) what each band adds to the predictions of any images.

    The prediction is the sum over bands plus `fit.mean`. Over the training images, each contribution has a mean of 0.

    across : (n_bands, n, n_images) kernels of these images with the training images, as those given to `fit_bands`
    """
    pairs = zip(fit.centred(across), fit.weights, strict=True)
    return torch.stack([kernel @ (fit.coefficients * of_band) for kernel, of_band in pairs])


def _choose(
    kernels: torch.Tensor,
    responses: torch.Tensor,
    weights: torch.Tensor,
    penalties: torch.Tensor,
    folds: Sequence[Fold],
    image_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number of the best candidate, best penalty and least mean squared error of every vertex, each (n_vertices,)."""
    n_vertices, device = responses.shape[1], responses.device
    rows = [tuple(torch.as_tensor(part, device=device) for part in fold) for fold in folds]
    n_held_out = sum(len(y) if image_weights is None else float(image_weights[y].sum()) for _, y in rows)
    best = torch.zeros(n_vertices, dtype=torch.long, device=device)
    penalty = penalties.new_zeros(n_vertices)
    least = responses.new_full((n_vertices,), torch.inf)
    for candidate, of_bands in enumerate(weights):
        kernel = _mixed(kernels, of_bands)
        errors = responses.new_zeros(len(penalties), n_vertices)
        for train, held_out in rows:
            _add_errors(errors, kernel, responses, penalties, train, held_out, image_weights)
        error, which = (errors / n_held_out).min(0)
        better = error < least
        best[better], penalty[better], least[better] = candidate, penalties[which[better]], error[better]
    return best, penalty, least


def _add_errors(
    errors: torch.Tensor,
    kernel: torch.Tensor,
    responses: torch.Tensor,
    penalties: torch.Tensor,
    train: torch.Tensor,
    held_out: torch.Tensor,
    image_weights: torch.Tensor | None,
) -> None:
    """Add the squared errors of one fold, summed over its held-out images. errors : (n_penalties, n_vertices)"""
    own, others = (None if image_weights is None else image_weights[rows] for rows in (train, held_out))
    shares = None if own is None else own / own.sum()
    across = kernel[:, train]
    means = across[train].mean(0) if shares is None else shares @ across[train]
    values, vectors = eigh_of(rooted_kernel(centre_kernel(across[train], means, shares), own))
    roots = values.sqrt()
    scores = vectors * roots
    held_out_scores = by_root(centre_kernel(across[held_out], means, shares), others) @ by_root(vectors / roots, own)
    y, held_out_y = responses[train], responses[held_out]
    for start in range(0, responses.shape[1], VERTEX_BLOCK):
        block = slice(start, start + VERTEX_BLOCK)
        mean = weighted_mean(y[:, block], own)
        rotated = scores.T @ by_root(y[:, block] - mean, own)
        target = by_root(held_out_y[:, block] - mean, others)
        errors[:, block] += squared_errors(values, rotated, penalties, held_out_scores, target)


def by_root(rows: torch.Tensor, image_weights: torch.Tensor | None) -> torch.Tensor:
    """(n_images, n) rows times the roots of their weights, so that a sum of squares is weighted."""
    return rows if image_weights is None else rows * image_weights.sqrt()[:, None]


def rooted_kernel(kernel: torch.Tensor, image_weights: torch.Tensor | None) -> torch.Tensor:
    """(..., n, n) kernel times the roots of the weights of both images."""
    if image_weights is None:
        return kernel
    roots = image_weights.sqrt()
    return kernel * roots * roots[:, None]


def _mixed(kernels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(n, n) weighted sum of kernels (n_bands, n, n)."""
    return torch.einsum("b,bij->ij", weights, kernels)


def _scales(centred: torch.Tensor) -> torch.Tensor:
    """(n_bands,) mean diagonals; 1 where it is 0."""
    diagonals = torch.diagonal(centred, dim1=1, dim2=2).mean(1)
    return torch.where(diagonals > 0, diagonals, torch.ones_like(diagonals))


def _check(
    kernels: torch.Tensor,
    responses: torch.Tensor,
    weights: torch.Tensor,
    penalties: Sequence[float],
    folds: Sequence[Fold],
) -> None:
    n_bands, n_images = len(kernels), len(responses)
    shapes = [tuple(part.shape) for part in (kernels, responses, weights)]
    matching = shapes[0] == (n_bands, n_images, n_images) and responses.ndim == 2 and shapes[2][1:] == (n_bands,)
    if not matching or not len(weights):
        raise ConfigError(
            "kernels, responses and weights",
            expected="shapes (n_bands, n_images, n_images), (n_images, n_vertices) and (n_candidates, n_bands)",
            found=", ".join(map(str, shapes)),
            remedy="pass the same images and bands",
        )
    if not len(penalties) or not all(0 < penalty < np.inf for penalty in penalties):
        raise ConfigError("penalties", expected="one or more numbers above 0", found=penalties, remedy="correct them")
    if not folds or any(len(train) < 2 or not len(held_out) for train, held_out in folds):
        sizes = [(len(train), len(held_out)) for train, held_out in folds]
        raise ConfigError(
            "inner folds",
            expected="2 or more images to fit to and 1 or more held out, in each",
            found=sizes or "no folds",
            remedy="use fewer folds",
        )
