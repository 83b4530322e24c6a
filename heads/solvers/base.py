"""What fitted heads say of images they were not trained on, and how folds are brought together."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from featcache.dataset.subject import Subject
from heads.solvers.held_out import FoldHeads, FoldSolver
from heads.solvers.ridge import LinearMap


class Piece(NamedTuple):
    """Predictions of some held-out images by the head that may predict them.

    rows : (n,) numbers of the images
    predictions : (n, n_vertices)
    mean, spread : (n_vertices,) of the head's predictions of the images that it was trained on; a spread is never 0
    """

    rows: np.ndarray
    predictions: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor


class FoldFit(NamedTuple):
    """What was fitted without one fold.

    test : (n_test, n_vertices) predictions of the test images
    """

    held_out: list[Piece]
    test: torch.Tensor


class Fits(NamedTuple):
    """All folds.

    saved : {(prefix, part): tensor} what the heads are; the last axis is vertices, a prefix tells folds apart
    """

    folds: list[FoldFit]
    saved: dict[tuple[str, str], torch.Tensor]


class FoldPredictor(Protocol):
    """Fits heads on all folds but one, for each in turn, and predicts."""

    vertex_block: int | None  # vertices it takes at a time; None: all at once

    def fit(self, responses: torch.Tensor, **about: Any) -> Fits: ...


class LinearFits:
    """A solver whose heads are linear maps of a matrix of features.

    features : (n_train + n_test, n_features) float32, one for all folds or one for each
    names : of the saved maps: one where folds share their features, which is then the mean of theirs, or one a fold
    """

    def __init__(
        self, solver: FoldSolver, features: Sequence[torch.Tensor], n_train: int, names: Sequence[str]
    ) -> None:
        self._solver, self._features, self._n_train, self._names = solver, features, n_train, names
        self.vertex_block = solver.vertex_block
        self._spreads: dict[int, _Trained] = {}

    def fit(self, responses: torch.Tensor, **about: Any) -> Fits:
        folds = self._solver.fit(responses, **about)
        shared = len(self._features) == 1
        fits = [self._predict(k, fold, self._features[0 if shared else k]) for k, fold in enumerate(folds)]
        finals = [fold.final for fold in folds]
        if shared:
            finals = [LinearMap(*(torch.stack(parts).mean(0) for parts in zip(*finals, strict=True)))]
        saved = {
            (name, part): values
            for name, head in zip(self._names, finals, strict=True)
            for part, values in head._asdict().items()
        }
        return Fits(fits, saved)

    def _predict(self, k: int, fold: FoldHeads, features: torch.Tensor) -> FoldFit:
        if k not in self._spreads:
            self._spreads[k] = _Trained(features[: self._n_train], fold)
        trained = self._spreads[k]
        pieces = [
            Piece(
                rows, head(features[rows]), trained.mean @ head.weights + head.intercept, trained.spread(head.weights)
            )
            for rows, head in fold.held_out
        ]
        return FoldFit(pieces, fold.final(features[self._n_train :]))


class _Trained:
    """The features that a fold's head was trained on, as far as the spread of its predictions needs them."""

    def __init__(self, features: torch.Tensor, fold: FoldHeads) -> None:
        held_out = np.concatenate([rows for rows, _ in fold.held_out])
        features = features[np.setdiff1d(np.arange(len(features)), held_out)]
        self.mean, self._n_images = features.mean(0), len(features)
        centred = features - self.mean
        self._tall = len(features) > features.shape[1]
        self._factor = centred.T @ centred if self._tall else centred

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """(n_vertices,) standard deviation of the predictions; 1 where they are constant."""
        product = self._factor @ weights
        squares = (weights * product).sum(0) if self._tall else product.square().sum(0)
        return torch.where(squares > 0, squares / self._n_images, 1).sqrt()


def level_and_spread(predictions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each vertex over rows, (n_images, n_vertices); 1 where it is constant."""
    spread, mean = torch.std_mean(predictions, 0, correction=0)
    return mean, torch.where(spread > 0, spread, torch.ones_like(spread))


def comparable(pieces: Sequence[Piece], level: torch.Tensor) -> Iterator[torch.Tensor]:
    """The pieces' predictions, with the mean and spread of what their heads say of their training images made equal.

    Heads of different folds differ in level and scale: a fold whose responses happen to be high leaves a low mean to
    the head trained without it, and each takes its own penalty. Pooled over folds, these steps give predictions of
    noise a correlation below 0 and take some from every real one. Level and spread are set to one number a vertex, on
    which no r depends, from nothing but the images that the head saw.

    level : (n_vertices,) mean response
    """
    common = torch.stack([piece.spread for piece in pieces]).mean(0)
    ratios = [common / piece.spread for piece in pieces]
    for piece, ratio in zip(pieces, ratios, strict=True):
        yield torch.addcmul(level - piece.mean * ratio, piece.predictions, ratio)


def cross_validate(
    predictor: FoldPredictor,
    subject: Subject,
    hemisphere: str,
    advance: Callable[[int], None],
    device: str = "cpu",
) -> tuple[np.ndarray, dict[tuple[str, str], torch.Tensor]]:
    """Predictions (n_train + n_test, n_vertices) float32 of one hemisphere, and the heads that made them, by name.

    Training rows are predicted by heads that did not see them, and are NaN where there are none; test rows by the mean
    over folds.
    """
    n_train, responses = len(subject.train), subject.responses(hemisphere)
    n_vertices = responses.shape[1]
    predictions = torch.full((n_train + len(subject.test), n_vertices), torch.nan)
    saved: dict[tuple[str, str], torch.Tensor] = {}
    step = predictor.vertex_block or max(n_vertices, 1)
    about = {
        "hemisphere": hemisphere,
        "whole": responses,
        "noise_ceiling": subject.noise_ceiling[hemisphere],
        "rois": tuple(subject.rois[hemisphere].values()),
    }
    for block in (slice(start, min(start + step, n_vertices)) for start in range(0, n_vertices, step)):
        y = torch.from_numpy(np.array(responses[:, block], dtype=np.float32)).to(device)
        fits = predictor.fit(y, vertices=block, **about)
        pieces = [piece for fold in fits.folds for piece in fold.held_out]
        for piece, values in zip(pieces, comparable(pieces, y.mean(0)), strict=True):
            predictions[torch.from_numpy(piece.rows), block] = values.cpu()
        predictions[n_train:, block] = torch.stack([fold.test for fold in fits.folds]).mean(0).cpu()
        for name, values in fits.saved.items():
            if step >= n_vertices:
                saved[name] = values.cpu()
                continue
            whole = saved.setdefault(name, values.new_empty((*values.shape[:-1], n_vertices), device="cpu"))
            whole[..., block] = values.cpu()
        advance(block.stop - block.start)
    return predictions.numpy(), saved
