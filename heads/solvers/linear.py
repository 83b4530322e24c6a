"""Predictions of heads that are linear maps of one matrix of features, and the maps to save."""

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
    final : the map for test images
    """

    held_out: list[tuple[np.ndarray, LinearMap]]
    final: LinearMap


class LinearPredictions:
    """Applies linear heads to the features that they were fitted to.

    features : (n_train + n_test, n_features) float32, one for all folds or one for each (see FoldPlan.source)
    """

    def __init__(self, features: Sequence[torch.Tensor], plan: FoldPlan) -> None:
        self._features, self._plan = list(features), plan
        self._statistics: dict[int, _Statistics] = {}

    def fits(self, folds: Sequence[FoldHeads]) -> Fits:
        """Predictions of every fold, and the maps to save: one for each fold, or their mean if folds share features."""
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
        if k not in self._statistics:
            self._statistics[k] = _Statistics(features[self._plan.outside(k)])
        trained = self._statistics[k]
        pieces = [
            Piece(rows, head(features[rows]), trained.mean @ head.weights + head.intercept, trained.std(head.weights))
            for rows, head in fold.held_out
        ]
        return FoldFit(pieces, fold.final(features[self._plan.n_train :]))


class _Statistics:
    """Statistics of the training features of a fold, for the mean and standard deviation of predictions.

    mean : (n_features,)
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.mean, self._n_images = features.mean(0), len(features)
        centred = features - self.mean
        self._tall = len(features) > features.shape[1]
        self._factor = centred.T @ centred if self._tall else centred

    def std(self, weights: torch.Tensor) -> torch.Tensor:
        """(n_vertices,) standard deviation of the predictions; 1 where they are constant."""
        product = self._factor @ weights
        squares = (weights * product).sum(0) if self._tall else product.square().sum(0)
        return torch.where(squares > 0, squares / self._n_images, 1).sqrt()
