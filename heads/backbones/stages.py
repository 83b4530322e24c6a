"""The two stages of training: `pretrain` on all subjects together, `finetune` on each alone. One function, two configs.

Both train once per fold of the image ids, so that an image that is scored was never trained on, in either stage: the
second stage of a fold starts from the first stage of the same fold.

Source: the UARK-UAlbany entry to the Algonauts 2023 challenge.
"""

import copy
import gc
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch

from featcache.backbone.checkpoint import (
    Checkpoint,
    checkpoint_path,
    find_same_training,
    list_checkpoints,
    open_checkpoint,
    prune,
)
from featcache.backbone.keys import DESCRIPTION, BackboneKey, CheckpointFacts, CheckpointKey, Split
from featcache.backbone.network import Backbone
from featcache.backbone.outline import outline
from featcache.cache.pixels import cache_pixels
from featcache.config import OWN_WEIGHTS, BackboneConfig, is_own_code, settings_key
from featcache.dataset.digests import subject_digests
from featcache.dataset.grouping import split_of
from featcache.dataset.image_lists import SubjectDigests
from featcache.dataset.responses import refuse_unfit
from featcache.dataset.splits import Split as ImageSplit
from featcache.dataset.splits import check_folds, refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError
from featcache.machine.device import matrix_products, resolve_device
from featcache.machine.files import only_writer
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import say
from heads.backbones.accelerator import make_accelerator, resolve_precision
from heads.backbones.batches import Images, plan_steps, split_rows
from heads.backbones.encoder import Encoder
from heads.backbones.heads import FirstWeights, build_heads, has_roi_heads, start_heads
from heads.backbones.loop import EncoderTraining
from heads.backbones.memory import device_memory, refused_where_full, say_memory
from heads.backbones.starts import Start, Starts
from heads.config import StageConfig
from heads.config.losses import SAME


@dataclass(frozen=True)
class Trained:
    """One checkpoint of one stage.

    new : whether this run trained it, or finished it
    seconds : that it took
    """

    checkpoint: Checkpoint
    new: bool
    seconds: float


