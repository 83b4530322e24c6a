"""Heads that are trained together with a backbone, for one subject or several.

They read {array: rows} of the tapped layers and return (n_images, n_outputs). `surfaces` says which of these outputs
are those of a subject's surface, and of which of its heads; training and scoring need to know nothing else of them.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from featcache.config import POOLED
from featcache.dataset.subject import Subject
from featcache.machine.device import pinned, to_device
from heads.config import SpatialConfig, TrainConfig
from heads.modules.linear import LinearMap, RoiHead, linear_layer
from heads.modules.outputs import SurfaceOutputs
from heads.modules.saved import saved_shapes, shape_tensors
from heads.modules.spatial import Rows, Shapes, SpatialReadout, Standardise

Columns = dict[tuple[str, str], torch.Tensor]  # {(subject, surface): (n_vertices,) int64, the output of each vertex}
Surfaces = Mapping[tuple[str, str], SurfaceOutputs]  # {(subject, surface): its outputs, head by head}

_SPACE = "space"  # name of the outputs of the shared space, among rows that have the names of arrays


class SubjectHeads(nn.Module):
    """Base of all heads by subject: ({array: rows}, numbers of the subjects, (n_images,)) -> (n_images, n_outputs).

    Numbers of subjects are best in main memory, pinned: heads that ask which subjects there are then need not wait.

    names : subjects, in the order of their numbers
    surfaces : outputs of each subject's surfaces
    """

    def __init__(self, names: Sequence[str], surfaces: Surfaces) -> None:
        super().__init__()
        self.names, self.surfaces = tuple(names), surfaces

    def saved(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint keeps; `heads.modules.saved` reads them."""
        raise NotImplementedError

    def penalty(self) -> torch.Tensor | None:
        """Number to add to the loss of a training step; None if there is nothing to add."""
        return None


class _OneHeadEach(SubjectHeads):
    """Heads of which each surface has one.

    columns : outputs that are each subject's vertices
    """

    def __init__(self, names: Sequence[str], columns: Columns) -> None:
        super().__init__(names, {key: SurfaceOutputs.of_one_head(outputs) for key, outputs in columns.items()})
        self.columns = columns
        self.n_outputs = 1 + max((int(outputs.max()) for outputs in columns.values() if len(outputs)), default=-1)

    def _column_tensors(self) -> dict[str, torch.Tensor]:
        return {f"columns.{subject}.{surface}": outputs for (subject, surface), outputs in self.columns.items()}


class AllSubjects(_OneHeadEach):
    """Pooled heads of stage 1: features beside a learnt embedding of the subject, then linear and batch norm.

    One layer for all surfaces is the same as a layer for each, because nothing mixes outputs.

    start : standard deviation of the outputs before training; 1 for torch's
    """

    def __init__(self, n_features: int, names: Sequence[str], columns: Columns, n_embedding: int, start: float) -> None:
        super().__init__(names, columns)
        self.embedding = nn.Embedding(len(names), n_embedding)
        # without bias: the norm takes the mean out
        self.linear = nn.Linear(n_features + n_embedding, self.n_outputs, bias=False)
        self.norm = nn.BatchNorm1d(self.n_outputs)
        nn.init.constant_(self.norm.weight, start)

    def forward(self, rows: Rows, subjects: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(to_device(subjects, self.linear.weight.device))
        outputs: torch.Tensor = self.norm(self.linear(torch.cat([rows[POOLED], embedded], 1)))
        return outputs

    def saved(self) -> dict[str, torch.Tensor]:
        floats = {key: value for key, value in self.state_dict().items() if value.is_floating_point()}
        return floats | self._column_tensors()


class OneSubject(SubjectHeads):
    """Pooled heads of stage 2: one for each surface and one for each ROI; a vertex has the mean of its heads.

    Outputs are those of all heads, before the mean, because each is trained by itself.
    """

    def __init__(self, n_features: int, subject: Subject, start: float) -> None:
        heads, surfaces, n_outputs = {}, {}, 0
        for surface, n_vertices in subject.n_vertices.items():
            rois = [torch.from_numpy(mask) for mask in subject.rois[surface].values()]
            heads[surface] = RoiHead(n_features, n_vertices, rois, start)
            surfaces[subject.name, surface] = heads[surface].outputs.shifted(n_outputs)
            n_outputs += len(heads[surface].vertex)
        super().__init__([subject.name], surfaces)
        # this attribute is in the names of tensors in states of interrupted runs, so it keeps its name
        self.hemispheres = nn.ModuleDict(heads)

    def forward(self, rows: Rows, subjects: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._head(surface).unaveraged(rows[POOLED]) for surface in self.hemispheres], 1)

    def start_from(self, maps: Mapping[str, LinearMap]) -> None:
        """Start every head of a surface from the same map, {surface: map}, so that their mean is that map."""
        for surface, linear_map in maps.items():
            self._head(surface).start_from(linear_map)

    def saved(self) -> dict[str, torch.Tensor]:
        maps = {surface: self._head(surface).linear_map() for surface in self.hemispheres}
        return {
            f"{self.names[0]}.{surface}.{part}": tensor.detach()
            for surface, linear_map in maps.items()
            for part, tensor in linear_map._asdict().items()
        }

    def _head(self, surface: str) -> RoiHead:
        return cast(RoiHead, self.hemispheres[surface])


