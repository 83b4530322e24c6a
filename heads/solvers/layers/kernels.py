"""Kernels of several layers: inner products of images, place by place, straight from a feature store.

Features are centred, each channel is scaled to unit variance over images and places (to less, if it hardly varies), and
maps are blurred a little over places, which makes weights of neighbouring places alike. Scales come from some of the
images that every fold which uses them trains on (FoldPlan.scale_rows). A prior (see priors.py) weighs the places. Every
layer has the same share of the kernel's trace, times the prior's share for its depth. A kernel is the sum of kernels of
places, so it takes one pass over the store, in blocks of images.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from featcache.machine.threads import side_by_side
from heads.features.rows import LayerRows
from heads.solvers.layers.priors import Prior, depths_of
from heads.solvers.units import widest_of

_MAX_DUAL_NUMBERS = 1 << 23  # in the dual weights of the places that are multiplied at once
_PRODUCT_NUMBERS, _LEAST_ROWS = 1 << 23, 64  # in the inner products of single places at a time, and images at least
_CONSTANT = 1e-12  # variance of a channel that counts as constant, as a share of its squared mean: rounding of float32
FLOOR = 0.1  # least variance of a channel before it is scaled, as a share of the mean over its array's channels
BLUR = 0.75  # standard deviation over places, in cells of a 7 x 7 grid (docs/decisions/0013)


class LayerKernels:
    """Kernels of one store's images under any prior.

    scale_rows : numbers of the images that means, scales and traces are of
    whole : whether the prepared rows of all images are kept in memory, as kernels of all pairs of images need them
    """

    def __init__(self, rows: LayerRows, scale_rows: np.ndarray, whole: bool = False) -> None:
        self.rows, self.scale_rows = rows, scale_rows
        self._depths = depths_of(list(rows.grids))
        self._blurs = {name: _blur_matrix(grid).to(rows.device) for name, grid in rows.grids.items()}
        moments = side_by_side(lambda name: rows.mean_and_variance(name, scale_rows), rows.grids, rows.device)
        self.means = {name: mean for name, (mean, _) in zip(rows.grids, moments, strict=True)}
        self._stds = {name: _stds(*of_array) for name, of_array in zip(rows.grids, moments, strict=True)}
        self._last: tuple[np.ndarray, dict[str, torch.Tensor]] | None = None
        self._whole: dict[str, torch.Tensor] | None = None
        if whole:
            self._whole = self._all_prepared(np.arange(len(rows)))
        self._traces = dict(zip(rows.grids, side_by_side(self._trace, rows.grids, rows.device), strict=True))

    def kernel(self, prior: Prior) -> torch.Tensor:
        """(n_images, n_images) float32 kernel on the device under a prior; not centred over any fold."""
        return self.under([prior])[0]

    def under(
        self, priors: Sequence[Prior], columns: np.ndarray | None = None, images: np.ndarray | None = None
    ) -> torch.Tensor:
        """(n_priors, n_images, n_columns) float32 kernels of images with others, in one pass over the rows.

        columns, images : numbers of these images; None: all images

        Inner products of single places are computed once, for a few images at a time, and weighed for every prior.
        """
        symmetric = columns is None and images is None
        everyone = np.arange(len(self.rows))
        columns, images = everyone if columns is None else columns, everyone if images is None else images
        kernels = torch.zeros(len(priors), len(images), len(columns), device=self.rows.device)
        by_prior, prepared = [self.shares(prior) for prior in priors], self._prepared(columns)
        shares = {name: torch.stack([of_prior[name] for of_prior in by_prior]) for name in self.rows.grids}
        step = self._step(len(columns))

        def add_rows(start: int) -> None:
            rows, first = slice(start, start + step), start if symmetric else 0
            target = kernels[:, rows, first:]
            for name, of_array in shares.items():
                left = self._some_prepared(name, images[rows])
                products = torch.bmm(left, prepared[name][:, first:].transpose(1, 2))
                target += (of_array @ products.flatten(1)).view(target.shape)

        starts = range(0, len(images), step)
        side_by_side(add_rows, starts, self.rows.device)
        for start in starts if symmetric else ():  # each pair of images was multiplied once
            rows, others = slice(start, start + step), slice(start + step, None)
            kernels[:, others, rows] = kernels[:, rows, others].transpose(1, 2)
        return kernels

    def _step(self, n_columns: int) -> int:
        """Images at a time whose inner products of single places take a few tens of megabytes."""
        step = rows_at_once(max(map(self.rows.n_places, self.rows.grids)), n_columns)
        return max(step, self.rows.streamed_rows)  # a chunk on the disk is read as a whole

    def _prepared(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """{array: (n_places, len(index), n_channels)} prepared rows of some images; the last are kept."""
        if self._whole is not None:
            return self._whole if len(index) == len(self.rows) else self._all_prepared(index)
        if self._last is None or not np.array_equal(self._last[0], index):
            self._last = index, self._all_prepared(index)
        return self._last[1]

    def _all_prepared(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        made = side_by_side(lambda name: self._some_prepared(name, index), self.rows.grids, self.rows.device)
        return dict(zip(self.rows.grids, made, strict=True))

    def _some_prepared(self, name: str, index: np.ndarray) -> torch.Tensor:
        """(n_places, len(index), n_channels) rows of an array, centred, scaled and blurred."""
        if self._whole is not None:
            whole = self._whole[name]
            return whole[:, index[0] : index[-1] + 1] if _is_range(index) else whole[:, torch.from_numpy(index)]
        return torch.cat([self._prepare(name, block) for block in self.rows.blocks(name, index)], 1)

    def features(self, prior: Prior) -> torch.Tensor:
        """(n_images, n_features) float32 features whose inner products are the kernel."""
        shares, prepared = self.shares(prior), self._prepared(np.arange(len(self.rows)))
        scaled = [prepared[name] * shares[name].sqrt()[:, None, None] for name in self.rows.grids]
        return torch.cat([array.transpose(0, 1).flatten(1) for array in scaled], 1)

    def shares(self, prior: Prior) -> dict[str, torch.Tensor]:
        """{array: (n_places,)} factor of each place's kernel."""
        shares = {}
        for name, grid in self.rows.grids.items():
            window = torch.as_tensor(prior.window(grid), dtype=torch.float32, device=self.rows.device)
            trace = (window * self._traces[name]).sum()
            scale = prior.layer(self._depths[name]) * len(self.scale_rows)
            # as a tensor: its value is asked of an accelerator nowhere
            shares[name] = torch.where(trace > 0, window * scale / trace, 0.0)
        return shares

    def weights(self, priors: Sequence[Prior], images: np.ndarray, duals: torch.Tensor) -> dict[str, torch.Tensor]:
        """{array: (n_places * n_channels, n_vertices)} weights on the features as stored.

        images : numbers of the images that dual weights are of
        duals : (n_priors, len(images), n_vertices); predictions are the sum over priors of kernel @ dual, up to an
            intercept
        """
        # duals are mixed for each place by its shares first, so that features are multiplied once for all priors
        shares, prepared = [self.shares(prior) for prior in priors], self._prepared(images)
        mixed = {name: torch.stack([of_prior[name] for of_prior in shares]) for name in self.means}
        return {name: self._as_stored(name, _weighed(prepared[name], mixed[name].T, duals)) for name in self.means}

    def weights_of_features(self, prior: Prior, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same from weights on `features`, (n_features, n_vertices)."""
        shapes = {name: (self.rows.n_places(name), self.rows.channels[name]) for name in self.means}
        parts = dict(zip(shapes, weights.split([math.prod(shape) for shape in shapes.values()]), strict=True))
        shares = self.shares(prior)
        return {
            name: self._as_stored(name, parts[name].view(*shapes[name], -1) * shares[name].sqrt()[:, None, None])
            for name in self.means
        }

    def _as_stored(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """Weights on stored rows from weights on prepared rows, (n_places, n_channels, n_vertices)."""
        blurred = (self._blurs[name].T @ weights.flatten(1)).view_as(weights)
        return (blurred / self._stds[name][:, None]).flatten(0, 1)

    def _prepare(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of an array, (n, n_places, n_channels), centred, scaled and blurred; places come first afterwards."""
        by_place = rows.transpose(0, 1)
        scaled = torch.addcmul(-self.means[name][:, None] / self._stds[name], by_place, 1 / self._stds[name])
        return (self._blurs[name] @ scaled.flatten(1)).view_as(scaled) if len(scaled) > 1 else scaled

    def _trace(self, name: str) -> torch.Tensor:
        """(n_places,) sum of squares over the images of the scales and over channels."""
        total = torch.zeros(self.rows.n_places(name), device=self.rows.device)
        step = self.rows.block_rows(name)
        for start in range(0, len(self.scale_rows), step):
            total += self._some_prepared(name, self.scale_rows[start : start + step]).square().sum((1, 2))
        return total


def _is_range(index: np.ndarray) -> bool:
    """Whether numbers follow one another."""
    return len(index) > 0 and bool((np.diff(index) == 1).all())


def rows_at_once(n_places: int, n_columns: int) -> int:
    """Images whose inner products of single places with `n_columns` others are in memory at once."""
    return max(_PRODUCT_NUMBERS // (n_places * max(n_columns, 1)), _LEAST_ROWS)


def _weighed(prepared: torch.Tensor, shares: torch.Tensor, duals: torch.Tensor) -> torch.Tensor:
    """(n_places, n_channels, n_vertices) prepared rows times dual weights, weighed by place and summed over images.

    prepared : (n_places, n_images, n_channels); shares : (n_places, n_priors)
    duals : (n_priors, n_images, n_vertices)
    """
    n_places, n_images, n_channels = prepared.shape
    weights = prepared.new_empty(n_places, n_channels, duals.shape[2])
    n_at_once = max(_MAX_DUAL_NUMBERS // max(duals[0].numel(), 1), 1)
    for places in (slice(start, start + n_at_once) for start in range(0, n_places, n_at_once)):
        mixed = (shares[places] @ duals.flatten(1)).view(-1, n_images, duals.shape[2])
        torch.bmm(prepared[places].transpose(1, 2), mixed, out=weights[places])
    return weights


def _stds(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """(n_channels,) standard deviations; infinite for a channel that is constant: it says nothing at any scale.

    A channel that hardly varies among these images may vary a lot in an image that is held out. Scaled to unit
    variance, it would decide that image's predictions alone. So its variance counts as FLOOR of the mean over channels,
    to which a channel of much larger numbers than the others (see WIDEST) adds no more than the widest may.
    """
    varies = variance > _CONSTANT * mean.square().mean(0)
    widest = widest_of(torch.where(varies, variance, 0.0).sqrt())
    typical = variance if widest is None else variance.clamp_max(widest.square())
    return torch.where(varies, variance.clamp_min(FLOOR * typical.mean()), torch.inf).sqrt()


def _blur_matrix(grid: tuple[int, int]) -> torch.Tensor:
    """(n_places, n_places) weights by which each place becomes a mean of itself and its neighbours; rows sum to 1."""
    sides = []
    for n in grid:
        distances = torch.arange(n, dtype=torch.float64)[:, None] - torch.arange(n, dtype=torch.float64)
        weights = torch.exp(-(distances**2) / (2 * (BLUR * n / 7) ** 2))
        sides.append(weights / weights.sum(1, keepdim=True))
    return torch.kron(*sides).float()
