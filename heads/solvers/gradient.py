"""The only gradient loop: batches, loss, optimiser, schedule, early stop."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.dataset.splits import assign_folds, refuse_leak
from featcache.errors import ConfigError
from heads.config import AdamWConfig, FitConfig
from heads.modules.linear import Head, LinearHead, RoiHead
from heads.scores.losses import Loss, weighted_sum
from heads.scores.metrics import accuracy_from_r, pearson_r
from heads.solvers.ridge import LinearMap

# The first gradients of a correlation loss are the largest, and torch's 0.999 would remember them for 1,000 steps.
_BETAS = (0.9, 0.95)


class AdamWFolds:
    """Heads trained by gradient on all folds but one, for each fold in turn.

    features : (n_images, n_features) float32, on the device that trains
    folds, image_ids : (n_images,)
    """

    vertex_block: int | None = None  # a loss is a mean over vertices and stops for all of them together

    def __init__(self, features: torch.Tensor, folds: np.ndarray, image_ids: np.ndarray, config: FitConfig) -> None:
        self._features, self._folds, self._ids, self._config = features, folds, image_ids, config

    def splits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each fold, rows to train on and rows to decide when to stop by. Raises ConfigError for too few images."""
        return [stop_split(self._ids, self._folds, fold, self._config) for fold in range(self._folds.max() + 1)]

    def fit(
        self,
        responses: torch.Tensor,
        noise_ceiling: np.ndarray | None = None,
        rois: Sequence[np.ndarray] = (),
        **_: Any,
    ) -> list[LinearMap]:
        """One map a fold, for (n_images, n_vertices) float32 responses on the features' device.

        noise_ceiling : (n_vertices,), fraction of variance in [0, 1], or None
        rois : masks (n_vertices,), for the head that has a layer for each
        """
        return [self.fit_rows(t, [v], responses, noise_ceiling, rois)[0] for t, v in self.splits()]

    def fit_rows(
        self,
        trained: np.ndarray,
        choices: Sequence[np.ndarray],
        responses: torch.Tensor,
        noise_ceiling: np.ndarray | None = None,
        rois: Sequence[np.ndarray] = (),
        **_: Any,
    ) -> list[LinearMap]:
        """Train once on some rows; for each choice, rows too, the map of the epoch that scored best on those."""
        for rows in choices:
            refuse_leak(self._ids[trained], self._ids[rows], "early stopping")
        mean, scale = _standardisation(self._features[trained])
        torch.manual_seed(self._config.seed)
        head = _make_head(self._config.head, self._features.shape[1], responses.shape[1], rois)
        best = train_head(
            head.to(self._features.device),
            [Task((self._features - mean) / scale, responses, trained, choices, noise_ceiling)],
            weighted_sum(self._config.terms),
            self._config.adamw,
        )
        weights = [one.weights / scale[:, None] for one in best]
        whole = [LinearMap(w, one.intercept - mean @ w) for w, one in zip(weights, best, strict=True)]
        return [calibrate(one, self._features[trained], responses[trained]) for one in whole]


