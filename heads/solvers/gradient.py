"""Heads trained by gradient descent on cached features: batches, loss, optimiser, schedule, early stopping."""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from heads.config import HEADS, AdamWConfig, FitConfig
from heads.config.registry import load
from heads.modules.linear import LinearMap
from heads.modules.readout import Standardised
from heads.scores.losses import Loss, ceiling_on, weighted_sum
from heads.scores.metrics import accuracy_from_r, pearson_r
from heads.solvers.base import Block, Fits, FoldFit, Problem, mean_and_std, piece_of
from heads.solvers.held_out import FoldPlan, Split
from heads.solvers.linear import FoldHeads, LinearPredictions
from heads.solvers.memory import Sizes, announce_whole, whole_bytes
from heads.solvers.units import to_train_on, varies

# The first gradients of a correlation loss are the largest; with torch's 0.999 they would count for 1,000 steps.
_BETAS = (0.9, 0.95)


def build(problem: Problem) -> "GradientSolver":
    """Build the solver for heads trained by gradient on one matrix of features. Raises ConfigError."""
    features = [rows.dense() for rows in problem.features.read(problem.device, 0)]
    announce_whole(problem, features[0].shape[1], "by gradient")
    return GradientSolver(features, problem.plan, problem.config)


class GradientSolver:
    """Heads trained by gradient on all folds but one, for each fold in turn.

    features : (n_train + n_test, n_features) float32 on the device that trains, one for all folds or one for each
    """

    vertex_block: int | None = None  # the loss and early stopping are means over all vertices

    def __init__(self, features: Sequence[torch.Tensor], plan: FoldPlan, config: FitConfig) -> None:
        self._features, self._plan, self._config = list(features), plan, config
        # Build the splits now: folds that are too small must raise before a store exists.
        self._splits = [plan.split(k, config.adamw.validation, config.seed) for k in range(len(plan))]
        self._predictions = LinearPredictions(self._features, plan)

    def memory(self, n_vertices: int) -> float:
        sizes = Sizes.of_matrix(self._plan, self._features[0].shape, n_vertices)
        return whole_bytes(sizes, HEADS[self._config.head].copies)

    def fit(self, block: Block) -> Fits:
        heads = [self._train(k, split, block) for k, split in enumerate(self._splits)]
        if all(isinstance(head, LinearMap) for head in heads[0]):
            folds = [
                FoldHeads(list(zip(split.parts, maps, strict=False)), maps[-1])
                for split, maps in zip(self._splits, heads, strict=True)
            ]
            return self._predictions.fits(folds)
        return self._fits_of_modules(heads, block)

    def _train(self, k: int, split: Split, block: Block) -> list[Any]:
        """Train once; for each choice, return the head of the epoch that scored best on its rows."""
        self._plan.refuse_leaks(split.choice_rows, split.train_rows, "early stopping")
        features = self._features[self._plan.source(k)][: self._plan.n_train]
        mean, scale = _standardisation(features[split.train_rows])
        torch.manual_seed(self._config.seed)
        head = load(str(HEADS[self._config.head].module))(features.shape[1], block.responses.shape[1], block.rois)
        head = head.to(features.device)
        standardised = (features - mean) / scale
        loss = weighted_sum(self._config.terms)
        if hasattr(head, "unaveraged"):
            loss = head.outputs.averaged(loss, weighted_sum(self._config.roi_terms))
        responses = to_train_on(block.responses, split.train_rows)
        task = Task(standardised, responses, split.train_rows, split.choice_rows, block.noise_ceiling)
        best = train_head(head, [task], loss, self._config.adamw)
        return [self._unstandardised(head, mean, scale, features, split, block.responses) for head in best]

    def _unstandardised(
        self,
        head: Any,
        mean: torch.Tensor,
        scale: torch.Tensor,
        features: torch.Tensor,
        split: Split,
        responses: torch.Tensor,
    ) -> Any:
        """The head for features as stored: a calibrated LinearMap, or a module with its standardisation."""
        if not isinstance(head, LinearMap):
            return Standardised(head, mean, scale)
        weights = head.weights / scale[:, None]
        stored = LinearMap(weights, head.intercept - mean @ weights)
        return calibrate(stored, features[split.train_rows], responses[split.train_rows])

    @torch.no_grad()
    def _fits_of_modules(self, heads: Sequence[Sequence["Standardised"]], block: Block) -> Fits:
        folds: list[FoldFit] = []
        saved: dict[tuple[str, str], torch.Tensor] = {}
        for k, (split, fold_heads) in enumerate(zip(self._splits, heads, strict=True)):
            features = self._features[self._plan.source(k)]
            folds.append(fold_fit((head(features) for head in fold_heads), split, block.responses))
            prefix = f"fold{self._plan.held_out[k]}."
            saved |= {(prefix, f"head.{name}"): values for name, values in fold_heads[-1].state_dict().items()}
        return Fits(folds, saved)


