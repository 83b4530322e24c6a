"""Checkpoints of trained backbones: their folders, and how to write, find and load them.

A checkpoint is a folder `<work>/checkpoints/<label>-<fingerprint>`:

- `checkpoint.json`: key, and facts: ids of the images it saw, scores, names of the current folders. It is replaced in
  one step, and what it names is whole;
- `epoch-<n>/backbone.safetensors` under the network's own names, such as timm's, and `epoch-<n>/heads.safetensors`:
  the epoch that is kept;
- `state-<epoch>-<step>/`: what an interrupted run goes on from; removed when the run is finished.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file

from featcache.backbone.keys import (
    DESCRIPTION,
    CheckpointFacts,
    CheckpointKey,
    read_description,
    write_description,
)
from featcache.backbone.network import TorchBackbone, load_backbone
from featcache.config import BackboneConfig, fingerprint
from featcache.dataset.digests import file_digest, new_digest
from featcache.dataset.image_lists import SubjectDigests
from featcache.dataset.splits import refuse_leak
from featcache.dataset.subject import Subject, listed
from featcache.errors import CheckpointError, first_line
from featcache.machine.documents import DocumentError, HexDigest, read_document, write_document
from featcache.machine.progress import say
from featcache.machine.tensors import write_tensors
from featcache.workdir import Workdir, inside

_STATE, _STATE_DIGEST = "state.pt", "state.json"
_ORIGIN = "featcache checkpoint"  # in the header of its weights files


@dataclass(frozen=True)
class Checkpoint:
    """One trained backbone with its heads, in a folder."""

    path: Path
    key: CheckpointKey
    facts: CheckpointFacts

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether its training ended by itself."""
        return self.facts.finished

    @property
    def fold(self) -> int:
        """The fold that was held out."""
        return self.key.split.fold

    @property
    def training(self) -> str:
        """Fingerprint of how it was trained; see `CheckpointKey.training`."""
        return self.key.training

    @property
    def seen_ids(self) -> np.ndarray:
        """(n,) int64, ids of every image that this checkpoint, or the one it started from, was trained on."""
        return np.array(self.facts.seen_ids, dtype=np.int64)

    def concerns(self, subject: Subject) -> bool:
        """Whether it was trained on this subject, among others or alone."""
        return subject.name in self.key.subjects

    def heads(self) -> dict[str, torch.Tensor]:
        """Tensors of the heads that were trained with the backbone. Raises CheckpointError."""
        path = self._weights("heads")
        try:
            return load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise _damaged(self.path, f"{path.name} cannot be read ({error})") from error

    def backbone(
        self, device: str = "cpu", size: int | None = None, fit: str | None = None, network: str | None = None
    ) -> TorchBackbone:
        """The backbone, which reads images as in its training or, where they are given, at another size and fit.

        network : what --backbone calls it, such as a Python file that was moved; None: as in its training

        Raises CheckpointError or BackboneError.
        """
        path, trained = self._weights("backbone"), self.key.backbone
        config = BackboneConfig(
            name=network or self.network, weights=str(path), size=size or trained.size, fit=fit or trained.fit
        )
        backbone = replace(load_backbone(config, device), origin=f"checkpoint {self.name}")
        if dict(backbone.code) != dict(trained.code):
            theirs, ours = (", ".join(f"{k} {v}" for k, v in code.items()) for code in (trained.code, backbone.code))
            raise CheckpointError(
                self.path,
                expected=f"the code that was trained, {theirs}",
                found=f"{ours} in {config.name}",
                remedy="bring that code back, or train again",
            )
        return backbone

    @property
    def network(self) -> str:
        """What --backbone calls the network that was trained."""
        return self.facts.network or self.key.backbone.name

    def _weights(self, name: str) -> Path:
        """The file of one part. Its digest is compared: a damaged or exchanged one would still load and predict."""
        if not (folder := self.facts.weights):
            raise CheckpointError(
                self.path,
                expected="a trained backbone",
                found="a run without a finished epoch",
                remedy="run it again",
            )
        path = self.path / folder / f"{name}.safetensors"
        if name == "backbone" and self.facts.pruned:
            raise CheckpointError(
                self.path,
                expected="the backbone that was trained",
                found="that 'extract --prune' removed it",
                remedy="delete the folder and train it again",
            )
        if not os.path.isfile(path):  # which raises nothing for a name that no file can have
            raise _damaged(self.path, f"{path.name} is missing")
        written = self.facts.digests.get(f"{folder}/{path.name}")
        if written and written != file_digest(path):
            raise _damaged(self.path, f"{path.name} is not what was written")
        return path

    def refuse_other_tree(self, digests: Mapping[str, SubjectDigests]) -> None:
        """Raise CheckpointError where its subjects are not those of a tree, LeakError where it saw new test images.

        digests : {subject: its digests}
        """
        for name, now in digests.items():
            refuse_leak(self._seen_new_tests(name, now), now.images.test_ids, f"the test split of {name}")
        if fault := self.tree_fault(digests):
            expected, found = fault
            raise CheckpointError(
                self.path, expected=expected, found=found, remedy="choose another checkpoint, or train one on this tree"
            )

    def tree_fault(self, digests: Mapping[str, SubjectDigests]) -> tuple[str, str] | None:
        """Why a checkpoint cannot serve these subjects: what was expected and what was found; None if it can.

        It serves a subject whose test images alone have changed, if it saw none of these.
        """
        for name, now in digests.items():
            trained = self.key.subjects.get(name)
            if trained is None:
                return f"a checkpoint that was trained on {name}", ", ".join(self.key.subjects)
            if others := now.changed_for_training(trained):
                which = " and ".join(others).replace("_", " ")
                return "a checkpoint of this tree", f"one of other {which} of {name}"
            if seen := self._seen_new_tests(name, now):
                found = f"one that was trained on {len(seen)} of them (id {listed(seen)})"
                return f"a checkpoint that saw no test image of {name}", found
        return None

    def _seen_new_tests(self, subject: str, now: SubjectDigests) -> list[int]:
        """Ids of test images that it saw, where a subject's images are not those that it was trained with."""
        trained = self.key.subjects.get(subject, now.images.key)
        same = all(trained.get(name) == digest for name, digest in now.images.key.items())
        seen: list[int] = [] if same else np.intersect1d(self.seen_ids, now.images.test_ids).tolist()
        return seen


