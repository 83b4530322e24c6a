"""Saved heads applied to features: the one way in which images are predicted that no head was fitted to.

`fit-heads` predicts test images by it, and whoever has new images predicts them by it, so that both are the same
numbers. Heads are tensors named `<surface>.<part>` or, where every fold has heads of its own,
`fold<number>.<surface>.<part>`. The parts say what kind of heads they are:

- `weights`, `intercept`: a linear map of all arrays side by side;
- `<array>.weights`, `intercept`: the sum of a linear map of each array;
- `core<member>.*` beside `core.weights`: linear maps of what small networks on these arrays put out;
- `head.0.*`, `head.1.*`: a spatial readout, behind a shared space or a core where there is one;
- `head.mean`, `head.scale`, `head.head.*`: a module of HEADS on standardised features, all arrays side by side;
- `scale`, `shift`: (n_vertices,) what brings the heads of this fold to the mean and standard deviation of all folds.

The prediction of an image is the mean over folds of ``scale * head(features of the fold) + shift``.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from featcache.errors import StoreError, first_line
from featcache.machine.documents import DocumentError
from featcache.machine.files import regular_status
from featcache.machine.tensors import refuse_changed_tensors
from heads.config import HEADS
from heads.config.registry import load
from heads.modules.core import CORE, CoreFront, front_of
from heads.modules.linear import SMALL, linear_layer
from heads.modules.saved import tensors_under
from heads.modules.spatial import Rows, Shapes, readout_of

HEAD_METADATA = ("model", "predictions", "features")  # what the header of a file of heads says
SCALE, SHIFT = "scale", "shift"
_BATCH = 256  # images a pass of modules
_MEMBER = re.compile(rf"{CORE}(\d+)\.")
_BLOCK_NUMBERS = 1 << 26  # numbers of weights that are in memory at a time


class HeadTensors(Protocol):
    """Tensors of heads, in memory or in a file."""

    where: str

    def names(self) -> Iterable[str]:
        """Their names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of them."""

    def read(self, name: str, vertices: slice = slice(None)) -> torch.Tensor:
        """One of them, or some of its last axis."""


class InMemory:
    """Tensors of heads in memory. tensors : {name: tensor}"""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors, self.where = tensors, "heads in memory"

    def names(self) -> Iterable[str]:
        """Their names."""
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of them."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, vertices: slice = slice(None)) -> torch.Tensor:
        """One of them, or some of its last axis."""
        tensor = self._tensors[name]
        return tensor[..., vertices] if tensor.ndim else tensor


class InFile:
    """Tensors of heads in a safetensors file, read as they are asked for.

    predictions : name of the prediction store that they made, which the file has to say

    Raises StoreError for a file that is missing, damaged or of other heads.
    """

    def __init__(self, path: Path, predictions: str, remedy: str = "delete it and run 'fit-heads' again") -> None:
        self._path, self._predictions, self._remedy, self.where = path, predictions, remedy, str(path)
        try:
            regular_status(path)
            with safe_open(path, "pt") as file:
                owner = (file.metadata() or {}).get("predictions", predictions)
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if owner != predictions:
                raise StoreError(path, expected=self._expected, found=f"those of {owner}", remedy=remedy)
            refuse_changed_tensors(path, HEAD_METADATA)
        except (OSError, SafetensorError, DocumentError) as error:
            raise self._unreadable(error) from error

    @property
    def _expected(self) -> str:
        return f"the heads that made {self._predictions}"

    def _unreadable(self, error: Exception) -> StoreError:
        missing = isinstance(error, FileNotFoundError)
        found = "no such file" if missing else f"a damaged file ({first_line(error)})"
        remedy = self._remedy.removeprefix("delete it and ") if missing else self._remedy
        return StoreError(self._path, expected=self._expected, found=found, remedy=remedy)

    def names(self) -> Iterable[str]:
        """Their names."""
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of them."""
        return self._shapes[name]

    def read(self, name: str, vertices: slice = slice(None)) -> torch.Tensor:
        """One of them, or some of its last axis."""
        try:
            with safe_open(self._path, "pt") as file:
                if not self._shapes[name] or vertices == slice(None):
                    tensor: torch.Tensor = file.get_tensor(name)
                    return tensor
                part: torch.Tensor = file.get_slice(name)[..., vertices]
                return part
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error


def parse(name: str, surfaces: Sequence[str] = ()) -> tuple[str, int | None, str]:
    """'fold3.lh.part' -> ('lh', 3, 'part'), and 'lh.part' -> ('lh', None, 'part') of heads that all folds share.

    surfaces : names that there are; they may have dots
    """
    fold = re.match(r"fold(\d+)\.", name)
    rest = name.removeprefix(fold[0] if fold else "")
    known = max((one for one in surfaces if rest.startswith(f"{one}.")), key=len, default=rest.partition(".")[0])
    return known, int(fold[1]) if fold else None, rest.removeprefix(f"{known}.")


