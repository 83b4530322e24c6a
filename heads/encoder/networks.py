"""Networks as they made features: loaded again, and held against what the features say of them."""

from collections.abc import Mapping
from typing import Any

import timm

from featcache.backbone.extent import fit_of, size_of
from featcache.backbone.hooks import REGISTERS
from featcache.backbone.network import TorchBackbone, load_backbone
from featcache.config import BackboneConfig, label_of
from featcache.errors import BackboneError
from featcache.machine.progress import say
from heads.encoder.parts import FeaturePart


def load_network(part: FeaturePart, weights: str, device: str) -> TorchBackbone:
    """The network of some features, as it read them. Raises BackboneError for another, or for other weights.

    weights : file, or what --weights calls them
    """
    transform, own = part.key.transform, "own" in part.key.transform
    config = BackboneConfig(
        name=part.network,
        weights=weights,
        size=None if own else size_of(transform),
        fit=None if own else fit_of(transform),
    )
    return as_it_read(part, load_backbone(config, device))


def as_it_read(part: FeaturePart, backbone: TorchBackbone) -> TorchBackbone:
    """The network behind the transform that the features were made with, its batch norms fused as they were.

    Raises BackboneError for a network of other weights, code or transform.
    """
    key = part.key
    _refuse(part, "weights", key.weights, backbone.digest)
    code = {name: value for name, value in key.code.items() if name not in REGISTERS}
    _refuse(part, "code", code, dict(backbone.code))
    _refuse_other_tokens(part, part.taps(backbone).code)
    if "own" in key.transform:
        _refuse(part, "transform", dict(key.transform), dict(backbone.transform_settings))
    elif dict(backbone.transform_settings) != dict(key.transform):
        backbone = backbone.with_transform(key.transform)
    if key.timm and key.timm != timm.__version__:
        say(f"{key.backbone}: features were made with timm {key.timm}, and {timm.__version__} reads the images now")
    return backbone.optimised(part.taps(backbone)) if key.fused else backbone


def _refuse(part: FeaturePart, what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise BackboneError(
            f"{part.network}, weights {part.weights}",
            expected=f"the {what} that made the features, {_words(expected)}",
            found=_words(found),
            remedy="name the network with --backbone and its weights with --weights",
        )


def _refuse_other_tokens(part: FeaturePart, code: Mapping[str, str]) -> None:
    """Raise BackboneError where the first register was kept as a class token, as earlier versions did."""
    if (kept := {name: value for name, value in part.key.code.items() if name in REGISTERS}) != code:
        raise BackboneError(
            part.network,
            expected=f"features whose tokens are {_words(code) or 'as they were'}",
            found=f"those of an earlier version, with {_words(kept) or 'a register as a class token'}",
            remedy="extract them again, and fit heads on them",
        )


def _words(value: Any) -> str:
    return ", ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, Mapping) else str(value)


def renamed(network: str, weights: str | None, given: BackboneConfig | None) -> tuple[str, str | None]:
    """What --backbone and --weights are for a network: as given, where that is the same network, or as they were.

    weights : None where they are not known; then those that are given are tried, whatever network they are given for
    """
    if given is None or (given.name is not None and label_of(given.name) != label_of(network)):
        return network, weights
    return given.name or network, (given.weights if given.name or weights is None else None) or weights
