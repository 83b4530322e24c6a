"""Kernels of bands, and the axes that the training images of a fold span under weights of the bands.

The kernel of a band is the mean of the kernels of its layers (see heads.solvers.layers.kernels: features centred,
channels scaled, every layer with the same trace), so that bands of any number of features and of any unit count alike.
With many images there are only its columns at some of them, the landmarks (see heads.solvers.layers.axes).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from heads.compare.bands import Band
from heads.features.rows import LayerRows
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.axes import LANDMARKS, Basis, basis_of_features, basis_of_kernel, landmark_features
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior


@dataclass(frozen=True)
class Candidate:
    """What a vertex may choose: a window over the image, and weights of the bands, from 0, with sum 1."""

    window: Prior
    weights: tuple[float, ...]

    @property
    def support(self) -> frozenset[int]:
        """Numbers of the bands that have any weight."""
        return frozenset(number for number, weight in enumerate(self.weights) if weight > 0)


@dataclass(frozen=True)
class Spaces:
    """Kernels of the bands of one subject's training images, under one set of scales.

    columns : {window: (n_train, n_columns) of each band}
    landmarks : (n_columns,) the images that columns are of; None: all training images
    """

    columns: dict[Prior, list[torch.Tensor]]
    landmarks: np.ndarray | None = None

    def basis(self, candidate: Candidate, rows: np.ndarray) -> Basis:
        """Axes of the images to fit to, `rows`, under a candidate."""
        mixed = self._mixed(candidate)
        if self.landmarks is None:
            return basis_of_kernel(mixed, rows)
        features, whitening = landmark_features(mixed, self.landmarks)
        return basis_of_features(features, rows, (self.landmarks, whitening))

    def _mixed(self, candidate: Candidate) -> torch.Tensor:
        pairs = zip(candidate.weights, self.columns[candidate.window], strict=True)
        return torch.stack([weight * columns for weight, columns in pairs if weight > 0]).sum(0)

    def weighted(self, candidate: Candidate, index: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """(n_bands, n_train, len(index)) kernel of each band times its weight, less the mean over the images to fit to.

        index : the images that dual weights are of, as `Basis.dual` gives them; of landmarks, all of them
        rows : images to fit to
        """
        pairs = zip(candidate.weights, self.columns[candidate.window], strict=True)
        chosen = [weight * (columns if self.landmarks is not None else columns[:, index]) for weight, columns in pairs]
        return torch.stack([columns - columns[rows].mean(0) for columns in chosen])


def n_columns(plan: FoldPlan) -> int:
    """Number of images that columns of kernels are of."""
    return LANDMARKS if is_sampled(plan) else plan.n_train


def is_sampled(plan: FoldPlan) -> bool:
    """Whether there are more images to fit to than a kernel is decomposed for."""
    return min(len(plan.outside(k)) for k in range(len(plan))) > LANDMARKS


def spaces_of(
    bands: Sequence[Band], plan: FoldPlan, windows: Sequence[Prior], device: str, *, held: float
) -> list[Spaces]:
    """Kernels of the bands for each set of scales of a plan, from their stores, layer by layer.

    held : bytes of features of a store that may be kept in memory while it is read
    """
    made = []
    sources = {plan.scales(k): plan.source(k) for k in range(len(plan))}
    for number, source in sources.items():
        scale_rows = plan.scale_rows(number)
        landmarks = np.sort(np.random.default_rng(0).permutation(scale_rows)[:LANDMARKS]) if is_sampled(plan) else None
        columns: dict[Prior, list[torch.Tensor]] = {window: [] for window in windows}
        for band in bands:
            of_band = _columns(band, source, scale_rows, landmarks, windows, device, held)
            for window, part in zip(windows, of_band, strict=True):
                columns[window].append(part[: plan.n_train, : n_columns(plan)].contiguous())
        made.append(Spaces(columns, landmarks))
    return made


def _columns(
    band: Band,
    source: int,
    scale_rows: np.ndarray,
    landmarks: np.ndarray | None,
    windows: Sequence[Prior],
    device: str,
    held: float,
) -> list[torch.Tensor]:
    """(n_images, n_columns) kernel of a band under each window; arrays have the same share."""
    n_arrays = sum(len(part.names) for part in band.parts)
    totals: list[torch.Tensor] = []
    for part in band.parts:
        rows = LayerRows(part.stores[source if part.backbone_trained else 0], part.names, device, held)
        of_part = LayerKernels(rows, scale_rows).under(windows, landmarks).div_(n_arrays)
        totals = [*of_part] if not totals else [total.add_(more) for total, more in zip(totals, of_part, strict=True)]
    return totals
