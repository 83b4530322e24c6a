"""Checkpoints as training would leave them, without training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from featcache.backbone.checkpoint import Checkpoint, checkpoint_path, record, save_weights
from featcache.backbone.network import Backbone, load_backbone
from featcache.config import BackboneConfig
from featcache.dataset.digests import digests, subject_digests
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
    start: Checkpoint | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What training would write down, see `_checkpoint` in heads/end_to_end.py."""
    backbone = (
        load_backbone(BackboneConfig(name=name, weights="none", size=size))
        if start is None
        else start.backbone(size=size)
    )
    return {
        "kind": "checkpoint",
        "stage": stage,
        "subjects": {s.name: digests(s, work) | subject_digests(s) for s in subjects},
        "backbone": {"name": name, "weights": "none", "size": size},
        "transform": dict(backbone.transform_settings),
        "timm": timm.__version__,
        "start": {"weights": backbone.digest, "training": None if start is None else start.training},
        "fold": {"fold": fold, "n_folds": N_FOLDS, "seed": 0},
        "settings": settings or {"epochs": 2, "loss": "mse"},
    }


def write_checkpoint(
    subjects: Sequence[Subject],
    work: Path,
    fold: int = 0,
    finished: bool = True,
    heads: Mapping[str, torch.Tensor] = HEADS,
    **about: Any,
) -> Checkpoint:
    """A checkpoint that saw every training image but those of its fold, and whose weights are its fold's own."""
    key = key_of(subjects, work, fold, **about)
    settings = key["backbone"]
    label = f"{key['stage']}-{settings['name']}-fold{fold}"
    seen = [s.train.ids[assign_folds(s.train.ids, N_FOLDS, 0) != fold] for s in subjects]
    facts = {
        "label": label,
        "origin": "random weights",
        "scores": [0.1],
        "score": 0.1,
        "epoch": 1,
        "weights": "epoch-001",
        "state": None,
        "finished": finished,
        "seen_ids": np.unique(np.concatenate(seen)).tolist(),
    }
    path = checkpoint_path(work, label, key)
    backbone = load_backbone(BackboneConfig(name=settings["name"], weights="none", size=settings["size"]))
    facts["digests"] = save_weights(path / "epoch-001", trained_weights(backbone, seed=fold), heads)
    checkpoint = Checkpoint(path, key, facts)
    record(checkpoint)
    return checkpoint
