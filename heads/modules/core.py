"""A small convolutional network on cached maps, shared by all subjects, with a readout for each of their vertices.

Frozen layers are bent towards the responses by a few convolutions that every subject trains, and every vertex reads the
result at its own places. This is a head on the cache: no image is decoded and no backbone runs.

Source: Cowley, Stan, Pillow and Smith, Compact deep neural network models of visual cortex (2023).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from featcache.dataset.subject import Subject
from heads.config import CoreConfig, SpatialConfig, TrainConfig
from heads.modules.by_subject import SpatialHeads
from heads.modules.linear import SMALL
from heads.modules.saved import saved_shapes, tensors_under
from heads.modules.spatial import Rows, Shapes, Standardise, readout_of

CORE = "core"  # name of the core's output among rows, which have the names of arrays
_FRONT = "heads.standardise."  # prefix of the tensors of the part that all subjects share, in a checkpoint
_HALVED = 8  # places a side from which the core halves the grid


class Core(nn.Module):
    """{array: standardised rows} -> {'core': (n_images, height, width, n_channels)}.

    Every layer is brought to `hidden` channels by a linear map and to the grid of the layer with most places; their sum
    goes through ReLU and a separable convolution, which halves a grid of 8 places or more, to `channels` channels, and
    then through residual blocks.

    shapes : {array: shape of a row}
    config : `hidden`, `channels` and `blocks`
    """

    def __init__(self, shapes: Shapes, config: CoreConfig | TrainConfig) -> None:
        super().__init__()
        self._grid = max((_grid_of(shape) for shape in shapes.values()), key=math.prod)
        self.inputs = nn.ModuleList(nn.Linear(shape[-1], config.hidden, bias=False) for shape in shapes.values())
        self.norm = nn.BatchNorm2d(config.hidden)
        self.step = nn.Sequential(*_separable(config.hidden, config.channels, _stride(self._grid)))
        self.blocks = nn.ModuleList(_Block(config.channels) for _ in range(config.blocks))

    @staticmethod
    def shape(shapes: Shapes, config: CoreConfig | TrainConfig) -> tuple[int, int, int]:
        """Shape of a row of the output."""
        height, width = max((_grid_of(shape) for shape in shapes.values()), key=math.prod)
        stride = _stride((height, width))
        return -(-height // stride), -(-width // stride), config.channels

    def forward(self, rows: Rows) -> Rows:
        layers = [self._on_grid(linear(values)) for linear, values in zip(self.inputs, rows.values(), strict=True)]
        values = functional.relu(self.norm(torch.stack(layers).sum(0)))
        values = functional.relu(self.step(values))
        for block in self.blocks:
            values = block(values)
        return {CORE: values.permute(0, 2, 3, 1)}

    def _on_grid(self, values: torch.Tensor) -> torch.Tensor:
        """(n_images, n_channels, height, width) on the common grid; a vector is the same at all places."""
        maps = values[:, None, None] if values.ndim == 2 else values
        maps = maps.permute(0, 3, 1, 2)
        if maps.shape[2:] == self._grid:
            return maps
        if maps.shape[2:] == (1, 1):
            return maps.expand(-1, -1, *self._grid)
        return functional.interpolate(maps, self._grid, mode="bilinear")


class _Block(nn.Module):
    """Residual block of one separable convolution; it starts as the identity."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        layers = _separable(n_channels, n_channels, 1)
        nn.init.zeros_(layers[-1].weight)
        self.step = nn.Sequential(*layers)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return functional.relu(values + self.step(values))


def _separable(n_inputs: int, n_outputs: int, stride: int) -> list[Any]:
    """A 3 x 3 convolution within channels, batch norm and ReLU, then one between channels and batch norm."""
    return [
        nn.Conv2d(n_inputs, n_inputs, 3, stride, padding=1, groups=n_inputs, bias=False),
        nn.BatchNorm2d(n_inputs),
        nn.ReLU(),
        nn.Conv2d(n_inputs, n_outputs, 1, bias=False),
        nn.BatchNorm2d(n_outputs),
    ]


def _grid_of(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 3 else (1, 1)


def _stride(grid: tuple[int, int]) -> int:
    return 2 if min(grid) >= _HALVED else 1


class CoreFront(Standardise):
    """The part that all subjects share: standardisation of the rows, then the core.

    in_bfloat16 : whether the core multiplies in bfloat16; what it puts out is float32 all the same
    shapes : {'core': shape of a row} of what it puts out
    """

    in_bfloat16 = False

    def __init__(self, shapes: Shapes, config: CoreConfig | TrainConfig) -> None:
        super().__init__(shapes)
        self.core, self.shapes = Core(shapes, config), {CORE: Core.shape(shapes, config)}

    def forward(self, rows: Rows) -> Rows:
        rows = super().forward(rows)
        device = next(iter(rows.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.in_bfloat16 or torch.is_autocast_enabled(device)):
            outputs = self.core(rows)
        return {name: values.float() for name, values in outputs.items()}


class CoreHeads(SpatialHeads):
    """The core of all subjects, and a spatial readout of its output for each.

    shapes : {array: shape of a row}
    """

    standardise: CoreFront

    def __init__(self, shapes: Shapes, subjects: Sequence[Subject], config: CoreConfig | TrainConfig) -> None:
        readout = SpatialConfig(rank=1, token_dropout=config.core_dropout, smoothness=0.0)
        super().__init__({CORE: Core.shape(shapes, config)}, subjects, readout, SMALL)
        self.standardise, self._read = CoreFront(shapes, config), dict(shapes)

    def saved_surface(self, subject: str, surface: str) -> dict[str, torch.Tensor]:
        """The core and the readout of one surface: the tensors of the same heads of that surface alone."""
        outputs = self.columns[subject, surface]
        number = f"subjects.{self.names.index(subject)}."
        readout = {
            n.replace(number, "subjects.0."): t[outputs] for n, t in self.state_dict().items() if n.startswith(number)
        }
        return {n: t for n, t in self.state_dict().items() if n.startswith("standardise.")} | readout


def has_core(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether these heads of a checkpoint read the output of a core."""
    return f"{_FRONT}core.norm.weight" in tensors


def core_head_of(tensors: Mapping[str, torch.Tensor], names: Sequence[str], subject: str, surface: str) -> nn.Module:
    """Core and readout of one subject's surface, in evaluation: {array: rows} -> (n_images, n_vertices).

    Parameters
    ----------
    tensors : heads of a checkpoint that have a core, of either stage
    names : subjects of the checkpoint, in its order
    """
    outputs = tensors[f"columns.{subject}.{surface}"]
    of_subject = tensors_under(tensors, f"heads.subjects.{list(names).index(subject)}.")
    front = front_of(tensors_under(tensors, _FRONT), dict(saved_shapes(tensors)))
    readout = readout_of(front.shapes, {name: tensor[outputs] for name, tensor in of_subject.items()}, True)
    return nn.Sequential(front, readout).eval().requires_grad_(False)


def front_of(state: Mapping[str, torch.Tensor], shapes: Shapes) -> CoreFront:
    """The shared part that has these tensors, by their names in it. shapes : {array: shape of a row} that it reads"""
    channels, hidden = state["core.step.3.weight"].shape[:2]
    blocks = {name.split(".")[2] for name in state if name.startswith("core.blocks.")}
    front = CoreFront(shapes, CoreConfig(hidden=hidden, channels=channels, blocks=len(blocks)))
    front.load_state_dict(dict(state))
    return front