def checkpoint_path(work: Path, key: CheckpointKey) -> Path:
    """Folder of the checkpoint that has this key."""
    return inside(Workdir(work).checkpoints, f"{key.label}-{fingerprint(key.to_json())}")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint's folder. Raises CheckpointError if it is not one, or is damaged or of another format."""
    try:
        return Checkpoint(path, *read_description(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            path, expected="a checkpoint's folder", found=f"no {DESCRIPTION}", remedy="name a folder in checkpoints"
        ) from error
    except (OSError, DocumentError) as error:
        raise _damaged(path, f"{DESCRIPTION} cannot be read ({error})") from error


def list_checkpoints(work: Path) -> list[Checkpoint]:
    """Every checkpoint in a work folder, by name."""
    return _inside(Workdir(work).checkpoints)


def _inside(folder: Path, names: str = "[!.]*") -> list[Checkpoint]:
    for path in sorted(folder.glob(f"{names}/epoch-*/backbone.safetensors")):
        if not (path.parents[1] / DESCRIPTION).exists():
            say(f"{path.parents[1]}: left out: {DESCRIPTION} is missing, and its weights cannot be told from others")
    return [open_checkpoint(path.parent) for path in sorted(folder.glob(f"{names}/{DESCRIPTION}"))]


def siblings(checkpoint: Checkpoint) -> list[Checkpoint]:
    """All folds of a checkpoint's training that are in the same folder."""
    return [other for other in _inside(checkpoint.path.parent) if other.training == checkpoint.training]


def find_checkpoint(work: Path, name: str) -> Checkpoint:
    """The checkpoint in a folder, given as a path or by its name in the work folder."""
    inside = Workdir(work).checkpoints / name
    return open_checkpoint(inside if inside.is_dir() else Path(name))


def find_same_training(
    work: Path, key: CheckpointKey, digests: Mapping[str, SubjectDigests], seen_ids: Sequence[int]
) -> Checkpoint | None:
    """The checkpoint in a work folder whose key differs by images that its training did not see; None if there is none.

    digests : {subject: its digests}, for all subjects of the key
    seen_ids : ids of the images that the training of this key sees, in rising order. A test image of one subject may be
        a training image of another, which is then left out
    """
    for checkpoint in _inside(Workdir(work).checkpoints, f"{escape(key.label)}-*"):
        theirs = checkpoint.key.subjects
        if checkpoint.facts.seen_ids != tuple(seen_ids) or theirs.keys() != key.subjects.keys():
            continue
        here = {name: {**theirs[name], **now.images.key} for name, now in digests.items()}
        alike = fingerprint(replace(checkpoint.key, subjects=here).to_json()) == fingerprint(key.to_json())
        if alike and all(now.images.trains_as(theirs[name]) for name, now in digests.items()):
            return checkpoint
    return None


def record(checkpoint: Checkpoint) -> None:
    """Put a checkpoint's description on the disk, then remove the folders that it no longer names."""
    checkpoint.path.mkdir(parents=True, exist_ok=True)
    write_description(checkpoint.path, checkpoint.key, checkpoint.facts)
    prune(checkpoint)


def prune(checkpoint: Checkpoint) -> None:
    """Remove the folders of a checkpoint that its description does not name."""
    current = {checkpoint.facts.weights, checkpoint.facts.state}
    for folder in checkpoint.path.iterdir():
        if folder.is_dir() and folder.name not in current:
            shutil.rmtree(folder)


def prune_backbone(checkpoint: Checkpoint) -> int:
    """Remove the backbone of a finished checkpoint of stage 2; its heads and its description stay, which says so.

    The bytes that are free now. Nothing is done to checkpoints of stage 1, from which stage 2 starts.
    """
    if checkpoint.key.stage != "finetune" or not checkpoint.finished:
        return 0
    record(replace(checkpoint, facts=replace(checkpoint.facts, pruned=True)))
    path = checkpoint.path / str(checkpoint.facts.weights) / "backbone.safetensors"
    n_bytes = path.stat().st_size if path.is_file() else 0
    path.unlink(missing_ok=True)
    return n_bytes


def save_weights(
    folder: Path, backbone: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Write both files of an epoch; returns {'<folder>/<file>': digest} for the facts of their checkpoint.

    Raises CheckpointError where they cannot be written, and leaves nothing of them.
    """
    digests = {name: new_digest() for name in ("backbone", "heads")}

    def write(folder: Path) -> None:
        for (name, digest), tensors in zip(digests.items(), (backbone, heads), strict=True):
            write_tensors(folder / f"{name}.safetensors", tensors, {_ORIGIN: folder.parent.name}, digest)

    _write(folder, write)
    return {f"{folder.name}/{name}.safetensors": digest.hexdigest() for name, digest in digests.items()}


def refuse_trained(weights: str, option: str) -> None:
    """Raise CheckpointError for the weights file of a checkpoint, which does not say what images they saw."""
    if Path(weights).suffix != ".safetensors" or not Path(weights).is_file():
        return
    try:
        with safetensors.safe_open(weights, "pt") as file:
            name = (file.metadata() or {}).get(_ORIGIN)
    except (OSError, safetensors.SafetensorError):
        return  # the loader says what is wrong with it
    if name:
        raise CheckpointError(
            weights,
            expected="weights that saw none of the images",
            found=f"those of checkpoint {name}",
            remedy=f"name its folder with {option}",
        )


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state that an interrupted run goes on from. Raises CheckpointError as `save_weights`."""

    def write(folder: Path) -> None:
        torch.save(dict(state), folder / _STATE)
        write_document(folder / _STATE_DIGEST, {_STATE: file_digest(folder / _STATE)})

    _write(folder, write)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, into main memory: tensors and numbers, no code. Raises CheckpointError."""
    try:
        written = folder / _STATE_DIGEST  # states of earlier versions have none
        if written.exists() and read_document(written, dict[str, HexDigest]) != {_STATE: file_digest(folder / _STATE)}:
            raise DocumentError("it is not what was written")
        state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        return state
    except Exception as error:  # unpickling a broken file raises anything
        raise _damaged(folder.parent, f"{folder.name}/{_STATE} cannot be read ({first_line(error)})") from error


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
        existing = next(path for path in folder.absolute().parents if path.is_dir())
        raise CheckpointError(
            folder.parent,
            expected=f"to save {folder.name}",
            found=f"{first_line(error)} ({shutil.disk_usage(existing).free / 1e9:.2f} GB free)",
            remedy="make room, or choose another --work; the same command goes on after the last epoch saved",
        ) from error


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        path, expected="a whole checkpoint", found=f"that {why}", remedy="delete it and train it again"
    )


def usable(subject: Subject, checkpoints: list[Checkpoint], digests: SubjectDigests) -> list[Checkpoint]:
    """Finished checkpoints that were trained on this subject as it is now; the others are named and left out.

    Those without their backbone are among the others.
    """
    kept = []
    for checkpoint in checkpoints:
        if not checkpoint.concerns(subject):
            continue
        why = "" if checkpoint.finished else "its training is not finished; run the same command again"
        why = "its features were cached, and then its backbone was removed" if checkpoint.facts.pruned else why
        if fault := checkpoint.tree_fault({subject.name: digests}):
            expected, found = fault
            why = f"expected {expected}; found {found}"
        if why:
            say(f"{subject.name}: left out {checkpoint.name}: {why}")
        else:
            kept.append(checkpoint)
    return kept
