"""Spatial heads on cached layers, trained fold by fold: of one subject, or of several that share a response space."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import refuse_leak
from featcache.dataset.subject import Subject
from heads.config import FitConfig
from heads.features.rows import LayerRows
from heads.modules.by_subject import SpatialHeads
from heads.modules.linear import SMALL
from heads.modules.saved import spatial_head_of
from heads.modules.spatial import SpatialReadout
from heads.scores.losses import weighted_sum
from heads.solvers.base import Fits, FoldFit, Piece, level_and_spread
from heads.solvers.gradient import Task, calibration, stop_split, train_head
from heads.solvers.held_out import clean_parts
from heads.solvers.layers.axes import Basis, Seen, seen_under, way_of
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.layers.ridge import flat_weights

_BATCH = 256  # images a pass where heads only predict
_EPS = 1e-5  # of the standardisation, torch's own

Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]  # {array: (mean, variance) of each channel}


@dataclass(frozen=True)
class Member:
    """One subject of a training.

    rows : of the one store, or of one store for each held-out fold
    trained : whether the backbones saw the images outside each held-out fold
    """

    subject: Subject
    rows: list[LayerRows]
    folds: np.ndarray
    held_out: list[int]
    trained: bool

    def of_fold(self, k: int) -> LayerRows:
        return self.rows[k if len(self.rows) > 1 else 0]


class SpatialFolds:
    """Trains once a fold, when it is first asked for a prediction, and predicts for any member."""

    def __init__(self, members: Sequence[Member], config: FitConfig, device: str) -> None:
        self._members, self.config, self._device = list(members), config, device
        self._heads: dict[int, list[_Heads]] = {}
        self._flat: dict[int, Seen] = {}

    def of(self, number: int) -> "SpatialFits":
        """The predictor of one member."""
        return SpatialFits(self, self._members[number], number)

    def split(self, number: int, k: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """A member's rows to train on, the rows of each choice of an epoch, and the held-out rows each choice predicts.

        The last choice is for images of no fold; where choices are made outside the held-out fold, there is one.
        Choices are of the same images for every member, and what one chooses by none is trained on.
        """
        member, fold = self._members[number], self._members[number].held_out[k]
        ids = member.subject.train.ids
        outside, held_out = np.flatnonzero(member.folds != fold), np.flatnonzero(member.folds == fold)
        if not member.trained:
            everyone = [one.subject.train.ids for one in self._members]
            stops = [
                stop_split(i, one.folds, fold, self.config)[1] for i, one in zip(everyone, self._members, strict=True)
            ]
            chosen = np.concatenate([i[stop] for i, stop in zip(everyone, stops, strict=True)])
            return outside[~np.isin(ids[outside], chosen)], [stops[number]], [held_out]
        scored = np.unique(np.concatenate([one.subject.train.ids[one.folds == fold] for one in self._members]))
        parts = [held_out[np.isin(ids[held_out], scored[p])] for p in clean_parts(scored, np.arange(len(scored)), fold)]
        return outside, [*(np.setdiff1d(held_out, part) for part in parts), held_out], parts

    def heads(self, k: int) -> "list[_Heads]":
        """The heads of one fold, one for each choice."""
        if k not in self._heads:
            self._heads[k] = self._train(k)
        return self._heads[k]

    def _train(self, k: int) -> "list[_Heads]":
        config = self.config
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

        Gradients alone, from small random maps, end far below it (docs/layers.md). On features that were trained on
        those rows the error there is no guide, and the penalty is one for all.
        """
        penalties = (1.0,) if self._members[0].trained else self.config.ridge.penalties
        found = []
        for member, task in zip(self._members, tasks, strict=True):
            rows = member.of_fold(k)
            kernels = LayerKernels(rows, len(member.folds), 0)
            weights = flat_weights(kernels, self._basis(kernels, task.trained), task.responses, penalties)
            scales = {name: (variance + _EPS).sqrt() for name, (_, variance) in statistics.items()}
            found.append({n: w.T.reshape(w.shape[1], rows.n_places(n), -1) * scales[n] for n, w in weights.items()})
        levels = [task.responses[task.trained].mean(0) for task in tasks]
        heads.start_from_weights(found, levels)

    def _basis(self, kernels: LayerKernels, trained: np.ndarray) -> Basis:
        """Under the flat prior; where folds share their features, what it is made of serves them all."""
        key = id(kernels.rows)
        seen = self._flat.get(key) or seen_under(Prior(), kernels, way_of(kernels, kernels.n_train))
        if not self._members[0].trained:
            self._flat[key] = seen
        return seen.basis(trained)

    def _task(self, number: int, k: int) -> Task:
        member = self._members[number]
        subject = member.subject
        both = np.concatenate([np.asarray(subject.responses(h), dtype=np.float32) for h in HEMISPHERES], 1)
        ceilings = [one for h in HEMISPHERES if (one := subject.noise_ceiling[h]) is not None]
        ceiling = np.concatenate(ceilings) if len(ceilings) == len(HEMISPHERES) else None
        trained, choices, _ = self.split(number, k)
        return Task(member.of_fold(k), torch.from_numpy(both).to(self._device), trained, choices, ceiling)

    def _refuse_leaks(self, tasks: Sequence[Task], k: int) -> None:
        """What one subject is trained on must not be what another chooses by."""
        ids = [member.subject.train.ids for member in self._members]
        trained = np.concatenate([own[task.trained] for own, task in zip(ids, tasks, strict=True)])
        for own, task, member in zip(ids, tasks, self._members, strict=True):
            for rows in task.choices:
                refuse_leak(trained, own[rows], f"early stopping of {member.subject.name}")
            fold = member.held_out[k]
            refuse_leak(trained, own[member.folds == fold], f"fold {fold} of {member.subject.name}")

    def _statistics(self, k: int) -> Statistics:
        """{array: (mean, variance) of each channel}, the means of the members'."""
        found = {}
        for name in self._members[0].of_fold(k).grids:
            moments = [one.of_fold(k).moments(name, len(one.folds)) for one in self._members]
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


