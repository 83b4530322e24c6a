"""Heads that one training fits for one subject or for several, fold by fold: splits, leaks, predictions.

A kind of heads adds how its modules are made (`JointTraining.make`) and what is saved of them; `heads.solvers.spatial`
and `heads.solvers.core` are two.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch

from featcache.dataset.splits import refuse_leak
from featcache.dataset.subject import Subject
from featcache.machine.device_memory import spare_on
from featcache.machine.memory import spare_memory
from heads.config import FitConfig
from heads.features.rows import LayerRows
from heads.modules.by_subject import SpatialHeads
from heads.scores.losses import weighted_sum
from heads.solvers.base import Block, Fits, FoldFit, Problem, Solver, Trainee
from heads.solvers.gradient import Task, fold_fit, train_head
from heads.solvers.held_out import FoldPlan, Split, clean_parts
from heads.solvers.memory import FEATURE_SHARE, announce, spatial_bytes
from heads.solvers.trained import predict
from heads.solvers.units import to_train_on

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


class JointHeads(SpatialHeads):
    """Heads as the gradient loop calls them: one task is one subject."""

    def forward(self, rows: dict[str, torch.Tensor], number: int = 0) -> torch.Tensor:  # type: ignore[override]
        return self.of_subject(rows, number)

    def snapshot(self) -> Self:
        """Copy of the heads as they are now."""
        return copy.deepcopy(self).requires_grad_(False)

    def of_surface(self, subject: str, surface: str) -> dict[str, torch.Tensor]:
        """{name: tensor} of the heads of one surface, as they are saved."""
        raise NotImplementedError


class JointTraining:
    """Trains the heads of some subjects, once for each fold, when predictions of the fold are first needed."""

    def __init__(self, trainees: Sequence[TraineeRows], config: FitConfig, device: str) -> None:
        self.trainees, self.config, self.device = list(trainees), config, device
        self.plans = [trainee.plan for trainee in trainees]
        self._heads: dict[int, list[JointHeads]] = {}

    @property
    def subjects(self) -> list[Subject]:
        """Subjects in the order of their numbers."""
        return [trainee.subject for trainee in self.trainees]

    def make(self, tasks: Sequence[Task], statistics: Statistics, k: int) -> JointHeads:
        """Heads with their first weights, on the device, for the k-th held-out fold. Torch's seed is set."""
        raise NotImplementedError

    def memory(self, n_vertices: int) -> float:
        """Bytes that training and predicting take where they compute. n_vertices : of a surface, at most"""
        subjects = self.subjects
        n_outputs = sum(min(sum(s.n_vertices.values()), n_vertices * len(s.surfaces)) for s in subjects)
        return spatial_bytes(
            self.trainees[0].rows[0].shapes,
            self.config,
            n_outputs=max(n_outputs, n_vertices),
            n_surface=n_vertices,
            n_images=max(len(trainee.rows[0]) for trainee in self.trainees),
            n_responses=sum(t.plan.n_train * sum(t.subject.n_vertices.values()) for t in self.trainees),
            n_folds=len(self.plans[0]),
            n_choices=max(map(self.plans[0].n_choices, range(len(self.plans[0])))),
        )

    def solver(self, number: int) -> Solver:
        """The solver of one subject."""
        return JointSolver(self, self.trainees[number], number)

    def split(self, number: int, k: int) -> Split:
        """Rows of one subject for the k-th held-out fold.

        Every subject chooses on the same images; an image used for choosing by any subject is trained on by none.
        """
        plan = self.plans[number]
        if not plan.backbone_trained:
            splits = [each.split(k, self.config.adamw.validation, self.config.seed) for each in self.plans]
            chosen = [each.image_ids[split.choice_rows[0]] for each, split in zip(self.plans, splits, strict=True)]
            outside = plan.outside(k)
            train_rows = outside[~np.isin(plan.image_ids[outside], np.concatenate(chosen))]
            return Split(train_rows, splits[number].choice_rows, splits[number].parts)
        inside, fold = plan.inside(k), plan.held_out[k]
        scored = np.unique(np.concatenate([each.image_ids[each.inside(k)] for each in self.plans]))
        ids = [scored[part] for part in clean_parts(scored, np.arange(len(scored)), fold, plan.by)]
        parts = [inside[np.isin(plan.image_ids[inside], part_ids)] for part_ids in ids]
        return Split(plan.outside(k), [*(np.setdiff1d(inside, part) for part in parts), inside], parts)

    def heads(self, k: int) -> list[JointHeads]:
        """The heads of one fold, one for each choice."""
        if k not in self._heads:
            self._heads[k] = self.train(k, self.config.seed)
        return self._heads[k]

    def train(self, k: int, seed: int) -> list[JointHeads]:
        """Train the heads of one fold from the first weights that a seed gives; one for each choice."""
        tasks = [self._task(number, k) for number in range(len(self.trainees))]
        self._refuse_leaks(tasks, k)
        statistics = self._statistics(k)
        torch.manual_seed(seed)
        heads = self.make(tasks, statistics, k)
        trained: list[JointHeads] = train_head(heads, tasks, weighted_sum(self.config.terms), self.config.adamw)
        return trained

    def _task(self, number: int, k: int) -> Task:
        """Task of one subject, with the vertices of all its surfaces."""
        subject, split = self.trainees[number].subject, self.split(number, k)
        surfaces = [np.asarray(subject.responses(surface), dtype=np.float32) for surface in subject.surfaces]
        ceilings = [ceiling for ceiling in subject.noise_ceiling.values() if ceiling is not None]
        ceiling = np.concatenate(ceilings) if len(ceilings) == len(surfaces) else None
        responses = torch.from_numpy(np.concatenate(surfaces, 1)).to(self.device)
        responses = to_train_on(responses, split.train_rows)
        return Task(self.trainees[number].fold_rows(k), responses, split.train_rows, split.choice_rows, ceiling)

    def _refuse_leaks(self, tasks: Sequence[Task], k: int) -> None:
        """Raise LeakError where one subject is trained on images that another chooses on, or is scored on."""
        trained_ids = np.concatenate([p.image_ids[task.train_rows] for p, task in zip(self.plans, tasks, strict=True)])
        for trainee, task in zip(self.trainees, tasks, strict=True):
            plan, name = trainee.plan, trainee.subject.name
            for rows in task.choice_rows:
                refuse_leak(trained_ids, plan.image_ids[rows], f"early stopping of {name}")
            refuse_leak(trained_ids, plan.image_ids[plan.inside(k)], f"fold {plan.held_out[k]} of {name}")

    def _statistics(self, k: int) -> Statistics:
        """{array: (mean, variance) of each channel}, over all subjects' images outside a fold, with equal weights."""
        statistics = {}
        for name in self.trainees[0].fold_rows(k).grids:
            moments = [t.fold_rows(k).mean_and_variance(name, t.plan.outside(k)) for t in self.trainees]
            places = torch.stack([mean for mean, _ in moments])
            within = torch.stack([variance for _, variance in moments]).mean(0)
            mean = places.mean((0, 1))
            statistics[name] = (mean, within + (places - mean).square().mean((0, 1)))
        return statistics


