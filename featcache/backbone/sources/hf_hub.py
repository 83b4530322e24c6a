"""Networks in timm's format on the Hugging Face hub: 'hf-hub:owner/name'."""

from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from torch import nn

from featcache.backbone.sources.table import Network
from featcache.backbone.sources.timm import network_of_timm
from featcache.backbone.weights import RANDOM_SEED, file_or_refuse, load_file_into, refuse_unreachable
from featcache.config import BackboneConfig
from featcache.errors import BackboneError, first_line
from featcache.machine.documents import read_json


def check(config: BackboneConfig) -> None:
    """Raise BackboneError for a network that is neither in the cache nor within reach, or weights of another kind."""
    _description(config)
    if config.resolved_weights not in ("hub", "none"):
        file_or_refuse(config, "hub, none or a weights file")


def load(config: BackboneConfig) -> Network:
    """The network without its classifier, with the weights that are asked for. Raises BackboneError."""
    check(config)
    match config.resolved_weights:
        case "hub":
            file = _file(config, "model.safetensors")
            return network_of_timm(_bare(_create(config, file)), f"weights of {_repository(config)} on the hub")
        case "none":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(RANDOM_SEED)
                return network_of_timm(_bare(_create(config)), "random weights")
        case path:
            model = _bare(_create(config))
            load_file_into(model, Path(path), config.label, spare=_classifiers(model))
            return network_of_timm(model, f"file {Path(path).name}")


def outline(config: BackboneConfig, device: str) -> Network:
    """The network without its classifier and with no weights of use."""
    with torch.device(device):
        return network_of_timm(_bare(_create(config)), "")


def _repository(config: BackboneConfig) -> str:
    return config.resolved_name.partition(":")[2]


def _file(config: BackboneConfig, name: str) -> Path:
    """A file of the repository, of an earlier download or a new one. Raises BackboneError."""
    repository = _repository(config)
    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    found = f"no {name} of {repository} in the cache {constants.HF_HUB_CACHE}"
    refuse_unreachable(
        constants.ENDPOINT, found, "a network that is in the cache, or --weights PATH with a name of timm"
    )
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:  # errors of the hub are of these kinds
        raise BackboneError(
            "--backbone",
            expected=f"{name} of {repository} on the hub",
            found=first_line(error),
            remedy="correct the name; the network must be in timm's format, with weights in safetensors",
        ) from error


def _description(config: BackboneConfig) -> dict[str, Any]:
    """What the repository says of the network: timm's name of it, its arguments and its transform."""
    file = _file(config, "config.json")
    try:
        description: dict[str, Any] = read_json(file)
        if timm.is_model(description["architecture"]):
            return description
        found = f"the architecture {description['architecture']!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{file}, which is none ({first_line(error)})"
    raise BackboneError(
        "--backbone",
        expected=f"a network of timm {timm.__version__} in {_repository(config)}",
        found=found,
        remedy="name another, or build the network in a Python file, --backbone FILE.py:FUNCTION",
    )


def _create(config: BackboneConfig, weights: Path | None = None) -> nn.Module:
    description = _description(config)
    settings = dict(description.get("pretrained_cfg", description))
    n_classes = description.get("num_classes", settings.get("num_classes"))
    settings = {name: value for name, value in settings.items() if name not in ("architecture", "num_features")}
    arguments = dict(description.get("model_args") or {})
    if settings.get("fixed_input_size") and config.size is not None:
        arguments["img_size"] = config.size
    if n_classes is not None:
        arguments["num_classes"] = settings["num_classes"] = n_classes
    try:
        return timm.create_model(
            description["architecture"],
            pretrained=weights is not None,
            pretrained_cfg=settings,
            pretrained_cfg_overlay=None if weights is None else {"file": str(weights), "source": None},
            **arguments,
        )
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise BackboneError(
            "--backbone",
            expected=f"weights of {description['architecture']} in {_repository(config)}",
            found=first_line(error),
            remedy="name another network",
        ) from error


def _bare(model: nn.Module) -> nn.Module:
    model.reset_classifier(0)  # type: ignore[operator]
    return model


def _classifiers(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
