"""Weights over models, learnt from moments at one of four levels, and scored on folds they were not learnt on.

Fine levels have few images to learn many weights from, so each level is shrunk towards the one above it, and the first
towards the uniform blend: weights = (1 - s) own + s coarser. What s is, and any other setting of a method, is chosen on
images that the weights were not learnt on; where a blend is scored, on none of the fold that it is scored on.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Subject
from heads.blend.products import N_FOLDS, Moments
from heads.blend.weights import Groups, Judge, Learner, blended_sums, learners, r_from, single, times_blend
from heads.config import LEVELS, BlendConfig

SHRINKAGE = (1.0, 0.75, 0.5, 0.25, 0.0)  # the first of equals is taken: the coarser blend
MOST_VERTICES = 8192  # that levels above the vertex, and shrinkage, are learnt from; evenly spread over the ROIs
_TILE = 512  # vertices at a time where each has weights of its own
NO_ROI = "no ROI"


@dataclass(frozen=True)
class Level:
    """One way to group vertices, and what the groups are called."""

    name: str
    groups: Groups
    names: tuple[str, ...]

    def at(self, vertices: np.ndarray) -> "Level":
        """Of some of the vertices."""
        return replace(self, groups=self.groups.at(vertices))


@dataclass(frozen=True)
class Choice:
    """What left-out images chose for a level."""

    level: str
    setting: str  # of the method, as 'temperature 0.01'; '' for a method that has none
    shrinkage: float  # towards the level above


@dataclass(frozen=True)
class Learnt:
    """Weights of one subject, left hemisphere first.

    weights : (n_vertices, n_models) >= 0, of the standardised predictions, adding up to 1, learnt on all images
    nested : {'best single' | 'uniform' | 'blend': (n_vertices, n_models) for each fold, learnt on the others}
    choices : of `weights`, level by level
    """

    weights: np.ndarray
    nested: Mapping[str, Sequence[np.ndarray]]
    choices: Sequence[Choice]


def levels_of(subject: Subject) -> list[Level]:
    """From all vertices down to each. ROIs may overlap: a vertex belongs to the first that has it."""
    n = [subject.n_vertices[hemisphere] for hemisphere in HEMISPHERES]
    hemisphere = np.repeat(np.arange(len(n)), n)
    names = [f"{h} {roi}" for h in HEMISPHERES for roi in (*subject.rois[h], NO_ROI)]
    roi = np.concatenate([_first_roi(subject, h, names) for h in HEMISPHERES])
    return [
        Level("all", Groups(np.zeros(sum(n), dtype=np.int64), 1), ("all",)),
        Level("hemisphere", Groups(hemisphere, len(n)), HEMISPHERES),
        Level("roi", Groups(roi, len(names)), tuple(names)),
        Level("vertex", Groups(np.arange(sum(n)), sum(n)), ()),
    ]


def _first_roi(subject: Subject, hemisphere: str, names: Sequence[str]) -> np.ndarray:
    labels = np.full(subject.n_vertices[hemisphere], names.index(f"{hemisphere} {NO_ROI}"))
    for roi, mask in reversed(subject.rois[hemisphere].items()):
        labels[mask] = names.index(f"{hemisphere} {roi}")
    return labels


def judge_of(subject: Subject) -> Judge:
    return Judge.of([subject.noise_ceiling[h] for h in HEMISPHERES], [subject.n_vertices[h] for h in HEMISPHERES])


def learn(
    moments: Moments, judge: Judge, levels: Sequence[Level], config: BlendConfig, parts: np.ndarray | None = None
) -> Learnt:
    """Learn weights on all images, and, to be scored, on all folds but each in turn.

    levels : all four of `levels_of`
    parts : (n_parts, n_models) >= 0, rows that add up to 1: blend these averages of the models instead of the models
    """
    pooled = moments if parts is None else _pooled(moments, parts)
    chain = _Chain(pooled, judge, levels[: LEVELS.index(config.per) + 1], levels[2].groups, config)
    weights, choices = chain.weights(())
    nested = {"best single": [], "uniform": [], "blend": []}  # type: dict[str, list[np.ndarray]]
    by_hemisphere, plain = levels[1].groups, np.full((1, moments.n_models), 1 / moments.n_models)
    for fold in range(N_FOLDS):
        best = single(moments.total({fold}), by_hemisphere, judge)
        nested["best single"].append(by_hemisphere.spread(best))
        nested["uniform"].append(np.broadcast_to(plain, (moments.n_vertices, moments.n_models)))
        nested["blend"].append(_of_models(chain.weights((fold,))[0], parts))
    return Learnt(_without_constants(_of_models(weights, parts), moments.total()), nested, choices)


def nested_r(moments: Moments, weights: Sequence[np.ndarray]) -> np.ndarray:
    """(n_vertices,) r over all images of a blend whose weights, (n_vertices, n_models), differ from fold to fold."""
    each = ((moments.fold(fold).sums, of_fold) for fold, of_fold in enumerate(weights))
    parts = [blended_sums(sums, of_fold, times_blend(sums, of_fold)) for sums, of_fold in each]
    return r_from(*np.sum(parts, axis=0))


def _pooled(moments: Moments, parts: np.ndarray) -> Moments:
    change = np.zeros((len(parts) + 2, moments.n_models + 2))
    change[:-2, :-2] = parts
    change[-2:, -2:] = np.eye(2)
    return Moments(np.stack([change @ of_fold @ change.T for of_fold in moments.sums]), moments.cross_fitted)


def _of_models(weights: np.ndarray, parts: np.ndarray | None) -> np.ndarray:
    return weights if parts is None else weights @ parts


def _without_constants(weights: np.ndarray, total: Moments) -> np.ndarray:
    """A model that is constant at a vertex adds nothing there, and its weight would only look like something."""
    left = np.where(np.einsum("vcc->vc", total.sums)[:, :-2] > 0, weights, 0)
    sums = left.sum(1, keepdims=True)
    return np.where(sums > 0, left / np.where(sums > 0, sums, 1), weights)


def _mixed(own: np.ndarray, coarser: np.ndarray, shrinkage: float) -> np.ndarray:
    """Where there was nothing to learn from, the coarser."""
    return np.where(np.isnan(own), coarser, (1 - shrinkage) * own + shrinkage * coarser)


class _Chain:
    """Levels from coarse to fine, each shrunk towards the one before it."""

    def __init__(
        self, moments: Moments, judge: Judge, levels: Sequence[Level], rois: Groups, config: BlendConfig
    ) -> None:
        self._moments, self._judge, self._levels = moments, judge, levels
        self._learners = learners(config.method, config.seed)
        order = np.argsort(rois.labels, kind="stable")
        n_kept = min(len(order), MOST_VERTICES)
        self._kept = np.sort(order[np.arange(n_kept) * len(order) // n_kept])
        self._few, self._few_judge = moments.at(self._kept), judge.at(self._kept)
        self._folds = [self._few.fold(fold) for fold in range(N_FOLDS)]
        self._learnt: dict[frozenset[int], list[dict[str, np.ndarray]]] = {}

    def weights(self, without: Sequence[int]) -> tuple[np.ndarray, list[Choice]]:
        """(n_vertices, n_models) learnt on all folds but these, on which nothing depends, and what was chosen."""
        n_models = self._moments.n_models
        coarser = np.full((self._moments.n_vertices, n_models), 1 / n_models)
        others = [fold for fold in range(N_FOLDS) if fold not in without]
        left_out = {fold: coarser[self._kept] for fold in others}
        choices = []
        for number, level in enumerate(self._levels):
            own = {fold: self._on_few((*without, fold), number) for fold in others}
            setting, shrinkage = self._best(own, left_out)
            choices.append(Choice(level.name, setting, shrinkage))
            left_out = {fold: _mixed(own[fold][setting], left_out[fold], shrinkage) for fold in others}
            coarser = _mixed(self._on_all(without, number, setting), coarser, shrinkage)
        return coarser, choices

    def _on_few(self, without: Sequence[int], number: int) -> dict[str, np.ndarray]:
        """{setting: (n_kept, n_models)} of one level."""
        groups = self._levels[number].groups.at(self._kept)
        return {one: groups.spread(weights) for one, weights in self._of_groups(frozenset(without))[number].items()}

    def _of_groups(self, without: frozenset[int]) -> list[dict[str, np.ndarray]]:
        """{setting: (n_groups, n_models)} of each level, learnt from the vertices that are kept for it."""
        if without not in self._learnt:
            total = self._few.total(without)
            self._learnt[without] = [
                {
                    setting: learner(total, level.groups.at(self._kept), self._few_judge)
                    if level.name != "vertex"
                    else _each_vertex(learner, self._few, without, self._few_judge)
                    for setting, learner in self._learners.items()
                }
                for level in self._levels
            ]
        return self._learnt[without]

    def _on_all(self, without: Sequence[int], number: int, setting: str) -> np.ndarray:
        """(n_vertices, n_models) of one level and setting."""
        level = self._levels[number]
        if level.name == "vertex":
            return _each_vertex(self._learners[setting], self._moments, without, self._judge)
        return level.groups.spread(self._of_groups(frozenset(without))[number][setting])

    def _best(
        self, own: Mapping[int, Mapping[str, np.ndarray]], coarser: Mapping[int, np.ndarray]
    ) -> tuple[str, float]:
        """The setting and shrinkage whose weights, learnt without a fold, score best on it, over these folds."""
        best, found = -1.0, (next(iter(self._learners)), 1.0)
        times = {fold: times_blend(self._folds[fold].sums, weights) for fold, weights in coarser.items()}
        for setting in self._learners:
            parts = [
                _line(self._folds[fold].sums, _mixed(own[fold][setting], coarser[fold], 0), coarser[fold], times[fold])
                for fold in own
            ]
            score = self._few_judge.mean(r_from(*np.sum(parts, axis=0)))
            chosen = int(np.argmax(score > score.max() - 1e-9))
            if score[chosen] > best:
                best, found = score[chosen], (setting, SHRINKAGE[chosen])
        return found


def _each_vertex(learner: Learner, moments: Moments, without: Collection[int], judge: Judge) -> np.ndarray:
    """(n_vertices, n_models) where each has weights of its own: some at a time, which stay in a cache."""

    def of_tile(first: int) -> np.ndarray:
        tile = np.arange(first, min(first + _TILE, moments.n_vertices))
        own = Moments(moments.sums[:, tile[0] : tile[-1] + 1], moments.cross_fitted)
        return learner(own.total(without), Groups(np.arange(len(tile)), len(tile)), judge.at(tile))

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy lets go of the interpreter while it sums and solves
        return np.concatenate(list(threads.map(of_tile, range(0, moments.n_vertices, _TILE))))


def _line(sums: np.ndarray, own: np.ndarray, coarser: np.ndarray, times_coarser: np.ndarray) -> np.ndarray:
    """(6, n_shrinkages, n_vertices): `blended_sums` of all mixtures of two blends, at the price of one."""
    one, other = blended_sums(sums, own, times_blend(sums, own)), blended_sums(sums, coarser, times_coarser)
    s = np.array(SHRINKAGE)[:, None]
    mixed = (1 - s) * one[:, None] + s * other[:, None]
    between = np.einsum("vm,vm->v", own, times_coarser[:, :-2])
    mixed[2] = (1 - s) ** 2 * one[2] + 2 * s * (1 - s) * between + s**2 * other[2]
    return mixed
