"""Backbone and heads as one network, for both stages of training.

Outputs are one row of numbers an image, (n_images, n_outputs). `columns` says which of them are a subject's vertices,
so that whoever trains or scores needs to know nothing else of the heads. What heads read is {array: rows}, as the
layers that are tapped give it.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from featcache.backbone.taps import Taps
from featcache.config import POOLED
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Subject
from heads.backbones.batches import Targets
from heads.config import CORRELATIONS, SpatialConfig, TrainConfig
from heads.modules.linear import SMALL, RoiHead, linear_layer
from heads.modules.spatial import Rows, Shapes, SpatialReadout, Standardise
from heads.scores.losses import LOSSES
from heads.solvers.ridge import LinearMap

Columns = dict[tuple[str, str], torch.Tensor]  # (subject, hemisphere) -> (n_vertices,) int64, which outputs they are


class Encoder(nn.Module):
    """images (n_images, 3, height, width) and their subjects (n_images,) -> (n_images, n_outputs)"""

    def __init__(self, backbone: nn.Module, heads: "Heads", taps: Taps) -> None:
        super().__init__()
        self.backbone, self.heads, self._taps = backbone, heads, taps

    def forward(self, images: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
        return self.heads(self._taps.read(self.backbone, images), subjects)


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

    def forward(self, rows: Rows, subjects: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(torch.cat([rows[POOLED], self.embedding(subjects)], 1)))

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
        self.columns = _side_by_side(subject)
        self.n_outputs = _count(self.columns)

    def forward(self, rows: Rows, subjects: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.hemispheres[hemisphere](rows[POOLED]) for hemisphere in HEMISPHERES], 1)

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


class SpatialHeads(nn.Module):
    """Heads on places, of both stages: each subject's own, for both hemispheres.

    An image has outputs of its subject alone, from the first; those of another mean another's vertices, and what a
    smaller subject leaves over is 0.

    shapes : {array: shape of a row} of what is read
    config : space, rank, token_dropout; with a space, its outputs are one readout of all subjects, and each subject's
        vertices are linear in them
    """

    def __init__(
        self, shapes: Shapes, subjects: Sequence[Subject], config: TrainConfig | SpatialConfig, start: float
    ) -> None:
        super().__init__()
        self.names = tuple(subject.name for subject in subjects)
        self.columns = {key: index for subject in subjects for key, index in _side_by_side(subject).items()}
        self.n_outputs = _count(self.columns)
        self._shapes, self._config, self._start = dict(shapes), config, start
        self.standardise = Standardise(shapes)
        self.space = self._readout(config.space, 1.0) if config.space else None
        self.subjects = nn.ModuleList(self._own(sum(subject.n_vertices.values())) for subject in subjects)

    def _readout(self, n_outputs: int, start: float) -> SpatialReadout:
        config = self._config
        return SpatialReadout(self._shapes, n_outputs, config.rank, config.token_dropout, start, standardised=True)

    def _own(self, n_vertices: int) -> nn.Module:
        if self.space is None:
            return self._readout(n_vertices, self._start)
        return linear_layer(self.space.n_outputs, n_vertices, self._start)

    def forward(self, rows: Rows, subjects: torch.Tensor) -> torch.Tensor:
        rows = self.standardise(rows)
        read = rows if self.space is None else {_SPACE: self.space(rows)}
        if len(self.subjects) == 1:
            return self._outputs(0, read)
        parts, order = [], []
        for number in subjects.unique().tolist():
            own = (subjects == number).nonzero().flatten()
            parts.append(self._outputs(number, {array: values[own] for array, values in read.items()}))
            order.append(own)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def of_subject(self, rows: Rows, number: int) -> torch.Tensor:
        """(n_images, n_vertices) of both hemispheres, where all images are one subject's."""
        rows = self.standardise(rows)
        return self.subjects[number](rows if self.space is None else self.space(rows))

    def _outputs(self, number: int, read: Rows) -> torch.Tensor:
        outputs = self.subjects[number](read if self.space is None else read[_SPACE])
        return nn.functional.pad(outputs, (0, self.n_outputs - outputs.shape[1]))

    def regularisation(self) -> torch.Tensor:
        """What the spatial maps cost, as the settings weigh it: the mean over subjects with maps of their own."""
        readouts = [one for one in (self.space, *self.subjects) if isinstance(one, SpatialReadout)]
        costs = [one.regularisation(self._config.smoothness, self._config.sparsity) for one in readouts]
        return torch.stack(costs).mean()

    def start_from(self, heads: Mapping[str, torch.Tensor], names: Sequence[str]) -> bool:
        """Make them what a checkpoint's heads are for these subjects; False, and no change, where shapes differ.

        heads : what `saved` gave; names : the subjects of the checkpoint, in its order
        """
        if not set(self.names) <= set(names) or saved_shapes(heads) != list(self._shapes.items()):
            return False
        found = {key: heads.get(f"heads.{self._of(key, names)}") for key in self.state_dict()}
        own = self.state_dict().items()
        if any((value := found[key]) is None or value.shape != tensor.shape for key, tensor in own):
            return False
        self.load_state_dict(found)
        return True

    def _of(self, key: str, names: Sequence[str]) -> str:
        """The name of a tensor in the heads of these subjects."""
        kind, _, rest = key.partition(".")
        if kind != "subjects":
            return key
        number, _, rest = rest.partition(".")
        return f"subjects.{list(names).index(self.names[int(number)])}.{rest}"

    def saved(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: `spatial_head_of` reads it."""
        indices = {f"columns.{name}.{hemisphere}": index for (name, hemisphere), index in self.columns.items()}
        shapes = {f"{_ARRAY}{n:04d}.{array}": torch.tensor(s) for n, (array, s) in enumerate(self._shapes.items())}
        return {f"heads.{key}": value for key, value in self.state_dict().items()} | indices | shapes


Heads = AllSubjects | OneSubject | SpatialHeads

_SPACE = "space"  # the outputs that vertices are linear in, where rows are named by what was read
_ARRAY = "array."  # before the number and the name of an array, of the shape of its rows


def _side_by_side(subject: Subject) -> Columns:
    """The vertices of one subject, hemisphere by hemisphere."""
    columns, offset = {}, 0
    for hemisphere in HEMISPHERES:
        columns[subject.name, hemisphere] = torch.arange(offset, offset + subject.n_vertices[hemisphere])
        offset += subject.n_vertices[hemisphere]
    return columns


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


def saved_shapes(heads: Mapping[str, torch.Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    """[(array, shape of a row)] that the spatial heads of a checkpoint read, in their order; [] for pooled heads."""
    keys = sorted(key for key in heads if key.startswith(_ARRAY))
    return [(key.split(".", 2)[2], tuple(heads[key].tolist())) for key in keys]


def spatial_head_of(
    heads: Mapping[str, torch.Tensor], names: Sequence[str], subject: str, hemisphere: str
) -> nn.Module:
    """{array: rows} -> (n_images, n_vertices): what the spatial heads of a checkpoint are for a subject, in evaluation.

    Its first part, `[0]`, is a SpatialReadout: of the vertices, or of the space that they are linear in.

    heads : what `saved` gave; names : the subjects of the checkpoint, in its order
    """
    index = heads[f"columns.{subject}.{hemisphere}"]
    own = _under(heads, f"heads.subjects.{list(names).index(subject)}.")
    own = {key: value[index] for key, value in own.items()}
    space = _under(heads, "heads.space.")
    read = space or own
    rank = next((value.shape[1] for key, value in read.items() if key.endswith(".spatial")), 1)
    readout = SpatialReadout(dict(saved_shapes(heads)), len(read["bias"]), rank)
    statistics = {f"standardise.{key}": value for key, value in _under(heads, "heads.standardise.").items()}
    readout.load_state_dict(read | statistics)
    head = nn.Sequential(readout)
    if space:
        head.append(linear_layer(len(read["bias"]), len(index), SMALL))
        head[1].load_state_dict(own)
    return head.eval().requires_grad_(False)


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
