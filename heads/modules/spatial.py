"""Heads on maps, with separate weights for places in the image and for channels.

A vertex's weights on a layer are weights of places times weights of channels, summed over a few ranks. For 7 x 7 places
of 300 channels that is 349 numbers per rank instead of 14,700: few enough to be learnt from a few thousand images.

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

_NOISE = 0.1  # standard deviation of the initial spatial maps, relative to the uniform map
_LARGEST = 2**24  # numbers that a product of channels may keep for the backward pass; larger ones are recomputed


class Standardise(nn.Module):
    """{array: rows} -> the same rows with each channel at mean 0 and variance 1 over images and places.

    It uses running statistics, in training and in evaluation. So they follow a backbone that is trained with the heads,
    no image depends on the others of its batch, and statistics set by `fix` do not change.

    shapes : {array: shape of a row}
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._arrays = tuple(shapes)
        self.channels = nn.ModuleList(_Channels(shape[-1]) for shape in shapes.values())

    def forward(self, rows: Rows) -> Rows:
        pairs = zip(self._arrays, self.channels, strict=True)
        return {array: channels(rows[array].float()) for array, channels in pairs}

    @torch.no_grad()
    def fix(self, statistics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Set the statistics for good, {array: (mean (n_channels,), variance (n_channels,))}."""
        for array, channels in zip(self._arrays, cast("list[_Channels]", list(self.channels)), strict=True):
            mean, variance = statistics[array]
            channels.running_mean.copy_(mean)
            channels.running_var.copy_(variance)
            channels.num_batches_tracked.fill_(1)
            channels.momentum = 0.0


class _Channels(nn.modules.batchnorm._BatchNorm):
    """Standardisation of one array's channels by running statistics.

    It is a subclass of batch norm, so that code that freezes the statistics of batch norms freezes these too.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, n_channels: int) -> None:
        super().__init__(n_channels, affine=False)
        self._begun = False  # whether it is known that there are statistics: a device is asked for that once

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.training and (self.momentum or not self._has_begun()):
            self._update(values)
        scale = (self.running_var + self.eps).rsqrt()
        return torch.addcmul(-self.running_mean * scale, values, scale)

    def _has_begun(self) -> bool:
        self._begun = self._begun or bool(self.num_batches_tracked)
        return self._begun

    @torch.no_grad()
    def _update(self, values: torch.Tensor) -> None:
        variance, mean = torch.var_mean(values.flatten(0, -2), 0, correction=0)
        self.num_batches_tracked += 1
        # the first batches count equally
        share = (1 / self.num_batches_tracked.to(mean.dtype)).clamp(min=self.momentum or 0.0)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class SpatialReadout(nn.Module):
    """Readout of maps and vectors: {array: rows} -> (n_images, n_outputs).

    From a layer's map X, (n_places, n_channels), output v takes the sum over ranks r, places p and channels c of
    ``spatial[v, r, p] X[p, c] channels[v, r, c]``; from a vector it takes a linear map. An output is the sum of its
    layers, weighed by the softmax of its row of `mixture`, plus its `bias`.

    Parameters
    ----------
    shapes : {array: shape of a row}: (height, width, n_channels) of maps and (n_features,) of vectors
    rank : pairs of weights of places and weights of channels that each output has on a layer
    dropout : probability that a place of a layer is left out of an image, in training
    start : scale of the initial weights; 1 for torch's
    standardised : whether the rows are standardised already, because several readouts share one standardisation
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
        start_of_layer = start / len(shapes) ** 0.5  # so that the sum over layers has the scale `start`
        self.layers = nn.ModuleList(_reader(shape, n_outputs, rank, start_of_layer) for shape in shapes.values())
        self.mixture = nn.Parameter(torch.zeros(n_outputs, len(shapes)))
        self.bias = nn.Parameter(torch.zeros(n_outputs))

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, torch.Tensor], bias: torch.Tensor) -> None:
        """Start from the products of places and channels that are closest to given weights, layer by layer.

        weights : {array: (n_outputs, n_places, n_channels)} of standardised rows; bias : (n_outputs,)
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
            outputs = outputs + shares[:, layer] * reader(self._drop_places(rows[array]))
        return outputs

    def _drop_places(self, values: torch.Tensor) -> torch.Tensor:
        if values.ndim == 2 or not (self.training and self.dropout):
            return values
        kept = functional.dropout(values.new_ones(*values.shape[:-1], 1), self.dropout)
        return values * kept

    def regularisation(self, smoothness: float, sparsity: float) -> torch.Tensor:
        """Penalty of the spatial maps, to add to a loss: a mean over outputs, ranks and layers.

        The penalty of a map does not depend on its scale.

        smoothness : weight of the mean squared difference of neighbouring places, over the map's mean square
        sparsity : weight of the mean absolute value, over the root of that mean square
        """
        maps = [
            reader.spatial.reshape(*reader.spatial.shape[:2], *shape[:2])
            for _, shape, reader in self._readers()
            if isinstance(reader, _MapReader)
        ]
        total = self.bias.new_zeros(())
        for places in maps:
            size = places.square().mean((2, 3)).clamp_min(torch.finfo(places.dtype).tiny)
            roughness = sum(step.square().mean((2, 3)) for d in (2, 3) if (step := places.diff(dim=d)).numel())
            density = places.abs().mean((2, 3)) / size.sqrt()
            total = total + (smoothness * (roughness / size) + sparsity * density).mean() / len(maps)
        return total

    @torch.no_grad()
    def maps(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Places and layers that each output looks at, by the sizes of its weights of standardised channels.

        Returns
        -------
        places : {array: (n_outputs, height, width)} of each array that is a map; the places of a map sum to 1
        layers : (n_outputs, n_arrays), in the order of the arrays; they sum to 1
        """
        places, sizes = {}, []
        for array, shape, reader in self._readers():
            squares = reader.squares()
            sizes.append(squares.sum(1).sqrt())
            if len(shape) > 1:
                places[array] = functional.normalize(squares.sqrt(), p=1, dim=1).reshape(self.n_outputs, *shape[:2])
        return places, functional.normalize(self.mixture.softmax(1) * torch.stack(sizes, 1), p=1, dim=1)

    def _readers(self) -> "list[tuple[str, tuple[int, ...], _VectorReader | _MapReader]]":
        """Arrays and their readers, as [(array, shape of a row, reader)]."""
        readers = cast("list[_VectorReader | _MapReader]", list(self.layers))
        return [(array, shape, reader) for (array, shape), reader in zip(self.shapes.items(), readers, strict=True)]


def readout_of(shapes: Shapes, state: Mapping[str, torch.Tensor], standardised: bool = False) -> SpatialReadout:
    """The readout that has these tensors, by their names in it. shapes, standardised : as of the readout"""
    rank = next((tensor.shape[1] for name, tensor in state.items() if name.endswith(".spatial")), 1)
    readout = SpatialReadout(shapes, len(state["bias"]), rank, standardised=standardised)
    readout.load_state_dict(dict(state))
    return readout


class _VectorReader(nn.Module):
    """Linear map of a vector: (n_images, n_features) -> (n_images, n_outputs)."""

    def __init__(self, n_features: int, n_outputs: int, start: float) -> None:
        super().__init__()
        self.channels = _uniform(start, n_outputs, n_features)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return functional.linear(values, self.channels)

    def start_from(self, weights: torch.Tensor) -> None:
        """Start from weights (n_outputs, 1, n_features)."""
        self.channels.copy_(weights[:, 0])

    def squares(self) -> torch.Tensor:
        """Squares of the weights, summed over features: (n_outputs, 1)."""
        return self.channels.square().sum(1, keepdim=True)


class _MapReader(nn.Module):
    """Products of places and channels on a map: (n_images, height, width, n_channels) -> (n_images, n_outputs).

    spatial : (n_outputs, rank, n_places), sqrt(n_places) times the weights of the places. It starts near
        1 / sqrt(n_places), so that a map has norm 1 and places are learnt as fast as channels
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
        """Start from the products closest to weights (n_outputs, n_places, n_channels), by singular values.

        Weights of places have norm 1 afterwards.
        """
        rank, n_places = self.spatial.shape[1:]
        _, vectors = torch.linalg.eigh(weights @ weights.transpose(1, 2))  # the smaller side, ascending
        kept = min(rank, n_places)
        self.spatial[:, :kept] = vectors[:, :, -kept:].transpose(1, 2)
        self.channels[:, :kept] = n_places**0.5 * self.spatial[:, :kept] @ weights
        self.channels[:, kept:] = 0.0

    def squares(self) -> torch.Tensor:
        """Squares of the weights, summed over channels: (n_outputs, n_places)."""
        gram = self.channels @ self.channels.transpose(1, 2)  # (n_outputs, rank, rank)
        return torch.einsum("vrp,vrs,vsp->vp", self.spatial, gram, self.spatial).clamp_min(0) / self.spatial.shape[2]


def _reader(shape: tuple[int, ...], n_outputs: int, rank: int, start: float) -> _VectorReader | _MapReader:
    if len(shape) == 1:
        return _VectorReader(shape[0], n_outputs, start)
    return _MapReader(shape[0] * shape[1], shape[2], n_outputs, rank, start)


def _uniform(start: float, *shape: int) -> nn.Parameter:
    """Random weights, `start` times those of a linear layer in torch whose inputs are the last axis."""
    bound = start * shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _contract(values: torch.Tensor, spatial: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Product of values (n, P, C), spatial (V, R, P) and channels (V, R, C), summed over P, C and R: (n, V).

    Channels are summed first, (V R, n P): no other order was faster. If that is large, it is computed for some outputs
    at a time, and again in the backward pass.
    """
    n_outputs, rank = channels.shape[:2]
    block = max(1, _LARGEST // (rank * values.shape[0] * values.shape[1]))
    if n_outputs <= block:
        return _product(values, spatial, channels)
    parts = []
    for first in range(0, n_outputs, block):
        factors = values, spatial[first : first + block], channels[first : first + block]
        if torch.is_grad_enabled():
            parts.append(checkpoint(_product, *factors, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_product(*factors))
    return torch.cat(parts, 1)


def _product(values: torch.Tensor, spatial: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    (n_images, n_places, _), (n_outputs, rank, _) = values.shape, channels.shape
    by_place = channels.flatten(0, 1) @ values.flatten(0, 1).T
    summed = torch.bmm(by_place.view(n_outputs * rank, n_images, n_places), spatial.reshape(-1, n_places, 1))
    return summed.view(n_outputs, rank, n_images).sum(1).T
