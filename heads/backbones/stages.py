"""The two stages of training: `pretrain` on all subjects, `finetune` on one. One function, two configs.

Both train once per fold of the image id, so that a picture that is scored was never trained on, in either stage: the
second stage of a fold starts from the first stage of the same fold.

Source: the UARK-UAlbany entry to the Algonauts 2023 challenge.
"""

import copy
import gc
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
from torch import nn

from featcache.backbone.checkpoint import (
    FOLDER,
    Checkpoint,
    checkpoint_path,
    label_of,
    list_checkpoints,
    open_checkpoint,
    prune,
    refuse_trained,
    siblings,
    usable,
)
from featcache.backbone.network import Backbone, load_backbone
from featcache.cache.pixels import Pixels, cache_pixels
from featcache.config import POOLED, BackboneConfig
from featcache.dataset.digests import digests, subject_digests
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds, check_folds, refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import CheckpointError, LeakError
from featcache.machine.device import resolve_device
from featcache.machine.files import only_writer
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import say
from heads.backbones.batches import Images, plan_steps, split
from heads.backbones.encoder import Encoder
from heads.modules.by_subject import AllSubjects, OneSubject, SpatialHeads, output_columns
from heads.modules.saved import linear_map_of, saved_shapes
from heads.backbones.loop import EncoderTraining, make_accelerator
from heads.config import StageConfig
from heads.modules.linear import SMALL
from heads.modules.spatial import Shapes
from heads.solvers.ridge import LinearMap, RidgeHead

_FEATURE_BATCH = 64  # images a pass where only features are asked for


@dataclass(frozen=True)
class Trained:
    """One checkpoint of one stage."""

    checkpoint: Checkpoint
    new: bool
    seconds: float


@dataclass(frozen=True)
class Start:
    """The backbone that training starts from, and the checkpoint it is out of, if any."""

    backbone: Backbone
    checkpoint: Checkpoint | None
    settings: BackboneConfig  # of the first weights, before any training

    def key(self) -> dict[str, str | None]:
        training = None if self.checkpoint is None else self.checkpoint.training
        return {"weights": self.backbone.digest, "training": training}


def train_stage(subjects: Sequence[Subject], config: StageConfig, work: Path) -> list[Trained]:
    """Train one stage: `pretrain` leaves a checkpoint a fold, `finetune` one a fold and subject.

    What is there already is skipped; an interrupted run goes on. Raises CheckpointError for a start that is missing or
    of another tree, and LeakError for one that saw images of the fold that is held out.
    """
    device = resolve_device(config.device)
    if device == "cpu":
        keep_freed_memory()
    groups = [tuple(subjects)] if config.stage == "pretrain" else [(subject,) for subject in subjects]
    for subject in subjects:
        check_folds(assign_folds(subject.train.ids, config.n_folds, config.fold_seed), config.n_folds)
        refuse_leak(subject.train.ids, subject.test.ids, f"the test split of {subject.name}")
    folds = range(config.n_folds) if config.fold is None else [config.fold]
    starts = _Starts(config, work)
    return [_train_fold(group, fold, config, starts, device, work) for group in groups for fold in folds]


def _train_fold(
    subjects: tuple[Subject, ...], number: int, config: StageConfig, starts: "_Starts", device: str, work: Path
) -> Trained:
    began = time.perf_counter()
    fold = {"fold": number, "n_folds": config.n_folds, "seed": config.fold_seed}
    start = starts.of(subjects, fold)
    checkpoint = _checkpoint(subjects, fold, config, start, work)
    if checkpoint.finished:
        say(f"already trained, {checkpoint.path}")
        prune(checkpoint)
        return Trained(checkpoint, False, time.perf_counter() - began)
    taps = start.backbone.taps(config.train.tapped)
    shapes = start.backbone.shapes(taps)
    accelerator = make_accelerator(config.train.precision, device, every_weight=config.train.head == "pooled")
    # what cannot work is refused before anything is decoded
    plan_steps(config.train, accelerator.num_processes, sum(map(len, split(subjects, fold)[0])))
    with accelerator.main_process_first():
        pixels = cache_pixels(subjects, start.backbone, work, config.image_cache, config.workers)
    images = Images(subjects, pixels, fold)
    checkpoint = _know_ids(checkpoint, images, start)
    checkpoint = replace(checkpoint, facts={**checkpoint.facts, "taps": taps.key()})
    torch.manual_seed(config.train.seed)
    network = copy.deepcopy(start.backbone.model).to(accelerator.device)
    heads = _heads(subjects, shapes, config)
    if config.stage == "finetune" and config.train.head_start == "fitted" and accelerator.is_main_process:
        if isinstance(heads, OneSubject):
            heads.start_from(_fitted_maps(subjects[0], images, pixels[0], start, network))  # the others are given these
        elif isinstance(heads, SpatialHeads):
            _go_on(heads, start, checkpoint.facts["label"])
    encoder = Encoder(network, heads, taps).requires_grad_(True)
    run = EncoderTraining(encoder, start.backbone, images, config.train, accelerator, checkpoint, config.save_every)
    with only_writer(checkpoint.path) if accelerator.is_main_process else nullcontext():
        trained = run.train()
    del run, encoder, network
    gc.collect()  # mixed precision leaves cycles, which would keep this network in memory beside the next one
    return Trained(trained, True, time.perf_counter() - began)


