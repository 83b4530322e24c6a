"""The contract of every solver: what it is built from, what it is given, and what it hands back.

A solver fits heads on all folds but one, for each fold in turn. `Problem` is what its builder is given, `Block` what
`fit` is given, and `Fits` what comes back; `heads/fit/` does the rest without knowing what a head is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from featcache.dataset.subject import Subject
from heads.config import FitConfig
from heads.features.sets import FeatureSet
from heads.solvers.held_out import FoldPlan
from heads.solvers.units import varies

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Responses that are fitted together: some vertices of one surface.

    surface : its name
    vertices : which of its vertices these are
    responses : (n_train, n_vertices) float32, on the device that fits
    noise_ceiling : (n_vertices,), fraction of variance in [0, 1]; None where not given
    rois : masks (n_vertices,) of the ROIs
    all_responses : (n_train, all vertices of the surface), for choices made once per surface; memory-mapped
    """

    surface: str
    vertices: slice
    responses: torch.Tensor
    noise_ceiling: np.ndarray | None = None
    rois: tuple[np.ndarray, ...] = ()
    all_responses: np.ndarray | torch.Tensor | None = None


class Piece(NamedTuple):
    """Predictions of some held-out images by a head that was neither fitted to nor chosen on these images.

    rows : (n,) numbers of the images
    predictions : (n, n_vertices)
    mean, std : (n_vertices,) mean and standard deviation of the head's predictions of the images that it was trained
        on; 1 in place of a standard deviation of 0
    """

    rows: np.ndarray
    predictions: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


class FoldFit(NamedTuple):
    """Predictions of the heads that were fitted without one fold.

    held_out : predictions of the fold's images
    test : (n_test, n_vertices) predictions of the test images
    test_mean, test_std : (n_vertices,) of the head for test images, as those of a piece
    calibration : (n_vertices,) slope and shift by which `test` is made of what the saved head gives; None where it is
        what the saved head gives
    """

    held_out: list[Piece]
    test: torch.Tensor
    test_mean: torch.Tensor
    test_std: torch.Tensor
    calibration: tuple[torch.Tensor, torch.Tensor] | None = None


class Fits(NamedTuple):
    """Predictions and heads that were fitted to one block.

    folds : one for each held-out fold
    saved : {(prefix, part): tensor}, the heads themselves; prefixes name folds. If `vertex_block` is set, the last axis
        of every tensor must be vertices
    shared : the same, of what does not depend on the block of vertices
    """

    folds: list[FoldFit]
    saved: dict[tuple[str, str], torch.Tensor]
    shared: Mapping[tuple[str, str], torch.Tensor] = MappingProxyType({})


class Solver(Protocol):
    """Fits heads on all folds but one, for each fold in turn, and predicts the images of that fold.

    vertex_block : number of vertices to fit at a time; None: all of a surface at once
    """

    vertex_block: int | None

    def fit(self, block: Block) -> Fits:
        """Fit heads to a block of responses, and predict held-out and test images with them."""
        ...

    def memory(self, n_vertices: int) -> float:
        """Bytes of memory that a fit of a surface is expected to take, besides the program itself."""
        ...


class Shared:
    """Values that several fits share; each is made at first use."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def get_or_make(self, name: str, make: Callable[[], T]) -> T:
        """The value of this name; `make` is called if there is none yet."""
        if name not in self._values:
            self._values[name] = make()
        value: T = self._values[name]
        return value


@dataclass(frozen=True, eq=False)
class Trainee:
    """One subject to fit: its features and its folds. One training may serve several."""

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
    trainees : all subjects that one training serves, if it serves several
    shared : values that their fits share
    """

    subject: Subject
    features: FeatureSet
    plan: FoldPlan
    config: FitConfig
    device: str = "cpu"
    work: Path = Path()
    trainees: tuple[Trainee, ...] = ()
    shared: Shared = field(default_factory=Shared)

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


def mean_and_std(predictions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each vertex over rows, (n_images, n_vertices); 1 where it is constant.

    A head is constant too where it varies by no more than rounding: scaled up, that would be noise.
    """
    std, mean = torch.std_mean(predictions, 0, correction=0)
    return mean, torch.where(varies(std, mean), std, torch.ones_like(std))


def piece_of(predictions: torch.Tensor, rows: np.ndarray, train_rows: np.ndarray) -> Piece:
    """Piece of some held-out rows. predictions : (n_images, n_vertices) of all images"""
    return Piece(rows, predictions[rows], *mean_and_std(predictions[train_rows]))


def ratios(stds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Factors, (n_vertices,) each, that bring heads to one standard deviation: the mean of theirs."""
    common = torch.stack(list(stds)).mean(0)
    return [common / std for std in stds]


def joined(parts: Sequence[Fits]) -> Fits:
    """Fits of neighbouring vertices as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    folds = []
    for of_fold in zip(*(part.folds for part in parts), strict=True):
        held_out = [
            Piece(pieces[0].rows, *(torch.cat(values, -1) for values in zip(*(p[1:] for p in pieces), strict=True)))
            for pieces in zip(*(fold.held_out for fold in of_fold), strict=True)
        ]
        test, mean, std = (torch.cat(values, -1) for values in zip(*(fold[1:4] for fold in of_fold), strict=True))
        folds.append(FoldFit(held_out, test, mean, std))
    saved = {name: torch.cat([part.saved[name] for part in parts], -1) for name in parts[0].saved}
    return parts[0]._replace(folds=folds, saved=saved)


def mean_of_tests(folds: Sequence[FoldFit]) -> torch.Tensor:
    """(n_test, n_vertices) mean over folds, each brought to one mean and standard deviation first.

    Else the head with the largest scale would decide. Their common mean is the mean of theirs.
    """
    lines = to_one_scale(folds)
    scaled = [torch.addcmul(shift, fold.test, scale) for fold, (scale, shift) in zip(folds, lines, strict=True)]
    return torch.stack(scaled).mean(0)


def to_one_scale(folds: Sequence[FoldFit]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(n_vertices,) scale and shift of each fold's `test` that bring all folds to one mean and standard deviation."""
    level = torch.stack([fold.test_mean for fold in folds]).mean(0)
    scales = ratios([fold.test_std for fold in folds])
    return [(scale, level - fold.test_mean * scale) for fold, scale in zip(folds, scales, strict=True)]


def lines_of_heads(folds: Sequence[FoldFit]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same of what each fold's saved head gives: the mean of ``scale * head + shift`` is `mean_of_tests`."""
    lines = []
    for fold, (scale, shift) in zip(folds, to_one_scale(folds), strict=True):
        slope, offset = fold.calibration or (torch.ones_like(scale), torch.zeros_like(shift))
        lines.append((scale * slope, shift + scale * offset))
    return lines


def comparable(pieces: Sequence[Piece], mean: torch.Tensor) -> Iterator[torch.Tensor]:
    """Predictions of the pieces, all with the same mean and standard deviation for each vertex.

    Heads of different folds differ in mean and scale: if the responses of a fold happen to be high, the head that is
    trained without it has a low mean; and each head has its own penalty. When folds are pooled, these differences make
    noise correlate negatively and lower every true correlation. So each fold is set to the same mean and standard
    deviation. They are computed only from images that the head was trained on.

    mean : (n_vertices,) mean response
    """
    for piece, ratio in zip(pieces, ratios([piece.std for piece in pieces]), strict=True):
        yield torch.addcmul(mean - piece.mean * ratio, piece.predictions, ratio)
