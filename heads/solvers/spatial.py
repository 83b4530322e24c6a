"""Spatial heads on cached layers, trained fold by fold: for one subject, or for several that share a response space."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from itertools import chain
from typing import cast

import numpy as np
import torch
from torch import nn

from heads.config import FitConfig
from heads.modules.linear import SMALL
from heads.modules.saved import spatial_head_of
from heads.modules.spatial import SpatialReadout
from heads.solvers.base import Problem, Solver
from heads.solvers.gradient import Task
from heads.solvers.joint import JointHeads, JointTraining, Statistics, TraineeRows, build_joint
from heads.solvers.layers.axes import Basis, PriorView, method_for, view_under
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.layers.ridge import flat_weights
from heads.solvers.memory import SPARE_VECTORS, START_NUMBERS

_EPS = 1e-5  # of the standardisation, torch's own

Vectors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # left vectors, singular values, right vectors
Weights = tuple[slice, dict[str, torch.Tensor]]  # some vertices, and {array: (n, n_places, n_channels)}


def build(problem: Problem) -> Solver:
    """Build the solver of spatial heads of one subject. Raises ConfigError for folds that are too small."""
    return build_joint(problem, SpatialTraining)


class SpatialTraining(JointTraining):
    """Trains spatial heads from the closed form on."""

    def __init__(self, trainees: Sequence[TraineeRows], config: FitConfig, device: str) -> None:
        super().__init__(trainees, config, device)
        self._flat: dict[tuple[int, int], PriorView] = {}

    def make(self, tasks: Sequence[Task], statistics: Statistics, k: int) -> "_Heads":
        shapes = self.trainees[0].fold_rows(k).shapes
        heads = _Heads(shapes, self.subjects, self.config.spatial, SMALL).to(self.device)
        heads.standardise.fix(statistics)
        self._start(heads, tasks, statistics, k)
        return heads

    def _start(self, heads: "_Heads", tasks: Sequence[Task], statistics: Statistics, k: int) -> None:
        """Start the heads from the closed form on the training rows, as closely as products of maps can represent it.

        Gradient descent from small random maps ends far below it (docs/decisions/0015). If the backbone was trained on
        these rows, their error cannot choose a penalty, and all vertices have the same one.
        """
        weights = [
            self._weights(trainee, task, statistics, k) for trainee, task in zip(self.trainees, tasks, strict=True)
        ]
        heads.start_from_weights(weights, [task.responses[task.train_rows].mean(0) for task in tasks])

    def _weights(self, trainee: TraineeRows, task: Task, statistics: Statistics, k: int) -> Iterator[Weights]:
        """The closed form of one subject, for some of its vertices at a time."""
        penalties = (1.0,) if self.plans[0].backbone_trained else self.config.ridge.penalties
        scales = {name: (variance + _EPS).sqrt() for name, (_, variance) in statistics.items()}
        rows, number = trainee.fold_rows(k), trainee.plan.scales(k)
        kernels = LayerKernels(rows, trainee.plan.scale_rows(number))
        basis = self._basis(kernels, number, task.train_rows)
        n_vertices, step = task.responses.shape[1], max(START_NUMBERS // rows.n_features, 1)
        for start in range(0, n_vertices, step):
            vertices = slice(start, min(start + step, n_vertices))
            weights = flat_weights(kernels, basis, task.responses[:, vertices], penalties)
            yield vertices, {n: w.T.reshape(w.shape[1], rows.n_places(n), -1) * scales[n] for n, w in weights.items()}

    def _basis(self, kernels: LayerKernels, scales: int, train_rows: np.ndarray) -> Basis:
        """Axes under the flat prior; its kernel or features are computed once for folds that share their scales."""
        key, method = (id(kernels.rows), scales), method_for(len(train_rows), kernels.rows.n_features)
        view = self._flat.get(key) or view_under(Prior(), kernels, method)
        if not self.plans[0].backbone_trained:
            self._flat[key] = view
        return view.basis(train_rows)


class _Heads(JointHeads):
    """Spatial heads that start from linear weights."""

    @torch.no_grad()
    def start_from_weights(self, weights: Sequence[Iterable[Weights]], means: Sequence[torch.Tensor]) -> None:
        """Start from linear weights.

        The shared space starts from the leading singular vectors of all subjects' weights; each vertex starts from its
        coordinates there.

        weights : of each subject, some vertices after the other
        means : (n_vertices,) mean responses of each subject
        """
        if self.space is None:
            for head, blocks, mean in zip(self.subjects, weights, means, strict=True):
                for vertices, maps in blocks:
                    cast(SpatialReadout, head).start_from(maps, mean[vertices], vertices)
            return
        matrices = (
            torch.cat([values.flatten(1) for values in maps.values()], 1) for blocks in weights for _, maps in blocks
        )
        left, sizes, right = leading_vectors(_gathered(matrices), self.space.n_outputs)
        n_vertices, n_kept = left.shape
        shapes = {name: (math.prod(shape[:-1]), shape[-1]) for name, shape in self.space.shapes.items()}
        directions = right.new_zeros(self.space.n_outputs, len(right))
        directions[:n_kept] = right.T * sizes[:, None] / n_vertices**0.5
        parts = directions.split([math.prod(shape) for shape in shapes.values()], 1)
        space_maps = {n: p.reshape(-1, *shape) for (n, shape), p in zip(shapes.items(), parts, strict=True)}
        self.space.start_from(space_maps, directions.new_zeros(len(directions)))
        coordinates = (left * n_vertices**0.5).split([len(mean) for mean in means])
        for head, of_subject, mean in zip(self.subjects, coordinates, means, strict=True):
            linear = cast(nn.Linear, head)
            linear.weight.zero_()
            linear.weight[:, :n_kept] = of_subject
            linear.bias.copy_(mean)

    def of_surface(self, subject: str, surface: str) -> dict[str, torch.Tensor]:
        return dict(spatial_head_of(self.saved(), self.names, subject, surface).state_dict())


def leading_vectors(blocks: Iterable[torch.Tensor], n: int) -> Vectors:
    """The n leading left vectors, singular values and right vectors of a matrix, given in blocks of rows.

    One block is in memory at a time: each is reduced to its own leading vectors, SPARE_VECTORS more than n, which are
    merged with those so far. That is exact for a matrix of no more singular values, up to what `torch.svd_lowrank` is.

    Source: Iwen and Ong 2016, A distributed and incremental SVD algorithm, https://doi.org/10.1137/16M1058467
    """
    rest = iter(blocks)
    first, second = next(rest), next(rest, None)
    if second is None:
        return torch.svd_lowrank(first, min(n, *first.shape), niter=4)
    wide = n + SPARE_VECTORS
    parts = (torch.svd_lowrank(block, min(wide, *block.shape), niter=4) for block in chain((first, second), rest))
    left, sizes, right = reduce(partial(_merged, n=wide), parts)
    return left[:, :n], sizes[:n], right[:, :n]


def _merged(above: Vectors, below: Vectors, n: int) -> Vectors:
    """The n leading vectors of two blocks of rows, from those of each."""
    stacked = torch.cat([sizes[:, None] * right.T for _, sizes, right in (above, below)])
    left, sizes, right = torch.linalg.svd(stacked, full_matrices=False)
    of_above, of_below = left[:, :n].split([len(above[1]), len(below[1])])
    return torch.cat([above[0] @ of_above, below[0] @ of_below]), sizes[:n], right[:n].T


def _gathered(blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Blocks of rows, as many together as START_NUMBERS allows: small subjects are one matrix."""
    held: list[torch.Tensor] = []
    for block in blocks:
        if held and sum(part.numel() for part in held) + block.numel() > START_NUMBERS:
            yield torch.cat(held)
            held.clear()
        held.append(block)
    yield torch.cat(held)
