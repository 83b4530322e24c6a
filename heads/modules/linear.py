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


# torch's own start predicts noise of the size of the signal, which few images never wear down; zero would leave
# correlation losses without a gradient.
SMALL = 0.1


def linear_layer(n_features: int, n_outputs: int, start: float) -> nn.Linear:
    """`start` times torch's own random weights; below 1 without its random intercepts."""
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
        """The head as it is now."""
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

    A vertex in no ROI has the hemisphere layer's prediction, unscaled. The layers lie side by side in one product.

    rois : masks (n_vertices,) of the ROIs; empty ones have no layer
    start : the size of the first weights, 1 for torch's own
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
        """Make every layer predict what `head` does for its vertices, so that their mean does."""
        self.layer.weight.copy_(head.weights.T[self.vertex])
        self.layer.bias.copy_(head.intercept[self.vertex])

    def _mean(self, outputs: torch.Tensor) -> torch.Tensor:
        """(rows, n_outputs) -> (rows, n_vertices)"""
        sums = outputs.new_zeros(len(outputs), len(self.share))
        return sums.index_add(1, self.vertex, outputs) * self.share


def make_linear(n_features: int, n_vertices: int, rois: Sequence[np.ndarray]) -> LinearHead:
    """One layer for all vertices, whatever the ROIs."""
    return LinearHead(n_features, n_vertices)


def make_roi(n_features: int, n_vertices: int, rois: Sequence[np.ndarray]) -> RoiHead:
    """One layer for all vertices and one for each ROI that has any. rois : masks (n_vertices,)"""
    return RoiHead(n_features, n_vertices, [torch.from_numpy(mask) for mask in rois if mask.any()])
