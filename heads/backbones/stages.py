"""The two stages of training: `pretrain` on all subjects together, `finetune` on each alone. One function, two configs.

Both train once per fold of the image ids, so that an image that is scored was never trained on, in either stage: the
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

import accelerate
import numpy as np
import timm
import torch

from featcache.backbone.checkpoint import DESCRIPTION, Checkpoint, checkpoint_path, open_checkpoint, prune
from featcache.backbone.keys import BackboneKey, CheckpointFacts, CheckpointKey, Split
from featcache.cache.pixels import cache_pixels
from featcache.config import BackboneConfig
from featcache.dataset.digests import digests, subject_digests
from featcache.dataset.splits import assign_folds, check_folds, refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError
from featcache.machine.device import resolve_device
from featcache.machine.files import only_writer
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import say
from heads.backbones.accelerator import make_accelerator
from heads.backbones.batches import Images, plan_steps, split_rows
from heads.backbones.encoder import Encoder
from heads.backbones.heads import FirstWeights, build_heads, has_roi_heads, start_heads
from heads.backbones.loop import EncoderTraining
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


def train_stage(subjects: Sequence[Subject], config: StageConfig, work: Path | str) -> list[Trained]:
    """Train one stage: `pretrain` leaves a checkpoint for each fold, `finetune` one for each fold and subject.

    What is there already is skipped; an interrupted run goes on. Raises CheckpointError for a start that is missing or
    of another tree, and LeakError for one that saw images of the held-out fold.
    """
    work = Path(work)
    device = resolve_device(config.device)
    if device == "cpu":
        keep_freed_memory()
    _refuse_missing_rois(subjects, config)
    groups = [tuple(subjects)] if config.stage == "pretrain" else [(subject,) for subject in subjects]
    for subject in subjects:
        check_folds(assign_folds(subject.train.ids, config.n_folds, config.fold_seed), config.n_folds)
        refuse_leak(subject.train.ids, subject.test.ids, f"the test split of {subject.name}")
    folds = range(config.n_folds) if config.fold is None else [config.fold]
    splits = [Split(fold=fold, n_folds=config.n_folds, seed=config.fold_seed) for fold in folds]
    starts = Starts(config, work)
    return [_train_fold(group, split, config, starts, device, work) for group in groups for split in splits]


def _refuse_missing_rois(subjects: Sequence[Subject], config: StageConfig) -> None:
    """Raise ConfigError for a loss of heads of ROIs where no subject has any ROI."""
    if config.train.roi_loss != SAME and not has_roi_heads(subjects, config):
        raise ConfigError(
            "--roi-loss", expected="one or more ROIs in roi_masks", found="none", remedy="leave --roi-loss out"
        )


def _train_fold(
    subjects: tuple[Subject, ...], split: Split, config: StageConfig, starts: Starts, device: str, work: Path
) -> Trained:
    began = time.perf_counter()
    start = starts.find(subjects, split)
    checkpoint = _checkpoint(subjects, split, config, start, work)
    if checkpoint.finished:
        say(f"already trained, {checkpoint.path}")
        prune(checkpoint)
        return Trained(checkpoint, False, time.perf_counter() - began)
    taps = start.backbone.taps(config.train.tapped)
    shapes = start.backbone.shapes(taps)
    accelerator = make_accelerator(config.train.precision, device, config.train.kind.idle_weights)
    # what cannot work is refused before anything is decoded
    plan_steps(config.train, accelerator.num_processes, [len(rows) for rows in split_rows(subjects, split)[0]])
    with accelerator.main_process_first():
        pixels = cache_pixels(subjects, start.backbone, work, config.image_cache, config.workers)
    images = Images(subjects, pixels, split)
    facts = replace(checkpoint.facts, seen_ids=_seen_ids(checkpoint, images, start), taps=taps.key())
    checkpoint = replace(checkpoint, facts=facts)
    torch.manual_seed(config.train.seed)
    # a copy: the start serves other folds too
    backbone = replace(start.backbone, model=copy.deepcopy(start.backbone.model).to(accelerator.device))
    heads = build_heads(shapes, subjects, config)
    # the main process gives the first weights to the others
    first = FirstWeights(start.checkpoint, backbone, images)
    if accelerator.is_main_process and (note := start_heads(heads, first, config)):
        say(f"{facts.label}: {note}")
    encoder = Encoder(backbone.model, heads, taps).requires_grad_(True)
    run = EncoderTraining(encoder, start.backbone, images, config.train, accelerator, checkpoint, config.save_every)
    with only_writer(checkpoint.path) if accelerator.is_main_process else nullcontext():
        trained = run.train()
    del run, encoder, backbone, first
    gc.collect()  # mixed precision leaves cycles, which would keep this network in memory beside the next one
    return Trained(trained, True, time.perf_counter() - began)


def _checkpoint(subjects: Sequence[Subject], split: Split, config: StageConfig, start: Start, work: Path) -> Checkpoint:
    """The checkpoint that this run fills: as an earlier run left it, or a new one."""
    key = CheckpointKey(
        stage=config.stage,
        subjects={s.name: digests(s, work) | subject_digests(s) for s in subjects},
        backbone=_backbone_key(start.settings, start.backbone.transform_settings["input_size"][-1]),
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
    versions = {"torch": torch.__version__, "accelerate": accelerate.__version__}
    return Checkpoint(path, key, CheckpointFacts(label=key.label, origin=start.backbone.origin, versions=versions))


def _backbone_key(settings: BackboneConfig, size: int) -> BackboneKey:
    weights = settings.resolved_weights
    source = weights if weights in ("hub", "packaged", "none") else "file"
    return BackboneKey(name=settings.resolved_name, weights=source, size=size, fit=settings.resolved_fit)


def _seen_ids(checkpoint: Checkpoint, images: Images, start: Start) -> tuple[int, ...]:
    """Ids of the images that the checkpoint will have seen. Raises LeakError where some are held out."""
    before = np.empty(0, np.int64) if start.checkpoint is None else start.checkpoint.seen_ids
    seen = np.union1d(before, images.trained_ids)
    refuse_leak(seen, images.held_out_ids, f"fold {checkpoint.fold} of {checkpoint.facts.label}")
    return tuple(seen.tolist())
