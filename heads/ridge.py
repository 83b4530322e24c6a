"""Closed-form heads: ridge regression of every vertex on the same features, with a penalty per vertex.

With X the centred features and U e U' = X'X, the weights of a vertex under penalty p are

    w(p) = U (U'X'y) / (e + p)

so one eigendecomposition serves every vertex and penalty, and X'y is all that is needed of the responses. X'X and X'Y
are computed once for each fold's images; what a head is trained on is the sum over the other folds.

Penalties are chosen on the training images alone, per vertex, by the smallest of
- 'loo': the exact leave-one-out error, mean of ((y - h y) / (1 - h_ii))^2, one product of the size of X'Y a penalty;
- 'gcv': generalised cross-validation, the same with h_ii replaced by its mean. It needs only X'Y, but trusts that
  leverages are alike, which fails with few images that resemble each other (docs/log.md has the figures).
'auto' takes 'loo' up to 1,024 training images and 'gcv' beyond.

Golub, Heath and Wahba 1979, https://doi.org/10.1080/00401706.1979.10489751
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from featcache.errors import ConfigError
from heads.config import RidgeConfig

_LOO_IMAGES = 1024  # up to here the exact error costs seconds
_NULL = 1e-7  # eigenvalues below this part of the largest are rounding of float32 features
_FULL = 0.99  # a penalty that leaves fewer than 1 % of the degrees of freedom has no error left to judge it by
TOGETHER = 1 << 22  # numbers in the predictions of penalties that are tried at once
_VERTEX_BLOCK = 4096  # vertices at a time, so that memory does not grow with their number


class LinearMap(NamedTuple):
    """predictions = features @ weights + intercept

    weights : (n_features, n_vertices) float32
    intercept : (n_vertices,) float32
    """

    weights: torch.Tensor
    intercept: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.intercept, features, self.weights)


@dataclass(frozen=True)
class Eigenbasis:
    """The principal axes of centred features.

    n_images : number of images they come from
    mean : (n_features,) mean of the features over those images
    values : (rank,) eigenvalues of X'X that are not null, ascending
    vectors : (n_features, rank) their eigenvectors
    """

    n_images: int
    mean: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor

    def penalties(self, multiples: Sequence[float]) -> torch.Tensor:
        """(n_penalties,) in the units of the eigenvalues."""
        return penalties_of(self.values, multiples)


def penalties_of(values: torch.Tensor, multiples: Sequence[float]) -> torch.Tensor:
    """(n_penalties,) multiples of the mean eigenvalue, in its units."""
    scale = values.mean() if len(values) else torch.ones((), device=values.device)
    return torch.as_tensor(multiples, dtype=values.dtype, device=values.device) * scale


def eigenbasis(features: torch.Tensor) -> Eigenbasis:
    """Of (n_images, n_features) rows, by the smaller of the two Gram matrices."""
    n_images, n_features = features.shape
    mean = features.mean(0)
    centred = features - mean
    if n_images > n_features:
        return eigenbasis_of_gram(centred.T @ centred, mean, n_images)
    values, vectors = eigh_of(centred @ centred.T)
    return Eigenbasis(n_images, mean, values, centred.T @ (vectors / values.sqrt()))


def eigenbasis_of_gram(gram: torch.Tensor, mean: torch.Tensor, n_images: int) -> Eigenbasis:
    """Of centred X'X, (n_features, n_features)."""
    return Eigenbasis(n_images, mean, *eigh_of(gram))


