"""Heads of each kind that `--head` offers: how a stage of training builds them, and how the second stage starts them.

`heads.config.training.HEAD_KINDS` knows all kinds. Of each it names two functions:

- build (shapes of rows, subjects, config, size of the first weights) -> heads with random first weights;
- start (heads, first weights) -> what to say of it, or ''; it gives heads of the second stage their first weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from featcache.backbone.checkpoint import Checkpoint
from featcache.backbone.network import TorchBackbone
from featcache.config import POOLED
from featcache.dataset.subject import Subject
from heads.backbones.batches import Images, pairs_of
from heads.config import StageConfig
from heads.config.registry import load
from heads.modules.by_subject import AllSubjects, OneSubject, SpatialHeads, SubjectHeads, output_columns
from heads.modules.core import CoreHeads
from heads.modules.linear import SMALL, LinearMap
from heads.modules.saved import linear_map_of, saved_shapes
from heads.modules.spatial import Shapes
from heads.solvers.estimator import RidgeHead

_FEATURE_BATCH = 64  # images a pass where only features are asked for


@dataclass(frozen=True)
class FirstWeights:
    """What heads of the second stage may start from.

    checkpoint : of the backbone; None for one as its weights came
    backbone : as it is before training, on the device of the training
    """

    checkpoint: Checkpoint | None
    backbone: TorchBackbone
    images: Images


def build_heads(shapes: Shapes, subjects: Sequence[Subject], config: StageConfig) -> SubjectHeads:
    """Heads of a stage with random first weights. shapes : {array: shape of a row} of what they read."""
    size = 1.0 if config.train.head_start == "default" else SMALL
    heads: SubjectHeads = load(config.train.kind.build)(shapes, subjects, config, size)
    return heads


def has_roi_heads(subjects: Sequence[Subject], config: StageConfig) -> bool:
    """Whether `build_heads` makes heads of ROIs: in the second stage, of the kinds that have them, where ROIs are."""
    return config.stage == "finetune" and config.train.kind.reads_rois and any(one.has_rois for one in subjects)


def start_heads(heads: SubjectHeads, first: FirstWeights, config: StageConfig) -> str:
    """Give the heads the first weights that the settings ask for; returns what to say of it, or ''."""
    if config.stage != "finetune" or config.train.head_start != "fitted":
        return ""
    note: str = load(config.train.kind.start)(heads, first)
    return note


def build_linear(shapes: Shapes, subjects: Sequence[Subject], config: StageConfig, size: float) -> SubjectHeads:
    """Heads on the pooled features, of all subjects in the first stage, of one in the second."""
    n_features = shapes[POOLED][0]
    if config.stage == "finetune":
        return OneSubject(n_features, subjects[0], size)
    names = [subject.name for subject in subjects]
    return AllSubjects(n_features, names, output_columns(subjects), config.train.embedding, size)


def start_linear(heads: SubjectHeads, first: FirstWeights) -> str:
    """Start where stage 1's heads ended for this subject; without pooled ones, from the closed form."""
    assert isinstance(heads, OneSubject)
    subject, checkpoint = first.images.subjects[0], first.checkpoint
    tensors = checkpoint.heads() if checkpoint is not None and checkpoint.key.stage == "pretrain" else {}
    if checkpoint is not None and tensors and not saved_shapes(tensors):
        names = list(checkpoint.key.subjects)
        heads.start_from({s: linear_map_of(tensors, names, subject.name, s) for s in subject.surfaces})
    else:
        heads.start_from(_fitted_maps(first.backbone, first.images))
    return ""


def build_spatial(shapes: Shapes, subjects: Sequence[Subject], config: StageConfig, size: float) -> SubjectHeads:
    """Heads on places of layers, of either stage."""
    return SpatialHeads(shapes, subjects, config.train, size)


def build_core(shapes: Shapes, subjects: Sequence[Subject], config: StageConfig, size: float) -> SubjectHeads:
    """Heads on places of a core that all subjects share, of either stage; their first readouts are always small."""
    return CoreHeads(shapes, subjects, config.train)


def start_spatial(heads: SubjectHeads, first: FirstWeights) -> str:
    """Start where the checkpoint's heads ended, if they have the same shape."""
    assert isinstance(heads, SpatialHeads)
    checkpoint = first.checkpoint
    if checkpoint is not None and heads.start_from(checkpoint.heads(), list(checkpoint.key.subjects)):
        return ""
    return "heads start from small random maps; the start has none of the same --layers, --grid and shape"


def _fitted_maps(backbone: TorchBackbone, images: Images) -> dict[str, LinearMap]:
    """Ridge regression of the first subject's responses on pooled features, on the images to train on, by surface."""
    subject, rows = images.subjects[0], images.train_rows[0]
    features = _pooled_features(backbone, images, rows)
    maps = {}
    for surface in subject.surfaces:
        responses = torch.from_numpy(np.asarray(subject.responses(surface)[rows]))
        head = RidgeHead().fit(features, responses)
        maps[surface] = LinearMap(head.weights_, head.intercept_)
    return maps


@torch.inference_mode()
def _pooled_features(backbone: TorchBackbone, images: Images, rows: np.ndarray) -> torch.Tensor:
    """(len(rows), n_features) float32 of the first subject's images, on the CPU."""
    device = next(backbone.model.parameters()).device
    batches = [pairs_of(0, rows[i : i + _FEATURE_BATCH]) for i in range(0, len(rows), _FEATURE_BATCH)]
    features = [backbone.pooled(backbone.normalise(images.read(batch).to(device))) for batch in batches]
    return torch.cat(features).float().cpu()
