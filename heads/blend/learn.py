"""Weights over models, learnt at one of four levels, and scored on folds that they were not learnt on.

Fine levels have few images to learn many weights from. So each level is shrunk towards the one above it, and the first
towards the uniform blend: weights = (1 - s) own + s coarser. s, and any other setting of a method, is chosen on images
that the weights were not learnt on. Where a blend is scored on a fold, nothing of that fold is used to choose either.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from featcache.dataset.subject import Subject
from heads.blend.products import N_FOLDS, Products, of_tiles
from heads.blend.weights import Groups, Judge, Learner, blended_sums, learners, nested_sums, single
from heads.config import LEVELS, BlendConfig
from heads.scores.metrics import r_from_sums

SHRINKAGE = (1.0, 0.75, 0.5, 0.25, 0.0)  # of equally good ones the first is taken: the coarser blend
MOST_VERTICES = 8192  # from which levels above the vertex, and shrinkage, are learnt; evenly spread over the ROIs


@dataclass(frozen=True)
class Level:
    """One way to group vertices."""

    name: str
    groups: Groups

    def at(self, vertices: np.ndarray) -> "Level":
        """The level for some of the vertices, given by number."""
        return replace(self, groups=self.groups.at(vertices))


@dataclass(frozen=True)
class Choice:
    """The setting and shrinkage of a level that were best on left-out images."""

    level: str
    setting: str  # of the method, such as 'temperature 0.01'; '' for a method that has none
    shrinkage: float  # towards the level above


@dataclass(frozen=True)
class Learnt:
    """Weights of one subject; the vertices of its surfaces are side by side.

    weights : (n_vertices, n_models) >= 0, of the standardised predictions, adding up to 1, learnt on all images
    nested : {'best single' | 'uniform' | 'blend': (n_vertices, n_models) for each fold, learnt on the others}
    choices : for `weights`, level by level
    """

    weights: np.ndarray
    nested: Mapping[str, Sequence[np.ndarray]]
    choices: Sequence[Choice]


def levels_of(subject: Subject) -> list[Level]:
    """The levels from all vertices down to each. A vertex of several ROIs belongs to the first of them."""
    widths, labels = list(subject.n_vertices.values()), [_first_rois(subject, surface) for surface in subject.surfaces]
    starts = np.cumsum([0, *(len(subject.rois[surface]) + 1 for surface in subject.surfaces)])
    rois = np.concatenate([first + of_surface for first, of_surface in zip(starts, labels, strict=False)])
    return [
        Level("all", Groups(np.zeros(sum(widths), dtype=np.int64), 1)),
        Level("surface", Groups(np.repeat(np.arange(len(widths)), widths), len(widths))),
        Level("roi", Groups(rois, int(starts[-1]))),
        Level("vertex", Groups(np.arange(sum(widths)), sum(widths))),
    ]


def _first_rois(subject: Subject, surface: str) -> np.ndarray:
    """The number of each vertex's first ROI; the number of ROIs for a vertex without any."""
    every = np.ones(subject.n_vertices[surface], dtype=bool)
    return np.asarray(np.argmax([*subject.rois[surface].values(), every], axis=0))


def judge_of(subject: Subject) -> Judge:
    """The metric on all vertices of a subject."""
    return Judge.of([subject.noise_ceiling[surface] for surface in subject.surfaces], list(subject.n_vertices.values()))


