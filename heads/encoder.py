"""Backbone and heads as one network, for both stages of training.

Outputs are one row of numbers an image, (n_images, n_outputs). `columns` says which of them are a subject's vertices,
so that whoever trains or scores needs to know nothing else of the heads.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from featcache.challenge import Subject
from featcache.roi import HEMISPHERES
from heads.batches import Targets
from heads.config import CORRELATIONS
from heads.losses import LOSSES
from heads.modules import RoiHead
from heads.ridge import LinearMap

Columns = dict[tuple[str, str], torch.Tensor]  # (subject, hemisphere) -> (n_vertices,) int64, which outputs they are


class Encoder(nn.Module):
    """images (n_images, 3, height, width) and their subjects (n_images,) -> (n_images, n_outputs)"""

    def __init__(self, backbone: nn.Module, heads: "AllSubjects | OneSubject") -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, images: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
        return self.heads(self.backbone(images), subjects)


class AllSubjects(nn.Module):
    """Stage 1: features beside a learnt embedding of the subject, then linear and batch norm, for both hemispheres.

    One layer for both is the same as a block for each: nothing in it mixes outputs.

    names : the subjects, in the order of their numbers
    """

    def __init__(self, n_features: int, names: Sequence[str], columns: Columns, n_embedding: int, start: float) -> None:
        super().__init__()
        self.names, self.columns = tuple(names), columns
        self.n_outputs = n_outputs = _count(columns)
        self.embedding = nn.Embedding(len(names), n_embedding)
        self.linear = nn.Linear(n_features + n_embedding, n_outputs, bias=False)  # the norm takes the mean out anyway
        self.norm = nn.BatchNorm1d(n_outputs)
        nn.init.constant_(self.norm.weight, start)  # what the outputs' spread is before training

    def forward(self, features: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(torch.cat([features, self.embedding(subjects)], 1)))

    def saved(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: `linear_map_of` reads it."""
        indices = {f"columns.{name}.{hemisphere}": index for (name, hemisphere), index in self.columns.items()}
        return {key: value for key, value in self.state_dict().items() if value.is_floating_point()} | indices


class OneSubject(nn.Module):
    """Stage 2: for each hemisphere a layer over all vertices and one for each ROI; a vertex has the mean of its own."""

    def __init__(self, n_features: int, subject: Subject, start: float) -> None:
        super().__init__()
        self.names = (subject.name,)
        self.hemispheres = nn.ModuleDict(
            {
                hemisphere: RoiHead(
                    n_features,
                    subject.n_vertices[hemisphere],
                    [torch.from_numpy(mask) for mask in subject.rois[hemisphere].values() if mask.any()],
                    start,
                )
                for hemisphere in HEMISPHERES
            }
        )
        self.columns, offset = {}, 0
        for hemisphere in HEMISPHERES:
            self.columns[subject.name, hemisphere] = torch.arange(offset, offset + subject.n_vertices[hemisphere])
            offset += subject.n_vertices[hemisphere]
        self.n_outputs = offset

    def forward(self, features: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.hemispheres[hemisphere](features) for hemisphere in HEMISPHERES], 1)

    def _head(self, hemisphere: str) -> RoiHead:
        return cast(RoiHead, self.hemispheres[hemisphere])

    def start_from(self, maps: Mapping[str, LinearMap]) -> None:
        """Make every layer of a hemisphere the same map, so that their mean is that map."""
        for hemisphere, head in maps.items():
            self._head(hemisphere).start_from(head)

    def saved(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: `linear_map_of` reads it."""
        maps = {hemisphere: self._head(hemisphere).linear_map() for hemisphere in HEMISPHERES}
        return {
            f"{self.names[0]}.{hemisphere}.{part}": tensor.detach()
            for hemisphere, head in maps.items()
            for part, tensor in head._asdict().items()
        }


def _count(columns: Columns) -> int:
    return 1 + max((int(index.max()) for index in columns.values() if len(index)), default=-1)


def output_columns(subjects: Sequence[Subject]) -> Columns:
    """Where each subject's vertices are among the outputs of stage 1.

    With the fsaverage masks of every subject, one output is one place on the surface, so the outputs are the union of
    all subjects' vertices and a vertex that a subject lacks is not among its columns. Without them, columns of two
    subjects mean nothing to each other and every subject has outputs of its own.
    """
    columns: Columns = {}
    offset = 0
    for hemisphere in HEMISPHERES:
        masks = [mask for subject in subjects if (mask := subject.fsaverage[hemisphere]) is not None]
        if len(masks) == len(subjects):
            place = np.cumsum(np.logical_or.reduce(masks)) - 1  # of each vertex of the surface among the outputs
            indices = [place[mask] for mask in masks]
            size = int(place[-1]) + 1
        else:
            counts = [subject.n_vertices[hemisphere] for subject in subjects]
            starts = np.cumsum([0, *counts])
            indices = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=False)]
            size = int(starts[-1])
        for subject, index in zip(subjects, indices, strict=True):
            columns[subject.name, hemisphere] = torch.as_tensor(index + offset)
        offset += size
    return columns


def encoder_loss(
    terms: Sequence[tuple[float, str]],
    outputs: torch.Tensor,
    targets: Sequence[Targets],
    columns: Columns,
    ceilings: dict[tuple[str, str], torch.Tensor | None],
) -> torch.Tensor:
    """The weighted sum of losses over a batch of several subjects, each term a mean over their images and vertices.

    A subject's images are compared with the outputs that are its vertices, under its own ceilings: vertices that it
    lacks have no part in it, and correlations are over images of one subject. A subject with one image in the batch
    has no correlation.

    outputs : (n_images, n_outputs)
    """
    predicted = [outputs[t.rows.to(outputs.device)][:, columns[t.subject, t.hemisphere]] for t in targets]
    total = outputs.new_zeros(())
    for weight, name in terms:
        counted = [k for k, t in enumerate(targets) if name not in CORRELATIONS or len(t.rows) > 1]
        numbers = [targets[k].responses.numel() for k in counted]
        for k, n in zip(counted, numbers, strict=True):
            t = targets[k]
            value = LOSSES[name](predicted[k], t.responses, ceilings[t.subject, t.hemisphere])
            total = total + weight * n / sum(numbers) * value
    return total if targets and total.requires_grad else total + 0 * outputs.sum()


def linear_map_of(heads: Mapping[str, torch.Tensor], names: Sequence[str], subject: str, hemisphere: str) -> LinearMap:
    """The map from features to a subject's vertices that the heads of a checkpoint are, batch norm as in evaluation.

    heads : what `saved` gave; names : the subjects of the checkpoint, in its order
    """
    if f"{subject}.{hemisphere}.weights" in heads:
        return LinearMap(heads[f"{subject}.{hemisphere}.weights"], heads[f"{subject}.{hemisphere}.intercept"])
    index = heads[f"columns.{subject}.{hemisphere}"]
    weights = heads["linear.weight"][index]
    scale = heads["norm.weight"][index] / (heads["norm.running_var"][index] + nn.BatchNorm1d(1).eps).sqrt()
    n_features = weights.shape[1] - heads["embedding.weight"].shape[1]
    level = weights[:, n_features:] @ heads["embedding.weight"][list(names).index(subject)]
    intercept = heads["norm.bias"][index] + scale * (level - heads["norm.running_mean"][index])
    return LinearMap((weights[:, :n_features] * scale[:, None]).T.contiguous(), intercept)