def fold_fit(predictions: Iterable[torch.Tensor], split: Split, responses: torch.Tensor) -> FoldFit:
    """Predictions of the heads of one fold, each calibrated on the rows that it was trained on.

    predictions : (n_images, n_vertices) of each choice's head
    responses : (n_train, n_vertices)
    """
    pieces = []
    for choice, values in enumerate(predictions):
        line = calibration(values[split.train_rows], responses[split.train_rows])
        values = line[0] * values + line[1]
        if choice < len(split.parts):
            pieces.append(piece_of(values, split.parts[choice], split.train_rows))
    return FoldFit(pieces, values[len(responses) :], *mean_and_std(values[split.train_rows]), line)


class Task(NamedTuple):
    """Features, responses and rows that a head is trained on, for one set of vertices.

    features : features[rows] is what the head reads: a matrix (n_images, n_features), or the rows of several layers
    responses : (n_images, n_vertices) float32, on the device that trains
    train_rows, choice_rows : row numbers to train on, and for each choice of an epoch those that it is made on
    noise_ceiling : (n_vertices,), or None
    """

    features: Any
    responses: torch.Tensor
    train_rows: np.ndarray
    choice_rows: Sequence[np.ndarray]
    noise_ceiling: np.ndarray | None


def train_head(head: Any, tasks: Sequence[Task], loss: Loss, config: AdamWConfig) -> list[Any]:
    """Train a head; for each choice, return the snapshot of the epoch that scored best on its rows.

    Without any choice, it returns the one head of the last epoch. A batch has rows of one task. With several tasks, the
    head also gets the task's number, and a choice is made by the mean score over the vertices of all tasks. Batches
    differ between epochs; the torch seed decides them.

    loss : of the head's predictions; of a head that has a method `unaveraged`, of what this gives
    """
    ceilings = [
        None if t.noise_ceiling is None else ceiling_on(t.noise_ceiling, t.responses.shape[1], t.responses.device)
        for t in tasks
    ]
    decayed, undecayed = [p for p in head.parameters() if p.ndim > 1], [p for p in head.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    # fused: one pass over weights, moments and gradient instead of one for each operation
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, fused=True)
    n_batches = sum(max(len(task.train_rows) // config.batch_size, 1) for task in tasks)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs * n_batches)
    penalty = getattr(head, "regularisation", None)
    call_by_task = [head] if len(tasks) == 1 else [partial(head, number=number) for number in range(len(tasks))]
    outputs_by_task = [head.unaveraged] if hasattr(head, "unaveraged") else call_by_task
    untrained = _snapshot(head)
    stops = [_Stop(untrained) for _ in tasks[0].choice_rows]
    for _ in range(config.epochs):
        head.train()
        for number, batch in _epoch(tasks, config.batch_size):
            task = tasks[number]
            optimiser.zero_grad(set_to_none=True)
            value = loss(outputs_by_task[number](task.features[batch]), task.responses[batch], ceilings[number])
            (value if penalty is None else value + penalty()).backward()
            optimiser.step()
            schedule.step()
        head.eval()
        snapshot = _snapshot(head)
        for choice, stop in enumerate(stops):
            stop.update(snapshot, _mean_score(call_by_task, tasks, choice))
        if stops and all(stop.waited >= config.patience for stop in stops):
            break
    return [stop.best for stop in stops] or [snapshot]


def _snapshot(head: Any) -> Any:
    """Copy of the head as it is now, by its `snapshot` method if it has one."""
    return head.snapshot() if hasattr(head, "snapshot") else copy.deepcopy(head).requires_grad_(False)


def _epoch(tasks: Sequence[Task], batch_size: int) -> list[tuple[int, torch.Tensor]]:
    """(number of the task, rows) of every batch; left-over images are skipped in this epoch."""
    batches = []
    for number, task in enumerate(tasks):
        rows = torch.as_tensor(task.train_rows, device=task.responses.device)
        order = getattr(task.features, "shuffled", _shuffled)(rows)
        n_used = max(len(rows) // batch_size, 1) * batch_size
        batches += [(number, batch) for batch in order[:n_used].split(batch_size)]
    return batches if len(tasks) == 1 else [batches[k] for k in torch.randperm(len(batches)).tolist()]


def _shuffled(rows: torch.Tensor) -> torch.Tensor:
    return rows[torch.randperm(len(rows), device=rows.device)]


def _mean_score(call_by_task: Sequence[Any], tasks: Sequence[Task], choice: int) -> float:
    """Mean score of the tasks on the rows of one choice, weighted by their numbers of vertices."""
    scores = [
        _score(head, task.features[rows], task.responses[rows], task.noise_ceiling)
        for head, task in zip(call_by_task, tasks, strict=True)
        for rows in [task.choice_rows[choice]]
    ]
    return float(np.average(scores, weights=[task.responses.shape[1] for task in tasks]))


class _Stop:
    """The best head so far, by one score, and the number of epochs since."""

    def __init__(self, untrained: Any) -> None:
        self.best, self.score, self.waited = untrained, -np.inf, 0

    def update(self, head: Any, score: float) -> None:
        self.waited += 1
        if score > self.score:
            self.best, self.score, self.waited = head, score, 0


@torch.no_grad()
def calibrate(head: LinearMap, features: torch.Tensor, responses: torch.Tensor) -> LinearMap:
    """Head with the scale and intercept of each vertex that fit these rows best; a scale below 0 becomes 0.

    Correlation losses leave both undetermined, and folds that stop at different epochs differ in them. When folds are
    pooled, these differences would count as errors.
    """
    slope, shift = calibration(head(features), responses)
    return LinearMap(head.weights * slope, shift + slope * head.intercept)


def calibration(predictions: torch.Tensor, responses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_vertices,) slopes, 0 or more, and shifts that bring slope * prediction + shift closest to the responses."""
    centred = predictions - predictions.mean(0)
    variance = centred.square().sum(0)
    covariance = (centred * (responses - responses.mean(0))).sum(0)
    # of a head that never changes but for rounding, nothing is known
    known = varies((variance / len(predictions)).sqrt(), predictions.mean(0))
    slope = torch.where(known, covariance / torch.where(variance > 0, variance, 1), 0).clamp_min(0)
    return slope, responses.mean(0) - slope * predictions.mean(0)


@torch.no_grad()
def _score(head: Any, features: Any, responses: torch.Tensor, noise_ceiling: np.ndarray | None) -> float:
    """The challenge's metric over vertices; mean r if there are no noise ceilings."""
    r = pearson_r(head(features).cpu(), responses.cpu())
    if noise_ceiling is None or not noise_ceiling.any():
        return float(r.mean())
    return float(np.nanmean(accuracy_from_r(r, noise_ceiling)))


def _standardisation(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature; infinite for one that varies by no more than rounding."""
    scale, mean = torch.std_mean(features, 0)
    return mean, torch.where((scale == 0) | varies(scale, mean), torch.where(scale > 0, scale, 1), torch.inf)
