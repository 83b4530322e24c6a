"""Closed-form heads on all folds but one, for each fold in turn, and what they predict.

A fold's heads work on scores, the features on the principal axes of the images that it trains on (see heads.ridge):
there the spread of predictions is a sum of squares, and to predict no weights on features are needed. Those are formed
to be saved, once for all folds.

With more images than features X'Y is computed once for the images of each fold; what a head is trained on is the sum
over the other folds, turned to its axes. With fewer the axes are as many as images, and scores serve at once.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from heads.config import RidgeConfig
from heads.predictions import Fits, FoldFit, Piece
from heads.ridge import (
    TOGETHER,
    VERTEX_BLOCK,
    Eigenbasis,
    eigenbasis,
    eigenbasis_of_gram,
    is_exact,
    penalty_errors,
    sum_of_squares,
)


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


class _Fold(NamedTuple):
    """What one fold's heads are made of, whatever the responses.

    held_out, trained : row numbers, where the features are
    scores : of the held-out images and of the test images, on the axes of the trained ones
    own : of the trained ones, where they are needed
    """

    held_out: torch.Tensor
    trained: torch.Tensor
    basis: Eigenbasis
    scores: tuple[torch.Tensor, torch.Tensor]
    own: torch.Tensor | None


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
        of_fold = torch.from_numpy(folds).to(features.device)
        held_out, trained = zip(*(_rows_of(of_fold, k) for k in range(folds.max() + 1)), strict=True)
        self._tall = min(map(len, trained)) > features.shape[1]
        self._parts = [_Part.of(features[rows]) for rows in held_out] if self._tall else []
        bases = self._tall_bases(trained) if self._tall else (eigenbasis(features[rows]) for rows in trained)
        self._folds = [
            _Fold(
                held_out[k],
                trained[k],
                basis,
                (basis.scores(features[held_out[k]]), basis.scores(features[len(folds) :])),
                basis.own_scores(features[trained[k]]) if self._by_rows(basis.n_images) else None,
            )
            for k, basis in enumerate(bases)
        ]

    def _by_rows(self, n_images: int) -> bool:
        """Whether a fold needs the scores of the images that it trains on, and their responses one by one."""
        return not self._tall or is_exact(self._config, n_images)

    def _tall_bases(self, trained: Sequence[torch.Tensor]) -> Iterator[Eigenbasis]:
        grams = [part.centred.T @ part.centred for part in self._parts]
        for k, gram in enumerate(_without_each(grams)):
            mean, apart = _about_the_mean(self._parts, k)
            yield eigenbasis_of_gram(gram + apart.T @ apart, mean, len(trained[k]))

    def fit(self, responses: torch.Tensor, **_: Any) -> Fits:
        """For (n_train, n_vertices) float32 responses."""
        saved = _Mean(self._folds, responses) if self._save else None
        fits = []
        for fold, target in zip(self._folds, self._targets(responses), strict=True):
            weights = self._solve(fold, target)
            spread = (fold.basis.values @ weights.square() / fold.basis.n_images).sqrt()
            held_out, test = (torch.addmm(target.mean, scores, weights) for scores in fold.scores)
            piece = Piece(fold.held_out.cpu().numpy(), held_out, target.mean, torch.where(spread > 0, spread, 1))
            fits.append(FoldFit([piece], test))
            if saved is not None:
                saved.add(fold.basis, weights, target.mean)
        return Fits(fits, {} if saved is None else saved.tensors())

    def _solve(self, fold: _Fold, target: "_Target") -> torch.Tensor:
        """(rank, n_vertices) weights on the axes, each vertex under the penalty of its least error."""
        values, n_images = fold.basis.values, fold.basis.n_images
        offered = fold.basis.penalties(self._config.penalties)
        rows = None
        if is_exact(self._config, n_images) and fold.own is not None and target.rows is not None:
            rows = fold.own, target.rows
        errors = penalty_errors(values, n_images, target.rotated, target.squares, offered, rows)
        return target.rotated.div_(values[:, None] + offered[errors.argmin(0)])

    def _targets(self, responses: torch.Tensor) -> "Iterator[_Target]":
        if not self._tall:
            yield from (self._by_row(fold, responses) for fold in self._folds)
            return
        parts = [_Part.of(responses[fold.held_out]) for fold in self._folds]
        squares = _without_each([sum_of_squares(part.centred) for part in parts])
        cross = _without_each([x.centred.T @ y.centred for x, y in zip(self._parts, parts, strict=True)])
        for k, (fold, square, product) in enumerate(zip(self._folds, squares, cross, strict=True)):
            mean, apart = _about_the_mean(parts, k)
            axes = fold.basis.mixing
            between = _about_the_mean(self._parts, k)[1] @ axes
            rotated = torch.addmm(between.T @ apart, axes.T, product)
            rows = None if fold.own is None else responses[fold.trained] - mean
            yield _Target(mean, square + sum_of_squares(apart), rotated, rows)

    def _by_row(self, fold: _Fold, responses: torch.Tensor) -> "_Target":
        rows = responses[fold.trained]
        mean = rows.mean(0)
        rows -= mean
        assert fold.own is not None
        return _Target(mean, sum_of_squares(rows), fold.own.T @ rows, rows)


class _Target(NamedTuple):
    """What a fold learns a block of vertices from.

    mean : (n_vertices,) of the responses of the images that it trains on
    squares : (n_vertices,) of those responses less their mean, summed
    rotated : (rank, n_vertices) scores' @ responses
    rows : (n_trained, n_vertices) responses less their mean, where they are needed
    """

    mean: torch.Tensor
    squares: torch.Tensor
    rotated: torch.Tensor
    rows: torch.Tensor | None


class _Mean:
    """The mean over folds of the linear maps of features."""

    def __init__(self, folds: Sequence[_Fold], responses: torch.Tensor) -> None:
        self._share = 1 / len(folds)
        self._weights = responses.new_zeros(len(folds[0].basis.mean), responses.shape[1])
        self._intercept = responses.new_zeros(responses.shape[1])

    def add(self, basis: Eigenbasis, weights: torch.Tensor, mean: torch.Tensor) -> None:
        """Of one fold, whose weights are on its axes."""
        own = basis.weights(weights)
        self._weights.add_(own, alpha=self._share)
        self._intercept += self._share * (mean - basis.mean @ own)

    def tensors(self) -> dict[tuple[str, str], torch.Tensor]:
        return {("", "weights"): self._weights, ("", "intercept"): self._intercept}


class _Part(NamedTuple):
    """Rows of one fold. Each fold is centred on its own: what is large in one must not cost the others digits."""

    mean: torch.Tensor
    centred: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> "_Part":
        """values : rows of their own, which are centred in place"""
        mean = values.mean(0)
        return cls(mean, values.sub_(mean))


def _rows_of(folds: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the rows that are held out with fold k, and of the others."""
    return torch.nonzero(folds == k)[:, 0], torch.nonzero(folds != k)[:, 0]


def _about_the_mean(parts: Sequence[_Part], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of all parts but one, and how far theirs are from it, so that squares and products about it are those
    about the parts' own means plus those of the latter.

    Chan, Golub and LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115
    """
    others = [part for j, part in enumerate(parts) if j != k]
    counts = torch.tensor([len(part.centred) for part in others], device=parts[0].mean.device)[:, None]
    means = torch.stack([part.mean for part in others])
    mean = (means * counts).sum(0) / counts.sum()
    return mean, (means - mean) * counts.sqrt()


def _without_each(parts: Sequence[Any]) -> Iterator[Any]:
    """The sum over all parts but one, for each in turn.

    Added up and never subtracted from the whole: that would lose digits, and let the held-out part have a say in them.
    """
    after = list(accumulate(parts[:0:-1]))[::-1]
    before = None
    for k, part in enumerate(parts):
        others = [one for one in (before, after[k] if k < len(after) else None) if one is not None]
        yield others[0] if len(others) == 1 else others[0] + others[1]
        before = part if before is None else before + part