class SpatialHeads(_OneHeadEach):
    """Heads on places, of both stages: each subject has its own, for all of its surfaces.

    The first outputs of an image are its subject's vertices; the remaining outputs are 0. So an output stands for other
    vertices in another subject.

    Parameters
    ----------
    shapes : {array: shape of a row}
    config : `space`, `rank`, `token_dropout`, `smoothness` and `sparsity`. With a space, one readout of all subjects
        gives its outputs, and each subject's vertices are linear in them
    start : scale of the initial weights; 1 for torch's
    """

    def __init__(
        self, shapes: Shapes, subjects: Sequence[Subject], config: TrainConfig | SpatialConfig, start: float
    ) -> None:
        columns = {key: outputs for subject in subjects for key, outputs in _side_by_side(subject).items()}
        super().__init__([subject.name for subject in subjects], columns)
        self._shapes, self._config, self._start = dict(shapes), config, start
        self._read = dict(shapes)  # of the rows that they are given, before anything that `standardise` computes
        self.standardise = Standardise(shapes)
        self.space = self._readout(config.space, 1.0) if config.space else None
        self.subjects = nn.ModuleList(self._vertices(sum(subject.n_vertices.values())) for subject in subjects)

    def _readout(self, n_outputs: int, start: float) -> SpatialReadout:
        config = self._config
        return SpatialReadout(self._shapes, n_outputs, config.rank, config.token_dropout, start, standardised=True)

    def _vertices(self, n_vertices: int) -> nn.Module:
        """Module that predicts one subject's vertices: a separate readout, or a linear layer on the space."""
        if self.space is None:
            return self._readout(n_vertices, self._start)
        return linear_layer(self.space.n_outputs, n_vertices, self._start)

    def forward(self, rows: Rows, subjects: torch.Tensor) -> torch.Tensor:
        rows = self.standardise(rows)
        inputs = rows if self.space is None else {_SPACE: self.space(rows)}
        if len(self.subjects) == 1:
            return self._padded(0, inputs)
        of_images = subjects.cpu().numpy()
        numbers, counts = np.unique(of_images, return_counts=True)
        order = np.argsort(of_images, kind="stable")
        images, back = (self._on_device(torch.from_numpy(index)) for index in (order, np.argsort(order)))
        parts = {name: values[images].split(counts.tolist()) for name, values in inputs.items()}
        outputs = [
            self._padded(number, {name: of_subjects[k] for name, of_subjects in parts.items()})
            for k, number in enumerate(numbers.tolist())
        ]
        return torch.cat(outputs)[back]

    def _on_device(self, index: torch.Tensor) -> torch.Tensor:
        device = next(self.parameters()).device
        return to_device(pinned(index, device), device)

    def of_subject(self, rows: Rows, number: int) -> torch.Tensor:
        """(n_images, n_vertices) predictions for all surfaces of one subject."""
        rows = self.standardise(rows)
        outputs: torch.Tensor = self.subjects[number](rows if self.space is None else self.space(rows))
        return outputs

    def _padded(self, number: int, inputs: Rows) -> torch.Tensor:
        outputs = self.subjects[number](inputs if self.space is None else inputs[_SPACE])
        return nn.functional.pad(outputs, (0, self.n_outputs - outputs.shape[1]))

    def regularisation(self) -> torch.Tensor:
        """Penalty of the spatial maps under `smoothness` and `sparsity`, the mean over all readouts."""
        readouts = [module for module in (self.space, *self.subjects) if isinstance(module, SpatialReadout)]
        costs = [readout.regularisation(self._config.smoothness, self._config.sparsity) for readout in readouts]
        return torch.stack(costs).mean()

    def penalty(self) -> torch.Tensor | None:
        return self.regularisation() if self._config.smoothness or self._config.sparsity else None

    def start_from(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> bool:
        """Load a checkpoint's heads for these subjects. Returns False and changes nothing if shapes differ.

        Parameters
        ----------
        tensors : heads of the checkpoint, as `saved` gave them
        names : subjects of the checkpoint, in its order
        """
        if not set(self.names) <= set(names) or saved_shapes(tensors) != list(self._read.items()):
            return False
        current = self.state_dict()
        taken = {key: tensors.get(f"heads.{self._name_among(key, names)}") for key in current}
        if any(value is None or value.shape != current[key].shape for key, value in taken.items()):
            return False
        self.load_state_dict(taken)
        return True

    def _name_among(self, key: str, names: Sequence[str]) -> str:
        """Name of one of these tensors in the heads of a checkpoint, where a subject's number may differ."""
        kind, _, rest = key.partition(".")
        if kind != "subjects":
            return key
        number, _, rest = rest.partition(".")
        return f"subjects.{list(names).index(self.names[int(number)])}.{rest}"

    def saved(self) -> dict[str, torch.Tensor]:
        tensors = {f"heads.{key}": value for key, value in self.state_dict().items()}
        return tensors | self._column_tensors() | shape_tensors(self._read)


def output_columns(subjects: Sequence[Subject]) -> Columns:
    """Outputs of stage 1 that are each subject's vertices.

    If every subject has fsaverage masks, one output is one place on the surface: the outputs are the union of all
    subjects' vertices, and a vertex that a subject lacks is not among its columns. Otherwise vertices of two subjects
    cannot be matched, and every subject has separate outputs.
    """
    columns: Columns = {}
    offset = 0
    for surface in dict.fromkeys(surface for subject in subjects for surface in subject.surfaces):
        sharing = [subject for subject in subjects if surface in subject.surfaces]
        outputs, n_outputs = _outputs_of(sharing, surface)
        for subject, index in zip(sharing, outputs, strict=True):
            columns[subject.name, surface] = torch.as_tensor(index + offset)
        offset += n_outputs
    return columns


def _outputs_of(subjects: Sequence[Subject], surface: str) -> tuple[list[np.ndarray], int]:
    """Outputs of each subject's vertices on one surface, counted from 0, and the number of outputs."""
    masks = [mask for subject in subjects if (mask := subject.fsaverage[surface]) is not None]
    if len(masks) == len(subjects):
        output_of_place = np.cumsum(np.logical_or.reduce(masks)) - 1
        return [output_of_place[mask] for mask in masks], int(output_of_place[-1]) + 1
    ends = np.cumsum([subject.n_vertices[surface] for subject in subjects])
    starts = np.concatenate([[0], ends[:-1]])
    return [np.arange(start, end) for start, end in zip(starts, ends, strict=True)], int(ends[-1])


def _side_by_side(subject: Subject) -> Columns:
    """Columns of one subject, surface after surface."""
    columns, offset = {}, 0
    for surface in subject.surfaces:
        columns[subject.name, surface] = torch.arange(offset, offset + subject.n_vertices[surface])
        offset += subject.n_vertices[surface]
    return columns
