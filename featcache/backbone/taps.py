"""What is read of a network: which of its layers, and at how many places of the image each.

Layers of a network of timm are those that its `forward_intermediates` gives: every resolution of a convolutional
network, every block of a transformer. Those of other networks are submodules (see `featcache.backbone.hooks`). One
forward pass reads them all. A layer gives a map, a vector of channels at each place of the image,
which is pooled to a coarser grid. The class token of a transformer belongs to no place and is an array of its own.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import timm
import torch
from torch import nn
from torch.nn import functional

from featcache.backbone.hooks import REGISTERS, device_of
from featcache.config import CLASS_TOKEN, POOLED, LayerConfig
from featcache.errors import BackboneError, ConfigError

_GRID = 7  # most places on a side with --grid auto (docs/decisions/0006)
_LAYERS = 6  # most layers with --layers auto: all of a convolutional network, every other block of a transformer
_POOLS: dict[str | None, Any] = {"avg": functional.adaptive_avg_pool2d, "max": functional.adaptive_max_pool2d}


_Map = tuple[torch.Tensor, torch.Tensor | None]  # (n_images, n_channels, height, width), and class token or None


class Reader(Protocol):
    """How the layers of a network are read: by timm, or by hooks on submodules."""

    def names(self, model: nn.Module) -> list[str]:
        """Layers in the order of the network, first those nearest to the image. Raises BackboneError if it has none."""

    def others(self, model: nn.Module) -> list[str]:
        """All layers that may be named, in the order of the network: those of `names`, and more if there are."""

    def code(self, model: nn.Module) -> dict[str, str]:
        """What decides the arrays besides the names of layers, for keys, {name: value}; see `hooks.REGISTERS`."""

    def forward(
        self, model: nn.Module, images: torch.Tensor, layers: Sequence[str], pooled: bool
    ) -> tuple[torch.Tensor | None, list[_Map]]:
        """The pooled vectors, if they are asked for, and the maps of some layers."""

    def pooled(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """The pooled vectors alone, (n_images, n_features)."""


class TimmReader:
    """Reads the layers of a network of timm."""

    def names(self, model: nn.Module) -> list[str]:
        """Names of the layers that timm can read; see `layer_names`."""
        return layer_names(model)

    def others(self, model: nn.Module) -> list[str]:
        """The same layers: timm reads no others."""
        return layer_names(model)

    def code(self, model: Any) -> dict[str, str]:
        """`REGISTERS` for a network whose counts of tokens look as if there were a class token."""
        counted = _returns_tokens(model) and model.num_prefix_tokens > getattr(model, "num_reg_tokens", 0)
        return dict(REGISTERS) if counted and not has_class_token(model) else {}

    def forward(
        self, model: Any, images: torch.Tensor, layers: Sequence[str], pooled: bool
    ) -> tuple[torch.Tensor | None, list[_Map]]:
        """The pooled vectors, if they are asked for, and the maps of some layers."""
        names = layer_names(model)
        last, maps = _forward(model, images, [names.index(layer) for layer in layers], to_end=pooled)
        return None if last is None else model.forward_head(last), maps

    def pooled(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """The output of the network, which has lost its classifier."""
        vectors: torch.Tensor = model(images)
        return vectors


TIMM = TimmReader()


@dataclass(frozen=True)
class Taps:
    """Layers of one network, and the grid that each is read on.

    layers : names in the order of the network; 'pooled' is the vector that its classifier reads
    grids : (height, width) of each layer but 'pooled', in the same order
    pool : 'avg' or 'max' of the places that become one place of the grid; None where no map is read
    reader : what reads them; it decides no rows besides those of `code`
    code : what decides the arrays besides the names of layers; see `Reader.code`
    """

    layers: tuple[str, ...]
    grids: dict[str, tuple[int, int]]
    pool: str | None
    reader: Reader = field(default=TIMM, compare=False, repr=False)
    code: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def read(self, model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows of each array, {array: rows}, in the order of the network.

        Vectors are (n_images, n_features), maps are (n_images, height, width, n_channels). A layer with a class token
        gives two arrays: the token, named after the layer with '.cls' behind it, and the map.
        """
        (rows,) = read_together(model, images, [self])
        return rows

    def _rows(self, pooled: torch.Tensor | None, maps: Mapping[str, _Map]) -> dict[str, torch.Tensor]:
        rows = {} if pooled is None or POOLED not in self.layers else {POOLED: pooled}
        for layer, grid in self.grids.items():
            values, token = maps[layer]
            if token is not None:
                rows[layer + CLASS_TOKEN] = token
            on_grid = values if values.shape[-2:] == grid else _POOLS[self.pool](values, grid)
            rows[layer] = on_grid.permute(0, 2, 3, 1)
        return rows

    def key(self) -> dict[str, Any]:
        """What decides the rows besides weights and pixels, as JSON has it."""
        if not self.grids:
            return {"layers": list(self.layers)}
        return {
            "layers": list(self.layers),
            "grids": {layer: list(grid) for layer, grid in self.grids.items()},
            "pool": self.pool,
        }


def read_together(model: Any, images: torch.Tensor, taps: Sequence[Taps]) -> list[dict[str, torch.Tensor]]:
    """Rows of each of several taps of one network, as `Taps.read` gives them, in one pass. They share their reader."""
    reader, wanted = taps[0].reader, {layer for each in taps for layer in each.grids}
    if not wanted:
        return [each._rows(reader.pooled(model, images), {}) for each in taps[:1]] * len(taps)
    layers = [layer for layer in reader.others(model) if layer in wanted]
    pooled, maps = reader.forward(model, images, layers, any(POOLED in each.layers for each in taps))
    return [each._rows(pooled, dict(zip(layers, maps, strict=True))) for each in taps]


