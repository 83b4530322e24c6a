"""Image networks of open_clip: 'open_clip:ViT-B-32/openai', or 'open_clip:ViT-B-32' with random weights.

The network is the part that reads images; its output is the embedding that texts are compared with.
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from featcache.backbone.sources.table import Network
from featcache.backbone.weights import RANDOM_SEED, file_or_refuse, load_file_into
from featcache.config import BackboneConfig
from featcache.errors import BackboneError, first_line

_CROP_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}  # timm's words for open_clip's


def check(config: BackboneConfig) -> None:
    """Raise BackboneError where open_clip is not installed or has no such network or weights."""
    if find_spec("open_clip") is None:
        raise BackboneError(
            "--backbone",
            expected="the package open_clip_torch",
            found="none",
            remedy="install it (pip install open_clip_torch), or choose one of timm's CLIP networks, such as "
            "vit_base_patch16_clip_224",
        )
    model, tag = _name_and_tag(config)
    open_clip: Any = import_module("open_clip")
    if model not in open_clip.list_models():
        raise BackboneError(
            "--backbone",
            expected="a model of open_clip",
            found=f"{model!r}",
            remedy="open_clip.list_models() lists them",
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if config.resolved_weights == "hub" and tag not in tags:
        raise BackboneError(
            "--backbone",
            expected=f"open_clip:{model}/TAG with a tag of its weights, one of {', '.join(tags) or 'none'}",
            found=f"{tag!r}" if tag else "no tag",
            remedy="choose one of those, or --weights none (random)",
        )
    if config.resolved_weights not in ("hub", "none"):
        file_or_refuse(config, "hub, none or a weights file")


def load(config: BackboneConfig) -> Network:
    """The network of images with the weights that are asked for. Raises BackboneError."""
    check(config)
    model, tag = _name_and_tag(config)
    match config.resolved_weights:
        case "hub":
            return _create(config, tag, f"open_clip's weights {tag} of {model}")
        case "none":
            return _create(config, None, "random weights")
        case path:
            network = _create(config, None, f"file {Path(path).name}")
            load_file_into(network.model, Path(path), config.label)
            return network


def outline(config: BackboneConfig, device: str) -> Network:
    """The network with random weights, on the CPU: open_clip computes some of them where it makes it."""
    check(config)
    return _create(config, None, "")


def _name_and_tag(config: BackboneConfig) -> tuple[str, str]:
    name, _, tag = config.resolved_name.partition(":")[2].partition("/")
    return name, tag


def _create(config: BackboneConfig, tag: str | None, origin: str) -> Network:
    """The part that reads images; texts are left out."""
    open_clip: Any = import_module("open_clip")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            both, _, _ = open_clip.create_model_and_transforms(_name_and_tag(config)[0], pretrained=tag)
    except (OSError, RuntimeError, ValueError) as error:
        raise BackboneError(
            "--backbone",
            expected=f"{config.resolved_name} from its cache or the hub",
            found=first_line(error),
            remedy="try again where the hub can be reached, or use --weights PATH or --weights none (random)",
        ) from error
    return Network(
        model=both.visual,
        transform=_transform(both.visual.preprocess_cfg),
        origin=origin,
        transform_origin=f"as open_clip's {_name_and_tag(config)[0]}{f'/{tag}' if tag else ''} has it",
        code={"open_clip": version("open_clip_torch")},
        memory_format=torch.contiguous_format,
    )


def _transform(own: dict[str, Any]) -> dict[str, Any]:
    """timm's settings for what open_clip's transform does."""
    size = own["size"]
    return {
        "input_size": (3, size, size) if isinstance(size, int) else (3, *size),
        "interpolation": own["interpolation"],
        "mean": tuple(own["mean"]),
        "std": tuple(own["std"]),
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES[own["resize_mode"]],
    }
