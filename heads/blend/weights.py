"""Learners of weights over models, for any grouping of the vertices: one group of all, or each vertex its own.

Every learner takes products without a fold axis and gives one row of weights for each group, >= 0 and adding up to 1,
or NaN where the group has nothing to learn from. None loops over vertices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from heads.blend.nnls import nnls
from heads.blend.products import Products, Total, of_tiles
from heads.scores.metrics import explained_share, r_from_sums

TEMPERATURES = (0.003, 0.01, 0.03, 0.1, 0.3)  # of the softmax, in units of r
_ROUNDS = 30  # models that a greedy blend may add to its start, counting repeats
_BAGS = 5  # greedy blends that are averaged, each of half of the models
_TIE = 1e-6  # parts of a score: less is the rounding of its sums, and no reason to take another model


@dataclass(frozen=True)
class Judge:
    """The challenge's metric for many blends at once, given their r.

    ceiling : (n_vertices,) fraction of variance in (0, 1]; 1 where there is none
    counts : (n_vertices,) bool, False for vertices that the metric leaves out
    """

    ceiling: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(noise_ceiling: Sequence[np.ndarray | None], n_vertices: Sequence[int]) -> "Judge":
        """The judge of all surfaces side by side. Ceilings that are 0 everywhere count as none."""
        parts = zip(noise_ceiling, n_vertices, strict=True)
        ceiling = np.concatenate([np.ones(n) if given is None else given.astype(np.float64) for given, n in parts])
        counts = ceiling > 0 if ceiling.any() else np.full(len(ceiling), True)
        return Judge(np.where(ceiling > 0, ceiling, 1), counts)

    def value(self, r: np.ndarray) -> np.ndarray:
        """Noise-normalised accuracy as a fraction, (..., n_vertices) like r; 0 where a vertex does not count."""
        return np.where(self.counts, explained_share(r, self.ceiling), 0)

    def mean(self, r: np.ndarray) -> np.ndarray:
        """Mean accuracy as a fraction over the vertices that count, (...,), of r (..., n_vertices)."""
        mean: np.ndarray = self.value(r).sum(-1) / max(self.counts.sum(), 1)
        return mean

    def at(self, vertices: np.ndarray | slice) -> "Judge":
        """The judge of some of the vertices, given by number."""
        return Judge(self.ceiling[vertices], self.counts[vertices])


@dataclass(frozen=True)
class Groups:
    """A partition of the vertices.

    labels : (n_vertices,) int, the group of each
    """

    labels: np.ndarray
    n: int

    @cached_property
    def each_alone(self) -> bool:
        """Whether every vertex is a group of its own."""
        return self.n == len(self.labels) and bool((self.labels == np.arange(self.n)).all())

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Vertices group by group, the groups that have any, and where each begins."""
        order = np.argsort(self.labels, kind="stable")
        filled, starts = np.unique(self.labels[order], return_index=True)
        return order, filled, starts

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sums over the vertices of each group, (n_vertices, ...) -> (n, ...)."""
        if self.each_alone:
            return values
        order, filled, starts = self._order
        sums = np.zeros((self.n, *values.shape[1:]))
        sums[filled] = np.add.reduceat(values[order], starts, axis=0)
        return sums

    def spread(self, values: np.ndarray) -> np.ndarray:
        """What each vertex has of its group, (n, ...) -> (n_vertices, ...)."""
        return values if self.each_alone else values[self.labels]

    def at(self, vertices: np.ndarray) -> "Groups":
        """The groups of some of the vertices; they keep their numbers, unless each vertex is one."""
        if self.each_alone:
            return Groups(np.arange(len(vertices)), len(vertices))
        return Groups(self.labels[vertices], self.n)


def r_of(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """r of a blend with the responses, (n_vertices,).

    sums : (n_vertices, n_models + 2, n_models + 2)
    weights : (n_vertices, n_models)
    """
    times = np.einsum("vm,vmc->vc", weights, sums[:, :-2])
    return r_from_sums(*blended_sums(sums, weights[:, None], times[:, None])[:, 0])


def blended_sums(sums: np.ndarray, weights: np.ndarray, times: np.ndarray) -> np.ndarray:
    """What `r_from_sums` takes, for several blends, (6, n_blends, n_vertices).

    sums : (n_vertices, n_models + 2, n_models + 2)
    weights : (n_vertices, n_blends, n_models)
    times : weights @ sums[:, :-2], products of every blend with every column, (n_vertices, n_blends, n_models + 2)
    """
    blended = np.empty((6, weights.shape[1], len(sums)))
    blended[0], blended[4], blended[5] = sums[:, -1, -1], sums[:, -2, -1], sums[:, -2, -2]
    blended[1], blended[3] = times[..., -1].T, times[..., -2].T
    np.einsum("vbm,vbm->bv", times[..., :-2], weights, out=blended[2])
    return blended


def nested_sums(products: Products, weights: Sequence[np.ndarray]) -> np.ndarray:
    """What `r_from_sums` takes of a blend with other weights, (n_vertices, n_models), in each fold: (6, n_vertices)."""

    def of_tile(tile: slice) -> np.ndarray:
        total = np.zeros((6, 1, tile.stop - tile.start))
        for of_fold, weights_of_fold in zip(products.sums, weights, strict=True):
            sums, own = of_fold[tile].astype(np.float64), weights_of_fold[tile, None]
            total += blended_sums(sums, own, own @ sums[:, :-2])
        return total[:, 0]

    return np.concatenate(of_tiles(of_tile, products.n_vertices), axis=1)


def uniform(total: Total, groups: Groups, judge: Judge) -> np.ndarray:
    """The same weight for every model, (n_groups, n_models)."""
    return np.full((groups.n, total.n_models), 1 / total.n_models)


def single(total: Total, groups: Groups, judge: Judge) -> np.ndarray:
    """All weight on the best model of the group, (n_groups, n_models)."""
    scores, counted = _mean_value(judge.value(total.r_of_each), groups, judge)
    return _or_nothing(np.eye(total.n_models)[np.argmax(scores, axis=1)], counted)


def by_score(total: Total, groups: Groups, judge: Judge, temperature: float) -> np.ndarray:
    """Softmax of the models' mean r over the group, divided by a temperature, (n_groups, n_models)."""
    r = np.where(judge.counts, np.maximum(total.r_of_each, 0), 0)
    scores, counted = _mean_value(r, groups, judge)
    powers = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
    return _or_nothing(powers / powers.sum(1, keepdims=True), counted)


