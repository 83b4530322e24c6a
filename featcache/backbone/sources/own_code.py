"""Networks of one's own: a Python file and its function, 'my_network.py:build'.

The function takes no argument. It returns a torch module, or an object whose attribute `network` is one. The module or
the object may have two attributes more:

- transform: a function from a PIL image to (3, height, width), as the network reads it; or a mapping of size, mean,
  std, interpolation, crop_pct and crop_mode, of which any may be missing;
- layers: names of the submodules that may be read.

The file is compiled from the text whose digest is in the key, so that no earlier form of it can run.
"""

import linecache
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from featcache.backbone.hooks import device_of
from featcache.backbone.sources.table import Network, OwnTransform
from featcache.backbone.sources.timm import transform_of
from featcache.backbone.weights import RANDOM_SEED, load_file_into
from featcache.config import OWN_WEIGHTS, BackboneConfig
from featcache.errors import BackboneError, first_line
from featcache.machine.progress import say

_IMAGENET: Mapping[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
_LARGEST_SIDE = 4096  # pixels of an image as a network reads it
_SIZES_TRIED = ((640, 480), (300, 400))  # (width, height) of images that an own transform has to bring to one size


def check(config: BackboneConfig) -> None:
    """Raise BackboneError for a file or a kind of weights that is not there; run nothing."""
    _read(config)
    _refuse_weights(config)


def outline(config: BackboneConfig, device: str) -> Network:
    """The network itself, on the CPU: its code may need the numbers of its weights."""
    return load(config)


def load(config: BackboneConfig) -> Network:
    """The network that the function builds, with its weights or those of a file. Raises BackboneError."""
    file, text = _read(config)
    _refuse_weights(config)
    function = config.resolved_name.rpartition(":")[2]
    with torch.random.fork_rng(devices=[]), _blamed(file):
        torch.manual_seed(RANDOM_SEED)  # random weights are the same every time
        with _importable(file) as module:
            exec(compile(text, str(file), "exec"), module.__dict__)
            built = _function(module, function, file)()
        model = _model(built, file)
        transform = _transform(built, model, file)
        with torch.inference_mode():  # lazy weights are made here, and a network that fails is named by file and line
            model.eval()(torch.zeros(2, *_size(transform, config), device=device_of(model)))
    origin = f"{function} of {file.name}"
    if config.resolved_weights != OWN_WEIGHTS:
        load_file_into(model, Path(config.resolved_weights), config.label)
        origin = f"file {Path(config.resolved_weights).name} in {origin}"
    return Network(
        model=model,
        transform=transform,
        origin=origin,
        transform_origin=f"as {file.name} has it",
        code={"source": blake2b(text.encode(), digest_size=16).hexdigest(), "function": function},
        timm_layers=_timm_reads(model) and _layers(built) is None,
        layers=_layers(built),
        memory_format=torch.contiguous_format,  # its code may ask for views that channels_last has not
    )


def _read(config: BackboneConfig) -> tuple[Path, str]:
    """The file and its text. Raises BackboneError."""
    file = Path(config.resolved_name.rpartition(":")[0]).absolute()
    try:
        return file, file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"no file {file}" if isinstance(error, FileNotFoundError) else first_line(error)
        raise BackboneError(
            "--backbone", expected="a Python file and its function", found=found, remedy="correct the path"
        ) from error


def _refuse_weights(config: BackboneConfig) -> None:
    """Raise BackboneError for weights that are neither the function's own nor those of a file."""
    weights = config.resolved_weights
    if weights in ("hub", "packaged", "none"):
        raise BackboneError(
            "--weights",
            expected=f"{OWN_WEIGHTS}, or a file, for {config.resolved_name}, whose function decides its weights",
            found=weights,
            remedy=f"leave --weights out, or use --weights {OWN_WEIGHTS}",
        )
    if weights != OWN_WEIGHTS and not Path(weights).is_file():
        raise BackboneError("--weights", expected="a weights file", found=f"no file {weights}", remedy="correct it")


@contextmanager
def _importable(file: Path) -> Iterator[ModuleType]:
    """An empty module for the text of a file, which may import files beside it; nothing else changes."""
    name = f"featcache_own_{blake2b(str(file).encode(), digest_size=6).hexdigest()}"
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses look their module up, also when the network runs
    sys.path.append(str(file.parent))
    linecache.checkcache(str(file))
    try:
        yield module
    finally:
        sys.path.remove(str(file.parent))


@contextmanager
def _blamed(file: Path) -> Iterator[None]:
    """Raise BackboneError, with the line of the file, for whatever its code raises."""
    try:
        yield
    except BackboneError:
        raise
    except (Exception, SystemExit) as error:
        raise BackboneError(
            _place(file, error),
            expected="code that builds a network and reads images",
            found=f"{type(error).__name__}: {first_line(error)}",
            remedy="correct it",
        ) from error


def _place(file: Path, error: BaseException) -> str:
    """The file, and the number of its last line that was running."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}, line {lines[-1]}" if lines else str(file)


def _function(module: ModuleType, name: str, file: Path) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    there = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    raise BackboneError(
        "--backbone",
        expected=f"a function in {file}",
        found=f"no {name}" if found is None else f"{name}, which is none",
        remedy=f"name one: {', '.join(there)}" if there else "write one that returns the network",
    )


def _model(built: Any, file: Path) -> nn.Module:
    model = built if isinstance(built, nn.Module) else getattr(built, "network", None)
    if isinstance(model, nn.Module):
        return model
    raise BackboneError(
        file,
        expected="a function that returns a torch module, or an object whose attribute 'network' is one",
        found=f"a {type(built).__name__}",
        remedy="return the module",
    )


def _timm_reads(model: nn.Module) -> bool:
    """Whether the module is a network of timm with layers that timm reads."""
    return hasattr(model, "forward_intermediates") and bool(getattr(model, "feature_info", None))


def _layers(built: Any) -> tuple[str, ...] | None:
    """The names that it gives; a submodule of that name is a part of the network and says nothing."""
    names = getattr(built, "layers", None)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _transform(built: Any, model: nn.Module, file: Path) -> Mapping[str, Any] | OwnTransform:
    given = getattr(built, "transform", None)
    if isinstance(given, nn.Module) and any(True for _ in given.parameters()):
        given = None  # a part of the network
    if isinstance(given, Mapping):
        return _described(given, file)
    if callable(given):
        return _own(given, file)
    if given is not None:
        raise _no_transform(file, f"a {type(given).__name__}")
    if hasattr(model, "pretrained_cfg"):
        return transform_of(model)
    say(f"{file.name}: no transform, so images are of 224 pixels and normalised as for ImageNet")
    return _IMAGENET


def _no_transform(file: Path, found: str) -> BackboneError:
    return BackboneError(
        file,
        expected="a transform that is a function from a PIL image to a tensor (3, height, width) of one size, or a "
        "mapping of size, mean, std, interpolation, crop_pct, crop_mode",
        found=found,
        remedy="correct the transform",
    )


def _described(given: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """All settings of timm's transform, of those that were given."""
    unknown = given.keys() - {"size", *_IMAGENET.keys()} - {"input_size"}
    size = given.get("size", _IMAGENET["input_size"][1:])
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if unknown or len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= _LARGEST_SIDE for side in sides):
        raise _no_transform(file, f"{sorted(unknown)}" if unknown else f"a size of {size!r}")
    settings = {**_IMAGENET, **{name: value for name, value in given.items() if name != "size"}}
    for name in ("mean", "std"):
        numbers = settings[name]
        if not (isinstance(numbers, (list, tuple)) and len(numbers) == 3):
            raise _no_transform(file, f"a {name} of {numbers!r}")
        settings[name] = tuple(float(number) for number in numbers)
    return settings | {"input_size": (3, *sides)}


def _own(given: Callable[[Image.Image], Any], file: Path) -> OwnTransform:
    """The function, tried on images of two sizes. Raises BackboneError for one that gives no images of one size."""

    def call(image: Image.Image) -> torch.Tensor:
        return torch.as_tensor(given(image)).float()

    shapes = set()
    for width, height in _SIZES_TRIED:
        made = given(Image.new("RGB", (width, height), (128, 128, 128)))
        shapes.add(tuple(made.shape) if isinstance(made, (torch.Tensor, np.ndarray)) else type(made).__name__)
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 3 or shape[0] != 3:
        raise _no_transform(file, f"one that gives {' and '.join(map(str, sorted(map(str, shapes))))}")
    return OwnTransform(call, _description(given), (3, int(shape[1]), int(shape[2])))


def _description(given: Any) -> str:
    """What it says of itself, without addresses in memory, on one line."""
    words = getattr(given, "description", None)
    words = words if isinstance(words, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(given))
    return " ".join(words.split())


def _size(transform: Mapping[str, Any] | OwnTransform, config: BackboneConfig) -> tuple[int, ...]:
    if isinstance(transform, OwnTransform):
        return transform.size
    return tuple(transform["input_size"]) if config.size is None else (3, config.size, config.size)
