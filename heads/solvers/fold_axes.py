"""What closed-form and full-batch heads have in common on all folds but one, for each fold in turn.

A fold's heads work on scores, the features on the principal axes of the images that it trains on (see ridge.py):
there the spread of predictions is a sum of squares, and to predict no weights on features are needed. Those are formed
to be saved, once for all folds.

With more images than features X'Y is computed once for the images of each fold; what a head is trained on is the sum
over the other folds, turned to its axes. With fewer the axes are as many as images, and scores serve at once.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from heads.solvers.base import Fits, FoldFit, Piece
from heads.solvers.ridge import Eigenbasis, eigenbasis, eigenbasis_of_gram, sum_of_squares


class Fold(NamedTuple):
    """What one fold's heads are made of, whatever the responses.

    held_out, train_rows : row numbers, where the features are
    scores : of the held-out images, then of the test images, on the axes of the trained ones
    own : of the trained ones, where they are needed
    """

    held_out: torch.Tensor
    train_rows: torch.Tensor
    basis: Eigenbasis
    scores: torch.Tensor
    own: torch.Tensor | None


class Target(NamedTuple):
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


class FoldAxes:
    """The principal axes of every fold, and responses turned to them.

    features : (n_train + n_test, n_features) float32
    folds : (n_train,) fold of each training image, in [0, n_folds)
    by_rows : whether a fold that trains on so many images needs their responses one by one, besides X'Y
    """

    def __init__(self, features: torch.Tensor, folds: np.ndarray, by_rows: Callable[[int], bool]) -> None:
        of_fold = torch.from_numpy(folds).to(features.device)
        held_out, trained = zip(*(_rows_of(of_fold, k) for k in range(int(folds.max()) + 1)), strict=True)
        self._tall = min(map(len, trained)) > features.shape[1]
        self._parts = [_Part.of(features[rows]) for rows in held_out] if self._tall else []
        bases = self._tall_bases(trained) if self._tall else (eigenbasis(features[rows]) for rows in trained)
        self.folds = [
            Fold(
                held_out[k],
                trained[k],
                basis,
                basis.scores(torch.cat([features[held_out[k]], features[len(folds) :]])),
                basis.own_scores(features[trained[k]]) if not self._tall or by_rows(basis.n_images) else None,
            )
            for k, basis in enumerate(bases)
        ]

    def _tall_bases(self, trained: Sequence[torch.Tensor]) -> Iterator[Eigenbasis]:
        grams = [part.centred.T @ part.centred for part in self._parts]
        for k, gram in enumerate(_without_each(grams)):
            mean, apart = _about_the_mean(self._parts, k)
            yield eigenbasis_of_gram(gram + apart.T @ apart, mean, len(trained[k]))

    def targets(self, responses: torch.Tensor) -> Iterator[Target]:
        """Of (n_train, n_vertices) float32 responses, for each fold."""
        if not self._tall:
            yield from (_by_row(fold, responses) for fold in self.folds)
            return
        parts = [_Part.of(responses[fold.held_out]) for fold in self.folds]
        squares = _without_each([sum_of_squares(part.centred) for part in parts])
        cross = _without_each([x.centred.T @ y.centred for x, y in zip(self._parts, parts, strict=True)])
        for k, (fold, square, product) in enumerate(zip(self.folds, squares, cross, strict=True)):
            mean, apart = _about_the_mean(parts, k)
            axes = fold.basis.mixing
            between = _about_the_mean(self._parts, k)[1] @ axes
            rotated = torch.addmm(between.T @ apart, axes.T, product)
            rows = None if fold.own is None else responses[fold.train_rows] - mean
            yield Target(mean, square + sum_of_squares(apart), rotated, rows)

    def predict(self, solved: Iterator[tuple[torch.Tensor, torch.Tensor]], save: bool) -> Fits:
        """From each fold's weights on its axes, (rank, n_vertices), and the mean response, (n_vertices,).

        save : whether weights on the features are wanted, the mean over folds
        """
        fits: list[FoldFit] = []
        saved: _Mean | None = None
        for fold, (weights, mean) in zip(self.folds, solved, strict=True):
            spread = (fold.basis.values @ weights.square() / fold.basis.n_images).sqrt()
            predictions = torch.addmm(mean, fold.scores, weights)  # one product: a few test images are dear alone
            held_out, test = predictions.tensor_split([len(fold.held_out)])
            piece = Piece(fold.held_out.cpu().numpy(), held_out, mean, torch.where(spread > 0, spread, 1))
            fits.append(FoldFit([piece], test))
            if save:
                saved = saved or _Mean(len(self.folds), len(fold.basis.mean), mean)
                saved.add(fold.basis, weights, mean)
        return Fits(fits, {} if saved is None else saved.tensors())


class _Mean:
    """The mean over folds of the linear maps of features."""

    def __init__(self, n_folds: int, n_features: int, like: torch.Tensor) -> None:
        self._share = 1 / n_folds
        self._weights = like.new_zeros(n_features, len(like))
        self._intercept = torch.zeros_like(like)

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


def _by_row(fold: Fold, responses: torch.Tensor) -> Target:
    rows = responses[fold.train_rows]
    mean = rows.mean(0)
    rows -= mean
    assert fold.own is not None
    return Target(mean, sum_of_squares(rows), fold.own.T @ rows, rows)


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
