"""Outputs of the heads of one surface: which loss they are trained with, and what they predict together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from heads.scores.losses import Loss


class Compared(NamedTuple):
    """The arguments of a loss, for one head: its outputs, and the responses and ceilings of its vertices.

    outputs, responses : (n_images, n_vertices of the head)
    noise_ceiling : (n_vertices of the head,), or None
    """

    outputs: torch.Tensor
    responses: torch.Tensor
    noise_ceiling: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class SurfaceOutputs:
    """Which outputs of a module are those of one surface, head by head.

    The first head is that of the whole surface. The others, if any, are heads of ROIs. The prediction of a vertex is
    the mean of the heads that it belongs to.

    columns : the outputs of all heads, side by side: (n,) int64, or a slice
    vertex : (n,) int64, the vertex of each of these outputs
    share : (n_vertices,) one over the number of heads that a vertex belongs to
    sizes : number of outputs of each head
    """

    columns: torch.Tensor | slice
    vertex: torch.Tensor
    share: torch.Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of_heads(cls, n_vertices: int, rois: Sequence[torch.Tensor] = ()) -> "SurfaceOutputs":
        """Outputs that begin at 0. rois : masks (n_vertices,), one for each head of an ROI"""
        heads = [torch.arange(n_vertices), *(torch.as_tensor(mask).nonzero().flatten() for mask in rois)]
        vertex = torch.cat(heads)
        share = 1 / torch.bincount(vertex, minlength=n_vertices)
        return cls(slice(0, len(vertex)), vertex, share, tuple(map(len, heads)))

    @classmethod
    def of_one_head(cls, columns: torch.Tensor) -> "SurfaceOutputs":
        """Outputs of a surface with one head. columns : (n_vertices,) int64, the output of each vertex"""
        return replace(cls.of_heads(len(columns)), columns=columns)

    def shifted(self, first: int) -> "SurfaceOutputs":
        """The same outputs of a module in which others are before them; those of `of_heads` alone can be shifted."""
        return replace(self, columns=slice(first, first + len(self.vertex)))

    def to(self, device: torch.device | str) -> "SurfaceOutputs":
        """The same on a device."""
        columns = self.columns if isinstance(self.columns, slice) else self.columns.to(device)
        return replace(self, columns=columns, vertex=self.vertex.to(device), share=self.share.to(device))

    def mean(self, outputs: torch.Tensor) -> torch.Tensor:
        """Mean over the heads of each vertex: (n_images, outputs of the module) -> (n_images, n_vertices)."""
        of_surface = outputs[:, self.columns]
        if len(self.sizes) == 1:
            return of_surface
        sums = of_surface.new_zeros(len(of_surface), len(self.share))
        return sums.index_add(1, self.vertex, of_surface) * self.share

    def compared(
        self, outputs: torch.Tensor, responses: torch.Tensor, noise_ceiling: torch.Tensor | None
    ) -> list[Compared]:
        """What the loss of each head compares, the head of the whole surface first.

        Parameters
        ----------
        outputs : (n_images, outputs of the module)
        responses : (n_images, n_vertices)
        noise_ceiling : (n_vertices,), or None
        """
        of_surface = outputs[:, self.columns]
        if len(self.sizes) == 1:
            return [Compared(of_surface, responses, noise_ceiling)]
        ceilings = [None] * len(self.sizes) if noise_ceiling is None else noise_ceiling[self.vertex].split(self.sizes)
        parts = of_surface.split(self.sizes, 1), responses[:, self.vertex].split(self.sizes, 1), ceilings
        return [Compared(*values) for values in zip(*parts, strict=True)]

    def averaged(self, loss: Loss, roi_loss: Loss) -> Loss:
        """The mean over heads of the loss of each head's outputs, as one loss of the module's outputs.

        loss : of the head of the whole surface; roi_loss : of each head of an ROI
        """

        def mean_over_heads(
            outputs: torch.Tensor, responses: torch.Tensor, noise_ceiling: torch.Tensor | None = None
        ) -> torch.Tensor:
            whole, *rois = self.compared(outputs, responses, noise_ceiling)
            return torch.stack([loss(*whole), *(roi_loss(*roi) for roi in rois)]).mean()

        return mean_over_heads
