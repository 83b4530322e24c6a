"""The sources of networks, and what each of them gives. A new source is one file and one entry in `SOURCES`.

The file of a source has three functions, as `Source` says. What they give is a torch module and what has to be known of
it; which layers are read, how images are decoded and what decides a store's key follow from that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import nn

from featcache.config import BackboneConfig, is_own_code
from featcache.errors import BackboneError

# {what is before the colon of --backbone: module}; a name without a colon is one of timm
SOURCES = {
    "torchvision": "featcache.backbone.sources.torchvision",
    "hf-hub": "featcache.backbone.sources.hf_hub",
    "open_clip": "featcache.backbone.sources.open_clip",
}
_TIMM, _OWN_CODE = "featcache.backbone.sources.timm", "featcache.backbone.sources.own_code"
_NOT_NETWORKS = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".safetensors", ".onnx")


@dataclass(frozen=True)
class OwnTransform:
    """A function from a PIL image to the input of a network, in place of timm's transform.

    call : PIL image -> (3, height, width) float32
    description : what tells it from other transforms, in the key of a store
    size : (3, height, width) of what it gives
    """

    call: Callable[[Image.Image], torch.Tensor]
    description: str
    size: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network as a source gives it.

    model : reads (n_images, 3, height, width) float32; its output is what 'pooled' means
    transform : settings of timm's transform, all of input_size, interpolation, mean, std, crop_pct and crop_mode; or a
        function that takes its place
    origin : where the weights came from, in words
    transform_origin : whose transform it is, in words
    other_tags : what is said where the weights may be of another name, which has another transform; '' for nothing
    code : what decides the rows besides timm, weights and transform, {name: version or digest}
    timm_layers : whether timm reads its layers; else they are submodules, and hooks read them
    layers : submodules that may be read, by name; None: those that `hooks.find_layers` chooses
    memory_format : of its weights and images; a network that is not known to work with channels_last may not
    """

    model: nn.Module
    transform: Mapping[str, Any] | OwnTransform
    origin: str
    transform_origin: str = ""
    other_tags: str = ""
    code: Mapping[str, str] = field(default_factory=dict)
    timm_layers: bool = False
    layers: tuple[str, ...] | None = None
    memory_format: torch.memory_format = torch.channels_last


class Source(Protocol):
    """What the file of a source has."""

    def check(self, config: BackboneConfig) -> None:
        """Raise BackboneError for a network or weights that cannot be had, as far as that is known without loading."""

    def load(self, config: BackboneConfig) -> Network:
        """The network with its weights. Raises BackboneError."""

    def outline(self, config: BackboneConfig, device: str) -> Network:
        """The network for its shapes alone, with any weights, on this device if it can be: 'meta' takes no memory."""


def source_of(config: BackboneConfig) -> Source:
    """The source of a network. Raises BackboneError for a name that is none of a network."""
    name = config.resolved_name
    prefix, colon, rest = name.partition(":")
    if is_own_code(name):
        return _load(_OWN_CODE)
    if colon and rest and prefix in SOURCES:
        return _load(SOURCES[prefix])
    if name.endswith(_NOT_NETWORKS):
        raise BackboneError(
            "--backbone",
            expected="the name of a network",
            found=f"{name}, a file, which is not opened: such files may run code, or say nothing of the network",
            remedy="name the network that it belongs to, and the file with --weights (.safetensors, or a .pth file of "
            "tensors alone)",
        )
    if name.endswith(".py"):
        raise BackboneError(
            "--backbone",
            expected="a file and its function that builds the network",
            found=f"the file alone, {name}",
            remedy=f"name the function, too, such as {name}:build",
        )
    if colon:
        raise BackboneError(
            "--backbone",
            expected=f"a name of timm, file.py:function, or one that begins with {', '.join(f'{p}:' for p in SOURCES)}",
            found=f"{name!r}",
            remedy="correct it",
        )
    return _load(_TIMM)


def _load(module: str) -> Source:
    return cast(Source, import_module(module))


def check_backbone(config: BackboneConfig) -> None:
    """Raise BackboneError for a network or weights that cannot be had, as far as that is known without loading them."""
    source_of(config).check(config)
