"""Closed-form heads on all folds but one, for each fold in turn: a penalty per vertex on the fold's axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from heads.config import RidgeConfig
from heads.solvers.base import Fits
from heads.solvers.fold_axes import Fold, FoldAxes, Target
from heads.solvers.ridge import TOGETHER, VERTEX_BLOCK, is_exact, penalty_errors


def memory_of(
    n_images: tuple[int, int], n_features: int, n_vertices: Sequence[int], n_folds: int
) -> tuple[float, float]:
    """Bytes that a subject's fit takes whatever the block of vertices, and for each vertex of a block.

    n_images : to train on, and to test
    n_vertices : of each hemisphere
    """
    n_train, n_all, largest = n_images[0], sum(n_images), max(n_vertices)
    rank = min(n_features, n_train)
    features = n_all * n_features * 2 + (n_train + n_folds * n_images[1]) * rank + n_folds * rank * n_features
    decomposition = 8 * rank * rank  # in float64, with what it works on
    # responses are a file that is mapped, and count as long as nothing else needs their place
    results = (n_all + n_train) * largest + 2 * n_features * sum(n_vertices)
    block = (2 * n_folds + 4) * rank + 4 * n_train + n_folds * n_images[1] + n_features
    return 4.0 * (features + decomposition + results) + 16.0 * TOGETHER, 4.0 * block


def effort_of(
    n_images: tuple[int, int], n_features: int, n_vertices: Sequence[int], n_folds: int, config: RidgeConfig
) -> tuple[float, dict[int, int]]:
    """About the floating-point operations of a subject's fit, and {side: number} of matrices that are decomposed."""
    n_train, n_all, vertices = n_images[0], sum(n_images), sum(n_vertices)
    n_fit, rank = n_train - n_train // n_folds, min(n_features, n_train - n_train // n_folds)
    errors = len(config.penalties) * (n_fit if is_exact(config, n_fit) else 1)
    of_fold = rank * vertices * (errors + 2 * n_features + n_all - n_fit)
    return 2.0 * (n_all * n_features * (rank + vertices) + n_folds * of_fold), {rank: n_folds}


class RidgeFits:
    """Closed-form heads on features that no fold's images have shaped.

    features : (n_train + n_test, n_features) float32
    folds : (n_train,) fold of each training image, in [0, n_folds)
    save : whether weights on the features are wanted, the mean over folds
    """

    def __init__(
        self,
        features: torch.Tensor,
        folds: np.ndarray,
        config: RidgeConfig,
        save: bool = True,
        vertex_block: int = VERTEX_BLOCK,
    ) -> None:
        self._config, self._save = config, save
        self.vertex_block: int | None = vertex_block
        self._axes = FoldAxes(features, folds, lambda n_images: is_exact(config, n_images))

    def fit(self, responses: torch.Tensor, **_: Any) -> Fits:
        """For (n_train, n_vertices) float32 responses."""
        targets = zip(self._axes.folds, self._axes.targets(responses), strict=True)
        return self._axes.predict(((self._solve(fold, target), target.mean) for fold, target in targets), self._save)

    def _solve(self, fold: Fold, target: Target) -> torch.Tensor:
        """(rank, n_vertices) weights on the axes, each vertex under the penalty of its least error."""
        values, n_images = fold.basis.values, fold.basis.n_images
        offered = fold.basis.penalties(self._config.penalties)
        rows = None
        if is_exact(self._config, n_images) and fold.own is not None and target.rows is not None:
            rows = fold.own, target.rows
        errors = penalty_errors(values, n_images, target.rotated, target.squares, offered, rows)
        return target.rotated.div_(values[:, None] + offered[errors.argmin(0)])
