"""Kernels of several layers: inner products of images, place by place, straight from a feature store.

Features are centred, each channel is scaled to unit variance over images and places (to less, if it hardly varies), and
maps are blurred a little over places, which makes weights of neighbouring places alike. Scales come from some of the
images that every fold which uses them trains on (FoldPlan.scale_rows). A prior (see priors.py) weighs the places. Every
layer has the same share of the kernel's trace, times the prior's share for its depth. A kernel is the sum of kernels of
places, so it takes one pass over the store, in blocks of images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from heads.features.rows import LayerRows
from heads.solvers.layers.priors import Prior, depths_of

_MAX_DUAL_NUMBERS = 1 << 25  # in the dual weights of the places that are multiplied at once
_CONSTANT = 1e-12  # variance of a channel that counts as constant, as a share of its squared mean: rounding of float32
FLOOR = 0.1  # least variance of a channel before it is scaled, as a share of the mean over its array's channels
BLUR = 0.75  # standard deviation over places, in cells of a 7 x 7 grid (docs/decisions/0013)


class _Statistics(NamedTuple):
    """Statistics of the features of some images, {array: tensor}."""

    means: dict[str, torch.Tensor]  # (n_places, n_channels)
    stds: dict[str, torch.Tensor]  # (n_channels,)
    traces: dict[str, torch.Tensor]  # (n_places,)


class LayerKernels:
    """Kernels of one store's images under any prior.

    scale_rows : numbers of the images that means, scales and traces are of
    stack_bytes : memory that kernels of single places may take; if they fit, each is computed once
    """

    def __init__(
        self, rows: LayerRows, scale_rows: np.ndarray, stack_bytes: float, statistics: "_Statistics | None" = None
    ) -> None:
        self.rows, self.scale_rows = rows, scale_rows
        self._prepared: dict[str, torch.Tensor] = {}  # kept only with the stack, for few images
        self._depths = depths_of(list(rows.grids))
        self._blurs = {name: _blur_matrix(grid).to(rows.device) for name, grid in rows.grids.items()}
        if statistics is None:
            moments = {name: rows.mean_and_variance(name, scale_rows) for name in rows.grids}
            self.means = {name: mean for name, (mean, _) in moments.items()}
            self._stds = {name: _stds(*of_array) for name, of_array in moments.items()}
            self._traces = {name: self._trace(name) for name in rows.grids}
        else:
            self.means, self._stds, self._traces = statistics
        self._last: tuple[Prior, torch.Tensor] | None = None
        self._stack_limit = stack_bytes
        self._stack: torch.Tensor | None = self._place_kernels() if self.stack_bytes_of(len(rows)) > 0 else None

    def stack_bytes_of(self, n_images: int) -> int:
        """Bytes that kernels of single places take for so many images; 0 if above the limit."""
        wanted = 4 * sum(map(self.rows.n_places, self.rows.grids)) * n_images**2
        return wanted if wanted <= self._stack_limit else 0

    @property
    def stack_bytes(self) -> int:
        """Bytes of the kernels of single places that are kept, and of the rows that they were computed from."""
        return 0 if self._stack is None else 4 * sum(t.numel() for t in (self._stack, *self._prepared.values()))

    def kernel(self, prior: Prior) -> torch.Tensor:
        """(n_images, n_images) float32 kernel on the device under a prior; not centred over any fold."""
        if self._stack is not None or 4 * len(self.rows.grids) * len(self.rows) ** 2 <= self._stack_limit:
            kernel: torch.Tensor = torch.tensordot(self._layer_shares(prior), self._windowed(prior), 1)
            return kernel
        total = self._zeros()
        for name, share in self.shares(prior).items():
            self._add_array(total, name, share)
        return total

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(self.rows), len(self.rows), device=self.rows.device)

    def _windowed(self, prior: Prior) -> torch.Tensor:
        """(n_arrays, n_images, n_images) kernel of each array under the prior's window; kept, for the same window."""
        window = replace(prior, depth=None)
        if self._last is None or self._last[0] != window:
            kernels = [self._zeros() for _ in self.rows.grids]
            for kernel, (name, share) in zip(kernels, self.shares(window).items(), strict=True):
                self._add_array(kernel, name, share)
            self._last = (window, torch.stack(kernels))
        return self._last[1]

    def _layer_shares(self, prior: Prior) -> torch.Tensor:
        """(n_arrays,) share of each layer, by its depth."""
        shares = [prior.layer(self._depths[name]) for name in self.rows.grids]
        return torch.tensor(shares, dtype=torch.float32, device=self.rows.device)

    def features(self, prior: Prior) -> torch.Tensor:
        """(n_images, n_features) float32 features whose inner products are the kernel."""
        shares = self.shares(prior)
        return torch.cat(
            [
                torch.cat([(block * shares[name].sqrt()[:, None]).flatten(1) for _, block in self._blocks(name)])
                for name in self.rows.grids
            ],
            1,
        )

    def across(self, prior: Prior, landmarks: np.ndarray) -> torch.Tensor:
        """(n_images, len(landmarks)) float32 columns of the kernel."""
        columns = torch.zeros(len(self.rows), len(landmarks), device=self.rows.device)
        landmark_rows = self.rows.subset(landmarks)
        for name, share in self.shares(prior).items():
            if share.any():
                scale = share.sqrt()[:, None]
                landmark_features = (self._prepare(name, landmark_rows.read(name)) * scale).flatten(1)
                for start, block in self._blocks(name):
                    columns[start : start + len(block)] += (block * scale).flatten(1) @ landmark_features.T
        return columns

    def of_images(self, index: np.ndarray) -> "LayerKernels":
        """Kernels of some images, with the same means, scales and traces."""
        statistics = _Statistics(self.means, self._stds, self._traces)
        return LayerKernels(self.rows.subset(index), self.scale_rows, self._stack_limit, statistics)

    def shares(self, prior: Prior) -> dict[str, torch.Tensor]:
        """{array: (n_places,)} factor of each place's kernel."""
        shares = {}
        for name, grid in self.rows.grids.items():
            window = torch.as_tensor(prior.window(grid), dtype=torch.float32, device=self.rows.device)
            trace = (window * self._traces[name]).sum()
            scale = prior.layer(self._depths[name]) * len(self.scale_rows) / trace if trace > 0 else 0.0
            shares[name] = window * scale
        return shares

    def weights(self, priors: Sequence[Prior], duals: torch.Tensor) -> dict[str, torch.Tensor]:
        """{array: (n_places * n_channels, n_vertices)} weights on the features as stored.

        duals : (n_priors, n_images, n_vertices); predictions are the sum over priors of kernel @ dual, up to an
            intercept
        """
        # duals are mixed for each place by its shares first, so that features are multiplied once for all priors
        shares = [self.shares(prior) for prior in priors]
        return {name: self._array_weights(name, torch.stack([s[name] for s in shares]), duals) for name in self.means}

    def _array_weights(self, name: str, shares: torch.Tensor, duals: torch.Tensor) -> torch.Tensor:
        n_places, n_vertices = shares.shape[1], duals.shape[2]
        total = torch.zeros(n_places, self.rows.channels[name], n_vertices, device=duals.device)
        for start, block in self._blocks(name):
            part = duals[:, start : start + len(block)]
            n_at_once = max(_MAX_DUAL_NUMBERS // max(part[0].numel(), 1), 1)
            for places in (slice(start, start + n_at_once) for start in range(0, n_places, n_at_once)):
                mixed = torch.tensordot(shares[:, places].T, part, 1)  # (places, n_images, n_vertices)
                total[places] += torch.bmm(block[:, places].permute(1, 2, 0), mixed)
        blurred = (self._blurs[name].T @ total.flatten(1)).view_as(total)
        return (blurred / self._stds[name][:, None]).flatten(0, 1)

    def _add_array(self, total: torch.Tensor, name: str, share: torch.Tensor) -> None:
        """Add the kernel of one array to the total. share : (n_places,)"""
        if self._stack is not None:
            sizes = list(map(self.rows.n_places, self.rows.grids))
            kernels = self._stack.split(sizes)[list(self.rows.grids).index(name)]
            total += torch.tensordot(share, kernels, 1)
        elif share.any():
            self._add_products(total, name, share.sqrt())

    def _add_products(self, total: torch.Tensor, name: str, scale: torch.Tensor) -> None:
        """Add inner products in blocks of images; the kernel is symmetric, so each pair of blocks is computed once."""
        for start, left in self._blocks(name):
            left = (left * scale[:, None]).flatten(1)
            for other, right in self._blocks(name, start + len(left)):
                product = left @ (right * scale[:, None]).flatten(1).T
                total[start : start + len(left), other : other + len(right)] += product
                if other != start:
                    total[other : other + len(right), start : start + len(left)] += product.T

    def _place_kernels(self) -> torch.Tensor:
        """(places of all arrays, n_images, n_images) kernels of single places; keeps the prepared rows."""
        n_places = sum(map(self.rows.n_places, self.rows.grids))
        stack, first = torch.empty(n_places, len(self.rows), len(self.rows), device=self.rows.device), 0
        for name in self.rows.grids:
            self._prepared[name] = torch.cat([block for _, block in self._blocks(name)])
            places = self._prepared[name].transpose(0, 1)
            torch.bmm(places, places.transpose(1, 2), out=stack[first : first + len(places)])
            first += len(places)
        return stack

    def _blocks(self, name: str, stop: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, (n, n_places, n_channels) prepared features) of each block of images."""
        stop = len(self.rows) if stop is None else stop
        if name in self._prepared:
            yield 0, self._prepared[name][:stop]
            return
        step = self.rows.block_rows(name)
        for start in range(0, stop, step):
            yield start, self._prepare(name, self.rows.read(name, start, min(start + step, stop)))

    def _prepare(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of an array, centred, scaled and blurred."""
        return self._blurs[name] @ ((rows - self.means[name]) / self._stds[name])

    def _trace(self, name: str) -> torch.Tensor:
        """(n_places,) sum of squares over the images of the scales and over channels."""
        total = torch.zeros(self.rows.n_places(name), device=self.rows.device)
        for block in self.rows.blocks(name, self.scale_rows):
            total += self._prepare(name, block).square().sum((0, 2))
        return total


def _stds(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """(n_channels,) standard deviations; infinite for a channel that is constant: it says nothing at any scale.

    A channel that hardly varies among these images may vary a lot in an image that is held out. Scaled to unit
    variance, it would decide that image's predictions alone. So its variance counts as FLOOR of the mean over channels.
    """
    varies = variance > _CONSTANT * mean.square().mean(0)
    return torch.where(varies, variance.clamp_min(FLOOR * variance.mean()), torch.inf).sqrt()


def _blur_matrix(grid: tuple[int, int]) -> torch.Tensor:
    """(n_places, n_places) weights by which each place becomes a mean of itself and its neighbours; rows sum to 1."""
    sides = []
    for n in grid:
        distances = torch.arange(n, dtype=torch.float64)[:, None] - torch.arange(n, dtype=torch.float64)
        weights = torch.exp(-(distances**2) / (2 * (BLUR * n / 7) ** 2))
        sides.append(weights / weights.sum(1, keepdim=True))
    return torch.kron(*sides).float()
