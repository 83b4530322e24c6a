"""Closed form on several layers: ridge regression under many priors at once.

Let K be the kernel of images under a prior, centred over the training images, and U e U' = K. Predictions of any image
under penalty p are linear in its scores K(x, .) U e^(-1/2), which are the features rotated to the axes that the
training images span. There the formulas of ridge.py apply unchanged, with eigenvalues e (axes.py, which also handles
more images than a kernel can be decomposed for).

Every vertex has a penalty under every prior. Its prediction is the mean over priors with weights
exp(-n / 8 * error / variance). The error is leave-one-out or generalised on the n training images (see ridge.py), or
that of held-out images if the backbone was trained on the other images (see held_out.py). A single best prior is
noisier; the mean was better on every recording tried (docs/decisions/0013).

Penalties over groups of features: Dupré la Tour et al. 2022, https://doi.org/10.1016/j.neuroimage.2022.119728
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.machine.device import matrix_products
from featcache.machine.memory import memory_at_start, said, spare_memory
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.config import RidgeConfig
from heads.features.rows import LayerRows
from heads.solvers.base import Block, Fits, FoldFit, Problem, mean_and_std, piece_of
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers import sizes
from heads.solvers.layers.axes import (
    LANDMARKS,
    Basis,
    PriorView,
    basis_of_features,
    landmark_features,
    view_under,
)
from heads.solvers.layers.kernels import BLUR, FLOOR, LayerKernels
from heads.solvers.layers.priors import CENTRES, DEPTH_WIDTH, DEPTHS, NARROW_IMAGES, WIDTHS, Prior, prior_set
from heads.solvers.layers.saved import SavedWeights
from heads.solvers.layers.sizes import LayeredSizes
from heads.solvers.memory import CACHE_SHARE, FEATURE_SHARE, STACK_SHARE
from heads.solvers.ridge import held_out_errors, is_exact, penalties_of, penalty_errors

_METHOD_WORDS = {
    "images": "dual, by kernels of images",
    "features": "primal",
    "landmarks": "by kernels with landmark images",
}

_SHARPNESS = 1 / 8  # of the weights of priors, per training image
_NEGLIGIBLE = 0.01  # a prior with less than this share of the best prior's weight is left out
_SEARCH_LANDMARKS, _SEARCH_VERTICES = 512, 2048  # on which priors are compared, besides `sizes.SEARCH_IMAGES`
_WORST = 1e30  # error of a penalty that cannot be judged; finite, so that differences of errors are numbers

# One per decade: the mean over priors smooths between them, and each costs a product as large as a prediction.
PENALTIES = tuple(10.0**k for k in range(-4, 5))

# settings that decide the heads besides features and responses; part of every prediction store's key
METHOD = {
    "blur": BLUR,
    "floor": FLOOR,
    "centres": list(CENTRES),
    "widths": list(WIDTHS),
    "narrow": NARROW_IMAGES,
    "depths": list(DEPTHS),
    "depth_width": DEPTH_WIDTH,
    "sharpness": _SHARPNESS,
    "penalties": list(PENALTIES),
    "landmarks": LANDMARKS,
    "search": [sizes.SEARCH_IMAGES, _SEARCH_LANDMARKS, _SEARCH_VERTICES, sizes.FINALISTS],
}


class _PriorResult(NamedTuple):
    """Smallest error (a fraction of variance) of one prior on one fold, and its penalty, (n_choices, n_vertices)."""

    error: torch.Tensor
    penalty: torch.Tensor


def build_layered(problem: Problem) -> "LayeredRidge":
    """Build the closed form under priors over layers and places; says its method and its memory.

    Raises ConfigError beyond --max-memory.
    """
    config, features, plan = problem.config, problem.features, problem.plan
    free = spare_memory(config.max_memory)
    rows = features.read(problem.device, free * FEATURE_SHARE / len(features.stores))
    kernels = scaled_kernels(rows, plan, free * STACK_SHARE)
    priors = prior_set(rows[0].grids, DEPTHS if len(features.names) > 1 else (None,), plan.n_train)
    ridge = replace(config.ridge, penalties=PENALTIES)
    spool = Workdir(problem.work).heads
    solver = LayeredRidge(kernels, plan, ridge, priors, cache_bytes=free * CACHE_SHARE, spool=spool)
    peak = memory_at_start() + solver.memory(max(problem.n_vertices))
    streamed = list(dict.fromkeys(name for of_store in rows for name in of_store.streamed))
    say(
        f"{problem.subject.name}: {rows[0].n_features:,} features, {len(plan.outside(0)):,} images to fit to: "
        f"{_METHOD_WORDS[solver.method]}, {len(priors)} priors to compare before the first vertex counts; {said(peak)}"
        + (f"; {', '.join(streamed)} read from the store block by block" if streamed else "")
        + ("; not enough memory to keep decompositions; they are recomputed each time" if solver.recomputes else "")
    )
    return solver


def scaled_kernels(rows: Sequence[LayerRows], plan: FoldPlan, stack_bytes: float) -> list[LayerKernels]:
    """Kernels for each set of scales of a plan.

    rows : of the one store, or of one store for each held-out fold
    stack_bytes : memory that kernels of single places may take, over all sets
    """
    sources = {plan.scales(k): plan.source(k) for k in range(len(plan))}
    return [
        LayerKernels(rows[source], plan.scale_rows(number), stack_bytes / len(sources))
        for number, source in sources.items()
    ]


class LayeredRidge:
    """Kernel ridge heads on all folds but one, for each fold in turn.

    kernels : for each set of scales (see scaled_kernels)
    priors : to average over
    cache_bytes : memory for decompositions, which serve any responses
    spool : folder for weights that are larger than the memory; None: all are in memory
    """

    def __init__(
        self,
        kernels: Sequence[LayerKernels],
        plan: FoldPlan,
        config: RidgeConfig,
        priors: Sequence[Prior],
        *,
        cache_bytes: float,
        spool: Path | None = None,
    ) -> None:
        self._spool = spool
        self._kernels, self._config, self._plan = list(kernels), config, plan
        self._rows = [plan.outside(k) for k in range(len(plan))]
        self._parts = [plan.parts(k) for k in range(len(plan))]
        self._n_train, self._n_images = plan.n_train, len(kernels[0].rows)
        self._all_priors = list(priors)
        self._priors = [self._all_priors for _ in self._rows]
        self._sizes = self._count(cache_bytes)
        shuffled = np.random.default_rng(0).permutation(self._n_train)
        self._sample = np.sort(shuffled[: sizes.SEARCH_IMAGES]) if self._sizes.searched else None
        self._searched_for: str | None = None
        self._sampled: dict[int, LayerKernels] = {}
        self.method, self.recomputes = self._sizes.method, self._sizes.recomputes
        self._cache: dict[tuple[Prior, int], Basis] | None = None if self.recomputes else {}
        # without the cache all decompositions would be recomputed for every block of vertices
        self.vertex_block: int | None = None if self.recomputes else sizes.VERTEX_BLOCK

    def _count(self, cache_bytes: float) -> LayeredSizes:
        rows = self._kernels[0].rows
        counts = LayeredSizes(
            n_train=self._n_train,
            n_images=self._n_images,
            n_fit=tuple(map(len, self._rows)),
            n_choices=max(map(self._plan.n_choices, range(len(self._plan)))),
            n_scales=len(self._kernels),
            n_features=rows.n_features,
            n_priors=len(self._all_priors),
            backbone_trained=self._plan.backbone_trained,
            stack_bytes=float(sum(kernels.stack_bytes for kernels in self._kernels)),
            held_bytes=float(sum({id(kernels.rows): kernels.rows.held_bytes for kernels in self._kernels}.values())),
            cache_bytes=cache_bytes,
        )
        if not counts.searched:
            return counts
        sought = self._kernels[0].stack_bytes_of(sizes.SEARCH_IMAGES) * (
            1 if self._plan.backbone_trained else len(self._kernels)
        )
        return replace(counts, stack_bytes=counts.stack_bytes + sought)

    def memory(self, n_vertices: int) -> float:
        return self._sizes.memory(n_vertices)

    def fit(self, block: Block) -> Fits:
        """Fit heads under all priors; with many images, under those that explain the surface best."""
        responses = block.responses
        if self._sample is not None and (block.all_responses is None or self._searched_for != block.surface):
            self._searched_for = block.surface
            with matrix_products("float32"):
                self._priors = self._finalists(responses if block.all_responses is None else block.all_responses)
            if self._cache is not None:  # drop bases of another surface's priors, so that the cache does not grow
                self._cache = {key: basis for key, basis in self._cache.items() if key[0] in self._priors[key[1]]}
        results: list[dict[Prior, _PriorResult]] = [{} for _ in self._rows]
        for prior, k, basis in self._bases(lambda prior, k: prior in self._priors[k]):
            results[k][prior] = self._evaluate(basis, k, responses)
        weights = [_weights(of_fold, len(rows)) for of_fold, rows in zip(results, self._rows, strict=True)]
        mixes = [_Mix(self._plan.n_choices(k), rows, self._n_images, responses) for k, rows in enumerate(self._rows)]
        for prior, k, basis in self._bases(lambda prior, k: prior in weights[k]):
            mixes[k].add(basis, results[k][prior].penalty, weights[k][prior])
        fits = Fits([self._fit(k, mix) for k, mix in enumerate(mixes)], {})
        # the scale of a fold's weights in the mean is known only now
        saved = SavedWeights(self._kernels, self._plan, fits.folds, self._spool)
        for prior, k, basis in self._bases(lambda prior, k: prior in weights[k]):
            saved.add(prior, k, basis, *mixes[k].last(basis, results[k][prior].penalty, weights[k][prior]))
        return fits._replace(saved=saved.tensors([mix.predictions[-1] for mix in mixes]))

    def _bases(self, wanted: Callable[[Prior, int], bool]) -> Iterator[tuple[Prior, int, Basis]]:
        """(prior, k, basis), prior by prior. A kernel is computed only if a decomposition is missing, for all folds."""
        for prior in dict.fromkeys(prior for priors in self._priors for prior in priors):
            views: dict[int, PriorView] = {}
            for k in range(len(self._rows)):
                if wanted(prior, k):
                    yield prior, k, self._basis(prior, k, views)

    def _basis(self, prior: Prior, k: int, views: dict[int, PriorView]) -> Basis:
        """Basis of the k-th fold. views : by set of scales; the view of this fold is added if it is needed"""
        if self._cache is not None and (prior, k) in self._cache:
            return self._cache[prior, k]
        scales = self._plan.scales(k)
        with matrix_products("float32"):  # decompositions need full precision
            if scales not in views:
                views[scales] = view_under(prior, self._kernels[scales], self.method)
            basis = views[scales].basis(self._rows[k])
        if self._cache is not None:
            self._cache[prior, k] = basis
        return basis

    def _evaluate(self, basis: Basis, k: int, responses: torch.Tensor) -> _PriorResult:
        """Smallest error over penalties for each choice of the k-th fold."""
        rows = self._rows[k]
        target = responses[rows] - responses[rows].mean(0)
        penalties = penalties_of(basis.values, self._config.penalties)
        rotated = basis.rotated(target)
        variance = target.square().mean(0)
        variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        if self._plan.backbone_trained:
            parts = [(basis.scores(part), responses[part] - responses[rows].mean(0)) for part in self._parts[k]]
            errors = held_out_errors(basis.values, rotated, penalties, parts)
        else:
            exact_inputs = (basis.scores(rows), target) if is_exact(self._config, len(rows)) else None
            squares = target.square().sum(0)
            errors = penalty_errors(basis.values, len(rows), rotated, squares, penalties, exact_inputs)[None]
        least, which = errors.min(1)
        return _PriorResult((least.to(variance.dtype).clamp_max(_WORST) / variance).clamp_max(_WORST), penalties[which])

    def _fit(self, k: int, mix: "_Mix") -> FoldFit:
        pieces = [piece_of(mix.predictions[choice], part, self._rows[k]) for choice, part in enumerate(self._parts[k])]
        last = mix.predictions[-1]
        return FoldFit(pieces, last[self._n_train :], *mean_and_std(last[self._rows[k]]))

    def _finalists(self, responses: Any) -> list[list[Prior]]:
        """The best priors of each fold, on a sample of its training images and of the vertices of the surface.

        responses : (n_train, all vertices of the surface)
        """
        assert self._sample is not None
        columns: Any = np.sort(np.random.default_rng(1).permutation(responses.shape[1])[:_SEARCH_VERTICES])
        columns = torch.as_tensor(columns) if isinstance(responses, torch.Tensor) else columns
        y = torch.as_tensor(responses[self._sample][:, columns], device=self._kernels[0].rows.device).float()
        explained = [torch.empty(len(self._all_priors), y.shape[1], device=y.device) for _ in self._rows]
        for scales, all_kernels in enumerate(self._kernels):
            kernels = self._sampled.get(scales) or all_kernels.of_images(self._sample)
            if not self._plan.backbone_trained:  # for the other surfaces
                self._sampled[scales] = kernels
            landmarks = np.flatnonzero(np.isin(self._sample, all_kernels.scale_rows))[:_SEARCH_LANDMARKS]
            for number, prior in enumerate(self._all_priors):
                features = landmark_features(kernels.kernel(prior)[:, landmarks], landmarks)[0]
                for k in (k for k in range(len(self._rows)) if self._plan.scales(k) == scales):
                    train_rows = np.flatnonzero(np.isin(self._sample, self._rows[k]))
                    explained[k][number] = self._explained(features, train_rows, y)
        return [[self._all_priors[number] for number in _choose_greedily(of_fold)] for of_fold in explained]

    def _explained(self, features: torch.Tensor, rows: np.ndarray, responses: torch.Tensor) -> torch.Tensor:
        """(n_vertices,) share of variance that the best penalty explains, by generalised cross-validation."""
        basis, y = basis_of_features(features, rows), responses[rows] - responses[rows].mean(0)
        squares, penalties = y.square().sum(0), penalties_of(basis.values, self._config.penalties)
        errors = penalty_errors(basis.values, len(rows), basis.rotated(y), squares, penalties, None)
        return (1 - errors.min(0).values * len(rows) / squares.clamp_min(1e-12)).clamp_min(0).float()


def _choose_greedily(explained: torch.Tensor) -> list[int]:
    """Numbers of priors, chosen greedily: each adds most to the explained variance, summed over vertices, of the best
    prior chosen so far. explained : (n_priors, n_vertices)
    """
    chosen: list[int] = []
    best = torch.zeros_like(explained[0])
    while len(chosen) < min(sizes.FINALISTS, len(explained)):
        gains = (explained - best).clamp_min(0).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        best = torch.maximum(best, explained[chosen[-1]])
    return chosen


def flat_weights(
    kernels: LayerKernels, basis: Basis, responses: torch.Tensor, penalties: Sequence[float]
) -> dict[str, torch.Tensor]:
    """{array: (n_places * n_channels, n_vertices)} weights on the features as stored.

    basis : under the flat prior, on the images to fit to
    responses : (n_train, n_vertices)
    penalties : to choose from by exact or generalised leave-one-out error
    """
    rows = basis.rows
    target = responses[rows] - responses[rows].mean(0)
    rotated = basis.rotated(target)
    offered = penalties_of(basis.values, penalties)
    exact_inputs = (basis.scores(rows), target) if is_exact(RidgeConfig(), len(rows)) else None
    errors = penalty_errors(basis.values, len(rows), rotated, target.square().sum(0), offered, exact_inputs)
    index, dual = basis.dual(rotated / (basis.values[:, None] + offered[errors.argmin(0)]))
    duals = responses.new_zeros(len(kernels.rows), responses.shape[1])
    duals[index] = dual
    return kernels.weights([Prior()], duals[None])


def _weights(results: dict[Prior, _PriorResult], n_images: int) -> dict[Prior, torch.Tensor]:
    """{prior: (n_choices, n_vertices)} weights, which sum to 1 over priors; priors without any weight are left out."""
    errors = torch.stack([result.error for result in results.values()])
    weights = torch.softmax((errors.amin(0) - errors) * (n_images * _SHARPNESS), 0)
    weights = torch.where(weights >= _NEGLIGIBLE * weights.amax(0), weights, 0)
    weights = weights / weights.sum(0)
    return {prior: weight for prior, weight in zip(results, weights, strict=True) if weight.any()}


class _Mix:
    """Predictions of one fold, summed over priors.

    predictions : (n_choices, n_images, n_vertices)
    """

    def __init__(self, n_choices: int, rows: np.ndarray, n_images: int, responses: torch.Tensor) -> None:
        mean = responses[rows].mean(0)
        self._target = responses[rows] - mean
        self.predictions = mean.repeat(n_choices, n_images, 1)

    def add(self, basis: Basis, penalties: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the predictions of one prior. penalties, weights : (n_choices, n_vertices)"""
        used_vertices = torch.nonzero(weights.amax(0) > 0)[:, 0]
        rotated = basis.rotated(self._target[:, used_vertices])
        used = zip(penalties[:, used_vertices], weights[:, used_vertices], strict=True)
        for choice, (penalty, weight) in enumerate(used):
            prior_weights = rotated / (basis.values[:, None] + penalty) * weight
            self.predictions[choice].index_add_(1, used_vertices, basis.predictions(prior_weights))

    def last(self, basis: Basis, penalties: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The vertices to which the last choice gives any weight, and their weights on the axes, (rank, n_used)."""
        used_vertices = torch.nonzero(weights[-1] > 0)[:, 0]
        rotated = basis.rotated(self._target[:, used_vertices])
        on_axes = rotated / (basis.values[:, None] + penalties[-1, used_vertices]) * weights[-1, used_vertices]
        return used_vertices, on_axes
