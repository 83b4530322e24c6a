"""Shares of variance from out-of-fold predictions, over bootstraps of the images.

All of them are fractions of the variance of the responses of images that no head was fitted to or chosen on, over all
folds. With y the response and f the prediction, both less the mean response of the images that were fitted to:

    full       R2 of all bands, 1 - sum (y - f)^2 / sum y^2
    unique b   R2 of all bands, less R2 of all bands but b
    alone b    R2 of band b alone
    shared     R2 of all bands, less all unique shares; for two bands it is alone a + alone b - full
    product b  sum f_b (2 y - f) / sum y^2, where f_b is what band b adds to f; they sum to full

Sources: Pratt 1987 and himalaya's r2_score_split (Dupré la Tour et al. 2022) for the product measure; Nimon and Reio
2011, https://doi.org/10.1177/1534484311411077, for unique and shared variance (commonality analysis).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from heads.compare.folds import Held, Model, models_of
from heads.compare.heads import Images


class Measure(NamedTuple):
    """What is measured. kind : one of KINDS; band : its number; None for 'full' and 'shared'"""

    kind: str
    band: int | None = None


KINDS = ("full", "shared", "unique", "alone", "product")
WITHOUT_INTERVAL = ("product",)  # how R2 is divided among bands depends on the weights that were chosen most of all


def measures_of(n_bands: int) -> list[Measure]:
    """Every measure, in the order of every array of them."""
    of_bands = [Measure(kind, number) for kind in KINDS[2:] for number in range(n_bands)]
    return [Measure("full"), Measure("shared"), *of_bands]


class VarianceSums:
    """Sums over images under weights of a bootstrap, fold by fold.

    The weight of an image counts where it is held out, and, to first order, in the heads of the other folds. Without
    the latter, intervals were a tenth too narrow (docs/log.md#2026-11-27-compare).

    weights : (n_draws, n_train) float32 of the images; the first draw is the images as they are
    """

    def __init__(self, n_bands: int, weights: torch.Tensor) -> None:
        self._n_bands, self._weights, self._sums = n_bands, weights, dict[Model | int | None, torch.Tensor]()

    def add(self, held: Held) -> None:
        """Add the images of one fold."""
        times, more = self._weights[:, held.rows], self._weights[:, held.fit_rows] - 1
        parts: list[tuple[Model | int | None, Images]] = [(None, held.squares), *held.errors.items()]
        for name, images in parts:
            self._add(name, times @ images.values + more @ images.pulls)
        for number, products in enumerate(held.products):
            self._add(number, products.sum(0))

    def _add(self, name: Model | int | None, summed: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + summed.double() if name in self._sums else summed.double()

    def shares(self) -> np.ndarray:
        """(n_measures, n_draws, n_vertices) float64, in the order of `measures_of`; products do not vary."""
        total = torch.where(self._sums[None] > 0, self._sums[None], torch.inf)
        r2 = {model: 1 - self._sums[model] / total for model in models_of(self._n_bands)}
        everything = frozenset(range(self._n_bands))
        unique = [r2[everything] - r2[everything - {number}] for number in range(self._n_bands)]
        alone = [r2[frozenset({number})] for number in range(self._n_bands)]
        shared = r2[everything] - torch.stack(unique).sum(0)
        product = [(self._sums[number] / total[0]).expand_as(total) for number in range(self._n_bands)]
        return torch.stack([r2[everything], shared, *unique, *alone, *product]).cpu().numpy()


class GroupSums(NamedTuple):
    """Sums of measures over groups of vertices of one subject.

    groups : (surface, ROI) of each; ROI 'all' for the surface
    counts : (n_groups,) vertices
    sums : (n_groups, n_measures, n_draws)
    ceilings : (n_groups,) sum of the noise ceilings of the vertices that have one above 0
    ceiling_counts, ceiling_sums : as counts and sums, of these vertices alone
    """

    groups: list[tuple[str, str]]
    counts: np.ndarray
    sums: np.ndarray
    ceilings: np.ndarray
    ceiling_counts: np.ndarray
    ceiling_sums: np.ndarray

    @classmethod
    def empty(cls, groups: Sequence[tuple[str, str]], n_measures: int, n_draws: int) -> "GroupSums":
        """No vertices yet."""
        n = len(groups)
        shape = (n, n_measures, n_draws)
        whole = [np.zeros(n, dtype=np.int64) for _ in range(2)]
        return cls(list(groups), whole[0], np.zeros(shape), np.zeros(n), whole[1], np.zeros(shape))

    def plus(
        self, surface: str, shares: np.ndarray, masks: dict[str, np.ndarray], ceiling: np.ndarray | None
    ) -> "GroupSums":
        """With some vertices of a surface more.

        shares : (n_measures, n_draws, n_vertices)
        masks : {ROI: (n_vertices,) bool}
        ceiling : (n_vertices,) noise ceilings; None where not known
        """
        parts = [part.copy() for part in self[1:]]
        counts, sums, ceilings, ceiling_counts, ceiling_sums = parts
        for number, (of_surface, roi) in enumerate(self.groups):
            if of_surface != surface or roi not in masks:
                continue
            mask = masks[roi]
            counts[number] += mask.sum()
            sums[number] += shares @ mask.astype(np.float64)
            if ceiling is not None:
                known = mask & (ceiling > 0)
                ceilings[number] += ceiling[known].sum(dtype=np.float64)
                ceiling_counts[number] += known.sum()
                ceiling_sums[number] += shares @ known.astype(np.float64)
        return GroupSums(self.groups, *parts)

    def over(self, surfaces: Sequence[str], roi: str) -> "GroupSums":
        """One group of the vertices of an ROI in some surfaces."""
        chosen = [number for number, (surface, name) in enumerate(self.groups) if name == roi and surface in surfaces]
        return GroupSums([("", roi)], *(part[chosen].sum(0, keepdims=True) for part in self[1:]))
