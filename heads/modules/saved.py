"""TODO docstring."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from heads.modules.linear import SMALL, linear_layer
from heads.modules.spatial import SpatialReadout
from heads.solvers.ridge import LinearMap

_ARRAY = "array."  # before the number and the name of an array, of the shape of its rows


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
