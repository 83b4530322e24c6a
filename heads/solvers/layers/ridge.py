"""Closed form on several layers: ridge regression under many priors at once.

Let K be the kernel of images under a prior, centred over the training images, and U e U' = K. Predictions of any image
under penalty p are linear in its scores K(x, .) U e^(-1/2), which are the features rotated to the axes that the
training images span. There the formulas of ridge.py apply unchanged, with eigenvalues e (axes.py, which also handles
more images than a kernel can be decomposed for).

Priors are compared on rough kernels first, and a few of them go on (search.py). Every vertex has a penalty under each
of these. Its prediction is the mean over priors with weights exp(-n / 8 * error / variance). The error is leave-one-out
or generalised on the n training images (see ridge.py), or that of held-out images if the backbone was trained on the
other images (see held_out.py). A single best prior is noisier; the mean was better on every recording tried
(docs/decisions/0013).

Axes serve any responses: they are computed once for a surface, fold by fold on a core each. Vertices are independent:
blocks of them are fitted likewise.

Penalties over groups of features: Dupré la Tour et al. 2022, https://doi.org/10.1016/j.neuroimage.2022.119728
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from featcache.machine.device_memory import on_cuda, refuse_beyond, said_on
from featcache.machine.memory import memory_at_start, spare_memory
from featcache.machine.progress import say
from featcache.machine.threads import side_by_side
from heads.config import RidgeConfig
from heads.features.rows import LayerRows
from heads.solvers.base import Block, Fits, FoldFit, Problem, joined, mean_and_std, piece_of
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers import sizes
from heads.solvers.layers.axes import LANDMARKS, Basis, method_for
from heads.solvers.layers.bases import FinalBasis, FoldBases, SurfaceBases
from heads.solvers.layers.kernels import BLUR, FLOOR, LayerKernels
from heads.solvers.layers.priors import CENTRES, DEPTH_WIDTH, DEPTHS, NARROW_IMAGES, WIDTHS, Prior, prior_set
from heads.solvers.layers.saved import SavedWeights
from heads.solvers.layers.search import SEARCH_LANDMARKS, SEARCH_VERTICES
from heads.solvers.memory import FEATURE_SHARE
from heads.solvers.ridge import held_out_errors, is_exact, least_loo_errors, penalties_of, penalty_errors

_METHOD_WORDS = {
    "images": "dual, by kernels of images",
    "features": "primal",
    "landmarks": "by kernels with landmark images",
}

_SHARPNESS = 1 / 8  # of the weights of priors, per training image
_NEGLIGIBLE = 0.01  # a prior with less than this share of the best prior's weight is left out
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
    "search": [
        sizes.SEARCH_IMAGES,
        SEARCH_LANDMARKS,
        SEARCH_VERTICES,
        *sizes.FINALISTS.values(),
        sizes.FINALISTS_TOGETHER,
    ],
}


class _Result(NamedTuple):
    """Some vertices under one prior, on one fold.

    prior, basis : and its axes; precise for vertices whose penalty rough axes do not allow
    vertices : (n,) numbers
    rotated : (rank, n) responses on the axes
    error : (n_choices, n) smallest error, a fraction of variance
    penalty : (n_choices, n) at which it is
    """

    prior: Prior
    basis: Basis
    vertices: torch.Tensor
    rotated: torch.Tensor
    error: torch.Tensor
    penalty: torch.Tensor


class _Head(NamedTuple):
    """Weights of some vertices under one prior, (n, len(vertices)) on the features of its basis."""

    prior: Prior
    basis: Basis
    vertices: torch.Tensor
    weights: torch.Tensor


def build_layered(problem: Problem) -> "LayeredRidge":
    """Build the closed form under priors over layers and places; says its method and its memory.

    Raises ConfigError beyond --max-memory.
    """
    config, features, plan, subject = problem.config, problem.features, problem.plan, problem.subject
    free = spare_memory(config.max_memory)
    rows = features.read(problem.device, free * FEATURE_SHARE / len(features.stores))
    kernels = scaled_kernels(rows, plan)
    priors = prior_set(rows[0].grids, DEPTHS if len(features.names) > 1 else (None,), plan.n_train)
    ridge = replace(config.ridge, penalties=PENALTIES)
    solver = LayeredRidge(kernels, plan, ridge, priors, {name: subject.responses(name) for name in subject.surfaces})
    peak = solver.memory(max(problem.n_vertices)) + (0 if on_cuda(problem.device) else memory_at_start())
    refuse_beyond(problem.device, config.max_memory, peak)
    streamed = list(dict.fromkeys(name for of_store in rows for name in of_store.streamed))
    say(
        f"{subject.name}: {rows[0].n_features:,} features, {len(plan.outside(0)):,} images to fit to: "
        f"{_METHOD_WORDS[solver.method]}, under {solver.said_priors}; "
        + said_on(problem.device, peak)
        + (f"; {', '.join(streamed)} read from the store block by block" if streamed else "")
    )
    return solver


def scaled_kernels(rows: Sequence[LayerRows], plan: FoldPlan) -> list[LayerKernels]:
    """Kernels for each set of scales of a plan. rows : of the one store, or of one store for each held-out fold"""
    sources = {plan.scales(k): plan.source(k) for k in range(len(plan))}
    whole = method_for(min(len(plan.outside(k)) for k in range(len(plan))), rows[0].n_features) != "landmarks"
    return [LayerKernels(rows[source], plan.scale_rows(number), whole) for number, source in sources.items()]


class LayeredRidge:
    """Kernel ridge heads on all folds but one, for each fold in turn.

    kernels : for each set of scales (see scaled_kernels)
    priors : to average over
    surfaces : (n_train, n_vertices) responses of each surface that will be fitted, where they are known beforehand:
        their axes are then computed together, if they are small
    """

    vertex_block: int | None = sizes.VERTEX_BLOCK

    def __init__(
        self,
        kernels: Sequence[LayerKernels],
        plan: FoldPlan,
        config: RidgeConfig,
        priors: Sequence[Prior],
        surfaces: Mapping[str, Any] | None = None,
    ) -> None:
        self._config, self._plan = config, plan
        self._rows = [plan.outside(k) for k in range(len(plan))]
        self._parts = [plan.parts(k) for k in range(len(plan))]
        self._device = kernels[0].rows.device
        self._axes = FoldBases(kernels, plan, priors, config.penalties, surfaces or {})
        self._kernels = list(kernels)
        self.method = self._axes.sizes.method

    @property
    def said_priors(self) -> str:
        """Number of priors, as a message says it."""
        counts = self._axes.sizes
        every = f"{counts.n_priors} prior{'s' if counts.n_priors > 1 else ''}"
        return f"the best {counts.n_finalists} of {every}" if counts.searched else every

    def memory(self, n_vertices: int) -> float:
        return self._axes.sizes.memory(n_vertices)

    def fit(self, block: Block) -> Fits:
        """Fit heads under the priors that explain the surface best."""
        bases = self._axes.of_surface(block)
        n_vertices = block.responses.shape[1]
        width = min(max(-(-n_vertices // torch.get_num_threads()), 1), sizes.AT_ONCE)
        some = [slice(start, start + width) for start in range(0, max(n_vertices, 1), width)]
        return joined(side_by_side(lambda v: self._fit(bases, block.responses[:, v]), some, self._device))

    def _fit(self, bases: SurfaceBases, responses: torch.Tensor) -> Fits:
        """Heads of some vertices, (n_train, n_vertices)."""
        targets = [responses[rows] - responses[rows].mean(0) for rows in self._rows]
        rotated = self._axes.rotated(bases, responses, targets)
        folds, levels, heads = [], [], []
        for k in range(len(self._rows)):
            # what only this fold needs is let go with it: it is most of the memory of a block
            predictions, of_fold = self._mix(k, bases, responses, targets.pop(0), rotated.pop(0))
            folds.append(self._fold_fit(k, predictions))
            levels.append(predictions[-1][self._kernels[self._plan.scales(k)].scale_rows].mean(0))
            heads.append(of_fold)
        # the scale of a fold's weights in the mean is known only now
        saved = SavedWeights(self._kernels, self._plan, folds)
        for k in range(len(folds)):
            for head in heads.pop(0):
                saved.add(head.prior, k, head.basis, head.vertices, head.weights)
        return Fits(folds, saved.tensors(levels))

    def _mix(
        self,
        k: int,
        bases: SurfaceBases,
        responses: torch.Tensor,
        target: torch.Tensor,
        rotated: Mapping[Prior, torch.Tensor],
    ) -> tuple[torch.Tensor, list[_Head]]:
        """Predictions of one fold, (n_choices, n_images, n_vertices), and the heads of the last choice."""
        results = []
        for prior, final in bases.of_fold[k].items():
            for result in self._results(k, prior, final, responses, target, rotated[prior]):
                result.error[bases.left_out(k, prior)] = torch.inf
                results.append(result)
        weights = _weights(results, len(target), target.shape[1])
        mean = responses[self._rows[k]].mean(0)
        predictions = mean.repeat(self._plan.n_choices(k), len(self._kernels[0].rows), 1)
        heads = []
        for result, weight in zip(results, weights, strict=True):
            for choice, (penalty, of_choice) in enumerate(zip(result.penalty, weight, strict=True)):
                used = torch.nonzero(of_choice > 0)[:, 0]
                on_axes = result.rotated[:, used] / (result.basis.values[:, None] + penalty[used]) * of_choice[used]
                on_features = result.basis.on_features(on_axes)
                predictions[choice].index_add_(1, result.vertices[used], result.basis.predictions(on_features))
            heads.append(_Head(result.prior, result.basis, result.vertices[used], on_features))
        return predictions, heads

    def _results(
        self,
        k: int,
        prior: Prior,
        final: FinalBasis,
        responses: torch.Tensor,
        target: torch.Tensor,
        rotated: torch.Tensor,
    ) -> list[_Result]:
        """Errors and penalties under one prior; vertices whose penalty is too small for rough axes get precise ones."""
        everyone = torch.arange(target.shape[1], device=target.device)
        result = self._result(k, prior, final.basis, everyone, responses, target, rotated)
        if not final.basis.resolved:
            return [result]
        too_small = result.penalty < final.basis.resolved  # of each choice for itself
        finer = torch.nonzero(too_small.any(0))[:, 0]
        if not len(finer):
            return [result]
        basis = final.precise()
        some = target[:, finer]
        again = self._result(k, prior, basis, finer, responses[:, finer], some, basis.rotated(some))
        again.error.masked_fill_(~too_small[:, finer], torch.inf)
        result.error.masked_fill_(too_small, torch.inf)  # in their place is `again`
        return [result, again]

    def _result(
        self,
        k: int,
        prior: Prior,
        basis: Basis,
        vertices: torch.Tensor,
        responses: torch.Tensor,
        target: torch.Tensor,
        rotated: torch.Tensor,
    ) -> _Result:
        """Smallest error over penalties for each choice of the k-th fold."""
        rows = self._rows[k]
        penalties = penalties_of(basis.values, self._config.penalties)
        squares = target.square().sum(0)
        if self._plan.backbone_trained:
            mean = responses[rows].mean(0)
            parts = [(basis.scores(part), responses[part] - mean) for part in self._parts[k]]
            least, which = held_out_errors(basis.values, rotated, penalties, parts).min(1)
        elif is_exact(self._config, len(rows)):
            one = least_loo_errors(basis.values, rotated, penalties, basis.scores(rows), target)
            least, which = (values[None] for values in one)
        else:
            errors = penalty_errors(basis.values, len(rows), rotated, squares, penalties, None)[None]
            least, which = errors.min(1)
        variance = torch.where(squares > 0, squares / len(rows), torch.ones_like(squares))
        error = (least.to(variance.dtype).clamp_max(_WORST) / variance).clamp_max(_WORST)
        return _Result(prior, basis, vertices, rotated, error, penalties[which])

    def _fold_fit(self, k: int, predictions: torch.Tensor) -> FoldFit:
        pieces = [piece_of(predictions[choice], part, self._rows[k]) for choice, part in enumerate(self._parts[k])]
        last = predictions[-1]
        return FoldFit(pieces, last[self._plan.n_train :].clone(), *mean_and_std(last[self._rows[k]]))


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
    images, dual = basis.dual(rotated / (basis.values[:, None] + offered[errors.argmin(0)]))
    return kernels.weights([Prior()], images, dual[None])


def _weights(results: Sequence[_Result], n_images: int, n_vertices: int) -> list[torch.Tensor]:
    """(n_choices, n) weights of each result's vertices; over all results, a vertex's weights sum to 1."""
    shape = len(results), len(results[0].error), n_vertices
    errors = results[0].error.new_full(shape, torch.inf)
    for number, result in enumerate(results):
        errors[number][:, result.vertices] = result.error
    weights = torch.softmax((errors.amin(0) - errors) * (n_images * _SHARPNESS), 0)
    weights = torch.where(weights >= _NEGLIGIBLE * weights.amax(0), weights, 0)
    weights = weights / weights.sum(0)
    return [weights[number][:, result.vertices] for number, result in enumerate(results)]