def stop_split(image_ids: np.ndarray, folds: np.ndarray, fold: int, config: FitConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to decide when to stop by, all outside the fold, which is for scoring."""
    outside = np.flatnonzero(folds != fold)
    if len(outside) < 4:
        raise ConfigError(
            f"fold {fold}",
            expected="4 or more images outside it, to train on and to decide when to stop",
            found=len(outside),
            remedy="add images, or give other --folds",
        )
    stop = assign_folds(image_ids[outside], config.adamw.validation, config.seed + 1) == 0
    if not 2 <= stop.sum() <= len(outside) - 2:  # so few images that the draw left none for r: every tenth, by id
        stop = np.zeros(len(outside), dtype=bool)
        stop[np.argsort(image_ids[outside], kind="stable")[:: min(10, len(outside) // 2)]] = True
    return outside[~stop], outside[stop]


class Task(NamedTuple):
    """What one set of vertices learns from.

    features : features[rows] is what the head reads: a matrix (n_images, n_features), or the rows of several layers
    responses : (n_images, n_vertices) float32, on the device that trains
    trained, choices : row numbers to train on, and those that each choice of an epoch is made on
    noise_ceiling : (n_vertices,), or None
    """

    features: Any
    responses: torch.Tensor
    trained: np.ndarray
    choices: Sequence[np.ndarray]
    noise_ceiling: np.ndarray | None


def train_head(head: Any, tasks: Sequence[Task], loss: Loss, config: AdamWConfig) -> list[Any]:
    """Train a head on the trained rows; for each choice, what `head.snapshot()` gave after the epoch that was best.

    A head of several tasks is called with their number as well, and a batch is of one task; a choice is then made by
    the mean score over all their vertices. Batches differ between epochs; the torch seed decides them.
    """
    ceilings = [
        None if t.noise_ceiling is None else torch.as_tensor(t.noise_ceiling, device=t.responses.device) for t in tasks
    ]
    decayed, free = [p for p in head.parameters() if p.ndim > 1], [p for p in head.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    # fused: one pass over weights, moments and gradient, and not one for each of its operations
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, fused=True)
    n_batches = sum(max(len(task.trained) // config.batch_size, 1) for task in tasks)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs * n_batches)
    cost = getattr(head, "regularisation", None)
    called = [head] if len(tasks) == 1 else [partial(head, number=number) for number in range(len(tasks))]
    first = head.snapshot()
    stops = [_Stop(first) for _ in tasks[0].choices]
    for _ in range(config.epochs):
        head.train()
        for number, batch in _epoch(tasks, config.batch_size):
            task = tasks[number]
            optimiser.zero_grad(set_to_none=True)
            value = loss(called[number](task.features[batch]), task.responses[batch], ceilings[number])
            (value if cost is None else value + cost()).backward()
            optimiser.step()
            schedule.step()
        head.eval()
        now = head.snapshot()
        for choice, stop in enumerate(stops):
            stop.see(now, _overall(called, tasks, choice))
        if all(stop.waited >= config.patience for stop in stops):
            break
    return [stop.best for stop in stops]


def _epoch(tasks: Sequence[Task], batch_size: int) -> list[tuple[int, torch.Tensor]]:
    """(number of the task, rows) of every batch; images that do not fill one come in another epoch."""
    batches = []
    for number, task in enumerate(tasks):
        rows = torch.as_tensor(task.trained, device=task.responses.device)
        order = getattr(task.features, "shuffled", _shuffled)(rows)
        whole = max(len(rows) // batch_size, 1) * batch_size
        batches += [(number, batch) for batch in order[:whole].split(batch_size)]
    return batches if len(tasks) == 1 else [batches[k] for k in torch.randperm(len(batches)).tolist()]


def _shuffled(rows: torch.Tensor) -> torch.Tensor:
    return rows[torch.randperm(len(rows), device=rows.device)]


def _overall(called: Sequence[Any], tasks: Sequence[Task], choice: int) -> float:
    """The mean over tasks, each by the number of its vertices."""
    scores = [
        _score(head, task.features[task.choices[choice]], task.responses[task.choices[choice]], task.noise_ceiling)
        for head, task in zip(called, tasks, strict=True)
    ]
    return float(np.average(scores, weights=[task.responses.shape[1] for task in tasks]))


class _Stop:
    """The best head so far, by one score, and for how many epochs there was no better one."""

    def __init__(self, first: Any) -> None:
        self.best, self.score, self.waited = first, -np.inf, 0

    def see(self, head: Any, score: float) -> None:
        self.waited += 1
        if score > self.score:
            self.best, self.score, self.waited = head, score, 0


@torch.no_grad()
def calibrate(head: LinearMap, features: torch.Tensor, responses: torch.Tensor) -> LinearMap:
    """Give each vertex the scale and intercept that fit these rows best, its direction kept; a scale below 0 becomes 0.

    Correlation losses leave both free, and folds that stop at different epochs differ in them. Pooled over folds, such
    steps would count as errors.
    """
    slope, shift = calibration(head(features), responses)
    return LinearMap(head.weights * slope, shift + slope * head.intercept)


def calibration(predictions: torch.Tensor, responses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_vertices,) slopes, 0 or more, and shifts: slope * prediction + shift is closest to the responses."""
    centred = predictions - predictions.mean(0)
    variance = centred.square().sum(0)
    covariance = (centred * (responses - responses.mean(0))).sum(0)
    slope = (covariance / torch.where(variance > 0, variance, 1)).clamp_min(0)
    return slope, responses.mean(0) - slope * predictions.mean(0)


@torch.no_grad()
def _score(head: Any, features: Any, responses: torch.Tensor, noise_ceiling: np.ndarray | None) -> float:
    """The challenge's metric over vertices, or mean r without ceilings."""
    r = pearson_r(head(features).cpu(), responses.cpu())
    if noise_ceiling is None or not noise_ceiling.any():
        return float(r.mean())
    return float(np.nanmean(accuracy_from_r(r, noise_ceiling)))


def _make_head(kind: str, n_features: int, n_vertices: int, rois: Sequence[np.ndarray]) -> Head:
    if kind == "linear":
        return LinearHead(n_features, n_vertices)
    return RoiHead(n_features, n_vertices, [torch.from_numpy(mask) for mask in rois if mask.any()])


def _standardisation(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature; 1 for a feature that never changes."""
    scale, mean = torch.std_mean(features, 0)
    return mean, torch.where(scale > 0, scale, torch.ones_like(scale))
