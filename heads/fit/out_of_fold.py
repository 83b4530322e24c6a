"""Predictions of one surface out of fold: blocks of vertices, one after the other, brought together."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from featcache.dataset.subject import Subject
from featcache.machine.tensors import large_zeros
from heads.modules.readout import SCALE, SHIFT
from heads.solvers.base import Block, Fits, Solver, comparable, lines_of_heads, mean_of_tests


def predict_surface(
    solver: Solver,
    subject: Subject,
    surface: str,
    advance: Callable[[int], None],
    device: str = "cpu",
    held_out: Sequence[int] = (),
    spool: Path | None = None,
) -> tuple[np.ndarray, dict[tuple[str, str], torch.Tensor]]:
    """Predictions of one surface, (n_train + n_test, n_vertices) float32, and the heads that made them, by name.

    Training rows are predicted by heads that did not see them, and are NaN where there are none; test rows by the mean
    over folds. Both are brought to one mean and standard deviation over folds.

    advance : called with the number of vertices that were just fitted
    held_out : number of each fold, in the order of the solver's
    spool : folder for heads that are larger than the memory; None: all are in memory
    """
    n_train, responses = len(subject.train), subject.responses(surface)
    n_vertices = responses.shape[1]
    predictions = torch.full((n_train + len(subject.test), n_vertices), torch.nan)
    saved: dict[tuple[str, str], torch.Tensor] = {}
    step = solver.vertex_block or max(n_vertices, 1)
    for vertices in (slice(start, min(start + step, n_vertices)) for start in range(0, n_vertices, step)):
        block = block_of(subject, surface, responses, vertices, device)
        fits = solver.fit(block)
        pieces = [piece for fold in fits.folds for piece in fold.held_out]
        for piece, values in zip(pieces, comparable(pieces, block.responses.mean(0)), strict=True):
            predictions[torch.from_numpy(piece.rows), vertices] = values.cpu()
        predictions[n_train:, vertices] = mean_of_tests(fits.folds).cpu()
        saved |= {name: values.cpu() for name, values in fits.shared.items()}
        for name, values in [*fits.saved.items(), *_lines(fits, held_out)]:
            if step >= n_vertices:
                saved[name] = values.cpu()
                continue
            if name not in saved:
                saved[name] = large_zeros(spool, *values.shape[:-1], n_vertices)
            saved[name][..., vertices] = values.cpu()
        advance(vertices.stop - vertices.start)
    return predictions.numpy(), saved


def _lines(fits: Fits, held_out: Sequence[int]) -> list[tuple[tuple[str, str], torch.Tensor]]:
    """What brings the heads of the folds to one mean and standard deviation, where each fold saves its own."""
    if "" in {prefix for prefix, _ in fits.saved}:  # one head, which is their mean already
        return []
    named: list[tuple[tuple[str, str], torch.Tensor]] = []
    for fold, (scale, shift) in zip(held_out, lines_of_heads(fits.folds), strict=True) if held_out else ():
        named += [((f"fold{fold}.", SCALE), scale), ((f"fold{fold}.", SHIFT), shift)]
    return named


def block_of(subject: Subject, surface: str, responses: np.ndarray, vertices: slice, device: str) -> Block:
    """Some vertices of a surface as solvers are given them. responses : (n_train, all vertices of the surface)"""
    ceiling = subject.noise_ceiling[surface]
    return Block(
        surface=surface,
        vertices=vertices,
        responses=torch.from_numpy(np.array(responses[:, vertices], dtype=np.float32)).to(device),
        noise_ceiling=None if ceiling is None else ceiling[vertices],
        rois=tuple(mask[vertices] for mask in subject.rois[surface].values()),
        all_responses=responses,
    )
