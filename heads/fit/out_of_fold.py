"""Predictions of one surface out of fold: blocks of vertices, one after the other, brought together."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from featcache.dataset.responses import response_fault_in
from featcache.dataset.subject import Subject
from featcache.errors import DataError
from featcache.machine.device import pinned, to_device, to_host
from featcache.machine.device_memory import halving
from featcache.machine.tensors import Spool
from heads.modules.readout import SCALE, SHIFT
from heads.solvers.base import Block, Fits, Solver, comparable, lines_of_heads, mean_of_tests

_LEAST = 64  # vertices of a block that is no longer halved where the device's memory is full
_REMEDY = "use --device cpu, or fit fewer features, by --layers or one --subject"


def predict_surface(
    solver: Solver,
    subject: Subject,
    surface: str,
    advance: Callable[[int], None],
    device: str = "cpu",
    held_out: Sequence[int] = (),
    spool: Spool | None = None,
) -> tuple[np.ndarray, dict[tuple[str, str], torch.Tensor]]:
    """Predictions of one surface, (n_train + n_test, n_vertices) float32, and the heads that made them, by name.

    Training rows are predicted by heads that did not see them, and are NaN where there are none; test rows by the mean
    over folds. Both are brought to one mean and standard deviation over folds.

    advance : called with the number of vertices that were just fitted
    held_out : number of each fold, in the order of the solver's
    spool : for heads that are larger than the memory; None: all are in memory
    """
    n_train, responses = len(subject.train), subject.responses(surface)
    n_vertices = responses.shape[1]
    predictions = torch.full((n_train + len(subject.test), n_vertices), torch.nan)
    saved: dict[tuple[str, str], torch.Tensor] = {}

    def fit_from(start: int, n: int) -> slice:
        """Fit n vertices, or as many as there are, and keep what comes of it; may be done again after it failed."""
        vertices = slice(start, min(start + n, n_vertices))
        block = block_of(subject, surface, responses, vertices, device)
        kept = _kept(solver.fit(block), block, held_out, n_train)
        for rows, values in kept.predictions:
            predictions[rows, vertices] = values
        saved.update(kept.shared)
        for name, values in kept.saved.items():
            if vertices == slice(0, n_vertices):
                saved[name] = values
                continue
            if name not in saved:
                shape = (*values.shape[:-1], n_vertices)
                saved[name] = torch.zeros(shape) if spool is None else spool.zeros(*shape)
            saved[name][..., vertices] = values
        if spool is not None:
            spool.let_go()
        return vertices

    step = solver.vertex_block or max(n_vertices, 1)
    least = min(step, _LEAST) if solver.vertex_block else step  # some heads see all vertices or none
    start = 0
    while start < n_vertices:
        vertices, step = halving(
            partial(fit_from, start), step, device=device, things="vertices", remedy=_REMEDY, least=least
        )
        advance(vertices.stop - vertices.start)
        start = vertices.stop
    return predictions.numpy(), saved


class _Kept(NamedTuple):
    """What a fit of some vertices leaves, in main memory.

    predictions : (row numbers, predictions of these rows)
    saved, shared : as those of `Fits`
    """

    predictions: list[tuple[torch.Tensor, torch.Tensor]]
    saved: dict[tuple[str, str], torch.Tensor]
    shared: dict[tuple[str, str], torch.Tensor]


def _kept(fits: Fits, block: Block, held_out: Sequence[int], n_train: int) -> _Kept:
    """Predictions on one level and scale, and heads, after one wait for the device."""
    pieces = [piece for fold in fits.folds for piece in fold.held_out]
    of_test = mean_of_tests(fits.folds)
    rows = [torch.from_numpy(piece.rows) for piece in pieces] + [torch.arange(n_train, n_train + len(of_test))]
    saved = fits.saved | dict(_lines(fits, held_out))
    found = [*comparable(pieces, block.responses.mean(0)), of_test]
    copied = iter(to_host([*found, *saved.values(), *fits.shared.values()])())
    return _Kept(
        [(of_rows, next(copied)) for of_rows in rows],
        {name: next(copied) for name in saved},
        {name: next(copied) for name in fits.shared},
    )


def _lines(fits: Fits, held_out: Sequence[int]) -> list[tuple[tuple[str, str], torch.Tensor]]:
    """What brings the heads of the folds to one mean and standard deviation, where each fold saves its own."""
    if "" in {prefix for prefix, _ in fits.saved}:  # one head, which is their mean already
        return []
    named: list[tuple[tuple[str, str], torch.Tensor]] = []
    for fold, (scale, shift) in zip(held_out, lines_of_heads(fits.folds), strict=True) if held_out else ():
        named += [((f"fold{fold}.", SCALE), scale), ((f"fold{fold}.", SHIFT), shift)]
    return named


def block_of(subject: Subject, surface: str, responses: np.ndarray, vertices: slice, device: str) -> Block:
    """Some vertices of a surface as solvers are given them.

    responses : (n_train, all vertices of the surface)

    Raises DataError for responses that no head can be fitted to.
    """
    ceiling = subject.noise_ceiling[surface]
    values = np.array(responses[:, vertices], dtype=np.float32)
    if (fault := response_fault_in(subject.response_paths[surface], values, vertices.start)) is not None:
        remedy = "the file was changed since it was looked through; touch it, and run the command again"
        raise DataError(fault.where, expected=fault.expected, found=fault.found, remedy=remedy)
    of_block = torch.from_numpy(values)
    return Block(
        surface=surface,
        vertices=vertices,
        responses=to_device(pinned(of_block, device), device),
        noise_ceiling=None if ceiling is None else ceiling[vertices],
        rois=tuple(mask[vertices] for mask in subject.rois[surface].values()),
        all_responses=responses,
    )