def train_stage(
    subjects: Sequence[Subject], config: StageConfig, work: Path | str, by: ImageSplit | None = None
) -> list[Trained]:
    """Train one stage: `pretrain` leaves a checkpoint for each fold, `finetune` one for each fold and subject.

    by : which images stay together in the folds; None: what `config.split` says of these subjects alone

    What is there already is skipped; an interrupted run goes on. Raises CheckpointError for a start that is missing or
    of another tree, and LeakError for one that saw images of the held-out fold.
    """
    work = Path(work)
    device = resolve_device(config.device)
    precision = resolve_precision(config.train.precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    if device == "cpu":
        keep_freed_memory()
    _refuse_missing_rois(subjects, config)
    refuse_unfit(subjects, work)
    by = split_of(config.split, subjects, work) if by is None else by
    groups = [tuple(subjects)] if config.stage == "pretrain" else [(subject,) for subject in subjects]
    for subject in subjects:
        check_folds(by.folds(subject.train.ids, config.n_folds, config.fold_seed), config.n_folds)
        refuse_leak(subject.train.ids, subject.test.ids, f"the test split of {subject.name}")
    folds = range(config.n_folds) if config.fold is None else [config.fold]
    splits = [Split(fold=fold, n_folds=config.n_folds, seed=config.fold_seed, by=by.key) for fold in folds]
    starts = Starts(config, work)
    with matrix_products(precision), refused_where_full(device):
        return [_train_fold(group, split, by, config, starts, device, work) for group in groups for split in splits]


@dataclass(frozen=True)
class StagePart:
    """One fold of a stage, of all subjects in stage 1, of one in stage 2.

    config : with its one fold
    inputs : what decides the checkpoint, as JSON has it, and is the same on every machine
    """

    subjects: tuple[Subject, ...]
    config: StageConfig
    inputs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Subjects, stage and fold."""
        return f"{', '.join(one.name for one in self.subjects)} fold {self.config.fold}"

    @property
    def words(self) -> dict[str, str]:
        """Options of the command that have it train this part alone."""
        return {"--subject": ",".join(one.name for one in self.subjects), "--fold": str(self.config.fold)}


def stage_parts(subjects: Sequence[Subject], config: StageConfig, work: Path, by: ImageSplit) -> list[StagePart]:
    """What `train_stage` does, in parts that share nothing but files; `train_stage` does each. No network is loaded."""
    groups = [tuple(subjects)] if config.stage == "pretrain" else [(subject,) for subject in subjects]
    folds = range(config.n_folds) if config.fold is None else [config.fold]
    before = (
        [one for one in list_checkpoints(work) if one.key.stage == "pretrain"] if config.stage == "finetune" else []
    )
    digests = {subject: SubjectDigests.of(subject, work).to_json() | subject_digests(subject) for subject in subjects}
    parts = []
    for group in groups:
        for fold in folds:
            one = replace(config, fold=fold)
            inputs = {
                "subjects": {subject.name: digests[subject] for subject in group},
                "starts": [[start.name, start.facts.weights] for start in before if start.fold == fold],
                "split": by.key.to_json(),
                "settings": settings_key(one),
            }
            parts.append(StagePart(group, one, inputs))
    return parts


def _refuse_missing_rois(subjects: Sequence[Subject], config: StageConfig) -> None:
    """Raise ConfigError for a loss of heads of ROIs where no subject has any ROI."""
    if config.train.roi_loss != SAME and not has_roi_heads(subjects, config):
        raise ConfigError(
            "--roi-loss", expected="one or more ROIs in roi_masks", found="none", remedy="leave --roi-loss out"
        )


def _train_fold(
    subjects: tuple[Subject, ...],
    split: Split,
    by: ImageSplit,
    config: StageConfig,
    starts: Starts,
    device: str,
    work: Path,
) -> Trained:
    began = time.perf_counter()
    start = starts.find(subjects, split)
    seen = _seen_ids(subjects, split, by, start)
    checkpoint = _checkpoint(subjects, split, config, start, seen, work)
    if checkpoint.finished:
        say(f"already trained, {checkpoint.path}")
        prune(checkpoint)
        return Trained(checkpoint, False, time.perf_counter() - began)
    _refuse_augmented(start.backbone, config)
    taps = start.backbone.taps(config.train.tapped)
    shapes = start.backbone.shapes(taps)
    accelerator = make_accelerator(config.train.precision, device, config.train.kind.idle_weights)
    # what cannot work is refused before anything is decoded
    plan_steps(config.train, accelerator.num_processes, [len(rows) for rows in split_rows(subjects, split, by)[0]])
    with accelerator.main_process_first():
        pixels = cache_pixels(subjects, start.backbone, work, config.image_cache, config.workers)
    images = Images(subjects, pixels, split, by)
    refuse_leak(seen, images.held_out_ids, f"fold {split.fold} of {checkpoint.facts.label}", by)
    checkpoint = replace(checkpoint, facts=replace(checkpoint.facts, seen_ids=seen, taps=taps.key()))
    torch.manual_seed(config.train.seed)
    # a copy: the start serves other folds too
    backbone = replace(start.backbone, model=copy.deepcopy(start.backbone.model).to(accelerator.device))
    heads = build_heads(shapes, subjects, config)
    # the main process gives the first weights to the others
    first = FirstWeights(start.checkpoint, backbone, images)
    if accelerator.is_main_process and (note := start_heads(heads, first, config)):
        say(f"{checkpoint.facts.label}: {note}")
    encoder = Encoder(backbone.model, heads, taps, config.compile).requires_grad_(True)
    if device == "cuda":
        _say_memory(encoder, start, checkpoint.facts.label, device, config)
    with only_writer(checkpoint.path) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        if (checkpoint := _as_left(checkpoint)).finished:
            say(f"trained by another process meanwhile, {checkpoint.path}")
            return Trained(checkpoint, False, time.perf_counter() - began)
        run = EncoderTraining(encoder, start.backbone, images, config.train, accelerator, checkpoint, config.save_every)
        trained = run.train()
    del run, encoder, backbone, first
    gc.collect()  # mixed precision leaves cycles, which would keep this network in memory beside the next one
    return Trained(trained, True, time.perf_counter() - began)


def _say_memory(encoder: Encoder, start: Start, label: str, device: str, config: StageConfig) -> None:
    network = outline(start.settings, config.train.tapped, config.train.precision)
    trained = sum(weights.numel() * weights.element_size() for weights in encoder.parameters())
    n_outputs = sum(len(one.vertex) for one in encoder.heads.surfaces.values()) / len(encoder.heads.names)
    say_memory(label, device, device_memory(network, trained, n_outputs, config.train))


def _checkpoint(
    subjects: Sequence[Subject], split: Split, config: StageConfig, start: Start, seen: tuple[int, ...], work: Path
) -> Checkpoint:
    """The checkpoint that this run fills: as an earlier run left it, or a new one."""
    digests = {subject.name: SubjectDigests.of(subject, work) for subject in subjects}
    key = CheckpointKey(
        stage=config.stage,
        subjects={s.name: digests[s.name].to_json() | subject_digests(s) for s in subjects},
        backbone=_backbone_key(start),
        transform=dict(start.backbone.transform_settings),
        timm=timm.__version__,
        start=start.key(),
        split=split,
        settings=config.train.key(has_roi_heads(subjects, config)),
        devices=int(os.environ.get("WORLD_SIZE", "1")),  # batches are a device's
    )
    path = checkpoint_path(work, key)
    if (path / DESCRIPTION).exists():
        return open_checkpoint(path)
    if (same := find_same_training(work, key, digests, seen)) is not None:
        return same
    versions = {"torch": torch.__version__, "accelerate": accelerate.__version__}
    facts = CheckpointFacts(
        label=key.label, origin=start.backbone.origin, versions=versions, network=_network(start.settings)
    )
    return Checkpoint(path, key, facts)


def _as_left(checkpoint: Checkpoint) -> Checkpoint:
    """The same as the writer before this one left it; itself where nothing was saved yet."""
    if not (checkpoint.path / DESCRIPTION).exists():
        return checkpoint
    facts = open_checkpoint(checkpoint.path).facts
    return replace(checkpoint, facts=replace(facts, seen_ids=checkpoint.facts.seen_ids, taps=checkpoint.facts.taps))


def _backbone_key(start: Start) -> BackboneKey:
    settings, weights = start.settings, start.settings.resolved_weights
    return BackboneKey(
        name=settings.label,
        weights=weights if weights in ("hub", "packaged", "none", OWN_WEIGHTS) else "file",
        size=start.backbone.transform_settings["input_size"][-1],
        fit=settings.resolved_fit,
        code=start.backbone.code,
    )


def _network(settings: BackboneConfig) -> str | None:
    """What a later command calls the network, from wherever it is run; None where its label says it."""
    name = settings.resolved_name
    if is_own_code(name):
        file, _, function = name.rpartition(":")
        return f"{Path(file).absolute()}:{function}"
    return None if name == settings.label else name


def _refuse_augmented(backbone: Backbone, config: StageConfig) -> None:
    """Raise ConfigError for --augment on images that a network's own transform has normalised."""
    if config.train.augment and backbone.pixel_dtype != "uint8":
        raise ConfigError(
            "--augment",
            expected="images of 8 bits a channel",
            found=f"{backbone.pixel_dtype} of the transform of {backbone.name}",
            remedy="leave it out, or describe the transform by its size, mean and std",
        )


def _seen_ids(subjects: Sequence[Subject], split: Split, by: ImageSplit, start: Start) -> tuple[int, ...]:
    """Ids of the images that the checkpoint will have seen, in rising order."""
    rows = split_rows(subjects, split, by)[0]
    before = [] if start.checkpoint is None else [start.checkpoint.seen_ids]
    seen = np.concatenate([*before, *(s.train.ids[rows] for s, rows in zip(subjects, rows, strict=True))])
    return tuple(np.unique(seen).tolist())
