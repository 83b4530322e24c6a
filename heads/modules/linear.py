"""Linear heads: one for all vertices, or one more for each ROI. They reduce to one LinearMap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from heads.modules.outputs import SurfaceOutputs


class LinearMap(NamedTuple):
    """predictions = features @ weights + intercept

    weights : (n_features, n_vertices) float32
    intercept : (n_vertices,) float32
    """

    weights: torch.Tensor
    intercept: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.intercept, features, self.weights)


# Torch's initial weights predict noise of the size of the signal, which training on few images does not remove; zeros
# would leave correlation losses without a gradient.
SMALL = 0.1


def linear_layer(n_features: int, n_outputs: int, start: float) -> nn.Linear:
    """Linear layer with `start` times torch's initial weights, and intercepts of 0 if `start` is below 1."""
    layer = nn.Linear(n_features, n_outputs)
    if start < 1:
        with torch.no_grad():
            layer.weight.mul_(start)
            layer.bias.zero_()
    return layer


class _Linear(nn.Module):
    def linear_map(self) -> LinearMap:
        raise NotImplementedError

    def snapshot(self) -> LinearMap:
        """Copy of the head as a linear map."""
        return LinearMap(*(part.detach().clone() for part in self.linear_map()))


class LinearHead(_Linear):
    """One linear layer for all vertices: (n_images, n_features) -> (n_images, n_vertices)."""

    def __init__(self, n_features: int, n_vertices: int) -> None:
        super().__init__()
        self.layer = linear_layer(n_features, n_vertices, SMALL)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        predictions: torch.Tensor = self.layer(features)
        return predictions

    def linear_map(self) -> LinearMap:
        return LinearMap(self.layer.weight.T, self.layer.bias)


class RoiHead(_Linear):
    """Linear heads of the whole surface and of each ROI; the prediction of a vertex is the mean of its heads.

    A vertex in no ROI has the surface head's prediction, unscaled. A loss is taken of `unaveraged`, head by head, so
    that each learns to predict its vertices by itself. All heads are computed in one product.

    rois : masks (n_vertices,) of the ROIs; empty ones have no head
    start : scale of the initial weights; 1 for torch's
    """

    vertex: torch.Tensor  # (n_outputs,) and (n_vertices,) of SurfaceOutputs; in states of interrupted runs
    share: torch.Tensor

    def __init__(self, n_features: int, n_vertices: int, rois: Sequence[torch.Tensor], start: float = SMALL) -> None:
        super().__init__()
        outputs = SurfaceOutputs.of_heads(n_vertices, [mask for mask in rois if mask.any()])
        self.layer = linear_layer(n_features, len(outputs.vertex), start)
        self._sizes = outputs.sizes
        self.register_buffer("vertex", outputs.vertex)
        self.register_buffer("share", outputs.share)

    @property
    def outputs(self) -> SurfaceOutputs:
        """Which outputs of `unaveraged` are those of which head."""
        return SurfaceOutputs(slice(0, len(self.vertex)), self.vertex, self.share, self._sizes)

    def unaveraged(self, features: torch.Tensor) -> torch.Tensor:
        """(n_images, n_outputs) outputs of all heads, side by side."""
        outputs: torch.Tensor = self.layer(features)
        return outputs

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.outputs.mean(self.unaveraged(features))

    def linear_map(self) -> LinearMap:
        mean = self.outputs.mean
        return LinearMap(mean(self.layer.weight.T), mean(self.layer.bias[None])[0])

    @torch.no_grad()
    def start_from(self, head: LinearMap) -> None:
        """Give every head the weights of `head` for its vertices, so that their mean equals `head`."""
        self.layer.weight.copy_(head.weights.T[self.vertex])
        self.layer.bias.copy_(head.intercept[self.vertex])


def make_linear(n_features: int, n_vertices: int, rois: Sequence[np.ndarray]) -> LinearHead:
    """One layer for all vertices; ROIs are not used."""
    return LinearHead(n_features, n_vertices)


def make_roi(n_features: int, n_vertices: int, rois: Sequence[np.ndarray]) -> RoiHead:
    """One head for all vertices and one for each ROI that has any. rois : masks (n_vertices,)"""
    return RoiHead(n_features, n_vertices, [torch.from_numpy(mask) for mask in rois])
