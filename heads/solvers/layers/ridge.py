"""Closed form on several layers: ridge regression under many priors at once.

With K the kernel of images under a prior, centred over the training images, and U e U' = K, predictions of any image
under penalty p are linear in its scores K(x, .) U e^(-1/2), which are the features rotated to the axes that the
training images span. There the formulas of ridge.py hold as they are, with eigenvalues e (see axes.py, also for
more images than a kernel can be decomposed for).

Every vertex has a penalty under every prior. Its prediction is the mean over priors, weighed by how well each did:
exp(-n / 8 * error / variance), where the error is leave-one-out or generalised on the n training images (see
ridge.py), or on held-out images where the backbone was trained on the others (see held_out.py). A single best prior
is noisier; the mean was better on every recording tried (docs/decisions/0013).

Penalties over groups of features: Dupré la Tour et al. 2022, https://doi.org/10.1016/j.neuroimage.2022.119728
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.machine.device import matrix_products
from featcache.machine.memory import memory_at_start, refuse_above, said, spare_memory
from featcache.machine.progress import say
from heads.config import RidgeConfig
from heads.features.rows import BLOCK_BYTES
from heads.solvers.base import Block, Fits, FoldFit, Piece, Problem, level_and_spread
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.axes import LANDMARKS, Basis, Seen, basis_of_features, landmark_features, seen_under, way_for
from heads.solvers.layers.kernels import BLUR, LayerKernels
from heads.solvers.layers.priors import CENTRES, DEPTH_WIDTH, DEPTHS, NARROW_IMAGES, WIDTHS, Prior, prior_set
from heads.solvers.memory import CACHE_SHARE, FEATURE_SHARE, STACK_SHARE
from heads.solvers.ridge import TOGETHER, held_out_errors, is_exact, penalties_of, penalty_errors

_WAYS = {
    "images": "dual, by kernels of images",
    "features": "primal",
    "landmarks": "by kernels with landmark images",
}

_SHARPNESS = 1 / 8  # of the mean over priors, per training image
_NEGLIGIBLE = 0.01  # a prior with less than this part of the best one's weight is left out
_SEARCH_IMAGES = 1024  # with more, the priors to try on all of them are found on so many,
_SEARCH_LANDMARKS = 512  # on so many axes,
_SEARCH_VERTICES = 2048  # for so many vertices of a hemisphere
_FINALISTS = 8  # priors that are tried on all images then
_VERTEX_BLOCK = 4096
_WORST = 1e30  # error of a penalty that cannot be judged, so that differences of errors are numbers
_PENDING_BYTES = 256 << 20  # of dual weights that wait to be multiplied with features
_WEIGHTS_BYTES = 2e9  # of a hemisphere's weights that are saved; larger ones are left out

# One a decade: the mean over priors fills in what lies between, and each costs a product as large as a prediction.
PENALTIES = tuple(10.0**k for k in range(-4, 5))

# what decides the heads besides features and responses; part of every prediction store's key
METHOD = {
    "blur": BLUR,
    "centres": list(CENTRES),
    "widths": list(WIDTHS),
    "narrow": NARROW_IMAGES,
    "depths": list(DEPTHS),
    "depth_width": DEPTH_WIDTH,
    "sharpness": _SHARPNESS,
    "penalties": list(PENALTIES),
    "landmarks": LANDMARKS,
    "search": [_SEARCH_IMAGES, _SEARCH_LANDMARKS, _SEARCH_VERTICES, _FINALISTS],
}


class _Tried(NamedTuple):
    """One prior on one fold. error : fraction of variance; both (n_choices, n_vertices)."""

    error: torch.Tensor
    penalty: torch.Tensor


def build_layered(problem: Problem) -> "LayeredRidge":
    """Build the closed form under priors over layers and places; says its way and its memory.

    Raises ConfigError beyond --max-memory.
    """
    config, features, plan = problem.config, problem.features, problem.plan
    free = spare_memory(config.max_memory)
    rows = features.read(problem.device, free * FEATURE_SHARE / len(features.stores))
    kernels = [LayerKernels(one, plan.n_train, free * STACK_SHARE / len(rows)) for one in rows]
    priors = prior_set(rows[0].grids, DEPTHS if len(features.names) > 1 else (None,), plan.n_train)
    ridge = replace(config.ridge, penalties=PENALTIES)
    solver = LayeredRidge(kernels, plan, ridge, priors, cache_bytes=free * CACHE_SHARE)
    peak = memory_at_start() + solver.memory(max(problem.n_vertices))
    refuse_above(config.max_memory, peak)
    streamed = list(dict.fromkeys(name for one in rows for name in one.streamed))
    say(
        f"{problem.subject.name}: {rows[0].n_features:,} features, {len(plan.outside(0)):,} images to fit to: "
        f"{_WAYS[solver.way]}; {said(peak)}"
        + (f"; {', '.join(streamed)} read from the store block by block" if streamed else "")
        + ("; too little to keep decompositions, which are made again as they are needed" if solver.forgets else "")
    )
    return solver


@dataclass(frozen=True, kw_only=True)
class LayeredSizes:
    """Counts that the memory of a fit under priors follows from.

    n_fit : training images of each held-out fold
    n_choices : heads of a fold that choose for themselves, at most
    n_sources : sets of features, one for all folds or one for each
    stack_bytes : of kernels of single places, where there is room for them
    held_bytes : of features that are kept in memory
    """

    n_train: int
    n_images: int
    n_fit: tuple[int, ...]
    n_choices: int
    n_sources: int
    n_features: int
    n_priors: int
    backbone_trained: bool
    stack_bytes: float
    held_bytes: float
    cache_bytes: float

    @property
    def way(self) -> str:
        """What is decomposed: see heads/solvers/layers/axes.py."""
        return way_for(min(self.n_fit), self.n_features)

    @property
    def searched(self) -> bool:
        """Whether the priors that serve are found on a part of the images first."""
        return self.n_train > _SEARCH_IMAGES and self.n_priors > _FINALISTS

    @property
    def decomposed_bytes(self) -> float:
        """Of all decompositions that serve any responses."""
        if self.way == "images":
            of_prior = 4.0 * self.n_images * sum(self.n_fit)
        else:
            n = min(LANDMARKS, self.n_features)
            of_prior = 4.0 * n * (self.n_images * self.n_sources + n * len(self.n_fit))
        return (_FINALISTS if self.searched else self.n_priors) * of_prior

    @property
    def forgets(self) -> bool:
        """Whether decompositions do not fit into their memory, and every use of one computes it."""
        return self.decomposed_bytes > self.cache_bytes

    @property
    def n_saved(self) -> int:
        """Sets of weights that are saved: the mean over folds, or one for each."""
        return len(self.n_fit) if self.backbone_trained else 1

    def saved_bytes(self, n_vertices: int) -> float:
        """Of the weights of a surface; 0 for those that are too many to save."""
        weights = 4.0 * self.n_features * n_vertices * self.n_saved
        return weights if weights <= _WEIGHTS_BYTES else 0.0

    def memory(self, n_vertices: int) -> float:
        """About what fitting a surface takes: features, decompositions, predictions of every choice, responses."""
        block = min(n_vertices, _VERTEX_BLOCK) if not self.forgets else n_vertices
        per_fold = 4.0 * self.n_images * block * self.n_choices
        # a kernel, its centred copy, and both in float64
        decomposition = 28.0 * self.n_images * (self.n_images if self.way == "images" else LANDMARKS)
        kept = 0.0 if self.forgets else self.decomposed_bytes
        duals = 2 * min(4.0 * self.n_priors * self.n_images * block, _PENDING_BYTES)
        errors = 16.0 * max(TOGETHER, self.n_train * block)
        # read, centred, scaled, blurred, weighed
        blocks = 6.0 * min(4 * self.n_images * self.n_features, BLOCK_BYTES)
        weights = 4 * self.saved_bytes(n_vertices)  # of two surfaces, and while they are written
        responded = per_fold * len(self.n_fit) + 12.0 * self.n_train * block
        total = self.stack_bytes + decomposition + kept + responded + duals + errors + blocks + weights
        return 1.2 * (total + self.held_bytes)  # a fifth for what the allocator cannot use again


class LayeredRidge:
    """Kernel ridge heads on all folds but one, for each fold in turn.

    kernels : of the one store, or of one store for each held-out fold
    priors : what to choose from
    cache_bytes : memory for decompositions, which serve any responses
    """

    def __init__(
        self,
        kernels: Sequence[LayerKernels],
        plan: FoldPlan,
        config: RidgeConfig,
        priors: Sequence[Prior],
        *,
        cache_bytes: float,
    ) -> None:
        self._kernels, self._config, self._plan = list(kernels), config, plan
        self._rows = [plan.outside(k) for k in range(len(plan))]
        self._choices = [plan.parts(k) for k in range(len(plan))]
        self._n_train, self._n_images = plan.n_train, len(kernels[0].rows)
        self._all = list(priors)
        self._priors = [self._all for _ in self._rows]
        self._sizes = self._counted(cache_bytes)
        shuffled = np.random.default_rng(0).permutation(self._n_train)
        self._sample = np.sort(shuffled[:_SEARCH_IMAGES]) if self._sizes.searched else None
        self._searched_for: str | None = None
        self._sampled: LayerKernels | None = None
        self.way, self.forgets = self._sizes.way, self._sizes.forgets
        self._cache: dict[tuple[Prior, int], Basis] | None = None if self.forgets else {}
        # without the cache every block of vertices would cost all decompositions anew
        self.vertex_block: int | None = None if self.forgets else _VERTEX_BLOCK

    def _counted(self, cache_bytes: float) -> LayeredSizes:
        rows = self._kernels[0].rows
        stacks = float(sum(kernels.stack_bytes for kernels in self._kernels))
        if self._n_train > _SEARCH_IMAGES and len(self._all) > _FINALISTS:
            stacks += self._kernels[0].stack_bytes_of(_SEARCH_IMAGES)
        return LayeredSizes(
            n_train=self._n_train,
            n_images=self._n_images,
            n_fit=tuple(map(len, self._rows)),
            n_choices=max(map(self._plan.n_choices, range(len(self._plan)))),
            n_sources=len(self._kernels),
            n_features=rows.n_features,
            n_priors=len(self._all),
            backbone_trained=self._plan.backbone_trained,
            stack_bytes=stacks,
            held_bytes=float(sum(kernels.rows.held_bytes for kernels in self._kernels)),
            cache_bytes=cache_bytes,
        )

    def memory(self, n_vertices: int) -> float:
        return self._sizes.memory(n_vertices)

    def fit(self, block: Block) -> Fits:
        """Fit heads under all priors, or those that serve the whole surface best where there are many images."""
        responses = block.responses
        if self._sample is not None and (block.whole is None or self._searched_for != block.surface):
            self._searched_for = block.surface
            with matrix_products("float32"):
                self._priors = self._finalists(responses if block.whole is None else block.whole)
            if self._cache is not None:  # what an earlier search found must not add up
                self._cache = {key: one for key, one in self._cache.items() if key[0] in self._priors[key[1]]}
        tried: list[dict[Prior, _Tried]] = [{} for _ in self._rows]
        for prior, k, basis in self._bases(lambda prior, k: prior in self._priors[k]):
            tried[k][prior] = self._try(basis, k, responses)
        weights = [_weights(one, len(rows)) for one, rows in zip(tried, self._rows, strict=True)]
        mixes = [_Mix(self._plan.n_choices(k), rows, self._n_images, responses) for k, rows in enumerate(self._rows)]
        saved = _Saved(self._kernels, self._plan, responses.shape[1], self._sizes.saved_bytes(responses.shape[1]) > 0)
        for prior, k, basis in self._bases(lambda prior, k: prior in weights[k]):
            saved.add(prior, k, basis, *mixes[k].add(basis, tried[k][prior].penalty, weights[k][prior]))
        fits = [self._fit(k, mix) for k, mix in enumerate(mixes)]
        return Fits(fits, saved.tensors([mix.predictions[-1][: self._n_train].mean(0) for mix in mixes]))

    def _bases(self, wanted: Callable[[Prior, int], bool]) -> Iterator[tuple[Prior, int, Basis]]:
        """Decompositions, prior by prior; a kernel is computed when a decomposition of it is missing, once for all."""
        for prior in dict.fromkeys(prior for priors in self._priors for prior in priors):
            products: dict[int, Seen] = {}
            for k in range(len(self._rows)):
                if wanted(prior, k):
                    yield prior, k, self._basis(prior, k, products)

    def _basis(self, prior: Prior, k: int, products: dict[int, Seen]) -> Basis:
        if self._cache is not None and (prior, k) in self._cache:
            return self._cache[prior, k]
        source = self._plan.source(k)
        with matrix_products("float32"):  # what is decomposed needs all its digits
            if source not in products:
                products[source] = seen_under(prior, self._kernels[source], self.way)
            basis = products[source].basis(self._rows[k])
        if self._cache is not None:
            self._cache[prior, k] = basis
        return basis

    def _try(self, basis: Basis, k: int, responses: torch.Tensor) -> _Tried:
        rows, choices = self._rows[k], self._choices[k]
        target = responses[rows] - responses[rows].mean(0)
        penalties = penalties_of(basis.values, self._config.penalties)
        rotated = basis.rotated(target)
        variance = target.square().mean(0)
        variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        if self._plan.backbone_trained:
            parts = [(basis.scores(part), responses[part] - responses[rows].mean(0)) for part in choices]
            errors = held_out_errors(basis.values, rotated, penalties, parts)
        else:
            own = (basis.scores(rows), target) if is_exact(self._config, len(rows)) else None
            errors = penalty_errors(basis.values, len(rows), rotated, target.square().sum(0), penalties, own)[None]
        least, which = errors.min(1)
        return _Tried((least.to(variance.dtype).clamp_max(_WORST) / variance).clamp_max(_WORST), penalties[which])

    def _fit(self, k: int, mix: "_Mix") -> FoldFit:
        held_out, pieces = self._choices[k], []
        for choice, rows in enumerate(held_out):
            mean, spread = level_and_spread(mix.predictions[choice][self._rows[k]])
            pieces.append(Piece(rows, mix.predictions[choice][rows], mean, spread))
        return FoldFit(pieces, mix.predictions[-1][self._n_train :])

    def _finalists(self, responses: Any) -> list[list[Prior]]:
        """For each fold the priors that serve its vertices best between them, from a part of its training images.

        One after the other, each the one that adds most to the variance that the best of those chosen explain.
        """
        assert self._sample is not None
        columns = np.random.default_rng(1).permutation(responses.shape[1])[:_SEARCH_VERTICES]
        some = torch.as_tensor(np.sort(columns)) if isinstance(responses, torch.Tensor) else np.sort(columns)
        y = torch.as_tensor(responses[self._sample][:, some], device=self._kernels[0].rows.device).float()
        explained = [torch.empty(len(self._all), y.shape[1], device=y.device) for _ in self._rows]
        for source, whole in enumerate(self._kernels):
            kernels = self._sampled or whole.of_some(self._sample)
            if not self._plan.backbone_trained:  # for the other surfaces
                self._sampled = kernels
            for number, prior in enumerate(self._all):
                seen = landmark_features(kernels.kernel(prior)[:, :_SEARCH_LANDMARKS], slice(_SEARCH_LANDMARKS))[0]
                for k in [source] if self._plan.backbone_trained else range(len(self._rows)):
                    explained[k][number] = self._explained(seen, np.isin(self._sample, self._rows[k]), y)
        return [[self._all[c] for c in _between_them(one)] for one in explained]

    def _explained(self, features: torch.Tensor, trained: np.ndarray, responses: torch.Tensor) -> torch.Tensor:
        """(n_vertices,) sum of squares that the best penalty explains of images that were left out."""
        rows = np.flatnonzero(trained)
        basis, y = basis_of_features(features, rows), responses[rows] - responses[rows].mean(0)
        squares, penalties = y.square().sum(0), penalties_of(basis.values, self._config.penalties)
        errors = penalty_errors(basis.values, len(rows), basis.rotated(y), squares, penalties, None)
        return (1 - errors.min(0).values * len(rows) / squares.clamp_min(1e-12)).clamp_min(0).float()


def _between_them(explained: torch.Tensor) -> list[int]:
    """Rows of (n_priors, n_vertices) whose maxima add up to most, chosen one after the other."""
    chosen: list[int] = []
    best = torch.zeros_like(explained[0])
    while len(chosen) < min(_FINALISTS, len(explained)):
        gains = (explained - best).clamp_min(0).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        best = torch.maximum(best, explained[chosen[-1]])
    return chosen


def flat_weights(
    kernels: LayerKernels, basis: Basis, responses: torch.Tensor, penalties: Sequence[float]
) -> dict[str, torch.Tensor]:
    """{array: (n_places * n_channels, n_vertices)} weights on the features as they are stored.

    basis : under the flat prior, on the images to fit to
    responses : (n_train, n_vertices)
    penalties : to choose from by generalised or exact leave-one-out error; a single one is taken
    """
    rows = basis.rows
    target = responses[rows] - responses[rows].mean(0)
    rotated = basis.rotated(target)
    offered = penalties_of(basis.values, penalties)
    own = (basis.scores(rows), target) if is_exact(RidgeConfig(), len(rows)) else None
    errors = penalty_errors(basis.values, len(rows), rotated, target.square().sum(0), offered, own)
    index, dual = basis.dual(rotated / (basis.values[:, None] + offered[errors.argmin(0)]))
    whole = responses.new_zeros(len(kernels.rows), responses.shape[1])
    whole[index] = dual
    return kernels.weights([Prior()], whole[None])


def _weights(tried: dict[Prior, _Tried], n_images: int) -> dict[Prior, torch.Tensor]:
    """{prior: (n_choices, n_vertices)}, which sum to 1; priors that no vertex needs are not among them."""
    errors = torch.stack([one.error for one in tried.values()])
    weights = torch.softmax((errors.amin(0) - errors) * (n_images * _SHARPNESS), 0)
    weights = torch.where(weights >= _NEGLIGIBLE * weights.amax(0), weights, 0)
    weights = weights / weights.sum(0)
    return {prior: one for prior, one in zip(tried, weights, strict=True) if one.any()}


class _Mix:
    """One fold's predictions under all priors together.

    predictions : (n_choices, n_images, n_vertices)
    """

    def __init__(self, n_choices: int, rows: np.ndarray, n_images: int, responses: torch.Tensor) -> None:
        level = responses[rows].mean(0)
        self._rows, self._target = rows, responses[rows] - level
        self.predictions = level.repeat(n_choices, n_images, 1)

    def add(self, basis: Basis, penalties: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one prior's part, (n_choices, n_vertices) each; gives the vertices that have one, and their weights on
        the axes under the last choice, (rank, n_vertices).
        """
        some = torch.nonzero(weights.amax(0) > 0)[:, 0]
        rotated = basis.rotated(self._target[:, some])
        for choice, (penalty, weight) in enumerate(zip(penalties[:, some], weights[:, some], strict=True)):
            own = rotated / (basis.values[:, None] + penalty) * weight
            self.predictions[choice].index_add_(1, some, basis.predictions(own))
        return some, own