STEM = "stem"  # what a layer is called to which timm gives no name, as that of TResNet before its stages


def layer_names(model: nn.Module) -> list[str]:
    """Names of the layers that timm can read in this network, first those nearest to the image.

    Raises BackboneError for a network whose layers timm cannot read.
    """
    known: Any = getattr(model, "feature_info", None)
    if not hasattr(model, "forward_intermediates") or not known:
        raise BackboneError(
            "--layers",
            expected=f"a network whose layers timm {timm.__version__} can read",
            found=f"{type(model).__name__}, which has none",
            remedy="use --layers pooled, or another backbone",
        )
    return [layer["module"] or STEM for layer in known]


def choose_taps(model: nn.Module, config: LayerConfig, size: Sequence[int], reader: Reader = TIMM) -> Taps:
    """The layers and grids that the settings mean for a network and images of this size, (3, height, width).

    Raises ConfigError for a layer that the network lacks, and for a grid larger than the map of a layer.
    """
    if config.layers == (POOLED,):
        return Taps(config.layers, {}, None, reader)
    layers = _chosen(reader.names(model), config.layers, reader.others(model))
    maps = map_shapes(model, size, reader, [layer for layer in layers if layer != POOLED])
    grids = {layer: _grid(layer, maps[layer][1:], config.grid) for layer in layers if layer != POOLED}
    return Taps(layers, grids, config.pool if grids else None, reader, reader.code(model) if grids else {})


def map_shapes(
    model: nn.Module, size: Sequence[int], reader: Reader = TIMM, layers: Sequence[str] | None = None
) -> dict[str, tuple[int, int, int]]:
    """Shape of the map of each layer, {layer: (n_channels, height, width)}, for images of (3, height, width).

    layers : of which; None: all that the reader offers
    """
    names = reader.names(model) if layers is None else list(layers)
    if not names:
        return {}
    with torch.inference_mode():
        _, maps = reader.forward(model, torch.zeros(1, *size, device=device_of(model)), names, False)
    shapes = [values.shape for values, _ in maps]
    return {name: (shape[1], shape[2], shape[3]) for name, shape in zip(names, shapes, strict=True)}


def _forward(
    model: Any, images: torch.Tensor, indices: list[int], to_end: bool = True
) -> tuple[torch.Tensor | None, list[_Map]]:
    """Output of the last layer, and the maps of the layers with these numbers.

    to_end : False: layers after the last of these need not be computed, and there is no output of the last
    """
    extra = {"return_prefix_tokens": True} if _returns_tokens(model) else {}
    if to_end:
        last, outputs = model.forward_intermediates(images, indices=indices, output_fmt="NCHW", **extra)
    else:
        extra |= {"stop_early": True, "intermediates_only": True}
        last, outputs = None, model.forward_intermediates(images, indices=indices, output_fmt="NCHW", **extra)
    return last, [_split(model, output) for output in outputs]


def _returns_tokens(model: Any) -> bool:
    """Whether timm gives the tokens of this network that belong to no place.

    It does so only when asked; networks without any lack the argument or fail on it.
    """
    has_tokens = getattr(model, "num_prefix_tokens", 0) > 0
    return has_tokens and "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters


def _split(model: Any, output: Any) -> _Map:
    """The map and the class token of what timm gives of one layer; registers, the other tokens, are left out."""
    if isinstance(output, torch.Tensor):
        return output, None
    values, tokens = output
    return values, tokens[:, 0] if tokens is not None and has_class_token(model) else None


def has_class_token(model: Any) -> bool:
    """Whether the first of the tokens without a place is a class token, in a network of timm.

    timm puts the class token first, where there is one; then a token for distillation or registers. Counts do not say
    so: not every class has a number of registers. The token itself does, in the network or in what embeds its images.
    """
    return any(getattr(part, "cls_token", None) is not None for part in (model, getattr(model, "embeds", None)))


def _chosen(names: list[str], wanted: Sequence[str], others: list[str]) -> tuple[str, ...]:
    """The layers that are wanted by name, number or word: 'pooled' first, then the others in the network's order.

    names, others : layers that words and numbers mean, and all that may be named
    """
    chosen: set[str] = set()
    for choice in wanted:
        match choice:
            case "auto":
                chosen |= {POOLED, *_spread(names)}
            case "all":
                chosen |= {POOLED, *names}
            case number if number.removeprefix("-").isdecimal() and -len(names) <= int(number) < len(names):
                chosen.add(names[int(number)])
            case name if name in (POOLED, *others):
                chosen.add(name)
            case _:
                raise ConfigError(
                    "--layers",
                    expected=f"auto, all, {POOLED}, {', '.join(names)}, or numbers from 0 to {len(names) - 1}",
                    found=f"{choice!r}",
                    remedy="choose among those",
                )
    return tuple(name for name in (POOLED, *others) if name in chosen)


def _spread(names: list[str]) -> list[str]:
    """At most _LAYERS of the names, evenly spaced, the last one among them."""
    step = -(-len(names) // _LAYERS)
    return names[::-1][::step]


def _grid(layer: str, shape: tuple[int, int], grid: str) -> tuple[int, int]:
    """The grid, (height, width), that --grid means for a layer whose map has this shape."""
    height, width = shape
    if grid == "native":
        return height, width
    if grid == "auto":
        return min(height, _GRID), min(width, _GRID)
    if int(grid) > min(shape):
        raise ConfigError(
            "--grid",
            expected="at most the places of each layer",
            found=f"{grid} x {grid} for {layer}, whose map is {height} x {width}",
            remedy="use a smaller grid, --grid auto, other --layers, or a larger --size",
        )
    return int(grid), int(grid)