def learn(
    products: Products, judge: Judge, levels: Sequence[Level], config: BlendConfig, parts: np.ndarray | None = None
) -> Learnt:
    """Learn weights on all images, and, for the scores, on all folds but each in turn.

    levels : all four, as `levels_of` gives them
    parts : (n_parts, n_models) >= 0, rows that add up to 1: blend these averages of the models instead of the models
    """
    pooled = products if parts is None else _pooled(products, parts)
    chain = _Chain(pooled, judge, levels[: LEVELS.index(config.per) + 1], levels[2].groups, config)
    weights, choices = chain.weights(())
    surfaces, equal = levels[1].groups, np.full((1, products.n_models), 1 / products.n_models)
    uniform = np.broadcast_to(equal, (products.n_vertices, products.n_models))
    nested: dict[str, list[np.ndarray]] = {"best single": [], "uniform": [uniform] * N_FOLDS, "blend": []}
    for fold in range(N_FOLDS):
        nested["best single"].append(surfaces.spread(single(products.total({fold}), surfaces, judge)))
        nested["blend"].append(_of_models(chain.weights((fold,))[0], parts))
    varies = products.total().varies
    return Learnt(_without_constants(_of_models(weights, parts), varies), nested, choices)


def nested_r(products: Products, weights: Sequence[np.ndarray]) -> np.ndarray:
    """r over all images, (n_vertices,), of a blend with other weights, (n_vertices, n_models), in each fold."""
    return r_from_sums(*nested_sums(products, weights))


def _pooled(products: Products, parts: np.ndarray) -> Products:
    """Products of averages of the models."""
    change = np.zeros((len(parts) + 2, products.n_models + 2))
    change[:-2, :-2] = parts
    change[-2:, -2:] = np.eye(2)
    return Products(np.stack([change @ of_fold @ change.T for of_fold in products.sums]), products.cross_fitted)


def _of_models(weights: np.ndarray, parts: np.ndarray | None) -> np.ndarray:
    """Weights of the models, given those of their averages."""
    return weights if parts is None else weights @ parts


def _without_constants(weights: np.ndarray, varies: np.ndarray) -> np.ndarray:
    """Weights without those of models that are constant at a vertex: they add nothing there, and would mislead."""
    varying = np.where(varies, weights, 0)
    sums = varying.sum(1, keepdims=True)
    return np.where(sums > 0, varying / np.where(sums > 0, sums, 1), weights)


def _mixed(own: np.ndarray, coarser: np.ndarray, shrinkage: float) -> np.ndarray:
    """Weights shrunk towards coarser ones; the coarser where there was nothing to learn from."""
    mixed = (1 - shrinkage) * own + shrinkage * coarser if shrinkage else own
    return np.where(np.isnan(own[:, :1]), coarser, mixed)  # a group has all weights or none


