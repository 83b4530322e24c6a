"""How weights over models are learnt from moments, for any grouping of the vertices: one for all, or each its own.

Every learner takes moments without a fold axis and gives one row of weights for each group, >= 0 and adding up to 1, or
NaN where the group has nothing to learn from. None loops over vertices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from heads.blend.nnls import nnls
from heads.blend.products import Moments

TEMPERATURES = (0.003, 0.01, 0.03, 0.1, 0.3)  # of the softmax, in units of r
_ROUNDS = 30  # members that a greedy blend may have beyond its start, counting repeats
_BAGS = 5  # greedy blends that are averaged, each of half of the models
_CONSTANT = 1e-6  # of a column's mean square: less is what rounding leaves of the spread of a constant one
_TIE = 1e-6  # parts of a score: less is the rounding of its sums, and no reason to take another model


@dataclass(frozen=True)
class Judge:
    """What the challenge's metric makes of r.

    ceiling : (n_vertices,) fraction of variance in (0, 1]; 1 where there is none
    counts : (n_vertices,) bool, False for vertices that the metric leaves out
    """

    ceiling: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(noise_ceiling: Sequence[np.ndarray | None], n_vertices: Sequence[int]) -> "Judge":
        """Of both hemispheres side by side. Ceilings that are 0 everywhere are none."""
        ceiling = np.concatenate(
            [
                np.ones(n) if given is None else np.asarray(given, np.float64)
                for given, n in zip(noise_ceiling, n_vertices, strict=True)
            ]
        )
        counts = ceiling > 0 if ceiling.any() else np.full(len(ceiling), True)
        return Judge(np.where(ceiling > 0, ceiling, 1), counts)

    def value(self, r: np.ndarray) -> np.ndarray:
        """(..., n_vertices) -> the same, noise-normalised accuracy as a fraction, 0 where it does not count."""
        return np.where(self.counts, np.minimum(np.maximum(r, 0) ** 2, self.ceiling) / self.ceiling, 0)

    def mean(self, r: np.ndarray) -> np.ndarray:
        """(..., n_vertices) -> (...,)"""
        return self.value(r).sum(-1) / max(self.counts.sum(), 1)

    def at(self, vertices: np.ndarray) -> "Judge":
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
        return self.n == len(self.labels) and bool((self.labels == np.arange(self.n)).all())

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = np.argsort(self.labels, kind="stable")
        there, starts = np.unique(self.labels[order], return_index=True)
        return order, there, starts

    def sum(self, values: np.ndarray) -> np.ndarray:
        """(n_vertices, ...) -> (n, ...)"""
        if self.each_alone:
            return values
        order, there, starts = self._order
        whole = np.zeros((self.n, *values.shape[1:]))
        whole[there] = np.add.reduceat(values[order], starts, axis=0)
        return whole

    def spread(self, values: np.ndarray) -> np.ndarray:
        """(n, ...) -> (n_vertices, ...)"""
        return values if self.each_alone else values[self.labels]

    def at(self, vertices: np.ndarray) -> "Groups":
        """Of some of the vertices; groups keep their numbers, unless each vertex is one."""
        if self.each_alone:
            return Groups(np.arange(len(vertices)), len(vertices))
        return Groups(self.labels[vertices], self.n)


def r_of(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n_vertices,) r of a blend with the responses.

    sums : (n_vertices, n_models + 2, n_models + 2)
    weights : (n_vertices, n_models)
    """
    return r_from(*blended_sums(sums, weights, times_blend(sums, weights)))


def times_blend(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n_vertices, n_models + 2) sums of products of every column with a blend."""
    return np.einsum("vmc,vm->vc", sums[:, :-2], weights)


def blended_sums(sums: np.ndarray, weights: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(6, n_vertices) what `r_from` takes, of one blend: images, blend, its squares, times y, y and its squares.

    times : of `times_blend`
    """
    squares = np.einsum("vm,vm->v", times[:, :-2], weights)
    y = sums[:, -2]
    return np.stack([sums[:, -1, -1], times[:, -1], squares, times[:, -2], y[:, -1], y[:, -2]])


