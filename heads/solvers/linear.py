"""Predictions of heads that are linear maps of one matrix of features, and what is saved of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from heads.modules.linear import LinearMap
from heads.solvers.base import Fits, FoldFit, Piece
from heads.solvers.held_out import FoldPlan


class FoldHeads(NamedTuple):
    """Linear heads that were fitted without one fold.

    held_out : (row numbers, the map that predicts them out of fold)
    final : the map for images of no fold
    """

    held_out: list[tuple[np.ndarray, LinearMap]]
    final: LinearMap


class LinearPredictions:
    """Applies linear heads to the features that they were fitted to.

    features : (n_train + n_test, n_features) float32, one for all folds or one for each (see FoldPlan.source)
    """

    def __init__(self, features: Sequence[torch.Tensor], plan: FoldPlan) -> None:
        self._features, self._plan = list(features), plan
        self._spreads: dict[int, _Spread] = {}

    def fits(self, folds: Sequence[FoldHeads]) -> Fits:
        """Predictions of every fold, and its map, or the mean of all maps where folds share their features."""
        finals = [fold.final for fold in folds]
        if not self._plan.backbone_trained:
            finals = [LinearMap(*(torch.stack(parts).mean(0) for parts in zip(*finals, strict=True)))]
        saved = {
            (prefix, part): values
            for prefix, head in zip(self._plan.prefixes, finals, strict=True)
            for part, values in head._asdict().items()
        }
        return Fits([self._predict(k, fold) for k, fold in enumerate(folds)], saved)

    def _predict(self, k: int, fold: FoldHeads) -> FoldFit:
        features = self._features[self._plan.source(k)]
        if k not in self._spreads:
            self._spreads[k] = _Spread(features[self._plan.outside(k)])
        spread = self._spreads[k]
        pieces = [
            Piece(rows, head(features[rows]), spread.mean @ head.weights + head.intercept, spread.of(head.weights))
            for rows, head in fold.held_out
        ]
        return FoldFit(pieces, fold.final(features[self._plan.n_train :]))


class _Spread:
    """The features that a fold's heads were fitted to, as far as the spread of predictions needs them.

    mean : (n_features,)
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.mean, self._n_images = features.mean(0), len(features)
        centred = features - self.mean
        self._tall = len(features) > features.shape[1]
        self._factor = centred.T @ centred if self._tall else centred

    def of(self, weights: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the predictions, (n_vertices,); 1 where they are constant."""
        product = self._factor @ weights
        squares = (weights * product).sum(0) if self._tall else product.square().sum(0)
        return torch.where(squares > 0, squares / self._n_images, 1).sqrt()
