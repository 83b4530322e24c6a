"""Heads that read maps: which channels matter, and where in the image, are learnt apart.

A vertex's weights on a layer are a map over places times a map over channels, summed over a few ranks: for 7 x 7 places
of 300 channels that is 349 numbers a rank instead of 14,700, which a few thousand images can tell.

Source: Klindt et al., Neural system identification for large populations separating "what" and "where" (2017).
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from heads.modules.linear import SMALL

Rows = dict[str, torch.Tensor]  # {array: (n_images, n_features), or (n_images, height, width, n_channels)}
Shapes = Mapping[str, tuple[int, ...]]  # {array: shape of a row}

_NOISE = 0.1  # of the first spatial maps, as a part of a uniform one
_LARGEST = 2**24  # numbers that a product of channels may keep for the way back; larger ones are computed again


class Standardise(nn.Module):
    """{array: rows} -> the same with each channel at mean 0 and variance 1 over images and places.

    By running statistics, in training as in evaluation: they follow a backbone that is trained along, no image depends
    on the others of its batch, and statistics that are given stay as they are.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._arrays = tuple(shapes)
        self.channels = nn.ModuleList(_Channels(shape[-1]) for shape in shapes.values())

    def forward(self, rows: Rows) -> Rows:
        return {array: one(rows[array].float()) for array, one in zip(self._arrays, self.channels, strict=True)}

    @torch.no_grad()
    def fix(self, statistics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Use these and no others. statistics : {array: (mean (n_channels,), variance (n_channels,))}"""
        for array, one in zip(self._arrays, cast("list[_Channels]", list(self.channels)), strict=True):
            mean, variance = statistics[array]
            one.running_mean.copy_(mean)
            one.running_var.copy_(variance)
            one.num_batches_tracked.fill_(1)
            one.momentum = 0.0


class _Channels(nn.modules.batchnorm._BatchNorm):
    """A batch norm, for whoever keeps the statistics of those still; it normalises by what it remembers."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, n_channels: int) -> None:
        super().__init__(n_channels, affine=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.training and (self.momentum or not self.num_batches_tracked):
            self._remember(values)
        scale = (self.running_var + self.eps).rsqrt()
        return torch.addcmul(-self.running_mean * scale, values, scale)

    @torch.no_grad()
    def _remember(self, values: torch.Tensor) -> None:
        variance, mean = torch.var_mean(values.flatten(0, -2), 0, correction=0)
        self.num_batches_tracked += 1
        share = max(self.momentum or 0.0, 1 / int(self.num_batches_tracked))  # the first batches count alike
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class SpatialReadout(nn.Module):
    """{array: rows} -> (n_images, n_outputs)

    Of a layer's map X (n_places, n_channels), output v takes sum over ranks r of sum over places and channels of
    spatial[v, r, place] X[place, channel] channels[v, r, channel]; of a vector, a linear map. Layers are mixed by a
    softmax of each output's own.

    shapes : {array: shape of a row}, (height, width, n_channels) of maps and (n_features,) of vectors
    dropout : probability of leaving a place of a layer out of an image, while training
    start : size of the first weights, 1 for torch's own
    standardised : the rows are already, so that several readouts share one standardisation
    """

    def __init__(
        self,
        shapes: Shapes,
        n_outputs: int,
        rank: int = 1,
        dropout: float = 0.0,
        start: float = SMALL,
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.shapes, self.n_outputs, self.rank, self.dropout = dict(shapes), n_outputs, rank, dropout
        self.standardise = nn.Identity() if standardised else Standardise(shapes)
        size = start / len(shapes) ** 0.5  # so that the sum over layers has the size that was asked for
        self.layers = nn.ModuleList(_reader(shape, n_outputs, rank, size) for shape in shapes.values())
        self.mixture = nn.Parameter(torch.zeros(n_outputs, len(shapes)))
        self.bias = nn.Parameter(torch.zeros(n_outputs))

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, torch.Tensor], bias: torch.Tensor) -> None:
        """Take the product of maps that is closest to given weights, layer by layer.

        weights : {array: (n_outputs, n_places, n_channels)} on standardised rows; bias : (n_outputs,)
        """
        self.mixture.zero_()
        self.bias.copy_(bias)
        for array, _, reader in self._readers():
            reader.start_from(weights[array])

    def forward(self, rows: Rows) -> torch.Tensor:
        rows = self.standardise(rows)
        shares = len(self.shapes) * self.mixture.softmax(1)
        outputs = self.bias.expand(len(next(iter(rows.values()))), -1)
        for layer, (array, reader) in enumerate(zip(self.shapes, self.layers, strict=True)):
            outputs = outputs + shares[:, layer] * reader(self._thinned(rows[array]))
        return outputs

    def _thinned(self, values: torch.Tensor) -> torch.Tensor:
        if values.ndim == 2 or not (self.training and self.dropout):
            return values
        kept = functional.dropout(values.new_ones(*values.shape[:-1], 1), self.dropout)
        return values * kept

    def regularisation(self, smoothness: float, sparsity: float) -> torch.Tensor:
        """What to add to a loss: a mean over the spatial maps of all outputs, ranks and layers, blind to their sizes.

        smoothness : weight of the mean squared difference of neighbouring places, in mean squares of the map
        sparsity : weight of the mean absolute value, in roots of that mean square
        """
        maps = [one.spatial.unflatten(2, shape[:2]) for _, shape, one in self._readers() if isinstance(one, _MapReader)]
        total = self.bias.new_zeros(())
        for one in maps:
            size = one.square().mean((2, 3)).clamp_min(torch.finfo(one.dtype).tiny)
            rough = sum(step.square().mean((2, 3)) for d in (2, 3) if (step := one.diff(dim=d)).numel())
            dense = one.abs().mean((2, 3)) / size.sqrt()
            total = total + (smoothness * (rough / size) + sparsity * dense).mean() / len(maps)
        return total

    @torch.no_grad()
    def maps(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Where each output looks, and at which layers, by the sizes of its weights on standardised channels.

        Returns ({layer: (n_outputs, height, width)} without vectors, (n_outputs, n_arrays) in their order); over the
        places of a layer, and over arrays, they sum to 1.
        """
        where, sizes = {}, []
        for array, shape, one in self._readers():
            squares = one.squares()
            sizes.append(squares.sum(1).sqrt())
            if len(shape) > 1:
                where[array] = functional.normalize(squares.sqrt(), p=1, dim=1).unflatten(1, shape[:2])
        return where, functional.normalize(self.mixture.softmax(1) * torch.stack(sizes, 1), p=1, dim=1)

    def _readers(self) -> "list[tuple[str, tuple[int, ...], _VectorReader | _MapReader]]":
        """[(array, shape of a row, what reads it)]"""
        readers = cast("list[_VectorReader | _MapReader]", list(self.layers))
        return [(array, shape, one) for (array, shape), one in zip(self.shapes.items(), readers, strict=True)]


class _VectorReader(nn.Module):
    """(n_images, n_features) -> (n_images, n_outputs)"""

    def __init__(self, n_features: int, n_outputs: int, start: float) -> None:
        super().__init__()
        self.channels = _uniform(start, n_outputs, n_features)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return functional.linear(values, self.channels)

    def start_from(self, weights: torch.Tensor) -> None:
        """(n_outputs, 1, n_features)"""
        self.channels.copy_(weights[:, 0])

    def squares(self) -> torch.Tensor:
        """(n_outputs, 1) summed squares of the weights"""
        return self.channels.square().sum(1, keepdim=True)


class _MapReader(nn.Module):
    """(n_images, height, width, n_channels) -> (n_images, n_outputs)

    spatial : (n_outputs, rank, n_places), first near 1 / sqrt(n_places); over another such root it weighs the places.
        So maps have norm 1 at first, and as many steps turn one into a peak as turn a channel on.
    channels : (n_outputs, rank, n_channels)
    """

    def __init__(self, n_places: int, n_channels: int, n_outputs: int, rank: int, start: float) -> None:
        super().__init__()
        noisy = 1 + _NOISE * torch.randn(n_outputs, rank, n_places)
        self.spatial = nn.Parameter(noisy / n_places**0.5)
        self.channels = _uniform(start, n_outputs, rank, n_channels)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return _contract(values.flatten(1, 2), self.spatial / self.spatial.shape[2] ** 0.5, self.channels)

    def start_from(self, weights: torch.Tensor) -> None:
        """(n_outputs, n_places, n_channels): by the largest singular values, the maps over places with norm 1."""
        rank, n_places = self.spatial.shape[1:]
        _, vectors = torch.linalg.eigh(weights @ weights.transpose(1, 2))  # the smaller side, ascending
        kept = min(rank, n_places)
        self.spatial[:, :kept] = vectors[:, :, -kept:].transpose(1, 2)
        self.channels[:, :kept] = n_places**0.5 * self.spatial[:, :kept] @ weights
        self.channels[:, kept:] = 0.0

    def squares(self) -> torch.Tensor:
        """(n_outputs, n_places) squares of the weights, summed over channels"""
        alike = self.channels @ self.channels.transpose(1, 2)  # (n_outputs, rank, rank)
        return torch.einsum("vrp,vrs,vsp->vp", self.spatial, alike, self.spatial).clamp_min(0) / self.spatial.shape[2]


def _reader(shape: tuple[int, ...], n_outputs: int, rank: int, start: float) -> _VectorReader | _MapReader:
    if len(shape) == 1:
        return _VectorReader(shape[0], n_outputs, start)
    return _MapReader(shape[0] * shape[1], shape[2], n_outputs, rank, start)


def _uniform(start: float, *shape: int) -> nn.Parameter:
    """`start` times what torch starts a linear layer with, from channels, the last axis."""
    bound = start * shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _contract(values: torch.Tensor, spatial: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Values (n, P, C), spatial (V, R, P), channels (V, R, C) -> (n, V): their product summed over P, C and R.

    Channels first, (V R, n P), however many they are: as fast as any other order, or faster. Where that is large it is
    made for some outputs at a time, and made again on the way back.
    """
    n_outputs, rank = channels.shape[:2]
    block = max(1, _LARGEST // (rank * values.shape[0] * values.shape[1]))
    if n_outputs <= block:
        return _product(values, spatial, channels)
    parts = []
    for first in range(0, n_outputs, block):
        own = values, spatial[first : first + block], channels[first : first + block]
        again = torch.is_grad_enabled()
        parts.append(
            checkpoint(_product, *own, use_reentrant=False, preserve_rng_state=False) if again else _product(*own)
        )
    return torch.cat(parts, 1)


def _product(values: torch.Tensor, spatial: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    (n_images, n_places, _), (n_outputs, rank, _) = values.shape, channels.shape
    by_place = channels.flatten(0, 1) @ values.flatten(0, 1).T
    summed = torch.bmm(by_place.view(n_outputs * rank, n_images, n_places), spatial.reshape(-1, n_places, 1))
    return summed.view(n_outputs, rank, n_images).sum(1).T
