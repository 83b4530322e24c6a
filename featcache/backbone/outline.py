"""Networks without their weights: shapes and sizes, from a network that takes no memory and computes nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from featcache.backbone.hooks import device_of
from featcache.backbone.network import layers_or_refuse, outlined, pixel_dtype
from featcache.backbone.sizes import without_numbers
from featcache.backbone.sources.table import check_backbone
from featcache.backbone.taps import choose_taps
from featcache.config import BackboneConfig, LayerConfig

_FLOAT32 = 4  # bytes
# torch's autocast computes these in float32 whatever the precision of the rest
_ALWAYS_FLOAT32 = (nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Outline:
    """Sizes of a network and of what is read of it.

    size : pixels on a side of the input, its last axis
    shapes : {array: shape of one row}
    weights : bytes of the weights
    pixels : bytes of one decoded image: 8 bits a channel, or 32 of a network's own transform
    widest : bytes of the input and the output of one layer for one image, at most
    kept : bytes of the outputs of all layers for one image, which training keeps for the way back
    """

    size: int
    shapes: dict[str, tuple[int, ...]]
    weights: int
    pixels: int
    widest: int
    kept: int

    @property
    def n_features(self) -> int:
        """Number of features of one image, over all arrays."""
        return sum(map(math.prod, self.shapes.values()))


@cache
def outline(config: BackboneConfig, layers: LayerConfig, precision: str = "float32") -> Outline:
    """Outline of a network and of the layers that are read of it, computed in this precision.

    Raises BackboneError for a name that timm lacks and for a size that the network cannot take, ConfigError for layers
    that it lacks.
    """
    check_backbone(config)
    return without_numbers(lambda device: _outline(config, layers, precision, device), config.size is None)


def _outline(config: BackboneConfig, layers: LayerConfig, precision: str, device: str) -> Outline:
    model, settings, reader = outlined(config, device)
    size = tuple(settings["input_size"])
    with layers_or_refuse(config.resolved_name, model, size, reader), torch.inference_mode():
        taps = choose_taps(model, layers, size, reader)
        with _LayerSizes(model, precision) as sizes:
            rows = taps.read(model, torch.zeros(1, *size, device=device_of(model)))
    return Outline(
        size=size[-1],
        shapes={array: tuple(values.shape[1:]) for array, values in rows.items()},
        weights=sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        pixels=math.prod(size) * getattr(torch, pixel_dtype(settings)).itemsize,
        widest=max(inputs + outputs for inputs, outputs in sizes.found),
        kept=sum(outputs for _, outputs in sizes.found),
    )


class _LayerSizes:
    """Bytes of the inputs and outputs of each layer that runs, as (inputs, outputs)."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.found: list[tuple[int, int]] = []
        self._bytes = getattr(torch, precision, torch.float32).itemsize
        self._layers = [layer for layer in model.modules() if not any(layer.children())]

    def __enter__(self) -> "_LayerSizes":
        self._hooks = [layer.register_forward_hook(self._count) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        after = _FLOAT32 if isinstance(layer, _ALWAYS_FLOAT32) else self._bytes
        self.found.append((self._bytes * _numbers(inputs), after * _numbers(output)))


def _numbers(values: Any) -> int:
    return sum(tensor.numel() for tensor in _tensors(values))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, torch.Tensor):
            yield value
