"""Ridge regression as a scikit-learn estimator, for use without the rest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from featcache.errors import ConfigError
from heads.config import RidgeConfig
from heads.modules.linear import LinearMap
from heads.solvers.ridge import VERTEX_BLOCK, eigenbasis, is_exact, penalty_errors, sum_of_squares


class RidgeHead(RegressorMixin, BaseEstimator):
    """Ridge regression with a penalty per vertex, for NumPy arrays or torch tensors.

    Parameters
    ----------
    penalties : multiples of the mean eigenvalue of the centred features' scatter
    selection : 'auto', 'loo' or 'gcv', how a vertex's penalty is chosen

    Attributes after `fit`, arrays or tensors like the responses (torch tensors stay on their device)
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
        """Fit one ridge model per vertex. features : (n_images, n_features); responses : (n_images, n_vertices)

        Raises ConfigError for shapes that do not match, values that are not finite, or fewer than 3 images.
        """
        config = RidgeConfig(penalties=tuple(self.penalties), selection=self.selection)
        x = _matrix("features", features)
        y = _matrix("responses", responses).to(x.device)
        if len(x) != len(y) or len(x) < 3 or not x.numel():
            raise ConfigError(
                "features and responses",
                expected="the same 3 or more images",
                found=f"{len(x)} and {len(y)} rows",
                remedy="pass the rows of the same images",
            )
        basis = eigenbasis(x)
        mean, penalties = y.new_empty(2, y.shape[1])
        on_axes = y.new_empty(len(basis.values), y.shape[1])
        scores, offered = basis.train_scores(x), basis.penalties(config.penalties)
        for start in range(0, y.shape[1], VERTEX_BLOCK):
            block = slice(start, start + VERTEX_BLOCK)
            mean[block] = y[:, block].mean(0)
            centred = y[:, block] - mean[block]
            rotated = scores.T @ centred
            rows = (scores, centred) if is_exact(config, len(x)) else None
            errors = penalty_errors(basis.values, len(x), rotated, sum_of_squares(centred), offered, rows)
            penalties[block] = offered[errors.argmin(0)]
            torch.div(rotated, basis.values[:, None] + penalties[block], out=on_axes[:, block])
        self._basis, self._on_axes, self._mean = basis, on_axes, mean
        self._map: LinearMap | None = None
        self._tensors = isinstance(responses, torch.Tensor)
        self.penalties_ = self._like_input(penalties)
        self.n_features_in_ = x.shape[1]
        return self

    @property
    def weights_(self) -> Any:
        return self._like_input(self._linear_map().weights)

    @property
    def intercept_(self) -> Any:
        return self._like_input(self._linear_map().intercept)

    def _linear_map(self) -> LinearMap:
        """Weights on features and intercept, computed at first use: predictions do not need them, and they are slow."""
        check_is_fitted(self)
        if self._map is None:
            weights = self._basis.weights(self._on_axes)
            self._map = LinearMap(weights, self._mean - self._basis.mean @ weights)
            del self._on_axes
        return self._map

    def predict(self, features: Any) -> Any:
        """(n_images, n_vertices) float32 predictions, as an array or tensor, like `features`.

        Raises NotFittedError before `fit`, ConfigError for another number of columns or values that are not finite.
        """
        check_is_fitted(self)
        x = _matrix("features", features)
        if x.shape[1] != self.n_features_in_:
            raise ConfigError(
                "features",
                expected=f"{self.n_features_in_} columns, as in fit",
                found=x.shape[1],
                remedy="read the same layers",
            )
        device, x = x.device, x.to(self._mean.device)
        if self._map is None:
            predictions = torch.addmm(self._mean, self._basis.scores(x), self._on_axes)
        else:
            predictions = self._map(x)
        return predictions.to(device) if isinstance(features, torch.Tensor) else predictions.cpu().numpy()

    def _like_input(self, values: torch.Tensor) -> Any:
        """The values as an array or tensor, like the responses given to `fit`."""
        return values if self._tensors else values.cpu().numpy()


def _matrix(name: str, values: Any) -> torch.Tensor:
    matrix = torch.as_tensor(np.asarray(values) if not isinstance(values, torch.Tensor) else values)
    if matrix.ndim != 2:
        raise ConfigError(
            expected=f"a matrix of {name}, (n_images, columns)",
            found=f"shape {tuple(matrix.shape)}",
            remedy="reshape it",
        )
    matrix = matrix.to(torch.float32)
    # a sum takes a fraction of the time of a test of every number, and is finite only if all are
    if not torch.isfinite(matrix.sum()) and not torch.isfinite(matrix).all():
        raise ConfigError(expected=f"finite {name}", found="NaN or infinity", remedy="remove those rows or columns")
    return matrix
