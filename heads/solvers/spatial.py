"""Spatial heads on cached layers, trained fold by fold: for one subject, or for several that share a response space."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import nn

from featcache.dataset.splits import refuse_leak
from featcache.dataset.subject import Subject
from featcache.machine.memory import spare_memory
from heads.config import FitConfig
from heads.features.rows import LayerRows
from heads.modules.by_subject import SpatialHeads
from heads.modules.linear import SMALL
from heads.modules.saved import spatial_head_of
from heads.modules.spatial import SpatialReadout
from heads.scores.losses import weighted_sum
from heads.solvers.base import Block, Fits, FoldFit, Problem, Trainee
from heads.solvers.gradient import Task, fold_fit, train_head
from heads.solvers.held_out import FoldPlan, Split, clean_parts
from heads.solvers.layers.axes import Basis, PriorView, method_for, view_under
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.layers.ridge import flat_weights
from heads.solvers.memory import FEATURE_SHARE, Sizes, whole_bytes
from heads.solvers.trained import predict

_EPS = 1e-5  # of the standardisation, torch's own

Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]  # {array: (mean, variance) of each channel}


@dataclass(frozen=True)
class TraineeRows:
    """One trainee with rows of its features.

    rows : from the one store, or from one store for each held-out fold
    """

    subject: Subject
    rows: list[LayerRows]
    plan: FoldPlan

    def fold_rows(self, k: int) -> LayerRows:
        """The rows that the k-th held-out fold reads."""
        return self.rows[self.plan.source(k)]


def build(problem: Problem) -> "SpatialSolver":
    """Build the solver of one subject; subjects that share a response space are trained once, together.

    Raises ConfigError for folds that are too small.
    """
    trainees = problem.trainees or (Trainee(problem.subject, problem.features, problem.plan),)
    training = problem.shared.get_or_make("spatial heads", lambda: _training(problem, trainees))
    return training.solver([trainee.subject for trainee in trainees].index(problem.subject))


def _training(problem: Problem, trainees: Sequence[Trainee]) -> "SpatialTraining":
    n_stores = sum(len(trainee.features.stores) for trainee in trainees)
    budget = spare_memory(problem.config.max_memory) * FEATURE_SHARE / n_stores
    read = [TraineeRows(t.subject, t.features.read(problem.device, budget), t.plan) for t in trainees]
    training = SpatialTraining(read, problem.config, problem.device)
    for number, trainee in enumerate(trainees):  # folds that are too small must raise before a store exists
        for k in range(len(trainee.plan)):
            training.split(number, k)
    return training


class SpatialTraining:
    """Trains the heads of some subjects, once for each fold, when predictions of the fold are first needed."""

    def __init__(self, trainees: Sequence[TraineeRows], config: FitConfig, device: str) -> None:
        self._trainees, self._config, self._device = list(trainees), config, device
        self._plans = [trainee.plan for trainee in trainees]
        self._heads: dict[int, list[_Heads]] = {}
        self._flat: dict[tuple[int, int], PriorView] = {}

    def solver(self, number: int) -> "SpatialSolver":
        """The solver of one subject."""
        return SpatialSolver(self, self._trainees[number], number)

    def split(self, number: int, k: int) -> Split:
        """Rows of one subject for the k-th held-out fold.

        Every subject chooses on the same images; an image used for choosing by any subject is trained on by none.
        """
        plan = self._plans[number]
        if not plan.backbone_trained:
            splits = [each.split(k, self._config.adamw.validation, self._config.seed) for each in self._plans]
            chosen = [each.image_ids[split.choice_rows[0]] for each, split in zip(self._plans, splits, strict=True)]
            outside = plan.outside(k)
            train_rows = outside[~np.isin(plan.image_ids[outside], np.concatenate(chosen))]
            return Split(train_rows, splits[number].choice_rows, splits[number].parts)
        inside, fold = plan.inside(k), plan.held_out[k]
        scored = np.unique(np.concatenate([each.image_ids[each.inside(k)] for each in self._plans]))
        ids = [scored[part] for part in clean_parts(scored, np.arange(len(scored)), fold)]
        parts = [inside[np.isin(plan.image_ids[inside], part_ids)] for part_ids in ids]
        return Split(plan.outside(k), [*(np.setdiff1d(inside, part) for part in parts), inside], parts)

    def heads(self, k: int) -> "list[_Heads]":
        """The heads of one fold, one for each choice."""
        if k not in self._heads:
            self._heads[k] = self._train(k)
        return self._heads[k]

    def _train(self, k: int) -> "list[_Heads]":
        config = self._config
        tasks = [self._task(number, k) for number in range(len(self._trainees))]
        self._refuse_leaks(tasks, k)
        torch.manual_seed(config.seed)
        shapes, subjects = self._trainees[0].fold_rows(k).shapes, [trainee.subject for trainee in self._trainees]
        heads = _Heads(shapes, subjects, config.spatial, SMALL)
        statistics = self._statistics(k)
        heads.standardise.fix(statistics)
        self._start(heads, tasks, statistics, k)
        return train_head(heads.to(self._device), tasks, weighted_sum(config.terms), config.adamw)

    def _start(self, heads: "_Heads", tasks: Sequence[Task], statistics: Statistics, k: int) -> None:
        """Start the heads from the closed form on the training rows, as closely as products of maps can represent it.

        Gradient descent from small random maps ends far below it (docs/decisions/0015). If the backbone was trained on
        these rows, their error cannot choose a penalty, and all vertices have the same one.
        """
        penalties = (1.0,) if self._plans[0].backbone_trained else self._config.ridge.penalties
        maps = []
        for trainee, task in zip(self._trainees, tasks, strict=True):
            rows = trainee.fold_rows(k)
            number = trainee.plan.scales(k)
            kernels = LayerKernels(rows, trainee.plan.scale_rows(number), 0)
            weights = flat_weights(kernels, self._basis(kernels, number, task.train_rows), task.responses, penalties)
            scales = {name: (variance + _EPS).sqrt() for name, (_, variance) in statistics.items()}
            maps.append({n: w.T.reshape(w.shape[1], rows.n_places(n), -1) * scales[n] for n, w in weights.items()})
        heads.start_from_weights(maps, [task.responses[task.train_rows].mean(0) for task in tasks])

    def _basis(self, kernels: LayerKernels, scales: int, train_rows: np.ndarray) -> Basis:
        """Axes under the flat prior; its kernel or features are computed once for folds that share their scales."""
        key, method = (id(kernels.rows), scales), method_for(len(train_rows), kernels.rows.n_features)
        view = self._flat.get(key) or view_under(Prior(), kernels, method)
        if not self._plans[0].backbone_trained:
            self._flat[key] = view
        return view.basis(train_rows)

    def _task(self, number: int, k: int) -> Task:
        """Task of one subject, with the vertices of all its surfaces."""
        subject, split = self._trainees[number].subject, self.split(number, k)
        surfaces = [np.asarray(subject.responses(surface), dtype=np.float32) for surface in subject.surfaces]
        ceilings = [ceiling for ceiling in subject.noise_ceiling.values() if ceiling is not None]
        ceiling = np.concatenate(ceilings) if len(ceilings) == len(surfaces) else None
        responses = torch.from_numpy(np.concatenate(surfaces, 1)).to(self._device)
        return Task(self._trainees[number].fold_rows(k), responses, split.train_rows, split.choice_rows, ceiling)

    def _refuse_leaks(self, tasks: Sequence[Task], k: int) -> None:
        """Raise LeakError where one subject is trained on images that another chooses on, or is scored on."""
        trained_ids = np.concatenate([p.image_ids[task.train_rows] for p, task in zip(self._plans, tasks, strict=True)])
        for trainee, task in zip(self._trainees, tasks, strict=True):
            plan, name = trainee.plan, trainee.subject.name
            for rows in task.choice_rows:
                refuse_leak(trained_ids, plan.image_ids[rows], f"early stopping of {name}")
            refuse_leak(trained_ids, plan.image_ids[plan.inside(k)], f"fold {plan.held_out[k]} of {name}")

    def _statistics(self, k: int) -> Statistics:
        """{array: (mean, variance) of each channel}, over all subjects' images outside a fold, with equal weights."""
        statistics = {}
        for name in self._trainees[0].fold_rows(k).grids:
            moments = [t.fold_rows(k).mean_and_variance(name, t.plan.outside(k)) for t in self._trainees]
            places = torch.stack([mean for mean, _ in moments])
            within = torch.stack([variance for _, variance in moments]).mean(0)
            mean = places.mean((0, 1))
            statistics[name] = (mean, within + (places - mean).square().mean((0, 1)))
        return statistics