def r_from(
    n: np.ndarray, blend: np.ndarray, squares: np.ndarray, cross: np.ndarray, y: np.ndarray, y_squares: np.ndarray
) -> np.ndarray:
    """Correlation from sums over images; 0 where either side is constant."""
    n = np.maximum(n, 1)
    spread, y_spread = squares - blend**2 / n, y_squares - y**2 / n
    defined = (spread > _CONSTANT * squares) & (y_spread > _CONSTANT * y_squares)
    norm = np.sqrt(np.where(defined, spread * y_spread, 1))
    return np.clip(np.where(defined, (cross - blend * y / n) / norm, 0), -1, 1)


def each_r(moments: Moments) -> np.ndarray:
    """(n_models, n_vertices) r of every model alone."""
    sums = np.moveaxis(moments.sums, 0, -1)  # (c, c, v)
    n_models = moments.n_models
    squares = np.einsum("mmv->mv", sums)[:n_models]
    y = sums[-2]
    return r_from(sums[-1, -1], sums[:n_models, -1], squares, sums[:n_models, -2], y[-1], y[-2])


def uniform(moments: Moments, groups: Groups, judge: Judge) -> np.ndarray:
    """(n_groups, n_models) the same weight for every model."""
    return np.full((groups.n, moments.n_models), 1 / moments.n_models)


def single(moments: Moments, groups: Groups, judge: Judge) -> np.ndarray:
    """(n_groups, n_models) all weight on the best model of the group."""
    scores, there = _mean_value(judge.value(each_r(moments)), groups, judge)
    return _or_nothing(np.eye(moments.n_models)[np.argmax(scores, axis=1)], there)


def by_score(moments: Moments, groups: Groups, judge: Judge, temperature: float) -> np.ndarray:
    """(n_groups, n_models) softmax of the models' mean r over the group, divided by a temperature."""
    r = np.where(judge.counts, np.maximum(each_r(moments), 0), 0)
    scores, there = _mean_value(r, groups, judge)
    powers = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
    return _or_nothing(powers / powers.sum(1, keepdims=True), there)


def stacked(moments: Moments, groups: Groups, judge: Judge) -> np.ndarray:
    """(n_groups, n_models) non-negative least squares of the responses on the predictions of all vertices together.

    A model that explains a vertex well has to be scaled up there, by the same for all models, or vertices that none
    explains would draw weights towards nothing: each vertex has the gain that suits the uniform blend. A vertex
    counts as in the metric, by its ceiling, or by what the blend explains where that is more.
    """
    gram, cross = moments.covariance
    if not groups.each_alone:
        plain = np.full(moments.n_models, 1 / moments.n_models)
        variance, along = plain @ gram @ plain, np.maximum(cross @ plain, 0)
        gain = along / np.where(variance > 0, variance, 1)
        counts = judge.counts / np.maximum(judge.ceiling, gain * along)
        gram = groups.sum(gram * (counts * gain**2)[:, None, None])
        cross = groups.sum(cross * (counts * gain)[:, None])
    weights = nnls(gram, cross)
    total = weights.sum(1, keepdims=True)
    there = (total[:, 0] > 0) & (groups.sum(judge.counts.astype(np.float64)) > 0)
    return _or_nothing(weights / np.where(total > 0, total, 1), there)


