"""Spatial heads on cached layers, trained fold by fold: of one subject, or of several that share a response space."""

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
from heads.solvers.layers.axes import Basis, Seen, seen_under, way_for
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.layers.ridge import flat_weights
from heads.solvers.memory import FEATURE_SHARE, Sizes, whole_bytes
from heads.solvers.trained import predict

_EPS = 1e-5  # of the standardisation, torch's own

Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]  # {array: (mean, variance) of each channel}


@dataclass(frozen=True)
class Member:
    """One subject of a training.

    rows : of the one store, or of one store for each held-out fold
    """

    subject: Subject
    rows: list[LayerRows]
    plan: FoldPlan

    def of_fold(self, k: int) -> LayerRows:
        """The rows that the k-th held-out fold reads."""
        return self.rows[self.plan.source(k)]


def build(problem: Problem) -> "SpatialSolver":
    """Build the solver of one subject; subjects that share a response space are trained once, together.

    Raises ConfigError for folds that are too small.
    """
    trainees = problem.together or (Trainee(problem.subject, problem.features, problem.plan),)
    training = problem.joint.once("spatial heads", lambda: _training(problem, trainees))
    return training.solver([trainee.subject for trainee in trainees].index(problem.subject))


def _training(problem: Problem, trainees: Sequence[Trainee]) -> "SpatialTraining":
    n_stores = sum(len(trainee.features.stores) for trainee in trainees)
    budget = spare_memory(problem.config.max_memory) * FEATURE_SHARE / n_stores
    members = [Member(one.subject, one.features.read(problem.device, budget), one.plan) for one in trainees]
    training = SpatialTraining(members, problem.config, problem.device)
    for number, member in enumerate(members):  # folds that are too small are refused before there is a store
        for k in range(len(member.plan)):
            training.split(number, k)
    return training


class SpatialTraining:
    """Heads of some subjects: trains once a fold, when it is first asked for a prediction."""

    def __init__(self, members: Sequence[Member], config: FitConfig, device: str) -> None:
        self._members, self._config, self._device = list(members), config, device
        self._heads: dict[int, list[_Heads]] = {}
        self._flat: dict[int, Seen] = {}

    def solver(self, number: int) -> "SpatialSolver":
        """The solver of one member."""
        return SpatialSolver(self, self._members[number], number)

    def split(self, number: int, k: int) -> Split:
        """The rows of one member for the k-th held-out fold.

        Choices are of the same images for every member, and what one member chooses by none is trained on.
        """
        plan = self._members[number].plan
        if not plan.backbone_trained:
            splits = [one.plan.split(k, self._config.adamw.validation, self._config.seed) for one in self._members]
            chosen = [one.plan.image_ids[split.choices[0]] for one, split in zip(self._members, splits, strict=True)]
            outside = plan.outside(k)
            trained = outside[~np.isin(plan.image_ids[outside], np.concatenate(chosen))]
            return Split(trained, splits[number].choices, splits[number].parts)
        inside, fold = plan.inside(k), plan.held_out[k]
        scored = np.unique(np.concatenate([one.plan.image_ids[one.plan.inside(k)] for one in self._members]))
        ids = [scored[part] for part in clean_parts(scored, np.arange(len(scored)), fold)]
        parts = [inside[np.isin(plan.image_ids[inside], of_part)] for of_part in ids]
        return Split(plan.outside(k), [*(np.setdiff1d(inside, part) for part in parts), inside], parts)

    def heads(self, k: int) -> "list[_Heads]":
        """The heads of one fold, one for each choice."""
        if k not in self._heads:
            self._heads[k] = self._train(k)
        return self._heads[k]

    def _train(self, k: int) -> "list[_Heads]":
        config = self._config
        tasks = [self._task(number, k) for number in range(len(self._members))]
        self._refuse_leaks(tasks, k)
        torch.manual_seed(config.seed)
        rows = self._members[0].of_fold(k)
        heads = _Heads(rows.shapes, [member.subject for member in self._members], config.spatial, SMALL)
        statistics = self._statistics(k)
        heads.standardise.fix(statistics)
        self._start(heads, tasks, statistics, k)
        return train_head(heads.to(self._device), tasks, weighted_sum(config.terms), config.adamw)

    def _start(self, heads: "_Heads", tasks: Sequence[Task], statistics: Statistics, k: int) -> None:
        """From the closed form on the rows that are trained on, as far as products of maps can follow it.

        Gradients alone, from small random maps, end far below it (docs/decisions/0015). On features that were trained
        on those rows the error there is no guide, and the penalty is one for all.
        """
        penalties = (1.0,) if self._members[0].plan.backbone_trained else self._config.ridge.penalties
        found = []
        for member, task in zip(self._members, tasks, strict=True):
            rows = member.of_fold(k)
            kernels = LayerKernels(rows, member.plan.n_train, 0)
            weights = flat_weights(kernels, self._basis(kernels, task.train_rows), task.responses, penalties)
            scales = {name: (variance + _EPS).sqrt() for name, (_, variance) in statistics.items()}
            found.append({n: w.T.reshape(w.shape[1], rows.n_places(n), -1) * scales[n] for n, w in weights.items()})
        levels = [task.responses[task.train_rows].mean(0) for task in tasks]
        heads.start_from_weights(found, levels)

    def _basis(self, kernels: LayerKernels, trained: np.ndarray) -> Basis:
        """Under the flat prior; where folds share their features, what it is made of serves them all."""
        key = id(kernels.rows)
        seen = self._flat.get(key) or seen_under(Prior(), kernels, way_for(kernels.n_train, kernels.rows.n_features))
        if not self._members[0].plan.backbone_trained:
            self._flat[key] = seen
        return seen.basis(trained)

    def _task(self, number: int, k: int) -> Task:
        member = self._members[number]
        subject, split = member.subject, self.split(number, k)
        responses = [np.asarray(subject.responses(surface), dtype=np.float32) for surface in subject.surfaces]
        given = [ceiling for ceiling in subject.noise_ceiling.values() if ceiling is not None]
        ceiling = np.concatenate(given) if len(given) == len(subject.surfaces) else None
        together = torch.from_numpy(np.concatenate(responses, 1)).to(self._device)
        return Task(member.of_fold(k), together, split.train_rows, split.choices, ceiling)

    def _refuse_leaks(self, tasks: Sequence[Task], k: int) -> None:
        """Raise LeakError where one subject is trained on what another chooses by, or is scored on."""
        plans = [member.plan for member in self._members]
        trained = np.concatenate([plan.image_ids[task.train_rows] for plan, task in zip(plans, tasks, strict=True)])
        for plan, task, member in zip(plans, tasks, self._members, strict=True):
            name = member.subject.name
            for rows in task.choices:
                refuse_leak(trained, plan.image_ids[rows], f"early stopping of {name}")
            refuse_leak(trained, plan.image_ids[plan.inside(k)], f"fold {plan.held_out[k]} of {name}")

    def _statistics(self, k: int) -> Statistics:
        """{array: (mean, variance) of each channel}, the means of the members'."""
        found = {}
        for name in self._members[0].of_fold(k).grids:
            moments = [one.of_fold(k).mean_and_variance(name, one.plan.n_train) for one in self._members]
            places = torch.stack([mean for mean, _ in moments])
            within = torch.stack([variance for _, variance in moments]).mean(0)
            mean = places.mean((0, 1))
            found[name] = (mean, within + (places - mean).square().mean((0, 1)))
        return found