class _Heads(SpatialHeads):
    """Heads as the gradient loop calls them: one task is one subject."""

    def forward(self, rows: dict[str, torch.Tensor], number: int = 0) -> torch.Tensor:  # type: ignore[override]
        return self.of_subject(rows, number)

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

    def snapshot(self) -> "_Heads":
        return copy.deepcopy(self).requires_grad_(False)


class SpatialSolver:
    """Predictions of one subject of a training."""

    vertex_block: int | None = None  # all vertices are trained together

    def __init__(self, training: SpatialTraining, trainee: TraineeRows, number: int) -> None:
        self._training, self._trainee, self._number = training, trainee, number

    def memory(self, n_vertices: int) -> float:
        plan, n_features = self._trainee.plan, self._trainee.rows[0].n_features
        n_images = plan.n_train + len(self._trainee.subject.test)
        return whole_bytes(Sizes.of_matrix(plan, (n_images, n_features), n_vertices))

    def fit(self, block: Block) -> Fits:
        """Predict one surface; `block.responses` only calibrate predictions, on the rows that were trained on."""
        folds: list[FoldFit] = []
        saved: dict[tuple[str, str], torch.Tensor] = {}
        for k, fold in enumerate(self._trainee.plan.held_out):
            split = self._training.split(self._number, k)
            folds.append(fold_fit(self._predict(k, block.surface), split, block.responses))
            last = self._training.heads(k)[-1]
            head = spatial_head_of(last.saved(), last.names, self._trainee.subject.name, block.surface)
            saved |= {(f"fold{fold}.", f"head.{name}"): tensor for name, tensor in head.state_dict().items()}
        return Fits(folds, saved)

    def _predict(self, k: int, surface: str) -> list[torch.Tensor]:
        """(n_images, n_vertices) for each choice. Not kept: all surfaces with all choices would fill the memory."""
        sizes = self._trainee.subject.n_vertices
        first = sum(sizes[other] for other in list(sizes)[: list(sizes).index(surface)])
        columns = slice(first, first + sizes[surface])

        def of_surface(rows: dict[str, torch.Tensor], head: _Heads) -> torch.Tensor:
            predictions: torch.Tensor = head(rows, self._number)
            return predictions[:, columns]

        heads = [partial(of_surface, head=head) for head in self._training.heads(k)]
        return predict(heads, self._trainee.fold_rows(k))
