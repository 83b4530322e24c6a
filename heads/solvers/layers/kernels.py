"""Kernels of several layers: inner products of images, place by place, straight from a feature store.

Features are centred, each channel is scaled to unit variance over images and places, and maps are blurred a little
over places, which makes weights of neighbouring places alike. A prior (see priors.py) weighs the places; every
layer has the same share of the kernel's trace, times what the prior says of its depth. Kernels of places add up, so a
kernel costs one pass over the store, in blocks of images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from heads.features.rows import LayerRows
from heads.solvers.layers.priors import Prior, depths_of

_MIXED = 1 << 25  # numbers in the dual weights of the places that are multiplied at once
BLUR = 0.75  # standard deviation over places, in cells of a 7 x 7 grid (docs/decisions/0013)


class _Statistics(NamedTuple):
    """What kernels need of all training images, {array: tensor}."""

    means: dict[str, torch.Tensor]  # (n_places, n_channels)
    spreads: dict[str, torch.Tensor]  # (n_channels,)
    traces: dict[str, torch.Tensor]  # (n_places,)


class LayerKernels:
    """Kernels of one store's images under any prior.

    n_train : rows before this one set means, scales and traces
    stack_bytes : memory that kernels of single places may take; where they fit, each is computed once
    """

    def __init__(
        self, rows: LayerRows, n_train: int, stack_bytes: float, statistics: "_Statistics | None" = None
    ) -> None:
        self.rows, self.n_train = rows, n_train
        self._prepared: dict[str, torch.Tensor] = {}  # with the stack, because both are for few images
        self._depths = depths_of(list(rows.grids))
        self._blurs = {name: _blur_matrix(grid).to(rows.device) for name, grid in rows.grids.items()}
        if statistics is None:
            moments = {name: rows.mean_and_variance(name, n_train) for name in rows.grids}
            self.means = {name: mean for name, (mean, _) in moments.items()}
            self._spreads = {name: torch.where(v > 0, v, 1).sqrt() for name, (_, v) in moments.items()}
            self._traces = {name: self._trace(name) for name in rows.grids}
        else:
            self.means, self._spreads, self._traces = statistics
        self._last: tuple[Prior, torch.Tensor] | None = None
        self._stack_limit = stack_bytes
        self._stack: torch.Tensor | None = self._place_kernels() if self._fits() else None

    def _fits(self) -> bool:
        return self.stack_bytes_of(len(self.rows)) > 0

    def stack_bytes_of(self, n_images: int) -> int:
        """What kernels of single places of so many images would take; 0 where that is more than they may."""
        wanted = 4 * sum(map(self.rows.n_places, self.rows.grids)) * n_images**2
        return wanted if wanted <= self._stack_limit else 0

    @property
    def stack_bytes(self) -> int:
        """What kernels of single places take, and the rows that they were made of."""
        kept = [one for one in (self._stack, *self._prepared.values()) if one is not None]
        return 4 * sum(one.numel() for one in kept)

    def kernel(self, prior: Prior) -> torch.Tensor:
        """(n_images, n_images) float32 on the device, of the features under a prior; not centred over any fold."""
        if self._stack is not None or 4 * len(self.rows.grids) * len(self.rows) ** 2 <= self._stack_limit:
            kernel: torch.Tensor = torch.tensordot(self._layer_shares(prior), self._windowed(prior), 1)
            return kernel
        whole = self._nothing()
        for name, share in self.shares(prior).items():
            self._add_gram(whole, name, share)
        return whole

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(len(self.rows), len(self.rows), device=self.rows.device)

    def _windowed(self, prior: Prior) -> torch.Tensor:
        """(n_arrays, n_images, n_images) of each array under the prior's window, which other priors may share."""
        window = replace(prior, depth=None)
        if self._last is None or self._last[0] != window:
            kernels = [self._nothing() for _ in self.rows.grids]
            for kernel, (name, share) in zip(kernels, self.shares(window).items(), strict=True):
                self._add_gram(kernel, name, share)
            self._last = (window, torch.stack(kernels))
        return self._last[1]

    def _layer_shares(self, prior: Prior) -> torch.Tensor:
        """(n_arrays,)"""
        shares = [prior.layer(self._depths[name]) for name in self.rows.grids]
        return torch.tensor(shares, dtype=torch.float32, device=self.rows.device)

    def features(self, prior: Prior) -> torch.Tensor:
        """(n_images, n_features) float32, whose inner products the kernel is."""
        shares = self.shares(prior)
        return torch.cat(
            [
                torch.cat([(block * shares[name].sqrt()[:, None]).flatten(1) for _, block in self._blocks(name)])
                for name in self.rows.grids
            ],
            1,
        )

    def across(self, prior: Prior, landmarks: np.ndarray) -> torch.Tensor:
        """(n_images, len(landmarks)) float32: the columns of the kernel that are some images'."""
        found = torch.zeros(len(self.rows), len(landmarks), device=self.rows.device)
        few = self.rows.subset(landmarks)
        for name, share in self.shares(prior).items():
            if share.any():
                scale = share.sqrt()[:, None]
                own = (self._seen(name, few.read(name)) * scale).flatten(1)
                for start, block in self._blocks(name):
                    found[start : start + len(block)] += (block * scale).flatten(1) @ own.T
        return found

    def of_some(self, index: np.ndarray) -> "LayerKernels":
        """The same of some images, with the means, scales and traces of all."""
        statistics = _Statistics(self.means, self._spreads, self._traces)
        return LayerKernels(self.rows.subset(index), self.n_train, self._stack_limit, statistics)

    def shares(self, prior: Prior) -> dict[str, torch.Tensor]:
        """{array: (n_places,)} what each place's kernel is multiplied with."""
        found = {}
        for name, grid in self.rows.grids.items():
            window = torch.as_tensor(prior.window(grid), dtype=torch.float32, device=self.rows.device)
            trace = (window * self._traces[name]).sum()
            scale = prior.layer(self._depths[name]) * self.n_train / trace if trace > 0 else 0.0
            found[name] = window * scale
        return found

    def weights(self, priors: Sequence[Prior], duals: torch.Tensor) -> dict[str, torch.Tensor]:
        """{array: (n_places * n_channels, n_vertices)} weights on the features as they are stored.

        duals : (n_priors, n_images, n_vertices), so that predictions are the sum over priors of kernel @ dual, up to an
            intercept. Each place takes its share of them first, so that features are multiplied once.
        """
        shares = [self.shares(prior) for prior in priors]
        return {name: self._array_weights(name, torch.stack([s[name] for s in shares]), duals) for name in self.means}

    def _array_weights(self, name: str, shares: torch.Tensor, duals: torch.Tensor) -> torch.Tensor:
        n_places, n_vertices = shares.shape[1], duals.shape[2]
        total = torch.zeros(n_places, self.rows.channels[name], n_vertices, device=duals.device)
        for start, block in self._blocks(name):
            part = duals[:, start : start + len(block)]
            some = max(_MIXED // max(part[0].numel(), 1), 1)
            for places in (slice(p, p + some) for p in range(0, n_places, some)):
                mixed = torch.tensordot(shares[:, places].T, part, 1)  # (places, n_images, n_vertices)
                total[places] += torch.bmm(block[:, places].permute(1, 2, 0), mixed)
        spread = (self._blurs[name].T @ total.flatten(1)).view_as(total)
        return (spread / self._spreads[name][:, None]).flatten(0, 1)

    def _add_gram(self, whole: torch.Tensor, name: str, share: torch.Tensor) -> None:
        """Add the kernel of one array, its places in their shares."""
        if self._stack is not None:
            sizes = [self.rows.n_places(one) for one in self.rows.grids]
            own = self._stack.split(sizes)[list(self.rows.grids).index(name)]
            whole += torch.tensordot(share, own, 1)
        elif share.any():
            self._add_products(whole, name, share.sqrt())

    def _add_products(self, whole: torch.Tensor, name: str, scale: torch.Tensor) -> None:
        """In blocks of images, to the lower and the upper half of the whole."""
        for start, left in self._blocks(name):
            left = (left * scale[:, None]).flatten(1)
            for other, right in self._blocks(name, start + len(left)):
                product = left @ (right * scale[:, None]).flatten(1).T
                whole[start : start + len(left), other : other + len(right)] += product
                if other != start:
                    whole[other : other + len(right), start : start + len(left)] += product.T

    def _place_kernels(self) -> torch.Tensor:
        """(places of all arrays, n_images, n_images)"""
        n_places = sum(map(self.rows.n_places, self.rows.grids))
        stack, first = torch.empty(n_places, len(self.rows), len(self.rows), device=self.rows.device), 0
        for name in self.rows.grids:
            self._prepared[name] = torch.cat([block for _, block in self._blocks(name)])
            places = self._prepared[name].transpose(0, 1)
            torch.bmm(places, places.transpose(1, 2), out=stack[first : first + len(places)])
            first += len(places)
        return stack

    def _blocks(self, name: str, stop: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, (n, n_places, n_channels)) of the features as the kernel sees them."""
        stop = len(self.rows) if stop is None else stop
        if name in self._prepared:
            yield 0, self._prepared[name][:stop]
            return
        step = self.rows.block_rows(name)
        for start in range(0, stop, step):
            yield start, self._seen(name, self.rows.read(name, start, min(start + step, stop)))

    def _seen(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of an array as kernels see them: centred, scaled, blurred."""
        return self._blurs[name] @ ((rows - self.means[name]) / self._spreads[name])

    def _trace(self, name: str) -> torch.Tensor:
        """(n_places,) sum of squares over training images and channels."""
        total = torch.zeros(self.rows.n_places(name), device=self.rows.device)
        for _, block in self._blocks(name, self.n_train):
            total += block.square().sum((0, 2))
        return total


def _blur_matrix(grid: tuple[int, int]) -> torch.Tensor:
    """(n_places, n_places): each place becomes a mean of itself and its neighbours, the weights of which sum to 1."""
    sides = []
    for n in grid:
        apart = torch.arange(n, dtype=torch.float64)[:, None] - torch.arange(n, dtype=torch.float64)
        weights = torch.exp(-(apart**2) / (2 * (BLUR * n / 7) ** 2))
        sides.append(weights / weights.sum(1, keepdim=True))
    return torch.kron(*sides).float()