class _Chain:
    """Levels from coarse to fine, each shrunk towards the one before it."""

    def __init__(
        self, products: Products, judge: Judge, levels: Sequence[Level], rois: Groups, config: BlendConfig
    ) -> None:
        self._products, self._judge, self._levels = products, judge, levels
        self._learners = learners(config.method, config.seed)
        order = np.argsort(rois.labels, kind="stable")
        n_kept = min(len(order), MOST_VERTICES)
        self._kept = np.sort(order[np.arange(n_kept) * len(order) // n_kept])
        few = products.at(self._kept)
        self._few, self._few_judge = replace(few, sums=few.sums.astype(np.float64)), judge.at(self._kept)
        self._learnt: dict[frozenset[int], list[dict[str, np.ndarray]]] = {}

    def weights(self, without: Sequence[int]) -> tuple[np.ndarray, list[Choice]]:
        """Weights learnt without some folds, (n_vertices, n_models), and what was chosen; neither depends on them."""
        n_models = self._products.n_models
        coarser = np.full((self._products.n_vertices, n_models), 1 / n_models)
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
        """{setting: weights of the kept vertices, (n_kept, n_models)} at one level."""
        groups, learnt = self._levels[number].groups.at(self._kept), self._of_groups(frozenset(without))[number]
        return {setting: groups.spread(weights) for setting, weights in learnt.items()}

    def _of_groups(self, without: frozenset[int]) -> list[dict[str, np.ndarray]]:
        """{setting: weights, (n_groups, n_models)} for each level, learnt from the kept vertices; remembered."""
        if without not in self._learnt:
            total = self._few.total(without)
            self._learnt[without] = [
                {
                    setting: learner(total, level.groups.at(self._kept), self._few_judge)
                    for setting, learner in self._learners.items()
                }
                if level.name != "vertex"
                else _each_vertex(self._learners, self._few, without, self._few_judge)
                for level in self._levels
            ]
        return self._learnt[without]

    def _on_all(self, without: Sequence[int], number: int, setting: str) -> np.ndarray:
        """Weights of all vertices, (n_vertices, n_models), at one level and setting."""
        level = self._levels[number]
        if level.name == "vertex":
            of_setting = {setting: self._learners[setting]}
            return _each_vertex(of_setting, self._products, without, self._judge)[setting]
        return level.groups.spread(self._of_groups(frozenset(without))[number][setting])

    def _best(
        self, own: Mapping[int, Mapping[str, np.ndarray]], coarser: Mapping[int, np.ndarray]
    ) -> tuple[str, float]:
        """The setting and shrinkage that score best over some folds, each with weights learnt without it.

        own, coarser : weights by fold, (n_kept, n_models); own also by setting
        """

        def of_tile(tile: slice) -> np.ndarray:
            """(n_settings, n_shrinkages) sums over vertices."""
            each, between = np.zeros(()), np.zeros(())
            for fold, of_fold in own.items():
                mixed = [_mixed(weights[tile], coarser[fold][tile], 0) for weights in of_fold.values()]
                parts = _beside(self._few.sums[fold, tile], mixed, coarser[fold][tile])
                each, between = each + parts[0], between + parts[1]
            r = r_from_sums(*_mixtures(each, between))
            return np.asarray(self._few_judge.at(tile).value(r).sum(-1))

        scores = np.sum(of_tiles(of_tile, self._few.n_vertices), axis=0) / max(self._few_judge.counts.sum(), 1)
        best, choice = -1.0, (next(iter(self._learners)), 1.0)
        for setting, score in zip(self._learners, scores, strict=True):
            first = int(np.argmax(score > score.max() - 1e-9))
            if score[first] > best:
                best, choice = score[first], (setting, SHRINKAGE[first])
        return choice


def _each_vertex(
    learners: Mapping[str, Learner], products: Products, without: Collection[int], judge: Judge
) -> dict[str, np.ndarray]:
    """{setting: weights of each vertex alone, (n_vertices, n_models)}."""

    def of_tile(tile: slice) -> list[np.ndarray]:
        total, n = products.at(tile).total(without), tile.stop - tile.start
        return [learner(total, Groups(np.arange(n), n), judge.at(tile)) for learner in learners.values()]

    of_settings = zip(*of_tiles(of_tile, products.n_vertices), strict=True)
    return {setting: np.concatenate(parts) for setting, parts in zip(learners, of_settings, strict=True)}


def _beside(sums: np.ndarray, own: Sequence[np.ndarray], coarser: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`blended_sums` of some blends and, last, of a coarser one, (6, n_blends + 1, n_vertices), and the products of
    each with that one, (n_blends, n_vertices).
    """
    weights = np.stack([*own, coarser]).swapaxes(0, 1)
    times = weights @ sums[:, :-2]
    return blended_sums(sums, weights, times), np.einsum("vbm,vm->bv", weights[:, :-1], times[:, -1, :-2])


def _mixtures(each: np.ndarray, between: np.ndarray) -> np.ndarray:
    """`blended_sums` of blends mixed with a coarser one at every shrinkage, at the price of one: of `_beside`, over
    any folds.

    (6, n_blends, n_shrinkages, n_vertices)
    """
    s = np.array(SHRINKAGE)[:, None]
    mixed = (1 - s) * each[:, :-1, None] + s * each[:, -1:, None]
    mixed[2] = (1 - s) ** 2 * each[2, :-1, None] + 2 * s * (1 - s) * between[:, None] + s**2 * each[2, -1]
    return np.asarray(mixed)