def greedy(moments: Moments, groups: Groups, judge: Judge, seed: int = 0, n_bags: int = 1) -> np.ndarray:
    """(n_groups, n_models) start from the best k, add the model, old or new, that helps most, until none does.

    With several bags the mean over them, each of which may choose among a random half of the models: steadier, and
    wrong where one model is all there is.

    Caruana et al. 2004, Ensemble selection from libraries of models, https://doi.org/10.1145/1015330.1015432
    """
    generator = np.random.default_rng(seed)
    n_models = moments.n_models
    parts = []
    for _ in range(n_bags):
        allowed = np.arange(n_models)
        if n_bags > 1:
            allowed = np.sort(generator.permutation(n_models)[: -(-n_models // 2)])
        columns = [*allowed, n_models, n_models + 1]
        bag = np.zeros((groups.n, n_models))
        bag[:, allowed] = _selected(Moments(moments.sums[:, columns][:, :, columns]), groups, judge)
        parts.append(bag)
    return np.mean(parts, axis=0)


def _selected(moments: Moments, groups: Groups, judge: Judge) -> np.ndarray:
    """(n_groups, n_models) one greedy blend of each group."""
    n_models = moments.n_models
    n, y, y_squares = moments.sums[:, -1, -1], moments.sums[:, -2, -1], moments.sums[:, -2, -2]
    # models first: their sums at all vertices lie side by side
    products = np.ascontiguousarray(np.moveaxis(moments.sums[:, :n_models, :n_models], 0, -1))
    own = np.einsum("mmv->mv", products).copy()
    model = np.ascontiguousarray(moments.sums[:, :n_models, -1].T)
    cross = np.ascontiguousarray(moments.sums[:, :n_models, -2].T)
    chosen, best = _best_start(moments, groups, judge)
    there = best >= 0
    vertex_chosen = groups.spread(chosen)
    predicted, explained = np.einsum("vm,mv->v", vertex_chosen, model), np.einsum("vm,mv->v", vertex_chosen, cross)
    with_models = np.einsum("vm,mkv->kv", vertex_chosen, products)
    squares = np.einsum("vm,mv->v", vertex_chosen, with_models)
    vertex = np.arange(moments.n_vertices)
    for _ in range(_ROUNDS):
        r = r_from(n, predicted + model, squares + 2 * with_models + own, explained + cross, y, y_squares)
        scores, _ = _mean_value(judge.value(r), groups, judge)
        most = scores.max(1)
        goes_on = most > best + _TIE * np.abs(best)
        if not goes_on.any():
            break
        new = np.argmax(scores >= (most - _TIE * np.abs(most))[:, None], axis=1)  # of equals the first
        best = np.where(goes_on, most, best)
        chosen[np.flatnonzero(goes_on), new[goes_on]] += 1
        pick, taken = groups.spread(new), groups.spread(goes_on)
        squares += np.where(taken, 2 * with_models[pick, vertex] + own[pick, vertex], 0)
        predicted += np.where(taken, model[pick, vertex], 0)
        explained += np.where(taken, cross[pick, vertex], 0)
        with_models += np.where(taken, products[pick, :, vertex].T, 0)
    return _or_nothing(chosen / np.maximum(chosen.sum(1, keepdims=True), 1), there)


def _best_start(moments: Moments, groups: Groups, judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """(n_groups, n_models) of 0 and 1, the best k models of each group, and the score of their average, (n_groups,).

    k is the number of them, up to half, whose average scores best.
    """
    scores, there = _mean_value(judge.value(each_r(moments)), groups, judge)
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    chosen, best = np.zeros(scores.shape), np.full(len(scores), -1.0)
    for k in range(1, moments.n_models // 2 + 2):
        first = (rank < k).astype(np.float64)
        of_group, _ = _mean_value(judge.value(r_of(moments.sums, groups.spread(first)))[None], groups, judge)
        better = there & (of_group[:, 0] > best * (1 + _TIE))
        chosen[better], best[better] = first[better], of_group[better, 0]
    return chosen, best


def _mean_value(values: np.ndarray, groups: Groups, judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """(k, n_vertices) -> (n_groups, k) means over the vertices that count, and (n_groups,) whether there are any."""
    counts = groups.sum(judge.counts.astype(np.float64))
    return groups.sum(np.where(judge.counts, values, 0).T) / np.maximum(counts, 1)[:, None], counts > 0


def _or_nothing(weights: np.ndarray, there: np.ndarray) -> np.ndarray:
    return np.where(there[:, None], weights, np.nan)


Learner = Callable[[Moments, Groups, Judge], np.ndarray]


def learners(method: str, seed: int) -> dict[str, Learner]:
    """The settings of a method among which left-out images choose, by what they are in words."""
    if method == "score":
        return {f"temperature {t:g}": partial(by_score, temperature=t) for t in TEMPERATURES}
    if method == "greedy":
        return {f"bags {n}": partial(greedy, seed=seed, n_bags=n) for n in (1, _BAGS)}
    return {"": {"uniform": uniform, "nnls": stacked}[method]}