def eigh_of(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and -vectors without the null space. In float64: float32 decompositions can fail on a GPU."""
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > _NULL * values.max().clamp_min(torch.finfo(torch.float32).tiny)
    return values[keep].to(gram.dtype), vectors[:, keep].to(gram.dtype)


def choose_penalties(
    basis: Eigenbasis,
    rotated: torch.Tensor,
    response_squares: torch.Tensor,
    penalties: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """(n_vertices,) the penalty of each vertex with the least leave-one-out error, exact or generalised.

    rotated : (rank, n_vertices) U'X'Y
    response_squares : (n_vertices,) squares of the centred responses, summed over images
    rows : scores XU (n_images, rank) and centred responses (n_images, n_vertices) for the exact one; None: generalised
    """
    errors = penalty_errors(basis.values, basis.n_images, rotated, response_squares, penalties, rows)
    return penalties[errors.argmin(0)]


def penalty_errors(
    values: torch.Tensor,
    n_images: int,
    rotated: torch.Tensor,
    response_squares: torch.Tensor,
    penalties: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """(n_penalties, n_vertices) mean squared leave-one-out error, exact or generalised; arguments as above.

    values : (rank,) eigenvalues of X'X
    """
    shrinkage = values / (values + penalties[:, None])  # (n_penalties, rank)
    freedom = (shrinkage.sum(1) + 1) / n_images  # the intercept is one degree of freedom
    if rows is None:
        errors = _gcv_errors(values, n_images, rotated, response_squares, shrinkage, freedom)
    else:
        errors = _loo_errors(values, rotated, shrinkage, *rows)
    errors[freedom > _FULL] = torch.inf
    errors[penalties.argmax()].clamp_max_(torch.finfo(errors.dtype).max)  # the largest penalty is always on offer
    return errors


def _gcv_errors(
    values: torch.Tensor,
    n_images: int,
    rotated: torch.Tensor,
    response_squares: torch.Tensor,
    shrinkage: torch.Tensor,
    freedom: torch.Tensor,
) -> torch.Tensor:
    """(n_penalties, n_vertices) ||y - h y||^2 / n / (1 - trace(h) / n)^2, in float64: it is a small difference."""
    explained = (rotated.double() ** 2) / values.double()[:, None]
    h = shrinkage.double()
    residuals = response_squares.double() - (2 * h - h**2) @ explained
    return residuals.clamp_min(0) / n_images / (1 - freedom.double()).clamp_min(1e-9)[:, None] ** 2


def _loo_errors(
    values: torch.Tensor, rotated: torch.Tensor, shrinkage: torch.Tensor, scores: torch.Tensor, responses: torch.Tensor
) -> torch.Tensor:
    """(n_penalties, n_vertices) mean over images of ((y - h y) / (1 - h_ii))^2."""
    left = scores / values.sqrt()  # left singular vectors
    target = rotated / values.sqrt()[:, None]
    left_out = (1 - 1 / len(scores) - left.square() @ shrinkage.T).clamp_min(1e-6)  # (n_images, n_penalties)
    some = max(TOGETHER // max(responses.numel(), 1), 1)
    errors = []
    for h, out in zip(shrinkage.split(some), left_out.split(some, dim=1), strict=True):
        fitted = left @ (h.T[:, :, None] * target[:, None]).flatten(1)  # penalties side by side: one product
        residuals = responses[:, None] - fitted.view(len(scores), *h.shape[:1], -1)
        errors.append((residuals / out[:, :, None]).square().mean(0))
    return torch.cat(errors)


def is_exact(config: RidgeConfig, n_images: int) -> bool:
    """Whether penalties are chosen by the exact leave-one-out error."""
    return config.selection == "loo" or (config.selection == "auto" and n_images <= _LOO_IMAGES)


def solve(
    basis: Eigenbasis,
    cross: torch.Tensor,
    response_mean: torch.Tensor,
    response_squares: torch.Tensor,
    multiples: Sequence[float],
    rows: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[LinearMap, torch.Tensor]:
    """The map of every vertex and its penalty, from centred X'Y (n_features, n_vertices).

    rows : features (n_images, n_features) and responses (n_images, n_vertices), for the exact error; None: generalised
    """
    rotated = basis.vectors.T @ cross
    centred = None if rows is None else ((rows[0] - basis.mean) @ basis.vectors, rows[1] - response_mean)
    chosen = choose_penalties(basis, rotated, response_squares, basis.penalties(multiples), centred)
    return maps_of_penalties(basis, rotated, response_mean, chosen), chosen


def maps_of_penalties(
    basis: Eigenbasis, rotated: torch.Tensor, response_mean: torch.Tensor, penalties: torch.Tensor
) -> LinearMap:
    """The map of each vertex under its penalty, (n_vertices,), from U'X'Y."""
    weights = basis.vectors @ (rotated / (basis.values[:, None] + penalties))
    return LinearMap(weights, response_mean - basis.mean @ weights)


def cross_products(
    features: torch.Tensor, responses: torch.Tensor, feature_mean: torch.Tensor, response_mean: torch.Tensor
) -> torch.Tensor:
    """Centred X'Y, (n_features, n_vertices)."""
    return (features - feature_mean).T @ (responses - response_mean)


class RidgeFolds:
    """Closed-form heads on all folds but one, for each fold in turn; the eigendecompositions serve any responses.

    features : (n_images, n_features) float32
    folds : (n_images,) fold of each image, in [0, n_folds)
    """

    vertex_block: int | None = _VERTEX_BLOCK

    def __init__(self, features: torch.Tensor, folds: np.ndarray, config: RidgeConfig) -> None:
        self._config = config
        self._held_out = [
            torch.from_numpy(np.flatnonzero(folds == k)).to(features.device) for k in range(folds.max() + 1)
        ]
        self._trained = [
            torch.from_numpy(np.flatnonzero(folds != k)).to(features.device) for k in range(folds.max() + 1)
        ]
        self._features = features
        self._offset = features.mean(0)  # keeps float32 sums small; the folds' own means are exact all the same
        self._bases = self._eigenbases()

    def _eigenbases(self) -> list[Eigenbasis]:
        if min(map(len, self._trained)) <= self._features.shape[1]:
            return [eigenbasis(self._features[rows]) for rows in self._trained]
        blocks = [self._features[rows] - self._offset for rows in self._held_out]
        grams, sums = [block.T @ block for block in blocks], [block.sum(0) for block in blocks]
        bases = []
        for fold, trained in enumerate(self._trained):
            mean = _without(sums, fold) / len(trained)
            centred = _without(grams, fold) - len(trained) * torch.outer(mean, mean)
            bases.append(eigenbasis_of_gram(centred, mean + self._offset, len(trained)))
        return bases

    def fit(self, responses: torch.Tensor, **_: Any) -> list[LinearMap]:
        """One map a fold, for (n_images, n_vertices) float32 responses."""
        level = responses.mean(0)
        blocks = [responses[rows] - level for rows in self._held_out]
        sums, squares = [block.sum(0) for block in blocks], [block.square().sum(0) for block in blocks]
        cross = [(self._features[r] - self._offset).T @ b for r, b in zip(self._held_out, blocks, strict=True)]
        maps = []
        for fold, (basis, trained) in enumerate(zip(self._bases, self._trained, strict=True)):
            mean = _without(sums, fold) / basis.n_images
            centred = _without(cross, fold) - basis.n_images * torch.outer(basis.mean - self._offset, mean)
            spread = _without(squares, fold) - basis.n_images * mean.square()
            exact = is_exact(self._config, basis.n_images)
            rows = (self._features[trained], responses[trained]) if exact else None
            maps.append(solve(basis, centred, mean + level, spread, self._config.penalties, rows)[0])
        return maps


def _without(parts: Sequence[torch.Tensor], fold: int) -> torch.Tensor:
    """The sum over all folds but one: adding the others up keeps the digits that subtracting an outlier would lose."""
    return torch.stack([part for other, part in enumerate(parts) if other != fold]).sum(0)


class RidgeHead(RegressorMixin, BaseEstimator):
    """Ridge regression with a penalty per vertex, for NumPy arrays or torch tensors.

    Parameters
    ----------
    penalties : multiples of the mean eigenvalue of the centred features' scatter
    selection : 'auto', 'loo' or 'gcv', how a vertex's penalty is chosen

    Attributes after `fit`, of the kind that `fit` was given (torch tensors stay on their device)
    ----------
    weights_ : (n_features, n_vertices) float32
    intercept_ : (n_vertices,) float32
    penalties_ : (n_vertices,) float32, in the units of the eigenvalues
    """

    def __init__(
        self, penalties: Sequence[float] = RidgeConfig.penalties, selection: str = RidgeConfig.selection
    ) -> None:
        self.penalties = penalties
        self.selection = selection

    def fit(self, features: Any, responses: Any) -> "RidgeHead":
        """features (n_images, n_features), responses (n_images, n_vertices).

        Raises ConfigError for shapes that do not belong together, values that are not finite, or fewer than 3 images.
        """
        config = RidgeConfig(tuple(self.penalties), self.selection)
        x = _matrix("features", features)
        y = _matrix("responses", responses).to(x.device)
        if len(x) != len(y) or len(x) < 3 or not x.numel():
            raise ConfigError(
                f"expected 3 or more images, as many features as responses; found {len(x)} and {len(y)} rows"
            )
        basis = eigenbasis(x)
        blocks = [_fit_block(basis, x, block, config) for block in y.split(_VERTEX_BLOCK, dim=1)]
        self.weights_ = _like(responses, torch.cat([head.weights for head, _ in blocks], 1))
        self.intercept_ = _like(responses, torch.cat([head.intercept for head, _ in blocks]))
        self.penalties_ = _like(responses, torch.cat([chosen for _, chosen in blocks]))
        self.n_features_in_ = x.shape[1]
        return self

    def predict(self, features: Any) -> Any:
        """(n_images, n_vertices) float32, of the kind that `features` is. Raises NotFittedError before `fit`."""
        check_is_fitted(self)
        x = _matrix("features", features)
        weights, intercept = (torch.as_tensor(w, device=x.device) for w in (self.weights_, self.intercept_))
        if x.shape[1] != len(weights):
            raise ConfigError(f"expected {len(weights)} features, as in fit; found {x.shape[1]}")
        return _like(features, LinearMap(weights, intercept)(x))


def _fit_block(
    basis: Eigenbasis, features: torch.Tensor, responses: torch.Tensor, config: RidgeConfig
) -> tuple[LinearMap, torch.Tensor]:
    mean = responses.mean(0)
    centred = responses - mean
    rows = (features, responses) if is_exact(config, len(features)) else None
    cross = cross_products(features, responses, basis.mean, mean)
    return solve(basis, cross, mean, centred.square().sum(0), config.penalties, rows)


def _matrix(name: str, values: Any) -> torch.Tensor:
    matrix = torch.as_tensor(np.asarray(values) if not isinstance(values, torch.Tensor) else values)
    if matrix.ndim != 2:
        raise ConfigError(
            f"expected a matrix of {name}, (n_images, columns); found shape {tuple(matrix.shape)}; reshape it"
        )
    if not torch.isfinite(matrix := matrix.to(torch.float32)).all():
        raise ConfigError(f"expected finite {name}; found NaN or infinity; remove those rows or columns")
    return matrix


def _like(reference: Any, result: torch.Tensor) -> Any:
    """The result as the kind of thing that the caller works with."""
    return result if isinstance(reference, torch.Tensor) else result.cpu().numpy()