def stacked(total: Total, groups: Groups, judge: Judge) -> np.ndarray:
    """Non-negative least squares of the responses on the predictions of a group's vertices, (n_groups, n_models).

    Predictions are scaled up at each vertex, all models by the gain that suits the uniform blend. Without it, vertices
    that no model explains would draw all weights towards 0. A vertex counts as in the metric, by its ceiling, or by
    what the blend explains where that is more.
    """
    gram, cross = total.covariance
    if not groups.each_alone:
        equal = np.full(total.n_models, 1 / total.n_models)
        variance, covariance = equal @ gram @ equal, np.maximum(cross @ equal, 0)
        gain = covariance / np.where(variance > 0, variance, 1)
        counts = judge.counts / np.maximum(judge.ceiling, gain * covariance)
        gram = groups.sum(gram * (counts * gain**2)[:, None, None])
        cross = groups.sum(cross * (counts * gain)[:, None])
    weights = nnls(gram, cross)
    whole = weights.sum(1, keepdims=True)
    counted = (whole[:, 0] > 0) & (groups.sum(judge.counts.astype(np.float64)) > 0)
    return _or_nothing(weights / np.where(whole > 0, whole, 1), counted)


def greedy(total: Total, groups: Groups, judge: Judge, seed: int = 0, n_bags: int = 1) -> np.ndarray:
    """Greedy selection, (n_groups, n_models): start from the best k models, add the best one until none helps.

    A model may be added again. With several bags, the mean over them, each of which chooses among a random half
    of the models: steadier, but wrong where one model is much better than all others.

    Caruana et al. 2004, Ensemble selection from libraries of models, https://doi.org/10.1145/1015330.1015432
    """
    generator = np.random.default_rng(seed)
    n_models = total.n_models
    bags = []
    for _ in range(n_bags):
        allowed = np.arange(n_models)
        if n_bags > 1:
            allowed = np.sort(generator.permutation(n_models)[: -(-n_models // 2)])
        bag = np.zeros((groups.n, n_models))
        bag[:, allowed] = _selected(total, allowed, groups, judge)
        bags.append(bag)
    return np.asarray(np.mean(bags, axis=0))


def _selected(total: Total, models: np.ndarray, groups: Groups, judge: Judge) -> np.ndarray:
    """One greedy blend of some models for each group, (n_groups, len(models)). models : their numbers, rising"""
    n, *of_each, y, y_squares = total.of_each
    model_sums, model_squares, model_times_y = (sums[models] for sums in of_each)
    columns = [*models, total.n_models, total.n_models + 1]
    sums = total.sums if len(models) == total.n_models else total.sums[:, columns][:, :, columns]
    # models first: their sums at all vertices lie side by side
    pairs = np.ascontiguousarray(np.moveaxis(sums[:, :-2, :-2], 0, -1))
    chosen, best = _best_start(sums, total.r_of_each[models], groups, judge)
    counted = best >= 0
    vertex_chosen = groups.spread(chosen)
    blend = np.einsum("vm,mv->v", vertex_chosen, model_sums)
    blend_times_y = np.einsum("vm,mv->v", vertex_chosen, model_times_y)
    with_models = np.einsum("vm,mkv->kv", vertex_chosen, pairs)
    squares = np.einsum("vm,mv->v", vertex_chosen, with_models)
    vertex = np.arange(total.n_vertices)
    for _ in range(_ROUNDS):
        grown = squares + 2 * with_models + model_squares  # squares of the blend with each model added
        r = r_from_sums(n, blend + model_sums, grown, blend_times_y + model_times_y, y, y_squares)
        scores, _ = _mean_value(judge.value(r), groups, judge)
        most = scores.max(1)
        goes_on = most > best + _TIE * np.abs(best)
        if not goes_on.any():
            break
        new = np.argmax(scores >= (most - _TIE * np.abs(most))[:, None], axis=1)  # of equals the first
        best = np.where(goes_on, most, best)
        chosen[np.flatnonzero(goes_on), new[goes_on]] += 1
        pick, taken = groups.spread(new), groups.spread(goes_on)
        squares += np.where(taken, 2 * with_models[pick, vertex] + model_squares[pick, vertex], 0)
        blend += np.where(taken, model_sums[pick, vertex], 0)
        blend_times_y += np.where(taken, model_times_y[pick, vertex], 0)
        with_models += np.where(taken, pairs[pick, :, vertex].T, 0)
    return _or_nothing(chosen / np.maximum(chosen.sum(1, keepdims=True), 1), counted)


def _best_start(sums: np.ndarray, r: np.ndarray, groups: Groups, judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """The best k models of each group, (n_groups, n_models) of 0 and 1, and the score of their average, (n_groups,).

    k is the number of models, up to half of them, whose average scores best.

    sums : (n_vertices, n_models + 2, n_models + 2)
    r : of every model, (n_models, n_vertices)
    """
    scores, counted = _mean_value(judge.value(r), groups, judge)
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    chosen, best = np.zeros(scores.shape), np.full(len(scores), -1.0)
    for k in range(1, len(r) // 2 + 2):
        first = (rank < k).astype(np.float64)
        of_group, _ = _mean_value(judge.value(r_of(sums, groups.spread(first)))[None], groups, judge)
        better = counted & (of_group[:, 0] > best * (1 + _TIE))
        chosen[better], best[better] = first[better], of_group[better, 0]
    return chosen, best


def _mean_value(values: np.ndarray, groups: Groups, judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """Means over the vertices that count, (k, n_vertices) -> (n_groups, k), and whether there are any, (n_groups,)."""
    counts = groups.sum(judge.counts.astype(np.float64))
    return groups.sum(np.where(judge.counts, values, 0).T) / np.maximum(counts, 1)[:, None], counts > 0


def _or_nothing(weights: np.ndarray, counted: np.ndarray) -> np.ndarray:
    return np.where(counted[:, None], weights, np.nan)


Learner = Callable[[Total, Groups, Judge], np.ndarray]


def learners(method: str, seed: int) -> dict[str, Learner]:
    """The settings of a method, in words, with a learner each; left-out images choose among them."""
    if method == "score":
        return {f"temperature {t:g}": partial(by_score, temperature=t) for t in TEMPERATURES}
    if method == "greedy":
        return {f"bags {n}": partial(greedy, seed=seed, n_bags=n) for n in (1, _BAGS)}
    return {"": {"uniform": uniform, "nnls": stacked}[method]}