class _Saved:
    """Weights on the features as they are stored, added up over priors, and over folds where these share features."""

    def __init__(self, kernels: Sequence[LayerKernels], plan: FoldPlan, n_vertices: int, kept: bool) -> None:
        self._kernels, self._plan, self._n_vertices, self._kept = kernels, plan, n_vertices, kept
        self._pending: list[dict[Prior, torch.Tensor]] = [{} for _ in plan.prefixes]
        self._weights: list[dict[str, torch.Tensor]] = [{} for _ in plan.prefixes]

    def add(self, prior: Prior, k: int, basis: Basis, some: torch.Tensor, weights: torch.Tensor) -> None:
        """weights : (rank, len(some)) on the axes of fold k, of some vertices"""
        if not self._kept:
            return
        own = self._plan.source(k)
        pending = self._pending[own]
        if prior not in pending:
            n_images = len(self._kernels[0].rows)
            if 4 * n_images * self._n_vertices * len(pending) > _PENDING_BYTES:
                self._flush(own)
            pending = self._pending[own]
            pending[prior] = weights.new_zeros(n_images, self._n_vertices)
        index, dual = basis.dual(weights)
        rows = torch.as_tensor(index, device=some.device)[:, None]
        pending[prior][rows, some] += dual / (1 if self._plan.backbone_trained else len(self._plan))

    def _flush(self, own: int) -> None:
        pending, self._pending[own] = self._pending[own], {}
        if pending:
            kernels, weights = self._kernels[own], self._weights[own]
            for name, values in kernels.weights(list(pending), torch.stack(list(pending.values()))).items():
                weights[name] = weights[name] + values if name in weights else values

    def tensors(self, means: Sequence[torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
        """means : each fold's mean prediction over all training images, which is that of their mean features"""
        if not self._kept:
            return {}
        for own in range(len(self._weights)):
            self._flush(own)
        if not self._plan.backbone_trained:
            means = [torch.stack(list(means)).mean(0)]
        found = {}
        for k, (prefix, weights) in enumerate(zip(self._plan.prefixes, self._weights, strict=True)):
            kernels = self._kernels[k]
            found[prefix, "intercept"] = means[k] - sum(kernels.means[n].flatten() @ w for n, w in weights.items())
            found |= {(prefix, f"{name}.weights"): values for name, values in weights.items()}
        return found
