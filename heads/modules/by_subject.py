"""TODO docstring."""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from featcache.config import POOLED
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Subject
from heads.config import SpatialConfig, TrainConfig
from heads.modules.linear import RoiHead, linear_layer
from heads.modules.saved import _ARRAY, saved_shapes
from heads.modules.spatial import Rows, Shapes, SpatialReadout, Standardise
from heads.solvers.ridge import LinearMap

Columns = dict[tuple[str, str], torch.Tensor]  # (subject, hemisphere) -> (n_vertices,) int64, which outputs they are


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
