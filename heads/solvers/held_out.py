"""Solvers fold by fold: heads, and the images that each may be scored on.

On features of a frozen backbone everything that is chosen (penalties, when to stop) is chosen on the images that the
head was trained on. On features of a backbone that was trained on those images that would be worthless: it has learnt
their responses, noise and all, and no penalty looks too small. There, choices are made on the held-out fold, and no
image has a say in the head that predicts it: the fold is cut in parts, and each is predicted by the head that the
other parts chose.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from featcache.dataset.splits import assign_folds, refuse_leak
from featcache.errors import ConfigError
from heads.config import FitConfig, RidgeConfig
from heads.solvers.gradient import AdamWFolds
from heads.solvers.ridge import VERTEX_BLOCK, LinearMap, eigenbasis, maps_of_penalties

_PARTS = 4  # of a held-out fold


class FoldHeads(NamedTuple):
    """Heads trained without one fold.

    held_out : [(row numbers, the map that predicts them out of fold)]
    final : the map for images of no fold
    """

    held_out: list[tuple[np.ndarray, LinearMap]]
    final: LinearMap


class FoldSolver(Protocol):
    """Fits heads on all folds but one, for each in turn."""

    vertex_block: int | None  # vertices it takes at a time; None: all at once

    def fit(self, responses: torch.Tensor, **about: Any) -> list[FoldHeads]: ...


class FrozenFolds:
    """A solver that makes one map a fold, on features that no fold's images have shaped."""

    def __init__(self, solver: AdamWFolds, folds: np.ndarray) -> None:
        self._solver, self._folds, self.vertex_block = solver, folds, solver.vertex_block

    def fit(self, responses: torch.Tensor, **about: Any) -> list[FoldHeads]:
        maps = self._solver.fit(responses, **about)
        return [FoldHeads([(np.flatnonzero(self._folds == k), head)], head) for k, head in enumerate(maps)]


class TrainedFolds:
    """The heads that were trained with the backbone, as they are.

    maps : {hemisphere: one for each held-out fold}
    """

    vertex_block: int | None = None

    def __init__(self, maps: dict[str, list[LinearMap]], folds: np.ndarray, held_out: Sequence[int]) -> None:
        self._maps, self._rows = maps, [np.flatnonzero(folds == k) for k in held_out]

    def fit(self, responses: torch.Tensor, **about: Any) -> list[FoldHeads]:
        maps = [LinearMap(*(part.to(responses.device) for part in head)) for head in self._maps[about["hemisphere"]]]
        return [FoldHeads([(rows, head)], head) for rows, head in zip(self._rows, maps, strict=True)]


class TunedRidge:
    """Closed form on features of a backbone that was trained without each held-out fold.

    features : (n_images, n_features) float32 for each of them
    """

    vertex_block: int | None = VERTEX_BLOCK

    def __init__(
        self,
        features: Sequence[torch.Tensor],
        folds: np.ndarray,
        held_out: Sequence[int],
        image_ids: np.ndarray,
        config: RidgeConfig,
    ) -> None:
        self._config = config
        self._trained = [np.flatnonzero(folds != k) for k in held_out]
        self._parts = [clean_parts(image_ids, np.flatnonzero(folds == k), k) for k in held_out]
        self._bases = [eigenbasis(x[rows]) for x, rows in zip(features, self._trained, strict=True)]
        self._scores = [basis.scores(x) for basis, x in zip(self._bases, features, strict=True)]

    def fit(self, responses: torch.Tensor, **_: Any) -> list[FoldHeads]:
        return [self._fit_fold(k, responses) for k in range(len(self._bases))]

    def _fit_fold(self, k: int, responses: torch.Tensor) -> FoldHeads:
        scores, rows, parts, basis = self._scores[k], self._trained[k], self._parts[k], self._bases[k]
        penalties = basis.penalties(self._config.penalties)
        target = responses[rows]
        level = target.mean(0)
        rotated = scores[rows].T @ target.sub_(level)
        judged = [(scores[part], responses[part] - level) for part in parts]
        errors = held_out_errors(basis.values, rotated, penalties, judged)
        maps = [maps_of_penalties(basis, rotated, level, penalties[one.argmin(0)]) for one in errors]
        return FoldHeads(list(zip(parts, maps[:-1], strict=True)), maps[-1])


