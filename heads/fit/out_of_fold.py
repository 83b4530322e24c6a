"""Predictions of one surface out of fold: blocks of vertices, one after the other, brought together."""

from collections.abc import Callable

import numpy as np
import torch

from featcache.dataset.subject import Subject
from heads.solvers.base import Block, Solver, comparable, mean_of_tests


def predict_surface(
    solver: Solver, subject: Subject, surface: str, advance: Callable[[int], None], device: str = "cpu"
) -> tuple[np.ndarray, dict[tuple[str, str], torch.Tensor]]:
    """Predictions of one surface, (n_train + n_test, n_vertices) float32, and the heads that made them, by name.

    Training rows are predicted by heads that did not see them, and are NaN where there are none; test rows by the mean
    over folds. Both are brought to one mean and standard deviation over folds.

    advance : called with the number of vertices that were just fitted
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
        for name, values in fits.saved.items():
            if step >= n_vertices:
                saved[name] = values.cpu()
                continue
            whole = saved.setdefault(name, values.new_empty((*values.shape[:-1], n_vertices), device="cpu"))
            whole[..., vertices] = values.cpu()
        advance(vertices.stop - vertices.start)
    return predictions.numpy(), saved


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
