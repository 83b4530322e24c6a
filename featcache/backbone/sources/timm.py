"""Networks of timm, by its own names."""

from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from featcache.backbone.sizes import refused_size
from featcache.backbone.sources.table import Network
from featcache.backbone.weights import build_network, fixed_size, refuse_unknown, refuse_unpackaged, without_classifier
from featcache.config import BackboneConfig


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
    return network_of_timm(model, origin)


def outline(config: BackboneConfig, device: str) -> Network:
    """The network without its classifier and with no weights of use."""
    check(config)
    with torch.device(device):
        model = timm.create_model(config.resolved_name, **fixed_size(config))
    return network_of_timm(without_classifier(model, config.resolved_name), "")


def network_of_timm(model: nn.Module, origin: str) -> Network:
    """A model of timm with the transform of its weights."""
    return Network(model=model, transform=transform_of(model), origin=origin, timm_layers=True)


def transform_of(model: nn.Module) -> dict[str, Any]:
    """timm's settings of the transform for the weights of one of its models."""
    settings: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return settings
