"""Networks of torchvision that classify images: 'torchvision:resnet50'.

Their classifier is left out, and the transform is that of torchvision's default weights.
"""

import difflib
import math
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision import models

from featcache.backbone.sources.table import Network
from featcache.backbone.weights import RANDOM_SEED, file_or_refuse, load_file_into, refuse_unreachable
from featcache.config import BackboneConfig
from featcache.errors import BackboneError, first_line

_CLASSIFIERS = ("fc", "classifier", "head", "heads")  # names that torchvision gives them


def check(config: BackboneConfig) -> None:
    """Raise BackboneError for a name that torchvision lacks, or for weights of another kind."""
    name = _name(config)
    known = models.list_models(module=models)
    if name not in known:
        near = [f"torchvision:{one}" for one in difflib.get_close_matches(name, known, n=3, cutoff=0.4)]
        raise BackboneError(
            "--backbone",
            expected=f"a network of torchvision {torchvision.__version__} that classifies images",
            found=f"{config.resolved_name!r}",
            remedy=f"did you mean {' or '.join(near)}?" if near else "torchvision.models.list_models() lists them",
        )
    if config.resolved_weights not in ("hub", "none"):
        file_or_refuse(config, "hub, none or a weights file")


def load(config: BackboneConfig) -> Network:
    """The network without its classifier, with the weights that are asked for. Raises BackboneError."""
    check(config)
    name = _name(config)
    match config.resolved_weights:
        case "hub":
            model, origin = _pretrained(name), f"torchvision's weights {_weights(name)}"
        case "none":
            model, origin = _random(name), "random weights"
        case path:
            model, origin = _without_classifier(_random(name)), f"file {Path(path).name}"
            load_file_into(model, Path(path), config.label, spare=_CLASSIFIERS)
    return _network(_without_classifier(model), name, origin)


def outline(config: BackboneConfig, device: str) -> Network:
    """The network without its classifier and with no weights of use."""
    check(config)
    with torch.device(device):
        model = models.get_model(_name(config), weights=None, **_quiet(_name(config)))
    return _network(_without_classifier(model), _name(config), "")


def _name(config: BackboneConfig) -> str:
    return config.resolved_name.partition(":")[2]


def _weights(name: str) -> Any:
    """torchvision's default weights of a network."""
    return models.get_model_weights(name).DEFAULT


def _network(model: nn.Module, name: str, origin: str) -> Network:
    return Network(
        model=model,
        transform=_transform(name),
        origin=origin,
        transform_origin=f"as torchvision's {_weights(name)} has it",
        code={"torchvision": torchvision.__version__},
    )


def _random(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model: nn.Module = models.get_model(name, weights=None, **_quiet(name))
        return model


def _quiet(name: str) -> dict[str, bool]:
    """Arguments of networks that warn about the first weights of a training unless they are told how to make them."""
    return {"init_weights": True} if name in ("googlenet", "inception_v3") else {}


def _pretrained(name: str) -> nn.Module:
    """The network with torchvision's weights, of an earlier download or a new one."""
    weights = _weights(name)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    ways_out = "--weights PATH (a file) or --weights none (random)"
    if not cached.is_file():
        refuse_unreachable(weights.url, f"no {cached}", ways_out)
    try:
        # strict: False would take the file of another network; the check of the digest in its name is torch's
        model: nn.Module = models.get_model(name, weights=weights)
        return model
    except (OSError, RuntimeError) as error:
        raise BackboneError(
            "--weights hub",
            expected=f"weights of {name} from {weights.url}",
            found=first_line(error),
            remedy=f"delete {cached} if it is damaged, or use {ways_out}",
        ) from error


def _without_classifier(model: nn.Module) -> nn.Module:
    for name in _CLASSIFIERS:
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, _features_of(getattr(model, name)))
    for name in ("aux_logits", "AuxLogits", "aux1", "aux2"):  # classifiers that help training alone
        if hasattr(model, name):
            setattr(model, name, None if name != "aux_logits" else False)
    return model


def _features_of(classifier: nn.Module) -> nn.Module:
    """What a classifier does before its last linear map, as convnext's norms; nothing for a linear map alone."""
    if isinstance(classifier, nn.Linear):
        return nn.Identity()
    parts = list(classifier.children())
    linear = [k for k, part in enumerate(parts) if isinstance(part, (nn.Linear, nn.Conv2d))]
    return nn.Sequential(*parts[: linear[-1]]) if linear else classifier


def _transform(name: str) -> dict[str, Any]:
    """timm's settings for what torchvision's own transform of the weights does."""
    preset = _weights(name).transforms()
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    return {
        "input_size": (3, crop, crop),
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "crop_pct": _crop_pct(crop, resize),
        "crop_mode": "center",
    }


def _crop_pct(crop: int, resize: int) -> float:
    """The part of a resized image that is cropped, such that timm, which rounds down, resizes to exactly this."""
    part = crop / resize
    return part if math.floor(crop / part) == resize else math.nextafter(part, 0)
