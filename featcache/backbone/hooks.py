"""Layers of any torch module: outputs of its submodules, seen by hooks in one forward pass.

What an output is, is told by its shape on two images: (n, channels, height, width) and (n, height, width, channels) are
maps; (n, tokens, channels) and (tokens, n, channels) are maps too, behind up to 8 tokens that belong to no place, the
first of which is taken for the class token, unless the network names registers among its parameters and no class token;
(n, channels) is a map of one place.

Where nobody names layers they are chosen so. Parts are the outermost submodules that are made of others. Of a network
whose parts differ in resolution they are the last part of each, which is where a stage ends. Of one with a single
resolution, such as a transformer, they are the blocks: the largest group of parts of one class within one parent. Of
one without parts they are the last convolution, norm or the like at each resolution.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from featcache.errors import BackboneError, some_of

_MOST_PREFIX_TOKENS = 8
# In the key of features of networks that have registers and no class token. Earlier versions kept the first register of
# some of them as a class token: their features have that array, and are not these.
REGISTERS = {"tokens": "registers"}
_REGISTERS = re.compile(r"(reg|register|storage)(_?tokens?|s)?")
_PROBES = 2  # images of the pass that finds the layers: two, so that their axis is told from others


@dataclass(frozen=True)
class Layout:
    """What the axes of an output are.

    axes : numbers of the axes of images, then places (none, one of tokens, or height and width), then channels
    n_prefix : tokens before those of places
    has_class : whether the first of these is a class token
    grid : (height, width) of the places
    """

    axes: tuple[int, ...]
    n_prefix: int
    grid: tuple[int, int]
    n_channels: int
    has_class: bool = True

    def split(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The map, (n_images, n_channels, height, width), and the class token, (n_images, n_channels), or None."""
        values = output.permute(self.axes)
        if len(self.axes) == 4:
            return values.permute(0, 3, 1, 2), None
        tokens = values[:, None] if len(self.axes) == 2 else values
        places = tokens[:, self.n_prefix :].transpose(1, 2).unflatten(2, self.grid)
        return places, tokens[:, 0] if self.n_prefix and self.has_class else None

    def vector(self, output: torch.Tensor) -> torch.Tensor:
        """(n_images, n_channels): the output itself, its class token, or the mean over its places."""
        places, token = self.split(output)
        return places.mean((2, 3)) if token is None else token


def layout_of(shape: Sequence[int], size: Sequence[int]) -> Layout | None:
    """Layout of an output of this shape for _PROBES images of (3, height, width); None where it is of no known kind."""
    match tuple(shape):
        case (n, channels) if n == _PROBES:
            return Layout((0, 1), 0, (1, 1), channels)
        case (n, tokens, channels) if n == _PROBES and (found := _places(tokens, size)):
            return Layout((0, 1, 2), *found, channels)
        case (tokens, n, channels) if n == _PROBES and (found := _places(tokens, size)):
            return Layout((1, 0, 2), *found, channels)
        case (n, a, b, c) if n == _PROBES:
            if not _alike((b, c), size) and _alike((a, b), size):
                return Layout((0, 1, 2, 3), 0, (a, b), c)
            return Layout((0, 2, 3, 1), 0, (b, c), a)
    return None


def _alike(grid: tuple[int, int], size: Sequence[int]) -> bool:
    """Whether a grid has the proportions of an image of (3, height, width), to the rounding of one place."""
    return abs(grid[0] * size[2] - grid[1] * size[1]) < max(size[1:]) and min(grid) > 0


