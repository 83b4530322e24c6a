"""Weights under priors on the features as stored, to be saved."""

from collections.abc import Sequence

import numpy as np
import torch

from heads.solvers.base import FoldFit, ratios
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.axes import Basis
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior


class SavedWeights:
    """Weights summed over priors; if folds share features, their mean over folds, which predicts what mean_of_tests is.

    kernels : for each set of scales
    folds : what each fold predicts
    """

    def __init__(self, kernels: Sequence[LayerKernels], plan: FoldPlan, folds: Sequence[FoldFit]) -> None:
        self._kernels, self._plan, self._folds = kernels, plan, folds
        self._n_vertices = folds[0].test.shape[1]
        self._share = 1.0 if plan.backbone_trained else 1 / len(plan)  # of a fold in the heads that are saved
        stds = [fold.test_std for fold in folds]
        self._factors = [torch.ones_like(s) for s in stds] if plan.backbone_trained else ratios(stds)
        self._pending: list[dict[Prior, _Pending]] = [{} for _ in kernels]

    def add(self, prior: Prior, k: int, basis: Basis, vertices: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the weights of one prior. weights : (n, len(vertices)) on the features of the basis of fold k"""
        pending = self._pending[self._plan.scales(k)]
        rows, on_rows = basis.spanned(weights)
        if prior not in pending:
            n_rows = len(self._kernels[0].rows) if basis.axes is None else len(on_rows)
            pending[prior] = _Pending(basis, weights.new_zeros(n_rows, self._n_vertices))
        factors = self._factors[k][vertices] * self._share
        if rows is None:
            pending[prior].weights.index_add_(1, vertices, on_rows * factors)
        else:
            index = torch.as_tensor(rows, device=vertices.device)[:, None]
            pending[prior].weights[index, vertices] += on_rows * factors

    def tensors(self, levels: Sequence[torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
        """Weights and intercepts, {(prefix, part): tensor}.

        levels : (n_vertices,) mean prediction by each fold's last choice, of the images that its scales are of
        """
        heads: dict[tuple[str, str], torch.Tensor] = {}
        for scales, kernels in enumerate(self._kernels):
            prefix = self._prefix(scales)
            for name, values in self._weights(scales).items():
                _add(heads, (prefix, f"{name}.weights"), values)
                # the mean prediction is the prediction of the mean features
                _add(heads, (prefix, "intercept"), -(kernels.means[name].flatten() @ values))
        for k, (level, fold) in enumerate(zip(levels, self._folds, strict=True)):
            shift = fold.test_mean + (level - fold.test_mean) * self._factors[k]
            _add(heads, (self._prefix(self._plan.scales(k)), "intercept"), shift * self._share)
        return heads

    def _prefix(self, scales: int) -> str:
        prefixes = self._plan.prefixes
        return prefixes[scales if len(prefixes) > 1 else 0]

    def _weights(self, scales: int) -> dict[str, torch.Tensor]:
        """{array: (n_places * n_channels, n_vertices)} sum over the priors of a set of scales."""
        kernels, pending = self._kernels[scales], self._pending[scales]
        first = next(iter(pending.values())).basis
        if first.axes is not None and first.span is None:
            total: dict[str, torch.Tensor] = {}
            for prior, of_prior in pending.items():
                for name, values in kernels.weights_of_features(prior, of_prior.weights).items():
                    total[name] = total[name] + values if name in total else values
            return total
        images = np.arange(len(kernels.rows)) if first.span is None else first.span[0]
        duals = [p.weights if p.basis.span is None else p.basis.span[1] @ p.weights for p in pending.values()]
        return kernels.weights(list(pending), images, torch.stack(duals))


class _Pending:
    """Weights of one prior, summed over the folds that share its features.

    basis : of any of these folds
    weights : (n, n_vertices) on its features, or dual weights of all images
    """

    def __init__(self, basis: Basis, weights: torch.Tensor) -> None:
        self.basis, self.weights = basis, weights


def _add(heads: dict[tuple[str, str], torch.Tensor], name: tuple[str, str], values: torch.Tensor) -> None:
    heads[name] = heads[name] + values if name in heads else values