class _Heads(SpatialHeads):
    """As the gradient loop wants them: one task is one subject."""

    def forward(self, rows: dict[str, torch.Tensor], number: int = 0) -> torch.Tensor:  # type: ignore[override]
        return self.of_subject(rows, number)

    @torch.no_grad()
    def start_from_weights(self, weights: Sequence[dict[str, torch.Tensor]], levels: Sequence[torch.Tensor]) -> None:
        """weights : of each subject, {array: (n_vertices, n_places, n_channels)}; levels : their mean responses

        A space takes the directions that carry most of all subjects' weights, and vertices the parts of theirs in it.
        """
        if self.space is None:
            for one, own, level in zip(self.subjects, weights, levels, strict=True):
                cast(SpatialReadout, one).start_from(own, level)
            return
        shapes = {name: values.shape[1:] for name, values in weights[0].items()}
        flat = torch.cat([torch.cat([values.flatten(1) for values in own.values()], 1) for own in weights])
        n_kept = min(self.space.n_outputs, *flat.shape)
        left, sizes, right = torch.svd_lowrank(flat, n_kept, niter=4)
        directions = flat.new_zeros(self.space.n_outputs, flat.shape[1])
        directions[:n_kept] = right.T * sizes[:, None] / len(flat) ** 0.5
        parts = directions.split([math.prod(shape) for shape in shapes.values()], 1)
        maps = {n: p.reshape(-1, *shape) for (n, shape), p in zip(shapes.items(), parts, strict=True)}
        self.space.start_from(maps, directions.new_zeros(len(directions)))
        shares = (left * len(flat) ** 0.5).split([len(level) for level in levels])
        for one, share, level in zip(self.subjects, shares, levels, strict=True):
            linear = cast(nn.Linear, one)
            linear.weight.zero_()
            linear.weight[:, :n_kept] = share
            linear.bias.copy_(level)

    def snapshot(self) -> "_Heads":
        return copy.deepcopy(self).requires_grad_(False)


class SpatialSolver:
    """The predictions of one member of a training."""

    vertex_block: int | None = None  # vertices share what is learnt

    def __init__(self, training: SpatialTraining, member: Member, number: int) -> None:
        self._training, self._member, self._number = training, member, number

    def memory(self, n_vertices: int) -> float:
        plan, n_features = self._member.plan, self._member.rows[0].n_features
        n_images = plan.n_train + len(self._member.subject.test)
        return whole_bytes(Sizes.of_matrix(plan, (n_images, n_features), n_vertices))

    def fit(self, block: Block) -> Fits:
        """Predict one surface; its responses only set the scale of predictions, on the rows that were trained on."""
        folds: list[FoldFit] = []
        saved: dict[tuple[str, str], torch.Tensor] = {}
        for k, fold in enumerate(self._member.plan.held_out):
            split = self._training.split(self._number, k)
            folds.append(fold_fit(self._predict(k, block.surface), split, block.responses))
            last = self._training.heads(k)[-1]
            head = spatial_head_of(last.saved(), last.names, self._member.subject.name, block.surface)
            saved |= {(f"fold{fold}.", f"head.{name}"): tensor for name, tensor in head.state_dict().items()}
        return Fits(folds, saved)

    def _predict(self, k: int, surface: str) -> list[torch.Tensor]:
        """(n_images, n_vertices) of each choice. Not kept: all surfaces under all choices would fill the memory."""
        sizes = self._member.subject.n_vertices
        first = sum(sizes[other] for other in list(sizes)[: list(sizes).index(surface)])
        columns = slice(first, first + sizes[surface])

        def of_surface(rows: dict[str, torch.Tensor], head: _Heads) -> torch.Tensor:
            predictions: torch.Tensor = head(rows, self._number)
            return predictions[:, columns]

        heads = [partial(of_surface, head=head) for head in self._training.heads(k)]
        return predict(heads, self._member.of_fold(k))
