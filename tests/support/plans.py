"""Folds, blocks of responses and predictions, as solvers are given them and give them back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from featcache.dataset.splits import assign_folds
from heads.solvers.base import Block, Fits
from heads.solvers.held_out import FoldPlan


def plan_of(
    ids: np.ndarray | int,
    n_folds: int = 3,
    seed: int = 0,
    *,
    held_out: Sequence[int] | None = None,
    trained: bool = False,
    folds: np.ndarray | None = None,
) -> FoldPlan:
    """A plan of images with these ids, or of so many images.

    held_out : folds that are held out; None: all of them
    folds : (n_train,) of each image; None: drawn by id
    """
    ids = np.arange(ids) if isinstance(ids, int) else ids
    folds = assign_folds(ids, n_folds, seed) if folds is None else folds
    every = range(int(folds.max()) + 1)
    return FoldPlan(
        image_ids=ids, folds=folds, held_out=tuple(every if held_out is None else held_out), backbone_trained=trained
    )


def block_of(responses: torch.Tensor | np.ndarray, surface: str = "lh", **about: Any) -> Block:
    """All vertices of a surface. responses : (n_train, n_vertices); about : other fields of Block"""
    tensor = torch.as_tensor(responses)
    return Block(surface=surface, responses=tensor, **({"vertices": slice(0, tensor.shape[1])} | about))


def out_of_fold(fits: Fits, n_train: int) -> np.ndarray:
    """(n_train, n_vertices) what each image's own head says of it; NaN where none does."""
    predictions = np.full((n_train, fits.folds[0].test.shape[1]), np.nan, dtype=np.float32)
    for fold in fits.folds:
        for piece in fold.held_out:
            predictions[piece.rows] = piece.predictions
    return predictions


def assert_same_fits(ours: Fits, theirs: Fits, **tolerance: float) -> None:
    """The same images, predicted the same."""
    for a, b in zip(ours.folds, theirs.folds, strict=True):
        torch.testing.assert_close(a.test, b.test, **tolerance)
        for one, other in zip(a.held_out, b.held_out, strict=True):
            assert np.array_equal(one.rows, other.rows)
            torch.testing.assert_close(one.predictions, other.predictions, **tolerance)
