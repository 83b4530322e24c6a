"""Tensors of weights files, under the names that a network has.

Public checkpoints keep the tensors of a network in a container, such as `state_dict` or `teacher`, and under the name
that the network has in what was trained, such as `backbone.` or `module.encoder_q.`. Both are taken off where all
parameters of the network are then there. Of several parts that fit, the outermost is taken, and of these the one whose
words come first in the lists below.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict

from featcache.machine.files import regular_status

# Averages over a training come before what they are averages of, as timm takes them.
CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "state_dict", "model_state_dict", "model"),
    *("net", "network", "weights", "params", "student", "target_encoder", "encoder", "backbone", "visual", "module"),
)
# What a network may be called in another one; they may stand in one another, as in 'module.encoder_q.'.
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.", "encoder_q.", "base_encoder."),
    *("teacher.", "student.", "online_encoder.", "target_encoder.", "momentum_encoder.", "encoder_k.", "visual."),
    *("trunk.", "image_encoder.", "vision_model.", "feature_extractor.", "base_model.", "ema."),
)
_OF_TIMM = ("state_dict_ema", "model_ema", "state_dict", "model")  # containers that timm opens itself
_DEPTH = 4  # containers, and prefixes, within one another


@dataclass(frozen=True)
class Tensors:
    """Tensors of a file.

    state : {name: tensor}
    container, prefix : where they were in the file; '' where nothing was taken off
    """

    state: dict[str, torch.Tensor]
    container: str = ""
    prefix: str = ""

    @property
    def taken_off(self) -> str:
        """What is said of the container and the prefix; '' where there was neither."""
        words = [f"container {self.container!r}"] if self.container else []
        return " and ".join(words + ([f"prefix {self.prefix!r}"] if self.prefix else []))


def read_tensors(path: Path, parameters: Sequence[str]) -> Tensors:
    """The part of a weights file that has all parameters of a network; where none has, what timm would take.

    parameters : names that a network has for them

    No code is run: torch opens tensors, numbers, texts and containers of these alone. What torch and safetensors raise
    of a file is passed on.
    """
    regular_status(path)
    content: Any = load_file(path) if path.suffix == ".safetensors" else _load(path)
    wanted = set(parameters)
    nearest, most = Tensors({}), 0
    for container, state in _states(content):
        for prefix in _prefixes(state):
            found = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
            n_common = len(wanted & found.keys())
            if n_common == len(wanted):
                return Tensors(found, container, prefix)
            if n_common > most:
                nearest, most = Tensors(found, container, prefix), n_common
    if isinstance(content, Mapping):
        whole = _tensors(next((content[name] for name in _OF_TIMM if isinstance(content.get(name), Mapping)), content))
        if whole:  # names of another code may be known to timm
            return Tensors(clean_state_dict(whole))
    return nearest


def _load(path: Path) -> Any:
    # settings of a training, which many checkpoints have as a Namespace: it holds values and does nothing
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(content: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {name: one for name, one in content.items() if isinstance(name, str) and isinstance(one, torch.Tensor)}


def _states(content: Any) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(container, its tensors) of a file's content and of the usual containers in it, the outermost first."""
    waiting: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()
    for _ in range(_DEPTH):
        inner: list[tuple[str, Any]] = []
        for name, one in waiting:
            if isinstance(one, Mapping) and id(one) not in seen:
                seen.add(id(one))
                yield name, _tensors(one)
                inner += [(f"{name}.{word}".lstrip("."), one[word]) for word in CONTAINERS if word in one]
        waiting = inner


def _prefixes(state: Mapping[str, Any]) -> Iterator[str]:
    """None at all, then the usual prefixes that names begin with, and those made of several."""
    waiting = [""]
    for _ in range(_DEPTH):
        yield from waiting
        longer = [old + new for old in waiting for new in PREFIXES]
        waiting = [prefix for prefix in longer if any(name.startswith(prefix) for name in state)]
