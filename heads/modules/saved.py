"""Heads of a checkpoint, read back from the tensors that it keeps.

The modules of `heads.modules.by_subject` write these tensors (`saved`) into `heads.safetensors`. Reading them needs
neither the settings of the training nor its subjects:

- `<subject>.<surface>.weights` and `.intercept`: a linear map of the pooled features (stage 2);
- `linear.*`, `norm.*`, `embedding.*` and `columns.<subject>.<surface>`: one layer for all subjects (stage 1);
- `heads.*`, `array.<number>.<name>` and `columns.<subject>.<surface>`: spatial heads (both stages); with
  `heads.standardise.core.*`, heads on the output of a core, which `heads.modules.core` reads.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from heads.modules.linear import SMALL, LinearMap, linear_layer
from heads.modules.spatial import Shapes, readout_of

_ARRAY = "array."  # prefix of the names of tensors that hold the shape of an array's rows


def linear_map_of(tensors: Mapping[str, torch.Tensor], names: Sequence[str], subject: str, surface: str) -> LinearMap:
    """Linear map from pooled features to a subject's vertices, with batch norms as in evaluation.

    Parameters
    ----------
    tensors : pooled heads of a checkpoint, of either stage
    names : subjects of the checkpoint, in its order
    """
    if f"{subject}.{surface}.weights" in tensors:
        return LinearMap(tensors[f"{subject}.{surface}.weights"], tensors[f"{subject}.{surface}.intercept"])
    outputs = tensors[f"columns.{subject}.{surface}"]
    weights = tensors["linear.weight"][outputs]
    scale = tensors["norm.weight"][outputs] / (tensors["norm.running_var"][outputs] + nn.BatchNorm1d(1).eps).sqrt()
    n_features = weights.shape[1] - tensors["embedding.weight"].shape[1]
    embedded = weights[:, n_features:] @ tensors["embedding.weight"][list(names).index(subject)]
    intercept = tensors["norm.bias"][outputs] + scale * (embedded - tensors["norm.running_mean"][outputs])
    return LinearMap((weights[:, :n_features] * scale[:, None]).T.contiguous(), intercept)


def saved_shapes(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    """Arrays that spatial heads read, in order, as [(array, shape of a row)]; [] for pooled heads."""
    keys = sorted(key for key in tensors if key.startswith(_ARRAY))
    return [(key.split(".", 2)[2], tuple(tensors[key].tolist())) for key in keys]


def shape_tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    """The tensors from which `saved_shapes` reads these shapes."""
    return {
        f"{_ARRAY}{number:04d}.{array}": torch.tensor(shape) for number, (array, shape) in enumerate(shapes.items())
    }


def spatial_head_of(tensors: Mapping[str, torch.Tensor], names: Sequence[str], subject: str, surface: str) -> nn.Module:
    """Spatial head of one subject's surface, in evaluation: {array: rows} -> (n_images, n_vertices).

    Its first part, `[0]`, is a SpatialReadout: of the vertices, or of the space that they are linear in.

    Parameters
    ----------
    tensors : spatial heads of a checkpoint, of either stage
    names : subjects of the checkpoint, in its order
    """
    outputs = tensors[f"columns.{subject}.{surface}"]
    head_of_subject = tensors_under(tensors, f"heads.subjects.{list(names).index(subject)}.")
    vertices = {key: value[outputs] for key, value in head_of_subject.items()}
    space = tensors_under(tensors, "heads.space.")
    maps = space or vertices
    statistics = {f"standardise.{key}": value for key, value in tensors_under(tensors, "heads.standardise.").items()}
    readout = readout_of(dict(saved_shapes(tensors)), maps | statistics)
    head = nn.Sequential(readout)
    if space:
        head.append(linear_layer(readout.n_outputs, len(outputs), SMALL))
        head[1].load_state_dict(vertices)
    return head.eval().requires_grad_(False)


def tensors_under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with a prefix, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
