"""Principal axes of the training images of each fold, and closed-form heads on these axes.

The heads of a fold work on scores: features on the principal axes of the images that the fold trains on (see ridge.py).
There the variance of predictions is a sum of squares. Prediction does not need weights on features. They are computed
only for saving, once for all folds.

With more images than features, X'Y is computed once for the images of each fold; a head is trained on the sum over the
other folds, rotated to its axes. With fewer, there are as many axes as images, and scores are used directly.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.machine.device import pinned, to_device
from heads.solvers.base import Fits, FoldFit, Piece
from heads.solvers.ridge import Eigenbasis, eigenbasis, eigenbasis_of_gram, sum_of_squares


class Fold(NamedTuple):
    """Axes and scores of one fold, which serve any responses.

    held_out, train_rows : row numbers, on the device of the features
    rows : those that are held out, in main memory
    scores : of the held-out images, then of the test images, on the axes of the training images
    train_scores : of the training images, where they are needed
    """

    held_out: torch.Tensor
    train_rows: torch.Tensor
    rows: np.ndarray
    basis: Eigenbasis
    scores: torch.Tensor
    train_scores: torch.Tensor | None


class Target(NamedTuple):
    """Responses that a fold learns a block of vertices from.

    mean : (n_vertices,) over the images that it trains on
    squares : (n_vertices,) sums of squares of the centred responses
    rotated : (rank, n_vertices) scores' @ responses
    rows : (n_train_rows, n_vertices) centred responses, where they are needed
    """

    mean: torch.Tensor
    squares: torch.Tensor
    rotated: torch.Tensor
    rows: torch.Tensor | None


class FoldAxes:
    """The principal axes of every fold, and responses rotated to them.

    features : (n_train + n_test, n_features) float32
    folds : (n_train,) fold of each training image, in [0, n_folds)
    by_rows : whether a fold that trains on so many images needs the response of each image, besides X'Y
    """

    def __init__(self, features: torch.Tensor, folds: np.ndarray, by_rows: Callable[[int], bool]) -> None:
        rows = [np.flatnonzero(folds == k) for k in range(int(folds.max()) + 1)]
        held_out = [_sent(of_fold, features) for of_fold in rows]
        train_rows = [_sent(np.flatnonzero(folds != k), features) for k in range(len(rows))]
        self._tall = min(map(len, train_rows)) > features.shape[1]
        self._parts = [_Part.centre(features[rows]) for rows in held_out] if self._tall else []
        bases = self._tall_bases(train_rows) if self._tall else (eigenbasis(features[rows]) for rows in train_rows)
        self.folds = [
            Fold(
                held_out[k],
                train_rows[k],
                rows[k],
                basis,
                basis.scores(torch.cat([features[held_out[k]], features[len(folds) :]])),
                basis.train_scores(features[train_rows[k]]) if not self._tall or by_rows(basis.n_images) else None,
            )
            for k, basis in enumerate(bases)
        ]

    def _tall_bases(self, train_rows: Sequence[torch.Tensor]) -> Iterator[Eigenbasis]:
        grams = [part.centred.T @ part.centred for part in self._parts]
        for k, gram in enumerate(_without_each(grams)):
            mean, offsets = _mean_and_offsets(self._parts, k)
            yield eigenbasis_of_gram(gram + offsets.T @ offsets, mean, len(train_rows[k]))

    def targets(self, responses: torch.Tensor) -> Iterator[Target]:
        """Targets of each fold, from (n_train, n_vertices) float32 responses."""
        if not self._tall:
            yield from (_by_row(fold, responses) for fold in self.folds)
            return
        parts = [_Part.centre(responses[fold.held_out]) for fold in self.folds]
        squares = _without_each([sum_of_squares(part.centred) for part in parts])
        cross = _without_each([x.centred.T @ y.centred for x, y in zip(self._parts, parts, strict=True)])
        for k, (fold, square, product) in enumerate(zip(self.folds, squares, cross, strict=True)):
            mean, offsets = _mean_and_offsets(parts, k)
            axes = fold.basis.mixing
            feature_offsets = _mean_and_offsets(self._parts, k)[1] @ axes
            rotated = torch.addmm(feature_offsets.T @ offsets, axes.T, product)
            rows = None if fold.train_scores is None else responses[fold.train_rows] - mean
            yield Target(mean, square + sum_of_squares(offsets), rotated, rows)

    def predict(self, solved: Iterator[tuple[torch.Tensor, torch.Tensor]], save: bool) -> Fits:
        """Predictions from each fold's weights on its axes, (rank, n_vertices), and mean response, (n_vertices,).

        save : whether to return weights on the features, the mean over folds
        """
        fits: list[FoldFit] = []
        saved: _Mean | None = None
        for fold, (weights, mean) in zip(self.folds, solved, strict=True):
            std = (fold.basis.values @ weights.square() / fold.basis.n_images).sqrt()
            # one product, because a separate product for few test images would be slow
            held_out, test = torch.addmm(mean, fold.scores, weights).tensor_split([len(fold.held_out)])
            piece = Piece(fold.rows, held_out, mean, torch.where(std > 0, std, 1))
            fits.append(FoldFit([piece], test, piece.mean, piece.std))
            if save:
                saved = saved or _Mean(len(self.folds), len(fold.basis.mean), mean)
                saved.add(fold.basis, weights, piece)
        return Fits(fits, {} if saved is None else saved.tensors())


class _Mean:
    """The mean over folds of linear maps, brought to one mean and standard deviation."""

    def __init__(self, n_folds: int, n_features: int, like: torch.Tensor) -> None:
        self._share = 1 / n_folds
        self._weights = like.new_zeros(n_features, len(like))
        self._mean, self._std, self._shift = (torch.zeros_like(like) for _ in range(3))

    def add(self, basis: Eigenbasis, weights: torch.Tensor, piece: Piece) -> None:
        """Add the map of one fold. weights : (rank, n_vertices) on its axes; piece : what it predicts"""
        feature_weights = basis.weights(weights / piece.std)
        self._weights.add_(feature_weights, alpha=self._share)
        self._shift -= self._share * (basis.mean @ feature_weights)
        self._mean += self._share * piece.mean
        self._std += self._share * piece.std

    def tensors(self) -> dict[tuple[str, str], torch.Tensor]:
        return {("", "weights"): self._weights * self._std, ("", "intercept"): self._mean + self._shift * self._std}


class _Part(NamedTuple):
    """Rows of one fold, centred by their own mean: a large mean in one fold must not reduce the others' precision."""

    mean: torch.Tensor
    centred: torch.Tensor

    @classmethod
    def centre(cls, values: torch.Tensor) -> "_Part":
        """values : a copy of the rows, which is centred in place"""
        mean = values.mean(0)
        return cls(mean, values.sub_(mean))


