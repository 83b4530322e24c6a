"""Closed form for more features than images: ridge regression in the dual, under many priors at once.

With K the kernel of images under a prior, centred over the training images, and U e U' = K, predictions of any image
under penalty p are linear in its scores K(x, .) U e^(-1/2), which are the features rotated to the axes that the
training images span. There the formulas of heads.ridge hold as they are, with eigenvalues e.

Every vertex has a penalty under every prior. Its prediction is the mean over priors, weighed by how well each did:
exp(-n / 8 * error / variance), where the error is leave-one-out or generalised on the n training images (see
heads.ridge), or on held-out images where the backbone was trained on the others (see heads.folds). A single best prior
is noisier; the mean was better on every recording tried (docs/layers.md).

Penalties over groups of features: Dupré la Tour et al. 2022, https://doi.org/10.1016/j.neuroimage.2022.119728
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from heads.config import RidgeConfig
from heads.folds import choices_of, held_out_errors
from heads.kernels import BLUR, LayerKernels
from heads.predictions import Fits, FoldFit, Piece, level_and_spread
from heads.priors import CENTRES, DEPTH_WIDTH, DEPTHS, WIDTHS, Prior
from heads.ridge import TOGETHER, eigh_of, is_exact, penalties_of, penalty_errors

_SHARPNESS = 1 / 8  # of the mean over priors, per training image
_NEGLIGIBLE = 0.01  # a prior with less than this part of the best one's weight is left out
_SEARCH_IMAGES = 1024  # with twice as many or more, the priors to try on all of them are found on so many
_FINALISTS = 8  # priors that are tried on all images then
_VERTEX_BLOCK = 4096
_WORST = 1e30  # error of a penalty that cannot be judged, so that differences of errors are numbers
_PENDING_BYTES = 256 << 20  # of dual weights that wait to be multiplied with features
_WEIGHTS_BYTES = 2e9  # of a hemisphere's weights that are saved; larger ones are left out

# One a decade: the mean over priors fills in what lies between, and each costs a product as large as a prediction.
PENALTIES = tuple(10.0**k for k in range(-4, 5))

# what decides the heads besides features and responses; part of every prediction store's recipe
METHOD = {
    "blur": BLUR,
    "centres": list(CENTRES),
    "widths": list(WIDTHS),
    "depths": list(DEPTHS),
    "depth_width": DEPTH_WIDTH,
    "sharpness": _SHARPNESS,
    "penalties": list(PENALTIES),
    "search": [_SEARCH_IMAGES, _FINALISTS],
}


class _Basis(NamedTuple):
    """values : (rank,) of the centred kernel; scores : (n_images, rank) of all images, trained on or not"""

    values: torch.Tensor
    scores: torch.Tensor


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
        self._sample = None
        if self._n_train > 2 * _SEARCH_IMAGES and len(priors) > _FINALISTS:
            self._sample = np.sort(np.random.default_rng(0).permutation(self._n_train)[:_SEARCH_IMAGES])
        n_priors = _FINALISTS if self._sample is not None else len(priors)
        self._whole = 4.0 * n_priors * self._n_images * sum(map(len, self._rows))
        self._cache: dict[tuple[Prior, int], _Basis] | None = {} if self._whole <= cache_bytes else None
        # without the cache every block of vertices would cost all decompositions anew
        self.vertex_block = _VERTEX_BLOCK if self._cache is not None and self._sample is None else None

    def peak_bytes(self, n_vertices: int) -> float:
        """About what fitting a hemisphere takes, besides the features that are kept: decompositions, predictions of
        every choice, and what goes with the responses.
        """
        block = min(n_vertices, self.vertex_block or n_vertices)
        n_choices = max(len(choices) + self._trained for choices in self._choices)
        per_fold = 4.0 * self._n_images * block * n_choices
        stacks = sum(kernels.stack_bytes for kernels in self._kernels)
        decomposition = 28.0 * self._n_images**2  # a kernel, its centred copy, and both in float64
        kept = self._whole if self._cache is not None else 0.0
        duals = min(4.0 * len(self._all) * self._n_images * block, _PENDING_BYTES)
        errors = 16.0 * max(TOGETHER, self._n_train * block)
        return (
            stacks + decomposition + kept + per_fold * len(self._rows) + 12.0 * self._n_train * block + duals + errors
        )

    def fit(self, responses: torch.Tensor, **_: Any) -> Fits:
        """For (n_train, n_vertices) float32 responses."""
        if self._sample is not None:
            self._priors = [self._finalists(k, responses) for k in range(len(self._rows))]
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
            saved.add(prior, k, self._rows[k], mixes[k].add(basis, tried[k][prior].penalty, weights[k][prior]))
        fits = [self._fit(k, mix) for k, mix in enumerate(mixes)]
        return Fits(fits, saved.tensors([mix.predictions[-1][: self._n_train].mean(0) for mix in mixes]))

    def _bases(self, wanted: Callable[[Prior, int], bool]) -> Iterator[tuple[Prior, int, _Basis]]:
        """Decompositions, prior by prior; a kernel is computed when a decomposition of it is missing, once for all."""
        for prior in dict.fromkeys(prior for priors in self._priors for prior in priors):
            products: dict[int, torch.Tensor] = {}
            for k in range(len(self._rows)):
                if wanted(prior, k):
                    yield prior, k, self._basis(prior, k, products)

    def _basis(self, prior: Prior, k: int, products: dict[int, torch.Tensor]) -> _Basis:
        if self._cache is not None and (prior, k) in self._cache:
            return self._cache[prior, k]
        source = k if len(self._kernels) > 1 else 0
        kernels, rows = self._kernels[source], self._rows[k]
        wide = is_dual(kernels, len(rows))
        if source not in products:
            products[source] = kernels.kernel(prior) if wide else kernels.features(prior)
        basis = (_decompose if wide else _decompose_features)(products[source], rows)
        if self._cache is not None:
            self._cache[prior, k] = basis
        return basis

    def _try(self, basis: _Basis, k: int, responses: torch.Tensor) -> _Tried:
        rows, choices = self._rows[k], self._choices[k]
        target = responses[rows] - responses[rows].mean(0)
        penalties = penalties_of(basis.values, self._config.penalties)
        rotated = basis.scores[rows].T @ target
        variance = target.square().mean(0)
        variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        if self._trained:
            parts = [(basis.scores[part], responses[part] - responses[rows].mean(0)) for part in choices]
            errors = held_out_errors(basis.values, rotated, penalties, parts)
        else:
            own = (basis.scores[rows], target) if is_exact(self._config, len(rows)) else None
            errors = penalty_errors(basis.values, len(rows), rotated, target.square().sum(0), penalties, own)[None]
        least, which = errors.min(1)
        return _Tried((least.to(variance.dtype).clamp_max(_WORST) / variance).clamp_max(_WORST), penalties[which])

    def _fit(self, k: int, mix: "_Mix") -> FoldFit:
        held_out, pieces = self._choices[k], []
        for choice, rows in enumerate(held_out):
            mean, spread = level_and_spread(mix.predictions[choice][self._rows[k]])
            pieces.append(Piece(rows, mix.predictions[choice][rows], mean, spread))
        return FoldFit(pieces, mix.predictions[-1][self._n_train :])

    def _finalists(self, k: int, responses: torch.Tensor) -> list[Prior]:
        """The priors that serve a fold's vertices best between them, from a part of its training images.

        One after the other, each the one that adds most to the variance that the best of those chosen explain.
        """
        assert self._sample is not None
        rows = np.intersect1d(self._sample, self._rows[k])
        kernels = self._kernels[k if len(self._kernels) > 1 else 0].of_some(rows)
        y = responses[rows] - responses[rows].mean(0)
        squares, everything = y.square().sum(0), self._all
        explained = []
        for prior in everything:
            basis = _decompose(kernels.kernel(prior), np.arange(len(rows)))
            penalties = penalties_of(basis.values, self._config.penalties)
            errors = penalty_errors(basis.values, len(rows), basis.scores.T @ y, squares, penalties, None)
            explained.append((1 - errors.min(0).values * len(rows) / squares.clamp_min(1e-12)).clamp_min(0))
        chosen: list[int] = []
        best = torch.zeros_like(explained[0])
        while len(chosen) < min(_FINALISTS, len(everything)):
            gains = torch.stack([(one - best).clamp_min(0).sum() for one in explained])
            gains[chosen] = -1
            chosen.append(int(gains.argmax()))
            best = torch.maximum(best, explained[chosen[-1]])
        return [everything[c] for c in chosen]


def is_dual(kernels: LayerKernels, n_images: int) -> bool:
    """Whether features outnumber the images that heads are trained on, so that their kernel is the smaller matrix."""
    return kernels.rows.n_features >= n_images


def _decompose_features(features: torch.Tensor, rows: np.ndarray) -> _Basis:
    """The same from features (n_images, n_features), where these are fewer than the images."""
    centred = features - features[rows].mean(0)
    values, vectors = eigh_of(centred[rows].T @ centred[rows])
    return _Basis(values, centred @ vectors)


def flat_weights(
    kernels: LayerKernels, kernel: torch.Tensor, rows: np.ndarray, responses: torch.Tensor, penalties: Sequence[float]
) -> dict[str, torch.Tensor]:
    """{array: (n_places * n_channels, n_vertices)} weights on the features as they are stored, under the flat prior.

    kernel : of the flat prior, (n_images, n_images)
    rows, responses : images to fit to, and (n_train, n_vertices) responses of all
    penalties : to choose from by generalised or exact leave-one-out error; a single one is taken
    """
    basis = _decompose(kernel, rows)
    target = responses[rows] - responses[rows].mean(0)
    rotated = basis.scores[rows].T @ target
    offered = penalties_of(basis.values, penalties)
    own = (basis.scores[rows], target) if is_exact(RidgeConfig(), len(rows)) else None
    errors = penalty_errors(basis.values, len(rows), rotated, target.square().sum(0), offered, own)
    chosen = rotated / (basis.values[:, None] + offered[errors.argmin(0)])
    dual = responses.new_zeros(len(kernel), responses.shape[1])
    dual[rows] = (basis.scores[rows] / basis.values) @ chosen
    return kernels.weights([Prior()], dual[None])


def _decompose(kernel: torch.Tensor, rows: np.ndarray) -> _Basis:
    """Of a kernel (n_images, n_images), centred over the training images, `rows`."""
    index = torch.from_numpy(rows).to(kernel.device)
    across = kernel[:, index]
    means = across[index].mean(0)
    centred = across - across.mean(1, keepdim=True) - means + means.mean()
    values, vectors = eigh_of(centred[index])
    return _Basis(values, centred @ (vectors / values.sqrt()))


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

    def add(self, basis: _Basis, penalties: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Add one prior's part, (n_choices, n_vertices) each; gives its dual weights under the last choice,
        (n_train, n_vertices).
        """
        rotated = basis.scores[self._rows].T @ self._target
        for choice, (penalty, weight) in enumerate(zip(penalties, weights, strict=True)):
            own = rotated / (basis.values[:, None] + penalty) * weight
            self.predictions[choice] += basis.scores @ own
        return (basis.scores[self._rows] / basis.values) @ own


class _Saved:
    """Weights on the features as they are stored, added up over priors, and over folds where these share features."""

    def __init__(self, kernels: Sequence[LayerKernels], n_folds: int, names: Sequence[str], n_vertices: int) -> None:
        self._kernels, self._n_folds, self._names = kernels, n_folds, names
        self._shared = len(names) == 1 and n_folds > 1
        self._pending: list[dict[Prior, torch.Tensor]] = [{} for _ in names]
        self._weights: list[dict[str, torch.Tensor]] = [{} for _ in names]
        self._kept = 4.0 * kernels[0].rows.n_features * n_vertices * len(names) <= _WEIGHTS_BYTES

    def add(self, prior: Prior, k: int, rows: np.ndarray, dual: torch.Tensor) -> None:
        """dual : (len(rows), n_vertices), of images that fold k was trained on"""
        if not self._kept:
            return
        own = 0 if self._shared else k
        pending = self._pending[own]
        if prior not in pending:
            if 4 * dual.numel() * len(pending) > _PENDING_BYTES:
                self._flush(own)
            pending = self._pending[own]
            pending[prior] = dual.new_zeros(len(self._kernels[0].rows), dual.shape[1])
        pending[prior][rows] += dual / (self._n_folds if self._shared else 1)

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