def _places(n_tokens: int, size: Sequence[int]) -> tuple[int, tuple[int, int]] | None:
    """(number of prefix tokens, grid) of a sequence of tokens: the fewest before a grid of the image's proportions."""
    for n_prefix in range(_MOST_PREFIX_TOKENS + 1):
        n = n_tokens - n_prefix
        height = round(math.sqrt(n * size[1] / size[2])) if n > 0 else 0
        if height and n % height == 0 and height * size[2] == n // height * size[1]:
            return n_prefix, (height, n // height)
    return None


@dataclass(frozen=True)
class HookReader:
    """Reads submodules of one network by hooks; see `featcache.backbone.taps.Reader`.

    chosen : names of the layers that 'auto', 'all' and numbers mean, first those that run first
    layouts : of every submodule that can be read, in the order in which they run; of the network itself under ''
    """

    chosen: tuple[str, ...]
    layouts: Mapping[str, Layout]

    def names(self, model: nn.Module) -> list[str]:
        """The layers that are offered. Raises BackboneError where there are none."""
        if not self.chosen:
            raise BackboneError(
                "--layers",
                expected="a network with submodules that give maps, tokens or vectors of each image once",
                found=f"none in {type(model).__name__}",
                remedy="use --layers pooled",
            )
        return list(self.chosen)

    def others(self, model: nn.Module) -> list[str]:
        """All layers that may be named, in the order in which they run."""
        return [name for name in self.layouts if name]

    def code(self, model: nn.Module) -> dict[str, str]:
        """What keys say of registers that are no class token."""
        return dict(REGISTERS) if any(one.n_prefix and not one.has_class for one in self.layouts.values()) else {}

    def forward(
        self, model: nn.Module, images: torch.Tensor, layers: Sequence[str], pooled: bool
    ) -> tuple[torch.Tensor | None, list[tuple[torch.Tensor, torch.Tensor | None]]]:
        """The pooled vectors, or None, and the map and the class token, or None, of each layer."""
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, output: Any) -> None:
            # a copy: the module that comes next may write into it
            seen[name] = tensor_of(output).clone()

        with _hooked(model, layers, keep):
            output = model(images)
        maps = [self.layouts[name].split(seen[name]) for name in layers]
        return (self._vectors(model, output) if pooled else None), maps

    def pooled(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """The output of the network as vectors, (n_images, n_features)."""
        return self._vectors(model, model(images))

    def _vectors(self, model: nn.Module, output: Any) -> torch.Tensor:
        if "" not in self.layouts:
            raise BackboneError(
                "--layers pooled",
                expected="a network whose output is vectors, tokens or a map of each image",
                found=f"{_described(output)} from {type(model).__name__}",
                remedy=f"name other --layers, such as {some_of(self.chosen)}" if self.chosen else "let it return those",
            )
        return self.layouts[""].vector(tensor_of(output))


def _described(output: Any) -> str:
    try:
        return f"a tensor {tuple(tensor_of(output).shape)}"
    except TypeError:
        return f"a {type(output).__name__}"


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor that a module gives: its output, or the first in a sequence or mapping. Raises TypeError."""
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, torch.Tensor):
        return values
    for value in values if not isinstance(values, str) and hasattr(values, "__iter__") else ():
        if isinstance(value, torch.Tensor):
            return value
    raise TypeError(f"no tensor in a {type(output).__name__}")


@contextmanager
def _hooked(model: nn.Module, names: Sequence[str], keep: Callable[[str, Any], None]) -> Iterator[None]:
    """Give `keep` the name and the output of each of these submodules whenever it runs."""
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def device_of(model: nn.Module) -> torch.device:
    """Device of a network; the CPU for one without any tensors."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def find_layers(model: nn.Module, size: Sequence[int], wanted: Sequence[str] | None = None) -> HookReader:
    """A reader of the layers of a network, for images of (3, height, width).

    wanted : names of submodules, in any order; None: chosen as the head of this file says

    Raises BackboneError for a name that cannot be read. What the network itself raises is passed on.
    """
    layouts = _probe(model, size)
    if wanted is None:
        return HookReader(tuple(_choose(model, layouts)), layouts)
    for name in wanted:
        if not name or name not in layouts:
            raise BackboneError(
                "layers of the network",
                expected="submodules that run once and give maps, tokens or vectors",
                found=f"{name!r}",
                remedy=f"choose among {some_of([one for one in layouts if one], 30)}",
            )
    return HookReader(tuple(name for name in layouts if name in set(wanted)), layouts)


def _probe(model: nn.Module, size: Sequence[int]) -> dict[str, Layout]:
    """Layouts of the submodules that run once, in the order in which they end; of the network itself under ''."""
    shapes: dict[str, tuple[int, ...]] = {}
    runs: Counter[str] = Counter()

    def keep(name: str, output: Any) -> None:
        runs[name] += 1
        try:
            shapes[name] = tuple(tensor_of(output).shape)
        except TypeError:
            shapes[name] = ()

    with torch.inference_mode(), _hooked(model, [name for name, _ in model.named_modules()], keep):
        model(torch.zeros(_PROBES, *size, device=device_of(model)))
    layouts = {name: layout_of(shape, size) for name, shape in shapes.items() if runs[name] == 1}
    has_class = not _has_registers_alone(model)
    return {name: replace(layout, has_class=has_class) for name, layout in layouts.items() if layout is not None}


def _has_registers_alone(model: nn.Module) -> bool:
    """Whether a network has parameters that are registers by their name, and none that is a class token."""
    names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
    return any(map(_REGISTERS.fullmatch, names)) and not any("cls" in name or "class" in name for name in names)


def _choose(model: nn.Module, layouts: Mapping[str, Layout]) -> list[str]:
    """The submodules in which stages or blocks end."""
    whole = {name: layout.grid for name, layout in layouts.items() if name}
    grids = {name: grid for name, grid in whole.items() if grid != (1, 1)} or whole
    parts = _opened(model, _parts(model, "", grids), grids)
    while len(parts) == 1 and (within := _opened(model, _parts(model, parts[0], grids), grids)):
        parts = within
    if len({grids[name] for name in parts}) > 1:
        return _last_of_each(parts, grids)
    inner = [name for name in grids if _is_part(model.get_submodule(name))]
    if len({grids[name] for name in inner}) == 1 and len(group := _largest_group(model, inner)) > 1:
        return group
    single = [name for name in grids if _is_operation(model.get_submodule(name))]
    return _last_of_each(single, grids) or list(grids)


def _last_of_each(names: Sequence[str], grids: Mapping[str, tuple[int, int]]) -> list[str]:
    """The last of the names at each grid, in the order in which they run."""
    wanted = set(names)
    last = {grid: name for name, grid in grids.items() if name in wanted}
    return [name for name in grids if name in last.values()]


def _parts(model: nn.Module, within: str, names: Collection[str]) -> list[str]:
    """The outermost of these names within a submodule that are stages or blocks."""
    found: list[str] = []
    for child, module in model.get_submodule(within).named_children():
        name = f"{within}.{child}" if within else child
        if name in names and _is_part(module):
            found.append(name)
        else:  # a list of modules, or one whose output is no map, such as a whole network that gives a vector
            found += _parts(model, name, names)
    return found


def _opened(model: nn.Module, parts: Sequence[str], grids: Mapping[str, tuple[int, int]]) -> list[str]:
    """The parts, with those in place of a sequence that differ in resolution: it is several stages, not one."""
    opened: list[str] = []
    for name in parts:
        within = _parts(model, name, grids) if isinstance(model.get_submodule(name), nn.Sequential) else []
        opened += within if len({grids[part] for part in within}) > 1 else [name]
    return opened


def _is_part(module: nn.Module) -> bool:
    """Whether a module is made of others and has parameters: a stage or a block, not one operation."""
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _is_operation(module: nn.Module) -> bool:
    """Whether a module is one operation with parameters, such as a convolution."""
    return not any(True for _ in module.children()) and any(True for _ in module.parameters())


def _largest_group(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The most of one class within one parent; of groups of equal size, the one that is outside."""
    groups: dict[tuple[str, type], list[str]] = {}
    for name in names:
        groups.setdefault((name.rpartition(".")[0], type(model.get_submodule(name))), []).append(name)
    return max(groups.values(), key=lambda group: (len(group), -group[0].count(".")), default=[])
