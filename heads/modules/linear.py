"""Linear heads: one layer for all vertices, or one more for each ROI. Each reduces to one LinearMap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn


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
    """A linear layer for the whole hemisphere and one for each ROI; a vertex's prediction is the mean of its layers.

    A vertex in no ROI has the hemisphere layer's prediction, unscaled. All layers are computed in one product.

    rois : masks (n_vertices,) of the ROIs; empty ones have no layer
    start : scale of the initial weights; 1 for torch's
    """

    vertex: torch.Tensor  # (n_outputs,) the vertex of each output: all of them, then those of each ROI
    share: torch.Tensor  # (n_vertices,) one over the number of layers that predict the vertex

    def __init__(self, n_features: int, n_vertices: int, rois: Sequence[torch.Tensor], start: float = SMALL) -> None:
        super().__init__()
        vertex = torch.cat([torch.arange(n_vertices), *(torch.as_tensor(mask).nonzero().flatten() for mask in rois)])
        self.layer = linear_layer(n_features, len(vertex), start)
        self.register_buffer("vertex", vertex)
        self.register_buffer("share", 1 / torch.bincount(vertex, minlength=n_vertices))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self._mean(self.layer(features))

    def linear_map(self) -> LinearMap:
        return LinearMap(self._mean(self.layer.weight.T), self._mean(self.layer.bias[None])[0])

    @torch.no_grad()
    def start_from(self, head: LinearMap) -> None:
        """Give every layer the weights of `head` for its vertices, so that the mean of the layers equals `head`."""
        self.layer.weight.copy_(head.weights.T[self.vertex])
        self.layer.bias.copy_(head.intercept[self.vertex])

    def _mean(self, outputs: torch.Tensor) -> torch.Tensor:
        """Mean over the layers of each vertex: (rows, n_outputs) -> (rows, n_vertices)."""
        sums = outputs.new_zeros(len(outputs), len(self.share))
        return sums.index_add(1, self.vertex, outputs) * self.share


def make_linear(n_features: int, n_vertices: int, rois: Sequence[np.ndarray]) -> LinearHead:
    """One layer for all vertices; ROIs are not used."""
    return LinearHead(n_features, n_vertices)


def make_roi(n_features: int, n_vertices: int, rois: Sequence[np.ndarray]) -> RoiHead:
    """One layer for all vertices and one for each ROI that has any. rois : masks (n_vertices,)"""
    return RoiHead(n_features, n_vertices, [torch.from_numpy(mask) for mask in rois if mask.any()])