def _by_row(fold: Fold, responses: torch.Tensor) -> Target:
    rows = responses[fold.train_rows]
    mean = rows.mean(0)
    rows -= mean
    assert fold.train_scores is not None
    return Target(mean, sum_of_squares(rows), fold.train_scores.T @ rows, rows)


def _sent(rows: np.ndarray, features: torch.Tensor) -> torch.Tensor:
    """Row numbers on the device of the features."""
    return to_device(pinned(torch.from_numpy(rows), features.device), features.device)


def _mean_and_offsets(parts: Sequence[_Part], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of all parts but the k-th, and the offset of each part's mean from it, times sqrt(n).

    Scatter about the common mean = sum of the scatter within parts + offsets.T @ offsets.

    Chan, Golub and LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115
    """
    others = [part for j, part in enumerate(parts) if j != k]
    counts = torch.tensor([len(part.centred) for part in others], device=parts[0].mean.device)[:, None]
    means = torch.stack([part.mean for part in others])
    mean = (means * counts).sum(0) / counts.sum()
    return mean, (means - mean) * counts.sqrt()


def _without_each(parts: Sequence[Any]) -> Iterator[Any]:
    """The sum over all parts but one, for each in turn.

    Sums are never formed by subtraction from the total: rounding would let the held-out part influence them.
    """
    after = list(accumulate(parts[:0:-1]))[::-1]
    before = None
    for k, part in enumerate(parts):
        others = [total for total in (before, after[k] if k < len(after) else None) if total is not None]
        yield others[0] if len(others) == 1 else others[0] + others[1]
        before = part if before is None else before + part