def held_out_errors(
    values: torch.Tensor,
    rotated: torch.Tensor,
    penalties: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """(n_parts + 1, n_penalties, n_vertices) mean squared error over the other parts of a fold, and over all.

    values, rotated : eigenvalues of X'X (rank,), and U'X'Y (rank, n_vertices)
    parts : scores XU (n, rank) and centred responses (n, n_vertices) of each
    """
    squares = torch.stack(
        [
            torch.stack([(y - x @ (rotated / (values[:, None] + penalty))).square().sum(0) for penalty in penalties])
            for x, y in parts
        ]
    )
    counts = torch.tensor([len(y) for _, y in parts], device=squares.device)[:, None, None]
    # added up and not subtracted from the whole: rounding would let a part's outliers have a say in its own choice
    others = 1 - torch.eye(len(parts), device=squares.device, dtype=squares.dtype)
    apart = torch.einsum("ij,jpv->ipv", others, squares) / (counts.sum() - counts)
    return torch.cat([apart, squares.sum(0)[None] / counts.sum()])


class TunedAdamW:
    """Heads trained by gradient, on such features; when to stop is chosen as penalties are."""

    vertex_block: int | None = None

    def __init__(
        self,
        features: Sequence[torch.Tensor],
        folds: np.ndarray,
        held_out: Sequence[int],
        image_ids: np.ndarray,
        config: FitConfig,
    ) -> None:
        self._rows = [np.flatnonzero(folds != k) for k in held_out]
        self._held_out = [np.flatnonzero(folds == k) for k in held_out]
        self._parts = [clean_parts(image_ids, *pair) for pair in zip(self._held_out, held_out, strict=True)]
        self._solvers = [AdamWFolds(x, folds, image_ids, config) for x in features]

    def fit(self, responses: torch.Tensor, **about: Any) -> list[FoldHeads]:
        return [self._fit_fold(k, responses, about) for k in range(len(self._solvers))]

    def _fit_fold(self, k: int, responses: torch.Tensor, about: dict[str, Any]) -> FoldHeads:
        held_out, parts = self._held_out[k], self._parts[k]
        others = [np.setdiff1d(held_out, part) for part in parts]
        maps = self._solvers[k].fit_rows(self._rows[k], [*others, held_out], responses, **about)
        return FoldHeads(list(zip(parts, maps[:-1], strict=True)), maps[-1])


def choices_of(image_ids: np.ndarray, folds: np.ndarray, fold: int, trained: bool) -> list[np.ndarray]:
    """The held-out rows, in the parts for which choices are made apart: all in one where no choice is made on them."""
    held_out = np.flatnonzero(folds == fold)
    return clean_parts(image_ids, held_out, fold) if trained else [held_out]


def clean_parts(image_ids: np.ndarray, held_out: np.ndarray, fold: int) -> list[np.ndarray]:
    """Row numbers of a held-out fold in parts, by image id; the others have 2 images or more to choose each by."""
    parts = [held_out[assign_folds(image_ids[held_out], _PARTS, fold) == part] for part in range(_PARTS)]
    parts = [part for part in parts if len(part)]
    if len(parts) < 2 or max(map(len, parts)) > len(held_out) - 2:
        raise ConfigError(
            f"fold {fold}",
            expected="enough held-out images to choose by and to score",
            found=len(held_out),
            remedy="add images, or train with fewer --folds",
        )
    for part in parts:
        refuse_leak(image_ids[np.setdiff1d(held_out, part)], image_ids[part], f"what is chosen on fold {fold}")
    return parts
