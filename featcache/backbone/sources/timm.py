"""Networks of timm, by its own names."""

from dataclasses import replace
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config, resolve_model_data_config
from torch import nn

from featcache.backbone.sizes import refused_size
from featcache.backbone.sources.table import Network
from featcache.backbone.weights import build_network, fixed_size, refuse_unknown, refuse_unpackaged, without_classifier
from featcache.config import BackboneConfig
from featcache.errors import some_of


def check(config: BackboneConfig) -> None:
    """Raise BackboneError for a name that timm lacks, or for packaged weights that are not installed."""
    refuse_unknown(config.resolved_name)
    if config.resolved_weights == "packaged":
        refuse_unpackaged(config)


def load(config: BackboneConfig) -> Network:
    """The network without its classifier. Raises BackboneError, which names what else can be done."""
    refuse_unknown(config.resolved_name)
    with refused_size(config.resolved_name, config.size or "its own"):
        model, origin = build_network(config)
    return replace(network_of_timm(model, origin), other_tags=_other_tags(config))


def outline(config: BackboneConfig, device: str) -> Network:
    """The network without its classifier and with no weights of use."""
    check(config)
    with torch.device(device):
        model = timm.create_model(config.resolved_name, **fixed_size(config))
    return network_of_timm(without_classifier(model, config.resolved_name), "")


def _other_tags(config: BackboneConfig) -> str:
    """What is said of a file whose tag nobody named, where other tags of the network have another transform."""
    name = config.resolved_name
    if config.resolved_weights in ("hub", "packaged", "none") or "." in name:
        return ""
    own = _transform_of_tag(name)
    others = [tag for tag in timm.list_pretrained(f"{name}.*") if _transform_of_tag(tag) != own]
    if not others:
        return ""
    return (
        f"weights of {some_of(others)} are read behind other transforms: if the file has those, name them with "
        f"--backbone, such as {others[0]}"
    )


def _transform_of_tag(name: str) -> dict[str, Any]:
    known: Any = timm.models.get_pretrained_cfg(name)
    settings: dict[str, Any] = resolve_data_config(pretrained_cfg=known.to_dict())  # type: ignore[no-untyped-call]
    return settings


def network_of_timm(model: nn.Module, origin: str, whose: str = "") -> Network:
    """A model of timm with the transform of its weights.

    whose : where its transform came from, in words; '' where timm has it
    """
    return Network(
        model=model,
        transform=transform_of(model),
        origin=origin,
        transform_origin=whose or transform_origin_of(model),
        timm_layers=True,
    )


def transform_origin_of(model: Any) -> str:
    """Whose transform timm has for one of its models, in words."""
    settings = model.pretrained_cfg
    tag = settings.get("tag")
    return f"as timm's {settings.get('architecture')}{f'.{tag}' if tag else ', which has no tag,'} has it"


def transform_of(model: nn.Module) -> dict[str, Any]:
    """timm's settings of the transform for the weights of one of its models."""
    settings: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return settings