class SpatialFits:
    """The predictions of one member of a training."""

    vertex_block: int | None = None  # vertices share what is learnt

    def __init__(self, folds: SpatialFolds, member: Member, number: int) -> None:
        self._folds, self._member, self._number = folds, member, number

    def fit(self, responses: torch.Tensor, **about: Any) -> Fits:
        """The responses only set the scale of predictions, on the rows that were trained on."""
        hemisphere = about["hemisphere"]
        fits: list[FoldFit] = []
        saved: dict[tuple[str, str], torch.Tensor] = {}
        for k, fold in enumerate(self._member.held_out):
            fits.append(self._fit_fold(k, hemisphere, responses))
            last = self._folds.heads(k)[-1]
            head = spatial_head_of(last.saved(), last.names, self._member.subject.name, hemisphere)
            saved |= {(f"fold{fold}.", f"head.{key}"): value for key, value in head.state_dict().items()}
        return Fits(fits, saved)

    def _fit_fold(self, k: int, hemisphere: str, responses: torch.Tensor) -> FoldFit:
        trained, _, parts = self._folds.split(self._number, k)
        pieces, test = [], responses[:0]
        for choice, values in enumerate(self._predict(k, hemisphere)):
            slope, shift = calibration(values[trained], responses[trained])
            values = slope * values + shift
            if choice < len(parts):
                pieces.append(piece_of(values, parts[choice], trained))
            test = values[len(responses) :]
        return FoldFit(pieces, test)

    def _predict(self, k: int, hemisphere: str) -> list[torch.Tensor]:
        """(n_images, n_vertices) of each choice. Not kept: both hemispheres under all choices would fill the memory."""
        left = self._member.subject.n_vertices[HEMISPHERES[0]]
        columns = slice(0, left) if hemisphere == HEMISPHERES[0] else slice(left, None)

        def of_hemisphere(rows: dict[str, torch.Tensor], head: _Heads) -> torch.Tensor:
            return head(rows, self._number)[:, columns]

        heads = [partial(of_hemisphere, head=head) for head in self._folds.heads(k)]
        return predict(heads, self._member.of_fold(k))


class TrainedSpatialFits:
    """Spatial heads that were trained with the backbones, as they are.

    heads : {hemisphere: one for each held-out fold}, {array: rows} -> (n_images, n_vertices)
    """

    vertex_block: int | None = None

    def __init__(
        self, heads: dict[str, list[nn.Module]], rows: Sequence[LayerRows], folds: np.ndarray, held_out: Sequence[int]
    ) -> None:
        self._heads, self._rows, self._folds, self._held_out = heads, rows, folds, held_out

    def fit(self, responses: torch.Tensor, **about: Any) -> Fits:
        fits: list[FoldFit] = []
        saved: dict[tuple[str, str], torch.Tensor] = {}
        for head, rows, fold in zip(self._heads[about["hemisphere"]], self._rows, self._held_out, strict=True):
            (values,) = predict([head.to(responses.device)], rows)
            piece = piece_of(values, np.flatnonzero(self._folds == fold), np.flatnonzero(self._folds != fold))
            fits.append(FoldFit([piece], values[len(responses) :]))
            saved |= {(f"fold{fold}.", f"head.{key}"): value for key, value in head.state_dict().items()}
        return Fits(fits, saved)


def piece_of(predictions: torch.Tensor, rows: np.ndarray, trained: np.ndarray) -> Piece:
    """Of predictions of all images, those of some rows, with the level and spread of those that were trained on."""
    return Piece(rows, predictions[rows], *level_and_spread(predictions[trained]))


@torch.inference_mode()
def predict(heads: Sequence[Callable[..., torch.Tensor]], rows: LayerRows) -> list[torch.Tensor]:
    """(n_images, n_vertices) of each head, in one pass over the rows."""
    batches = np.array_split(np.arange(len(rows)), -(-len(rows) // _BATCH))
    parts = [[head(read) for head in heads] for read in map(rows.__getitem__, batches)]
    return [torch.cat(own) for own in zip(*parts, strict=True)]
