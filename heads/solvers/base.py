"""The contract of every solver: what it is built from, what it is given, and what it hands back.

A solver fits heads on all folds but one, for each fold in turn. `Problem` is what its builder is given, `Block` what
`fit` is given, and `Fits` what comes back; `heads/fit/` does the rest without knowing what a head is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from featcache.dataset.subject import Subject
from heads.config import FitConfig
from heads.features.sets import FeatureSet
from heads.solvers.held_out import FoldPlan

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Responses that are fitted together: some vertices of one surface.

    surface : its name
    vertices : which of its vertices these are
    responses : (n_train, n_vertices) float32, on the device that fits
    noise_ceiling : (n_vertices,), fraction of variance in [0, 1]; None where not given
    rois : masks (n_vertices,) of the ROIs
    whole : (n_train, all vertices of the surface), for what is chosen for all of them together; memory-mapped
    """

    surface: str
    vertices: slice
    responses: torch.Tensor
    noise_ceiling: np.ndarray | None = None
    rois: tuple[np.ndarray, ...] = ()
    whole: np.ndarray | torch.Tensor | None = None


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

    held_out : predictions of the fold's images
    test : (n_test, n_vertices) predictions of the test images
    """

    held_out: list[Piece]
    test: torch.Tensor


class Fits(NamedTuple):
    """What was fitted to one block.

    folds : one for each held-out fold
    saved : {(prefix, part): tensor}, the heads themselves; a prefix tells folds apart. Of a solver that takes blocks of
        vertices, the last axis is vertices
    """

    folds: list[FoldFit]
    saved: dict[tuple[str, str], torch.Tensor]


class Solver(Protocol):
    """Fits heads on all folds but one, for each fold in turn, and predicts the images of that fold.

    vertex_block : vertices that it takes at a time; None: all of a surface at once
    """

    vertex_block: int | None

    def fit(self, block: Block) -> Fits:
        """Fit heads to a block of responses, and predict held-out and test images by them."""
        ...

    def memory(self, n_vertices: int) -> float:
        """Bytes that it is expected to take for a surface of so many vertices, besides the program itself."""
        ...


class Shared:
    """What the subjects of one training have in common; the first that needs it makes it."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once under this name."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made


@dataclass(frozen=True, eq=False)
class Trainee:
    """One subject of a training that serves several."""

    subject: Subject
    features: FeatureSet
    plan: FoldPlan


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that a solver is built from: the features of one subject, on which images to fit, and settings.

    features : of a frozen backbone, or of one that was trained once per fold
    plan : folds, and on which images a choice may be made
    device : 'cpu' or 'cuda'
    work : the work folder, where checkpoints are
    together, joint : all subjects that one training serves, if it serves several, and what their fits have in common
    """

    subject: Subject
    features: FeatureSet
    plan: FoldPlan
    config: FitConfig
    device: str = "cpu"
    work: Path = Path()
    together: tuple[Trainee, ...] = ()
    joint: Shared = field(default_factory=Shared)

    @property
    def n_train(self) -> int:
        return len(self.subject.train)

    @property
    def n_test(self) -> int:
        return len(self.subject.test)

    @property
    def n_vertices(self) -> tuple[int, ...]:
        """Vertices of each surface."""
        return tuple(self.subject.n_vertices.values())


def level_and_spread(predictions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each vertex over rows, (n_images, n_vertices); 1 where it is constant."""
    spread, mean = torch.std_mean(predictions, 0, correction=0)
    return mean, torch.where(spread > 0, spread, torch.ones_like(spread))


def piece_of(predictions: torch.Tensor, rows: np.ndarray, trained: np.ndarray) -> Piece:
    """Predictions of some rows, out of those of all images, with the level and spread of the rows trained on."""
    return Piece(rows, predictions[rows], *level_and_spread(predictions[trained]))


def comparable(pieces: Sequence[Piece], level: torch.Tensor) -> Iterator[torch.Tensor]:
    """Predictions of the pieces, brought to one level and one scale for each vertex.

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