Kind = Callable[[Sequence[TraineeRows], FitConfig, str], JointTraining]  # (trainees, config, device) -> training


def build_joint(problem: Problem, kind: Kind) -> Solver:
    """Build the solver of one subject; subjects that share a training are trained once, together.

    Raises ConfigError for folds that are too small.
    """
    trainees = problem.trainees or (Trainee(problem.subject, problem.features, problem.plan),)
    training = problem.shared.get_or_make("joint training", lambda: _training(problem, trainees, kind))
    return training.solver([trainee.subject for trainee in trainees].index(problem.subject))


def _training(problem: Problem, trainees: Sequence[Trainee], kind: Kind) -> JointTraining:
    n_stores = sum(len(trainee.features.stores) for trainee in trainees)
    budget = spare_memory(problem.config.max_memory) * FEATURE_SHARE / n_stores
    read = [TraineeRows(t.subject, t.features.read(problem.device, budget), t.plan) for t in trainees]
    for rows in (rows for one in read for rows in one.rows):
        rows.keep_on_device(spare_on(problem.device, 0) * FEATURE_SHARE / n_stores)
    training = kind(read, problem.config, problem.device)
    for number, trainee in enumerate(trainees):  # folds that are too small must raise before a store exists
        for k in range(len(trainee.plan)):
            training.split(number, k)
    needed = training.solver(0).memory(max(max(trainee.subject.n_vertices.values()) for trainee in trainees))
    method = f"by gradient, {len(trainees)} subjects together" if len(trainees) > 1 else "by gradient"
    announce(problem, read[0].rows[0].n_features, needed, method)
    return training


class JointSolver:
    """Predictions of one subject of a training."""

    vertex_block: int | None = None  # all vertices are trained together

    def __init__(self, training: JointTraining, trainee: TraineeRows, number: int) -> None:
        self._training, self._trainee, self._number = training, trainee, number

    def memory(self, n_vertices: int) -> float:
        return self._training.memory(n_vertices)

    def fit(self, block: Block) -> Fits:
        """Predict one surface; `block.responses` only calibrate predictions, on the rows that were trained on."""
        folds: list[FoldFit] = []
        saved: dict[tuple[str, str], torch.Tensor] = {}
        for k, fold in enumerate(self._trainee.plan.held_out):
            split = self._training.split(self._number, k)
            folds.append(fold_fit(self._predict(k, block.surface), split, block.responses))
            tensors = self._training.heads(k)[-1].of_surface(self._trainee.subject.name, block.surface)
            saved |= {(f"fold{fold}.", f"head.{name}"): tensor for name, tensor in tensors.items()}
        return Fits(folds, saved)

    def _predict(self, k: int, surface: str) -> list[torch.Tensor]:
        """(n_images, n_vertices) for each choice. Not kept: all surfaces with all choices would fill the memory."""
        sizes = self._trainee.subject.n_vertices
        first = sum(sizes[other] for other in list(sizes)[: list(sizes).index(surface)])
        columns = slice(first, first + sizes[surface])

        def of_surface(rows: dict[str, torch.Tensor], heads: JointHeads) -> torch.Tensor:
            predictions: torch.Tensor = heads(rows, self._number)
            return predictions[:, columns]

        choices = [partial(of_surface, heads=heads) for heads in self._training.heads(k)]
        return predict(choices, self._trainee.fold_rows(k))
