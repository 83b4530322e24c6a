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
        level, penalties = y.new_empty(2, y.shape[1])
        on_axes = y.new_empty(len(basis.values), y.shape[1])
        scores, offered = basis.own_scores(x), basis.penalties(config.penalties)
        for start in range(0, y.shape[1], VERTEX_BLOCK):
            block = slice(start, start + VERTEX_BLOCK)
            level[block] = y[:, block].mean(0)
            centred = y[:, block] - level[block]
            rotated = scores.T @ centred
            rows = (scores, centred) if is_exact(config, len(x)) else None
            errors = penalty_errors(basis.values, len(x), rotated, sum_of_squares(centred), offered, rows)
            penalties[block] = offered[errors.argmin(0)]
            torch.div(rotated, basis.values[:, None] + penalties[block], out=on_axes[:, block])
        self._basis, self._on_axes, self._level = basis, on_axes, level
        self._map: LinearMap | None = None
        self._tensors = isinstance(responses, torch.Tensor)
        self.penalties_ = self._own(penalties)
        self.n_features_in_ = x.shape[1]
        return self

    @property
    def weights_(self) -> Any:
        return self._own(self._linear_map().weights)

    @property
    def intercept_(self) -> Any:
        return self._own(self._linear_map().intercept)

    def _linear_map(self) -> LinearMap:
        """Formed when it is asked for: predictions need no weights on features, and with few images it is most work."""
        check_is_fitted(self)
        if self._map is None:
            weights = self._basis.weights(self._on_axes)
            self._map = LinearMap(weights, self._level - self._basis.mean @ weights)
            del self._on_axes
        return self._map

    def predict(self, features: Any) -> Any:
        """(n_images, n_vertices) float32, of the kind that `features` is. Raises NotFittedError before `fit`."""
        check_is_fitted(self)
        x = _matrix("features", features)
        if x.shape[1] != self.n_features_in_:
            raise ConfigError(
                "features",
                expected=f"{self.n_features_in_} columns, as in fit",
                found=x.shape[1],
                remedy="read the same layers",
            )
        given, x = x.device, x.to(self._level.device)
        if self._map is None:
            predictions = torch.addmm(self._level, self._basis.scores(x), self._on_axes)
        else:
            predictions = self._map(x)
        return predictions.to(given) if isinstance(features, torch.Tensor) else predictions.cpu().numpy()

    def _own(self, values: torch.Tensor) -> Any:
        """As the kind of thing that `fit` was given."""
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
    # a sum is a fraction of the time of looking at every number, and finite only if all are
    if not torch.isfinite(matrix.sum()) and not torch.isfinite(matrix).all():
        raise ConfigError(expected=f"finite {name}", found="NaN or infinity", remedy="remove those rows or columns")
    return matrix