def _checkpoint(
    subjects: Sequence[Subject], fold: dict[str, int], config: StageConfig, start: Start, work: Path
) -> Checkpoint:
    """The checkpoint that this run fills: as an earlier run left it, or a new one."""
    key = {
        "kind": "checkpoint",
        "stage": config.stage,
        "subjects": {s.name: digests(s, work) | subject_digests(s) for s in subjects},
        "backbone": {
            "name": start.settings.resolved_name,
            "weights": start.settings.resolved_weights
            if start.settings.resolved_weights in ("hub", "packaged", "none")
            else "file",
            "size": start.backbone.transform_settings["input_size"][-1],
        },
        "transform": dict(start.backbone.transform_settings),
        "timm": timm.__version__,
        "start": start.key(),
        "fold": fold,
        "settings": config.train.key(),
        "devices": int(os.environ.get("WORLD_SIZE", "1")),  # batches are a device's
    }
    label = label_of(key)
    path = checkpoint_path(work, label, key)
    if (path / "checkpoint.json").exists():
        return open_checkpoint(path)
    versions = {"torch": torch.__version__, "accelerate": accelerate.__version__}
    facts = {"label": label, "origin": start.backbone.origin, "versions": versions, "scores": [], "finished": False}
    return Checkpoint(path, key, facts)


def _know_ids(checkpoint: Checkpoint, images: Images, start: Start) -> Checkpoint:
    """Put the ids that it will have seen among the facts, and refuse those of the fold that is held out."""
    before = np.empty(0, np.int64) if start.checkpoint is None else start.checkpoint.seen_ids
    seen = np.union1d(before, images.trained_ids)
    refuse_leak(seen, images.held_out_ids, f"fold {checkpoint.fold['fold']} of {checkpoint.facts['label']}")
    return replace(checkpoint, facts={**checkpoint.facts, "seen_ids": seen.tolist()})


def _heads(subjects: Sequence[Subject], shapes: Shapes, config: StageConfig) -> AllSubjects | OneSubject | SpatialHeads:
    size = 1.0 if config.train.head_start == "default" else SMALL
    if config.train.head == "spatial":
        return SpatialHeads(shapes, subjects, config.train, size)
    n_features = shapes[POOLED][0]
    if config.stage == "finetune":
        return OneSubject(n_features, subjects[0], size)
    names = [subject.name for subject in subjects]
    return AllSubjects(n_features, names, output_columns(subjects), config.train.embedding, size)


def _fitted_maps(
    subject: Subject, images: Images, pixels: Pixels, start: Start, network: nn.Module
) -> dict[str, LinearMap]:
    """Where stage 1's own heads ended for this subject; without such, closed form on the backbone as it is."""
    if (one := start.checkpoint) is not None and one.key["stage"] == "pretrain":
        tensors, names = one.heads(), list(one.key["subjects"])
        if not saved_shapes(tensors):
            return {h: linear_map_of(tensors, names, subject.name, h) for h in HEMISPHERES}
    rows = images.trained[0]
    features = _features(replace(start.backbone, model=network), pixels, rows)
    maps = {}
    for hemisphere in HEMISPHERES:
        responses = torch.from_numpy(np.asarray(subject.responses(hemisphere)[rows]))
        head = RidgeHead().fit(features, responses)
        maps[hemisphere] = LinearMap(head.weights_, head.intercept_)
    return maps


def _go_on(heads: SpatialHeads, start: Start, label: str) -> None:
    """Start spatial heads where those of stage 1 ended, if they are alike; else they keep their small random start."""
    one = start.checkpoint
    if one is None or not heads.start_from(one.heads(), list(one.key["subjects"])):
        say(f"{label}: heads start from small random maps; the start has none of the same --layers, --grid and shape")


@torch.inference_mode()
def _features(backbone: Backbone, pixels: Pixels, rows: np.ndarray) -> torch.Tensor:
    """(len(rows), n_features) float32 of the pooled last layer."""
    device = next(backbone.model.parameters()).device
    batches = [rows[i : i + _FEATURE_BATCH] for i in range(0, len(rows), _FEATURE_BATCH)]
    parts = [backbone.pooled(backbone.normalise(pixels.read(b).to(device))) for b in batches]
    return torch.cat(parts).float().cpu()


