"""Predictions of heads that are linear maps of one matrix of features, and the maps to save."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from heads.modules.linear import LinearMap
from heads.solvers.base import Fits, FoldFit, Piece, ratios
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
        """Predictions of every fold, and the maps to save: one for each fold, or their mean if folds share features.

        Before the mean, maps are brought to one mean and standard deviation, as their predictions are.
        """
        fits = [self._predict(k, fold) for k, fold in enumerate(folds)]
        finals = [fold.final for fold in folds]
        if not self._plan.backbone_trained:
            finals = [_mean_map(finals, fits)]
        saved = {
            (prefix, part): values
            for prefix, head in zip(self._plan.prefixes, finals, strict=True)
            for part, values in head._asdict().items()
        }
        return Fits(fits, saved)

    def _predict(self, k: int, fold: FoldHeads) -> FoldFit:
        features = self._features[self._plan.source(k)]
        if k not in self._statistics:
            self._statistics[k] = _Statistics(features[self._plan.outside(k)])
        trained = self._statistics[k]
        pieces = [Piece(rows, head(features[rows]), *trained.of_predictions(head)) for rows, head in fold.held_out]
        return FoldFit(pieces, fold.final(features[self._plan.n_train :]), *trained.of_predictions(fold.final))


def _mean_map(maps: Sequence[LinearMap], fits: Sequence[FoldFit]) -> LinearMap:
    """The map that predicts the mean over folds (see mean_of_tests)."""
    scales = ratios([fit.test_std for fit in fits])
    weights = [head.weights * ratio for head, ratio in zip(maps, scales, strict=True)]
    intercepts = [
        fit.test_mean + (head.intercept - fit.test_mean) * ratio
        for head, fit, ratio in zip(maps, fits, scales, strict=True)
    ]
    return LinearMap(torch.stack(weights).mean(0), torch.stack(intercepts).mean(0))


class _Statistics:
    """Statistics of the training features of a fold, for the mean and standard deviation of predictions.

    mean : (n_features,)
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.mean, self._n_images = features.mean(0), len(features)
        centred = features - self.mean
        self._tall = len(features) > features.shape[1]
        self._factor = centred.T @ centred if self._tall else centred

    def of_predictions(self, head: LinearMap) -> tuple[torch.Tensor, torch.Tensor]:
        """(n_vertices,) mean and standard deviation of a head's predictions of the training rows."""
        return self.mean @ head.weights + head.intercept, self._std(head.weights)

    def _std(self, weights: torch.Tensor) -> torch.Tensor:
        """(n_vertices,) standard deviation of the predictions; 1 where they are constant."""
        product = self._factor @ weights
        squares = (weights * product).sum(0) if self._tall else product.square().sum(0)
        return torch.where(squares > 0, squares / self._n_images, 1).sqrt()
