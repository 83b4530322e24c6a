"""Checkpoints of trained backbones: what they are, what they saw, and how to load them.

A checkpoint is a folder `<work>/checkpoints/<label>-<fingerprint>`:

- `checkpoint.json`: key, image ids it saw, scores, and the names of the folders that are current; replaced in one
  step, so that whatever it names is whole;
- `epoch-<n>/backbone.safetensors` under timm's names, `epoch-<n>/heads.safetensors`: the best epoch so far;
- `state-<n>/`: what an interrupted run goes on from; gone when the run is finished.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file

from featcache.backbone.network import Backbone, load_backbone
from featcache.backbone.weights import first_line
from featcache.config import BackboneConfig, fingerprint
from featcache.dataset.digests import file_digest
from featcache.dataset.subject import Subject
from featcache.errors import CheckpointError
from featcache.machine.files import replace_json
from featcache.machine.progress import say

FOLDER = "checkpoints"
FORMAT = 1
_ABOUT = "checkpoint.json"
_ORIGIN = "featcache checkpoint"  # in the header of its weights files


@dataclass(frozen=True)
class Checkpoint:
    """One trained backbone with its heads.

    key : what decided it: stage, subjects and their data, backbone, start, settings, fold
    facts : what came of it: ids it saw, epoch and score, digests of its files, origin of the first weights, versions
    """

    path: Path
    key: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return bool(self.facts.get("finished"))

    @property
    def fold(self) -> dict[str, int]:
        """{'fold': the one held out, 'n_folds': ..., 'seed': of the folds}"""
        return dict(self.key["fold"])

    @property
    def training(self) -> str:
        """Fingerprint of how it was trained: the same for every fold, and for every subject of the second stage."""
        of_one = {"fold", "start"} | ({"subjects"} if self.key["stage"] == "finetune" else set())
        how = {name: value for name, value in self.key.items() if name not in of_one}
        return fingerprint(how | {"start": self.key["start"]["training"] or self.key["start"]["weights"]})

    @property
    def members(self) -> tuple[str, ...]:
        """Of a mean of several checkpoints, the trainings of these; () of a checkpoint that was trained itself."""
        return tuple(self.key["settings"].get("soup", ()))

    @property
    def seen_ids(self) -> np.ndarray:
        """(n,) int64, ids of every image that this checkpoint, or the one it started from, was trained on."""
        return np.array(self.facts["seen_ids"], dtype=np.int64)

    def concerns(self, subject: Subject) -> bool:
        return subject.name in self.key["subjects"]

    def heads(self) -> dict[str, torch.Tensor]:
        """Tensors of the heads that were trained with the backbone. Raises CheckpointError."""
        return self._tensors("heads")

    def backbone_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of the backbone under timm's names. Raises CheckpointError."""
        return self._tensors("backbone")

    def backbone(self, device: str = "cpu", size: int | None = None) -> Backbone:
        """The backbone at the size it was trained at, or another. Raises CheckpointError or BackboneError."""
        settings = self.key["backbone"]
        path = self._weights("backbone")
        found = load_backbone(
            BackboneConfig(name=settings["name"], weights=str(path), size=size or settings["size"]), device
        )
        return replace(found, origin=f"checkpoint {self.name}")

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        path = self._weights(name)
        try:
            return load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise _damaged(self.path, f"{path.name} cannot be read ({error})") from error

    def _weights(self, name: str) -> Path:
        """The file of one part, as it was written: a damaged or exchanged one would still load and predict."""
        if not (folder := self.facts.get("weights")):
            raise CheckpointError(
                self.path,
                expected="a trained backbone",
                found="a run without a finished epoch",
                remedy="run it again",
            )
        path = self.path / folder / f"{name}.safetensors"
        if not path.is_file():
            raise _damaged(self.path, f"{path.name} is missing")
        written = self.facts.get("digests", {}).get(f"{folder}/{path.name}")  # older checkpoints have none
        if written and written != file_digest(path):
            raise _damaged(self.path, f"{path.name} is not what was written")
        return path

    def refuse_other_tree(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Raise CheckpointError where its subjects are not those of a tree, {subject: {'images': digest, ...}}."""
        if fault := self.tree_fault(digests):
            expected, found = fault
            raise CheckpointError(
                self.path, expected=expected, found=found, remedy="choose another checkpoint, or train one on this tree"
            )

    def tree_fault(self, digests: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
        """Why a checkpoint cannot serve these subjects: what was expected and what was found; None if it can."""
        for name, digest in digests.items():
            trained = self.key["subjects"].get(name)
            if trained is None:
                return f"a checkpoint that was trained on {name}", ", ".join(self.key["subjects"])
            if others := [what for what in digest if trained.get(what) != digest[what]]:
                which = " and ".join(others).replace("_", " ")
                return "a checkpoint of this tree", f"one of other {which} of {name}"
        return None


def label_of(key: Mapping[str, Any]) -> str:
    """What the name of its folder begins with: stage, the subject of stage 2, backbone, whether it is a mean, fold."""
    who = [key["stage"], *(key["subjects"] if key["stage"] == "finetune" else ())]
    mean = ["soup"] if "soup" in key["settings"] else []
    return "-".join([*who, key["backbone"]["name"], *mean, f"fold{key['fold']['fold']}"])


def checkpoint_path(work: Path, label: str, key: Mapping[str, Any]) -> Path:
    return work / FOLDER / f"{label}-{fingerprint(key)}"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint's folder. Raises CheckpointError if it is not one, or is damaged or of another format."""
    try:
        about = json.loads((path / _ABOUT).read_text())
        if about["format"] != FORMAT:
            raise CheckpointError(
                path,
                expected=f"checkpoint format {FORMAT}",
                found=about["format"],
                remedy="train it again, or choose another --work",
            )
        return Checkpoint(path, about["recipe"], about["facts"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            path, expected="a checkpoint's folder", found=f"no {_ABOUT}", remedy=f"name a folder in {FOLDER}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{_ABOUT} cannot be read") from error


def list_checkpoints(work: Path) -> list[Checkpoint]:
    """Every checkpoint in a work folder, by name."""
    return [open_checkpoint(path.parent) for path in sorted((work / FOLDER).glob(f"[!.]*/{_ABOUT}"))]


def siblings(checkpoint: Checkpoint) -> list[Checkpoint]:
    """All folds of one training, from the folder that the checkpoint is in."""
    near = [open_checkpoint(path.parent) for path in sorted(checkpoint.path.parent.glob(f"[!.]*/{_ABOUT}"))]
    return [one for one in near if one.training == checkpoint.training]


def find_checkpoint(work: Path, name: str) -> Checkpoint:
    """The checkpoint in a folder, given as a path or by its name in the work folder."""
    inside = work / FOLDER / name
    return open_checkpoint(inside if inside.is_dir() else Path(name))


def record(checkpoint: Checkpoint) -> None:
    """Put a checkpoint's description on the disk, then remove the folders that it no longer names."""
    checkpoint.path.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "recipe": checkpoint.key, "facts": checkpoint.facts}
    replace_json(checkpoint.path / _ABOUT, about)
    prune(checkpoint)


def prune(checkpoint: Checkpoint) -> None:
    """Remove the folders of a checkpoint that its description does not name."""
    current = {checkpoint.facts.get("weights"), checkpoint.facts.get("state")}
    for folder in checkpoint.path.iterdir():
        if folder.is_dir() and folder.name not in current:
            shutil.rmtree(folder)


def save_weights(
    folder: Path, backbone: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Write both files of an epoch; {'<folder>/<file>': digest} for the facts of their checkpoint.

    Raises CheckpointError where they cannot be written, and leaves nothing of them.
    """
    origin = {_ORIGIN: folder.parent.name}

    def write(folder: Path) -> None:
        for name, tensors in (("backbone", backbone), ("heads", heads)):
            whole = {key: value.cpu().contiguous() for key, value in tensors.items()}
            save_file(whole, folder / f"{name}.safetensors", origin)

    _write(folder, write)
    return {f"{folder.name}/{path.name}": file_digest(path) for path in sorted(folder.iterdir())}


def refuse_trained(weights: str, option: str) -> None:
    """Raise CheckpointError for the weights file of a checkpoint, which does not say what images they saw."""
    if Path(weights).suffix != ".safetensors" or not Path(weights).is_file():
        return
    try:
        with safetensors.safe_open(weights, "pt") as file:
            name = (file.metadata() or {}).get(_ORIGIN)
    except (OSError, safetensors.SafetensorError):
        return  # whoever loads it says what is wrong with it
    if name:
        raise CheckpointError(
            weights,
            expected="weights that saw none of the images",
            found=f"those of checkpoint {name}",
            remedy=f"name its folder with {option}",
        )


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what a run goes on from. Raises CheckpointError as `save_weights`."""
    _write(folder, lambda folder: torch.save(dict(state), folder / "state.pt"))


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote: tensors in main memory and numbers, and nothing that could run."""
    try:
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise _damaged(folder.parent, f"{folder.name}/state.pt cannot be read") from error


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # before the description that names it is there
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch and safetensors report a full disk as errors of their own kinds
        shutil.rmtree(folder, ignore_errors=True)
        there = next(path for path in folder.absolute().parents if path.is_dir())
        raise CheckpointError(
            folder.parent,
            expected=f"to save {folder.name}",
            found=f"{first_line(error)} ({shutil.disk_usage(there).free / 1e9:.2f} GB free)",
            remedy="make room, or choose another --work; the same command goes on after the last epoch saved",
        ) from error


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        path, expected="a whole checkpoint", found=f"that {why}", remedy="delete it and train it again"
    )


def usable(subject: Subject, checkpoints: list[Checkpoint], digests: Mapping[str, str]) -> list[Checkpoint]:
    """The finished checkpoints that were trained on this subject as it is now; the others are named and left out."""
    kept = []
    for checkpoint in filter(lambda one: one.concerns(subject), checkpoints):
        fault = checkpoint.tree_fault({subject.name: digests})
        why = "" if checkpoint.finished else "its training is not finished; run the same command again"
        if fault:
            why = f"expected {fault[0]}; found {fault[1]}"
        if why:
            say(f"{subject.name}: left out {checkpoint.name}: {why}")
        else:
            kept.append(checkpoint)
    return kept