class _Starts:
    """Where each fold starts from. Weights are loaded once for all the folds that start from the same."""

    def __init__(self, config: StageConfig, work: Path) -> None:
        self._config, self._work = config, work
        self._last: tuple[Any, Start] | None = None
        self._known: dict[str, dict[str, str]] = {}

    def of(self, subjects: Sequence[Subject], fold: dict[str, int]) -> Start:
        found = self._wanted(subjects, fold)
        if self._last is None or self._last[0] != found:
            self._last = (found, self._load(found))
        return self._last[1]

    def _load(self, found: Path | BackboneConfig) -> Start:
        if isinstance(found, BackboneConfig):
            return Start(load_backbone(found), None, found)
        checkpoint = open_checkpoint(found)
        trained = checkpoint.key["backbone"]
        settings = BackboneConfig(name=trained["name"], weights=trained["weights"], size=trained["size"])
        return Start(checkpoint.backbone(size=self._config.backbone.size), checkpoint, settings)

    def _wanted(self, subjects: Sequence[Subject], fold: dict[str, int]) -> Path | BackboneConfig:
        init, own = self._config.init, self._config.backbone
        if self._config.stage == "pretrain":
            refuse_trained(own.resolved_weights, "finetune --init")
            return own
        if init == "stage1":
            return self._stage1(subjects[0], fold)
        if init not in ("hub", "packaged", "none") and Path(init).is_dir():
            return self._given(open_checkpoint(Path(init)), subjects[0], fold)
        refuse_trained(init, "--init")
        return replace(own, weights=init)

    def _stage1(self, subject: Subject, fold: dict[str, int]) -> Path:
        """The stage-1 checkpoint of this fold in the work folder; a mean of several is a start only by its name."""
        known = [one for one in list_checkpoints(self._work) if one.key["stage"] == "pretrain" and not one.members]
        ours = usable(subject, [one for one in known if self._is_wanted(one)], self._digests(subject))
        trainings = sorted({one.training for one in ours})
        if len(trainings) > 1:
            names = ", ".join(min(one.name for one in ours if one.training == t) for t in trainings)
            raise CheckpointError(
                "--init stage1",
                expected=f"one stage-1 training in {self._work / FOLDER}",
                found=f"{len(trainings)} ({names})",
                remedy="name the folder of one with --init",
            )
        return self._sibling(ours, fold, f"of {subject.name} in {self._work / FOLDER}")

    def _is_wanted(self, one: Checkpoint) -> bool:
        own, trained = self._config.backbone, one.key["backbone"]
        return own.admits(trained["name"]) and own.size in (None, trained["size"])

    def _given(self, given: Checkpoint, subject: Subject, fold: dict[str, int]) -> Path:
        """The checkpoint of this fold beside the one that was named."""
        trained = given.key["backbone"]["name"]
        if not self._config.backbone.admits(trained):
            raise CheckpointError(
                f"--init {given.path}",
                expected=f"a checkpoint of {self._config.backbone.name}",
                found=f"one of {trained}",
                remedy=f"name --backbone {trained}, or another checkpoint",
            )
        given.refuse_other_tree({subject.name: self._digests(subject)})
        ours = usable(subject, siblings(given), self._digests(subject))
        return self._sibling(ours, fold, f"like {given.path}")

    def _digests(self, subject: Subject) -> dict[str, str]:
        """Of a subject's files, looked at once for all folds."""
        if subject.name not in self._known:
            self._known[subject.name] = digests(subject, self._work)
        return self._known[subject.name]

    def _sibling(self, checkpoints: Sequence[Checkpoint], fold: dict[str, int], where: str) -> Path:
        for one in checkpoints:
            if one.fold == fold and one.finished:
                return one.path
        if any((one.fold["n_folds"], one.fold["seed"]) != (fold["n_folds"], fold["seed"]) for one in checkpoints):
            raise LeakError(
                expected=f"a stage-1 checkpoint of the same folds ({fold['n_folds']}, seed {fold['seed']}) {where}",
                found="one of others, which saw images that are held out here",
                remedy="give its --folds and --fold-seed",
            )
        folds = sorted(one.fold["fold"] for one in checkpoints if one.finished)
        raise CheckpointError(
            expected=f"a stage-1 checkpoint of fold {fold['fold']} {where}",
            found=(f"only folds {', '.join(map(str, folds))}" if folds else "none"),
            remedy=f"run pretrain --fold {fold['fold']}, or start without stage 1: --init hub",
        )