def by_head(names: Iterable[str], surfaces: Sequence[str] = ()) -> dict[tuple[str, int | None], dict[str, str]]:
    """{(surface, fold): {part: name}} of the tensors of heads, in the order of surfaces and folds."""
    heads: dict[tuple[str, int | None], dict[str, str]] = {}
    for name in names:
        surface, fold, part = parse(name, surfaces)
        heads.setdefault((surface, fold), {})[part] = name
    return dict(sorted(heads.items(), key=lambda item: (item[0][0], -1 if item[0][1] is None else item[0][1])))


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """What has to be known of heads besides their tensors.

    name : of HEADS
    precision : 'bfloat16' where cores multiply in it
    rois : {surface: masks (n_vertices,)} of heads that have one for each ROI
    surfaces : their names
    """

    name: str = "linear"
    precision: str = "float32"
    rois: Mapping[str, Sequence[np.ndarray]] | None = None
    surfaces: Sequence[str] = ()


class SavedHeads:
    """The heads of one model of one subject.

    tensors : of all surfaces
    shapes : {array: shape of a row}, of the arrays that they read, in order
    """

    def __init__(self, tensors: HeadTensors, shapes: Shapes, kind: HeadKind, device: str = "cpu") -> None:
        self._tensors, self._shapes, self._kind, self._device = tensors, dict(shapes), kind, device
        self._heads = by_head(tensors.names(), kind.surfaces)
        self._modules: dict[tuple[str, int | None], Callable[[Rows], torch.Tensor]] = {}

    @property
    def surfaces(self) -> list[str]:
        """Surfaces that they predict."""
        return list(dict.fromkeys(surface for surface, _ in self._heads))

    @property
    def by_fold(self) -> bool:
        """Whether every fold has heads of its own."""
        return any(fold is not None for _, fold in self._heads)

    def fault(self, surface: str) -> str:
        """What keeps these heads from predicting new images; '' where nothing does."""
        heads = [parts for (owner, _), parts in self._heads.items() if owner == surface]
        if not heads:
            return f"no heads of {surface}"
        if self.by_fold and not all(SCALE in parts for parts in heads):
            return "heads of an earlier version, without what brings their folds together"
        known = self._linear_names(heads[0]) or self._is_spatial(heads[0]) or "head.mean" in heads[0]
        return "" if known else "heads of a kind that cannot be applied to new images"

    def refuse_fault(self, surface: str) -> None:
        """Raise StoreError where `fault` names one."""
        if fault := self.fault(surface):
            raise StoreError(
                f"{self._tensors.where}, {surface}",
                expected="heads that predict new images",
                found=fault,
                remedy="delete that file and run 'fit-heads' again",
            )

    @torch.inference_mode()
    def predict(self, surface: str, rows: Sequence[Rows], vertices: slice = slice(None)) -> torch.Tensor:
        """(n_images, n_vertices) float32 predictions on the CPU.

        rows : {array: (n_images, *shape)} as stores have them, of the one set of features, or of each fold's
        vertices : of which vertices; all of them by default

        Raises StoreError where `fault` names one.
        """
        self.refuse_fault(surface)
        folds = [key for key in self._heads if key[0] == surface]
        if len(rows) not in (1, len(folds)):
            raise StoreError(
                f"{self._tensors.where}, {surface}",
                expected=f"heads of {len(rows)} folds, as there are features",
                found=f"those of {len(folds)}",
                remedy="delete that file and run 'fit-heads' again",
            )
        total: torch.Tensor | None = None
        for number, key in enumerate(folds):
            values = self._fold(key, rows[number if len(rows) > 1 else 0], vertices)
            total = values if total is None else total.add_(values)
        assert total is not None
        return total.div_(len(folds))

    def _fold(self, key: tuple[str, int | None], rows: Rows, vertices: slice) -> torch.Tensor:
        parts = self._heads[key]
        if linear := self._linear_names(parts):
            values = self._linear(parts, linear, rows, vertices)
        else:
            values = _in_batches(self._module(key), self._on_device(rows))[:, vertices].cpu()
        if SCALE in parts:
            scale, shift = (self._tensors.read(parts[part], vertices) for part in (SCALE, SHIFT))
            # in float64: of heads that hardly vary, the product and the shift nearly cancel
            values = torch.addcmul(shift.double(), values.double(), scale.double()).float()
        return values

    def _linear_names(self, parts: Mapping[str, str]) -> list[str]:
        """The parts that are weights of linear maps: one of all arrays, or one of each."""
        if "weights" in parts:
            return ["weights"]
        names = [CORE] if any(map(_MEMBER.match, parts)) else list(self._shapes)
        weights = [f"{name}.weights" for name in names]
        return weights if all(name in parts for name in weights) else []

    def _linear(self, parts: Mapping[str, str], names: Sequence[str], rows: Rows, vertices: slice) -> torch.Tensor:
        inputs = self._inputs(parts, rows)
        matrices = [torch.cat([values.flatten(1) for values in inputs.values()], 1)] if names == ["weights"] else []
        matrices = matrices or [inputs[name.removesuffix(".weights")].flatten(1) for name in names]
        matrices = [values.to(self._device).float() for values in matrices]
        n_vertices = self._tensors.shape(parts["intercept"])[0]
        start, stop, _ = vertices.indices(n_vertices)
        n_features = sum(values.shape[1] for values in matrices)
        step = max(_BLOCK_NUMBERS // max(n_features, 1), 1)
        blocks = []
        for first in range(start, max(stop, start + 1), step):
            block = slice(first, min(first + step, stop))
            total = self._tensors.read(parts["intercept"], block).to(self._device).expand(len(matrices[0]), -1)
            for name, values in zip(names, matrices, strict=True):
                total = torch.addmm(total, values, self._tensors.read(parts[name], block).to(self._device))
            blocks.append(total.cpu())
        return torch.cat(blocks, 1)

    def _inputs(self, parts: Mapping[str, str], rows: Rows) -> Rows:
        """The arrays that linear maps read: those of the store, or what the members of a core put out."""
        members = sorted({int(match[1]) for name in parts if (match := _MEMBER.match(name))})
        if not members:
            return {name: rows[name] for name in self._shapes}
        on_device = self._on_device(rows)
        outputs = [_in_batches(self._member(parts, member), on_device) for member in members]
        return {CORE: torch.cat(outputs, -1)}

    def _member(self, parts: Mapping[str, str], member: int) -> Callable[[Rows], torch.Tensor]:
        front = self._front(self._read(parts, f"{CORE}{member}."))
        return lambda rows: front(rows)[CORE].half()  # as heads were fitted to

    def _on_device(self, rows: Rows) -> Rows:
        return {name: rows[name].to(self._device).float() for name in self._shapes}

    def _read(self, parts: Mapping[str, str], prefix: str) -> dict[str, torch.Tensor]:
        return {p.removeprefix(prefix): self._tensors.read(name) for p, name in parts.items() if p.startswith(prefix)}

    @staticmethod
    def _is_spatial(parts: Mapping[str, str]) -> bool:
        return "head.0.bias" in parts or "head.1.bias" in parts

    def _module(self, key: tuple[str, int | None]) -> Callable[[Rows], torch.Tensor]:
        """The module of one fold; made once."""
        if key not in self._modules:
            state = self._read(self._heads[key], "head.")
            made = self._spatial(state) if self._is_spatial(self._heads[key]) else self._standardised(state, key[0])
            self._modules[key] = made
        return self._modules[key]

    def _spatial(self, state: Mapping[str, torch.Tensor]) -> nn.Module:
        first, second = tensors_under(state, "0."), tensors_under(state, "1.")
        if "core.norm.weight" in first:
            front = self._front(first)
            return nn.Sequential(front, readout_of(front.shapes, second, standardised=True)).to(self._device).eval()
        head = nn.Sequential(readout_of(self._shapes, first))
        if second:
            head.append(linear_layer(second["weight"].shape[1], len(second["weight"]), SMALL))
            head[1].load_state_dict(second)
        return head.to(self._device).eval()

    def _front(self, state: Mapping[str, torch.Tensor]) -> CoreFront:
        front = front_of(state, self._shapes)
        front.in_bfloat16 = self._kind.precision == "bfloat16"
        return front.to(self._device).eval()

    def _standardised(self, state: Mapping[str, torch.Tensor], surface: str) -> Callable[[Rows], torch.Tensor]:
        scale = next(parts[SCALE] for (owner, _), parts in self._heads.items() if owner == surface)
        n_vertices = self._tensors.shape(scale)[0]
        rois = (self._kind.rois or {}).get(surface, ())
        head = load(str(HEADS[self._kind.name].module))(len(state["mean"]), n_vertices, rois)
        module = Standardised(head, state["mean"], state["scale"])
        module.load_state_dict(dict(state))
        module = module.to(self._device).eval()
        return lambda rows: module(torch.cat([rows[name].flatten(1) for name in self._shapes], 1))


class Standardised(nn.Module):
    """A trained module that standardises stored features first, as in training.

    mean, scale : (n_features,)
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, head: nn.Module, mean: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n_images, n_vertices) from features as stored, (n_images, n_features)."""
        predictions: torch.Tensor = self.head((features - self.mean) / self.scale)
        return predictions


def _in_batches(head: Callable[[Rows], torch.Tensor], rows: Rows) -> torch.Tensor:
    n_images = len(next(iter(rows.values())))
    return torch.cat([head(batch) for batch in _batches(rows, n_images)])


def _batches(rows: Rows, n_images: int) -> Iterator[Rows]:
    for start in range(0, max(n_images, 1), _BATCH):
        yield {name: values[start : start + _BATCH] for name, values in rows.items()}
