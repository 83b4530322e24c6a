"""What is read of a network: which of its layers, and at how many places of the image each.

Layers are those that timm's `forward_intermediates` gives: every resolution of a convolutional network, every block of
a transformer. One pass reads them all. A layer is a map of channels over places, pooled to a coarser grid on the way
out; the class token of a transformer is no place and stays apart as an array of its own.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional

from featcache.config import POOLED, LayerConfig
from featcache.errors import BackboneError, ConfigError

CLASS_TOKEN = ".cls"  # after a layer's name, of its class token
_GRID = 7  # places a side, at most, where none are asked for (docs/layers.md has the measurement)
_LAYERS = 6  # layers, at most, where none are asked for: all of a convolutional network, every other block otherwise
_POOLS: dict[str, Any] = {"avg": functional.adaptive_avg_pool2d, "max": functional.adaptive_max_pool2d}


@dataclass(frozen=True)
class Taps:
    """Layers of one network, and the grid that each is read on.

    layers : names, in the order of the network; 'pooled' is the vector that its classifier reads
    grids : (height, width) of each layer but 'pooled'
    """

    layers: tuple[str, ...]
    grids: dict[str, tuple[int, int]]
    pool: str

    def read(self, model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """{array: rows}: (n_images, n_features) of vectors, (n_images, height, width, n_channels) of maps."""
        if not self.grids:
            return {POOLED: model(images)}
        names = layer_names(model)
        last, maps = _forward(model, images, [names.index(layer) for layer in self.grids])
        rows = {POOLED: _pooled(model, last)} if POOLED in self.layers else {}
        for layer, (values, token) in zip(self.grids, maps, strict=True):
            if token is not None:
                rows[layer + CLASS_TOKEN] = token
            pooled = values if values.shape[-2:] == self.grids[layer] else _POOLS[self.pool](values, self.grids[layer])
            rows[layer] = pooled.permute(0, 2, 3, 1)
        return rows

    def key(self) -> dict[str, Any]:
        """What decides the rows, besides weights and pixels."""
        if not self.grids:
            return {"layers": list(self.layers)}
        return {
            "layers": list(self.layers),
            "grids": {layer: list(grid) for layer, grid in self.grids.items()},
            "pool": self.pool,
        }


def layer_names(model: nn.Module) -> list[str]:
    """Names of the layers that timm taps in this network, from the image on. Raises BackboneError if it cannot."""
    known: Any = getattr(model, "feature_info", None)
    if not hasattr(model, "forward_intermediates") or not known:
        raise BackboneError(
            "--layers",
            expected=f"a network whose layers timm {timm.__version__} can read",
            found=f"{type(model).__name__}, which has none",
            remedy="use --layers pooled, or another backbone",
        )
    return [layer["module"] for layer in known]


def choose_taps(model: nn.Module, config: LayerConfig, size: Sequence[int]) -> Taps:
    """What the settings mean for a network and images of this size, (3, height, width).

    Raises ConfigError for a layer that it lacks, and for a grid larger than a layer's map.
    """
    if config.layers == (POOLED,):
        return Taps(config.layers, {}, config.pool)
    names = layer_names(model)
    layers = _chosen(names, config.layers)
    maps = map_shapes(model, size)
    return Taps(
        layers,
        {layer: _grid(layer, maps[layer][1:], config.grid) for layer in layers[_n_pooled(layers) :]},
        config.pool,
    )


def map_shapes(model: nn.Module, size: Sequence[int]) -> dict[str, tuple[int, int, int]]:
    """{layer: (n_channels, height, width)} for images of this size, (3, height, width)."""
    device = next(model.parameters()).device
    names = layer_names(model)
    with torch.inference_mode():
        _, maps = _forward(model, torch.zeros(1, *size, device=device), list(range(len(names))))
    return {name: tuple(values.shape[1:]) for name, (values, _) in zip(names, maps, strict=True)}


def _forward(model: Any, images: torch.Tensor, indices: list[int]) -> tuple[torch.Tensor, list]:
    """The last map, and [(map (n_images, n_channels, height, width), class token or None)] of the chosen layers."""
    # a transformer's other tokens come only when asked for; networks without any know no such argument, or fail on it
    has_tokens = getattr(model, "num_prefix_tokens", 0) > 0
    tokens = has_tokens and "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    extra = {"return_prefix_tokens": True} if tokens else {}
    last, maps = model.forward_intermediates(images, indices=indices, output_fmt="NCHW", **extra)
    return last, [_apart(model, one) for one in maps]


def _apart(model: Any, one: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(one, torch.Tensor):
        return one, None
    values, tokens = one
    first = getattr(model, "num_prefix_tokens", 0) > getattr(model, "num_reg_tokens", 0)  # registers carry no meaning
    return values, tokens[:, 0] if first and tokens is not None else None


def _pooled(model: Any, last: torch.Tensor) -> torch.Tensor:
    return model.forward_head(last)


def _chosen(names: list[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """Names, numbers and sets of layers -> 'pooled' if among them, then names in the network's order."""
    found: set[str] = set()
    for one in wanted:
        match one:
            case "auto":
                found |= {POOLED, *_spread(names)}
            case "all":
                found |= {POOLED, *names}
            case number if number.removeprefix("-").isdecimal() and -len(names) <= int(number) < len(names):
                found.add(names[int(number)])
            case name if name in (POOLED, *names):
                found.add(name)
            case _:
                raise ConfigError(
                    "--layers",
                    expected=f"auto, all, {POOLED}, {', '.join(names)}, or numbers from 0 to {len(names) - 1}",
                    found=f"{one!r}",
                    remedy="choose among those",
                )
    return tuple(name for name in (POOLED, *names) if name in found)


def _spread(names: list[str]) -> list[str]:
    """At most _LAYERS of them, evenly, with the last."""
    step = -(-len(names) // _LAYERS)
    return names[::-1][::step]


def _n_pooled(layers: Sequence[str]) -> int:
    return int(POOLED in layers)


def _grid(layer: str, shape: tuple[int, int], grid: str) -> tuple[int, int]:
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
