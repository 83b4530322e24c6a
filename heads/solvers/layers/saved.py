"""Weights under priors on the features as stored, to be saved."""

from collections.abc import Sequence
from pathlib import Path

import torch

from featcache.machine.tensors import large_zeros
from heads.solvers.base import FoldFit, ratios
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers import sizes
from heads.solvers.layers.axes import Basis
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior


class SavedWeights:
    """Weights summed over priors; if folds share features, their mean over folds, which predicts what mean_of_tests is.

    kernels : for each set of scales
    folds : what each fold predicts
    spool : folder for weights that are larger than the memory; None: all are in memory
    """

    def __init__(
        self,
        kernels: Sequence[LayerKernels],
        plan: FoldPlan,
        folds: Sequence[FoldFit],
        spool: Path | None = None,
    ) -> None:
        self._kernels, self._plan, self._folds, self._spool = kernels, plan, folds, spool
        self._n_vertices = folds[0].test.shape[1]
        self._share = 1.0 if plan.backbone_trained else 1 / len(plan)  # of a fold in the heads that are saved
        stds = [fold.test_std for fold in folds]
        self._factors = [torch.ones_like(s) for s in stds] if plan.backbone_trained else ratios(stds)
        self._pending: list[dict[Prior, torch.Tensor]] = [{} for _ in kernels]
        self._heads: dict[tuple[str, str], torch.Tensor] = {}

    def add(self, prior: Prior, k: int, basis: Basis, vertices: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the weights of one prior. weights : (rank, len(vertices)) on the axes of fold k"""
        scales = self._plan.scales(k)
        pending = self._pending[scales]
        if prior not in pending:
            n_images = len(self._kernels[0].rows)
            if 4 * n_images * self._n_vertices * len(pending) > sizes.PENDING_BYTES:
                self._flush(scales)
            pending = self._pending[scales]
            pending[prior] = weights.new_zeros(n_images, self._n_vertices)
        index, dual = basis.dual(weights)
        rows = torch.as_tensor(index, device=vertices.device)[:, None]
        pending[prior][rows, vertices] += dual * self._factors[k][vertices] * self._share

    def _flush(self, scales: int) -> None:
        """Multiply the pending dual weights with features and add the products to the heads."""
        pending, self._pending[scales] = self._pending[scales], {}
        if not pending:
            return
        kernels, duals = self._kernels[scales], torch.stack(list(pending.values()))
        for start in range(0, self._n_vertices, sizes.VERTEX_BLOCK):
            vertices = slice(start, start + sizes.VERTEX_BLOCK)
            for name, values in kernels.weights(list(pending), duals[:, :, vertices]).items():
                self._add(scales, f"{name}.weights", values, vertices)
                # the mean prediction is the prediction of the mean features
                self._add(scales, "intercept", -(kernels.means[name].flatten() @ values), vertices)

    def _add(self, scales: int, part: str, values: torch.Tensor, vertices: slice = slice(None)) -> None:
        prefixes = self._plan.prefixes
        name = prefixes[scales if len(prefixes) > 1 else 0], part
        if name not in self._heads:
            self._heads[name] = large_zeros(self._spool, *values.shape[:-1], self._n_vertices)
        self._heads[name][..., vertices] += values.cpu()

    def tensors(self, predictions: Sequence[torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
        """Weights and intercepts, {(prefix, part): tensor}. predictions : of all images by each fold's last choice"""
        for scales in range(len(self._kernels)):
            self._flush(scales)
        for k, (values, fold) in enumerate(zip(predictions, self._folds, strict=True)):
            scales = self._plan.scales(k)
            level = values[self._kernels[scales].scale_rows].mean(0)
            shift = fold.test_mean + (level - fold.test_mean) * self._factors[k]
            self._add(scales, "intercept", shift * self._share)
        return self._heads
