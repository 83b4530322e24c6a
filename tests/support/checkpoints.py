"""Checkpoints as training would leave them, without training."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from featcache.backbone.checkpoint import Checkpoint, checkpoint_path, open_checkpoint, record, save_weights
from featcache.backbone.keys import BackboneKey, CheckpointFacts, CheckpointKey, Split, StartKey
from featcache.backbone.network import Backbone, load_backbone
from featcache.config import BackboneConfig
from featcache.dataset.digests import subject_digests
from featcache.dataset.image_lists import SubjectDigests
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject

N_FOLDS = 3
HEADS = {"linear.weight": torch.arange(6.0).reshape(2, 3), "columns.subj01.lh": torch.arange(4)}


def trained_weights(backbone: Backbone, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a network, moved as if by training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value * (1 + 0.3 * torch.rand(value.shape, generator=generator)) if value.is_floating_point() else value
        for key, value in backbone.model.state_dict().items()
    }


def key_of(
    subjects: Sequence[Subject],
    work: Path,
    fold: int = 0,
    stage: str = "pretrain",
    name: str = "test_resnet",
    size: int = 48,
    fit: str = "crop",
    start: Checkpoint | None = None,
    settings: dict[str, Any] | None = None,
) -> CheckpointKey:
    """The key that training would give its checkpoint."""
    backbone = (
        load_backbone(BackboneConfig(name=name, weights="none", size=size, fit=fit))
        if start is None
        else start.backbone(size=size, fit=fit)
    )
    return CheckpointKey(
        stage=stage,
        subjects={s.name: SubjectDigests.of(s, work).to_json() | subject_digests(s) for s in subjects},
        backbone=BackboneKey(name=name, weights="none", size=size, fit=fit),
        transform=dict(backbone.transform_settings),
        timm=timm.__version__,
        start=StartKey(weights=backbone.digest, training=None if start is None else start.training),
        split=Split(fold=fold, n_folds=N_FOLDS, seed=0),
        settings=settings or {"epochs": 2, "loss": "mse"},
    )


def write_checkpoint(
    subjects: Sequence[Subject],
    work: Path,
    fold: int = 0,
    finished: bool = True,
    heads: Mapping[str, torch.Tensor] = HEADS,
    **options: Any,
) -> Checkpoint:
    """A checkpoint that saw every training image but those of its fold, and whose weights are its fold's own."""
    key = key_of(subjects, work, fold, **options)
    seen = [s.train.ids[assign_folds(s.train.ids, N_FOLDS, 0) != fold] for s in subjects]
    path = checkpoint_path(work, key)
    backbone = load_backbone(BackboneConfig(name=key.backbone.name, weights="none", size=key.backbone.size))
    facts = CheckpointFacts(
        label=key.label,
        origin="random weights",
        scores=(0.1,),
        score=0.1,
        epoch=1,
        weights="epoch-001",
        taps={"layers": ["pooled"]},
        finished=finished,
        seen_ids=tuple(np.unique(np.concatenate(seen)).tolist()),
        digests=save_weights(path / "epoch-001", trained_weights(backbone, seed=fold), heads),
    )
    checkpoint = Checkpoint(path, key, facts)
    record(checkpoint)
    return checkpoint


def mean_like(member: Checkpoint, work: Path) -> Checkpoint:
    """A mean of checkpoints as earlier versions made them, here with the weights of one member."""
    trainings = [member.training, "0123456789ab"]
    key = replace(member.key, settings={"soup": trainings})
    path = checkpoint_path(work, key)
    weights = "soup-ba9876543210"
    shutil.copytree(member.path / str(member.facts.weights), path / weights)
    about = [{"name": member.name, "training": training, "score": 0.1, "digests": {}} for training in trainings]
    facts = {
        "label": key.label,
        "origin": member.facts.origin,
        "versions": {"torch": torch.__version__},
        "taps": member.facts.taps,
        "members": about,
        "seen_ids": list(member.facts.seen_ids),
        "scores": [member.facts.score],
        "score": member.facts.score,
        "weights": weights,
        "state": None,
        "finished": True,
        "digests": {name.replace(str(member.facts.weights), weights): d for name, d in member.facts.digests.items()},
    }
    (path / "checkpoint.json").write_text(json.dumps({"format": 1, "recipe": key.to_json(), "facts": facts}))
    return open_checkpoint(path)
