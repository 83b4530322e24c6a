"""Closed form on several layers: ridge regression under many priors at once.

With K the kernel of images under a prior, centred over the training images, and U e U' = K, predictions of any image
under penalty p are linear in its scores K(x, .) U e^(-1/2), which are the features rotated to the axes that the
training images span. There the formulas of ridge.py hold as they are, with eigenvalues e (see axes.py, also for
more images than a kernel can be decomposed for).

Every vertex has a penalty under every prior. Its prediction is the mean over priors, weighed by how well each did:
exp(-n / 8 * error / variance), where the error is leave-one-out or generalised on the n training images (see
heads.ridge), or on held-out images where the backbone was trained on the others (see held_out.py). A single best prior
is noisier; the mean was better on every recording tried (docs/layers.md).

Penalties over groups of features: Dupré la Tour et al. 2022, https://doi.org/10.1016/j.neuroimage.2022.119728
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.machine.device import matrix_products
from heads.config import RidgeConfig
from heads.features.rows import BLOCK_BYTES
from heads.solvers.base import Fits, FoldFit, Piece, level_and_spread
from heads.solvers.held_out import choices_of, held_out_errors
from heads.solvers.layers.axes import LANDMARKS, Basis, Seen, basis_of_features, landmark_features, seen_under, way_of
from heads.solvers.layers.kernels import BLUR, LayerKernels
from heads.solvers.layers.priors import CENTRES, DEPTH_WIDTH, DEPTHS, NARROW_IMAGES, WIDTHS, Prior
from heads.solvers.ridge import TOGETHER, is_exact, penalties_of, penalty_errors

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


class DualFolds:
    """Kernel ridge heads on all folds but one, for each fold in turn.

    kernels : of the one store, or of one store for each held-out fold
    priors : what to choose from
    trained : whether the backbones saw the images outside each held-out fold
    cache_bytes : memory for decompositions, which serve any responses
    """

    def __init__(
        self,
        kernels: Sequence[LayerKernels],
        folds: np.ndarray,
        held_out: Sequence[int],
        image_ids: np.ndarray,
        config: RidgeConfig,
        priors: Sequence[Prior],
        trained: bool,
        cache_bytes: float,
    ) -> None:
        self._kernels, self._config, self._trained = list(kernels), config, trained
        self._rows = [np.flatnonzero(folds != k) for k in held_out]
        self._choices = [choices_of(image_ids, folds, k, trained) for k in held_out]
        self._names = [f"fold{k}." for k in held_out] if len(kernels) > 1 or trained else [""]
        self._n_train, self._n_images = len(folds), len(kernels[0].rows)
        self._all = list(priors)
        self._priors = [self._all for _ in held_out]
        shuffled = np.random.default_rng(0).permutation(self._n_train)
        searched = self._n_train > _SEARCH_IMAGES and len(priors) > _FINALISTS
        self._sample = np.sort(shuffled[:_SEARCH_IMAGES]) if searched else None
        self._searched_for: Any = None
        self._sampled: LayerKernels | None = None
        self.way = way_of(kernels[0], min(map(len, self._rows)))
        self._whole = (_FINALISTS if searched else len(priors)) * self._basis_bytes()
        self._cache: dict[tuple[Prior, int], Basis] | None = {} if self._whole <= cache_bytes else None
        # without the cache every block of vertices would cost all decompositions anew
        self.vertex_block = None if self._cache is None else _VERTEX_BLOCK

    @property
    def forgets(self) -> bool:
        """Whether decompositions do not fit into their memory, and every use of one computes it."""
        return self._cache is None

    def _basis_bytes(self) -> float:
        """Of one prior's bases on all folds."""
        if self.way == "images":
            return 4.0 * self._n_images * sum(map(len, self._rows))
        n = min(LANDMARKS, self._kernels[0].rows.n_features)
        return 4.0 * n * (self._n_images * len(self._kernels) + n * len(self._rows))

    def peak_bytes(self, n_vertices: int) -> float:
        """About what fitting a hemisphere takes, besides the features that are kept: decompositions, predictions of
        every choice, and what goes with the responses.
        """
        block = min(n_vertices, self.vertex_block or n_vertices)
        n_choices = max(len(choices) + self._trained for choices in self._choices)
        per_fold = 4.0 * self._n_images * block * n_choices
        stacks = sum(kernels.stack_bytes for kernels in self._kernels)
        if self._sample is not None:
            stacks += self._kernels[0].stack_bytes_of(len(self._sample))
        # a kernel, its centred copy, and both in float64
        decomposition = 28.0 * self._n_images * (self._n_images if self.way == "images" else LANDMARKS)
        kept = self._whole if self._cache is not None else 0.0
        duals = 2 * min(4.0 * len(self._all) * self._n_images * block, _PENDING_BYTES)
        errors = 16.0 * max(TOGETHER, self._n_train * block)
        rows = self._kernels[0].rows
        blocks = 6.0 * min(4 * len(rows) * rows.n_features, BLOCK_BYTES)  # read, centred, scaled, blurred, weighed
        weights = 4 * self.saved_bytes(n_vertices)  # of both hemispheres, and while they are written
        responded = per_fold * len(self._rows) + 12.0 * self._n_train * block
        return stacks + decomposition + kept + responded + duals + errors + blocks + weights

    def saved_bytes(self, n_vertices: int) -> float:
        """Of a hemisphere's weights; 0 for those that are too many to save."""
        weights = 4.0 * self._kernels[0].rows.n_features * n_vertices * len(self._names)
        return weights if weights <= _WEIGHTS_BYTES else 0.0

    def effort(self, n_vertices: int) -> tuple[float, dict[int, int]]:
        """About the floating-point operations of fitting so many vertices, and {side: number} of matrices that are
        decomposed. As if the mean took every prior that is tried.
        """
        n, n_fit, n_folds = self._n_images, len(self._rows[0]), len(self._rows)
        rows, kernel = self._kernels[0].rows, self._kernels[0]
        searched, landmarks = self._sample is not None, self.way == "landmarks"
        rank = min(n_fit, rows.n_features, LANDMARKS if landmarks else n_fit)
        tried = _FINALISTS if searched else len(self._all)
        found = min(tried * n_folds, len(self._all)) if searched else tried  # by one fold or another
        windows = 1 if kernel.stack_bytes else len({(one.x, one.y, one.width) for one in self._all})
        seen = n * (LANDMARKS * found if landmarks else n * min(windows, found)) * rows.n_features * len(self._kernels)
        errors = len(self._config.penalties) * (n_fit if is_exact(self._config, n_fit) and not self._trained else 1)
        of_prior = rank * (n * rank + n_vertices * (n_fit + errors + 2 * n))
        places = sum(map(rows.n_places, rows.grids))
        weights = n * n_vertices * (rows.n_features + tried * places)
        flops = seen + n_folds * (tried * of_prior + weights)
        decomposed = {rank: tried * n_folds * (4 if self.forgets else 1)}  # or twice for each hemisphere
        if searched:
            few = min(_SEARCH_LANDMARKS, rows.n_features)
            flops += _SEARCH_IMAGES**2 * rows.n_features * (1 if kernel.stack_bytes_of(_SEARCH_IMAGES) else windows)
            decomposed[few] = decomposed.get(few, 0) + 2 * len(self._all) * (n_folds + len(self._kernels))
        return 2.0 * flops, decomposed

    def fit(self, responses: torch.Tensor, whole: Any = None, **_: Any) -> Fits:
        """For (n_train, n_vertices) float32 responses.

        whole : the hemisphere's, where these are a block of its vertices; priors are sought for all of them
        """
        if self._sample is not None and (whole is None or self._searched_for is not whole):
            self._searched_for = whole
            with matrix_products("float32"):
                self._priors = self._finalists(responses if whole is None else whole)
            if self._cache is not None:  # what an earlier search found must not add up
                self._cache = {key: one for key, one in self._cache.items() if key[0] in self._priors[key[1]]}
        tried: list[dict[Prior, _Tried]] = [{} for _ in self._rows]
        for prior, k, basis in self._bases(lambda prior, k: prior in self._priors[k]):
            tried[k][prior] = self._try(basis, k, responses)
        weights = [_weights(one, len(rows)) for one, rows in zip(tried, self._rows, strict=True)]
        n_choices = [len(choices) + self._trained for choices in self._choices]
        mixes = [_Mix(n, rows, self._n_images, responses) for n, rows in zip(n_choices, self._rows, strict=True)]
        saved = _Saved(self._kernels, len(self._rows), self._names, responses.shape[1])
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
        source = k if len(self._kernels) > 1 else 0
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
        if self._trained:
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
        shared = len(self._kernels) == 1
        for source, whole in enumerate(self._kernels):
            kernels = self._sampled or whole.of_some(self._sample)
            if shared:  # for the other hemisphere
                self._sampled = kernels
            for number, prior in enumerate(self._all):
                seen = landmark_features(kernels.kernel(prior)[:, :_SEARCH_LANDMARKS], slice(_SEARCH_LANDMARKS))[0]
                for k in range(len(self._rows)) if shared else [source]:
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

    def __init__(self, kernels: Sequence[LayerKernels], n_folds: int, names: Sequence[str], n_vertices: int) -> None:
        self._kernels, self._n_folds, self._names, self._n_vertices = kernels, n_folds, names, n_vertices
        self._shared = len(names) == 1 and n_folds > 1
        self._pending: list[dict[Prior, torch.Tensor]] = [{} for _ in names]
        self._weights: list[dict[str, torch.Tensor]] = [{} for _ in names]
        self._kept = 4.0 * kernels[0].rows.n_features * n_vertices * len(names) <= _WEIGHTS_BYTES

    def add(self, prior: Prior, k: int, basis: Basis, some: torch.Tensor, weights: torch.Tensor) -> None:
        """weights : (rank, len(some)) on the axes of fold k, of some vertices"""
        if not self._kept:
            return
        own = 0 if self._shared else k
        pending = self._pending[own]
        if prior not in pending:
            n_images = len(self._kernels[0].rows)
            if 4 * n_images * self._n_vertices * len(pending) > _PENDING_BYTES:
                self._flush(own)
            pending = self._pending[own]
            pending[prior] = weights.new_zeros(n_images, self._n_vertices)
        index, dual = basis.dual(weights)
        rows = torch.as_tensor(index, device=some.device)[:, None]
        pending[prior][rows, some] += dual / (self._n_folds if self._shared else 1)

    def _flush(self, own: int) -> None:
        pending, self._pending[own] = self._pending[own], {}
        if pending:
            kernels, weights = self._kernels[own if len(self._kernels) > 1 else 0], self._weights[own]
            for name, values in kernels.weights(list(pending), torch.stack(list(pending.values()))).items():
                weights[name] = weights[name] + values if name in weights else values

    def tensors(self, means: Sequence[torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
        """means : each fold's mean prediction over all training images, which is that of their mean features"""
        if not self._kept:
            return {}
        for own in range(len(self._names)):
            self._flush(own)
        if self._shared:
            means = [torch.stack(list(means)).mean(0)]
        found = {}
        for k, (prefix, weights) in enumerate(zip(self._names, self._weights, strict=True)):
            kernels = self._kernels[k if len(self._kernels) > 1 else 0]
            found[prefix, "intercept"] = means[k] - sum(kernels.means[n].flatten() @ w for n, w in weights.items())
            found |= {(prefix, f"{name}.weights"): values for name, values in weights.items()}
        return found
