"""Spatial heads on cached layers, trained fold by fold: for one subject, or for several that share a response space."""

import math
from collections.abc import Sequence
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

_EPS = 1e-5  # of the standardisation, torch's own


def build(problem: Problem) -> Solver:
    """Build the solver of spatial heads of one subject. Raises ConfigError for folds that are too small."""
    return build_joint(problem, SpatialTraining)


class SpatialTraining(JointTraining):
    """Trains spatial heads from the closed form on."""

    def __init__(self, trainees: Sequence[TraineeRows], config: FitConfig, device: str) -> None:
        super().__init__(trainees, config, device)
        self._flat: dict[tuple[int, int], PriorView] = {}

    def make(self, tasks: Sequence[Task], statistics: Statistics, k: int) -> "_Heads":
        heads = _Heads(self.trainees[0].fold_rows(k).shapes, self.subjects, self.config.spatial, SMALL)
        heads.standardise.fix(statistics)
        self._start(heads, tasks, statistics, k)
        return heads

    def _start(self, heads: "_Heads", tasks: Sequence[Task], statistics: Statistics, k: int) -> None:
        """Start the heads from the closed form on the training rows, as closely as products of maps can represent it.

        Gradient descent from small random maps ends far below it (docs/decisions/0015). If the backbone was trained on
        these rows, their error cannot choose a penalty, and all vertices have the same one.
        """
        penalties = (1.0,) if self.plans[0].backbone_trained else self.config.ridge.penalties
        maps = []
        for trainee, task in zip(self.trainees, tasks, strict=True):
            rows = trainee.fold_rows(k)
            number = trainee.plan.scales(k)
            kernels = LayerKernels(rows, trainee.plan.scale_rows(number))
            weights = flat_weights(kernels, self._basis(kernels, number, task.train_rows), task.responses, penalties)
            scales = {name: (variance + _EPS).sqrt() for name, (_, variance) in statistics.items()}
            maps.append({n: w.T.reshape(w.shape[1], rows.n_places(n), -1) * scales[n] for n, w in weights.items()})
        heads.start_from_weights(maps, [task.responses[task.train_rows].mean(0) for task in tasks])

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
    def start_from_weights(self, weights: Sequence[dict[str, torch.Tensor]], means: Sequence[torch.Tensor]) -> None:
        """Start from linear weights.

        The shared space starts from the leading singular vectors of all subjects' weights; each vertex starts from its
        coordinates there.

        weights : {array: (n_vertices, n_places, n_channels)} of each subject
        means : (n_vertices,) mean responses of each subject
        """
        if self.space is None:
            for head, maps, mean in zip(self.subjects, weights, means, strict=True):
                cast(SpatialReadout, head).start_from(maps, mean)
            return
        shapes = {name: values.shape[1:] for name, values in weights[0].items()}
        flat = torch.cat([torch.cat([values.flatten(1) for values in maps.values()], 1) for maps in weights])
        n_kept = min(self.space.n_outputs, *flat.shape)
        left, sizes, right = torch.svd_lowrank(flat, n_kept, niter=4)
        directions = flat.new_zeros(self.space.n_outputs, flat.shape[1])
        directions[:n_kept] = right.T * sizes[:, None] / len(flat) ** 0.5
        parts = directions.split([math.prod(shape) for shape in shapes.values()], 1)
        space_maps = {n: p.reshape(-1, *shape) for (n, shape), p in zip(shapes.items(), parts, strict=True)}
        self.space.start_from(space_maps, directions.new_zeros(len(directions)))
        coordinates = (left * len(flat) ** 0.5).split([len(mean) for mean in means])
        for head, of_subject, mean in zip(self.subjects, coordinates, means, strict=True):
            linear = cast(nn.Linear, head)
            linear.weight.zero_()
            linear.weight[:, :n_kept] = of_subject
            linear.bias.copy_(mean)

    def of_surface(self, subject: str, surface: str) -> dict[str, torch.Tensor]:
        return dict(spatial_head_of(self.saved(), self.names, subject, surface).state_dict())
