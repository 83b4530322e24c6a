"""Heads of some vertices under one candidate, and what each image counts for, held out and fitted to.

A sum over held-out images varies with these images, and with those that the heads were fitted to. To first order it is
a sum over images of both. Let w_i be the weight of image i in the fit, e_i its residual, and s_i its scores on the axes
with eigenvalues v. Under penalty p the weights on the axes change by s_i e_i / (v + p) per unit of w_i. So a sum of
squared errors r_t of held-out images t changes by

    - 2 e_i sum_t (s_t' (v + p)^-1 s_i + 1 / n) r_t

where 1 / n is of the intercept. Penalties and weights of bands are taken as given.

Source: the infinitesimal jackknife, Giordano et al. 2019, A Swiss Army infinitesimal jackknife (AISTATS).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from heads.compare.spaces import Candidate, Spaces
from heads.solvers.layers.axes import Basis


class Images(NamedTuple):
    """What images count for in a sum over held-out images.

    values : (n_held, n_vertices) the summands
    pulls : (n_fit, n_vertices) by how much the sum grows per unit of the weight of an image that is fitted to
    """

    values: torch.Tensor
    pulls: torch.Tensor

    def at(self, vertices: torch.Tensor) -> "Images":
        """Of some vertices."""
        return Images(self.values[:, vertices], self.pulls[:, vertices])


class Heads:
    """Heads of some vertices.

    basis : axes of the images to fit to
    rotated : (rank, n_vertices) as `Basis.rotated` gives them
    penalty : (n_vertices,)
    target : (n_fit, n_vertices) responses less their mean
    rows, held_out : held-out images, and their responses less the same mean, (n_held, n_vertices)
    """

    def __init__(
        self,
        basis: Basis,
        rotated: torch.Tensor,
        penalty: torch.Tensor,
        target: torch.Tensor,
        rows: np.ndarray,
        held_out: torch.Tensor,
    ) -> None:
        self._basis, self._target, self._rows, self._y = basis, target, rows, held_out
        self._shrunk = basis.values[:, None] + penalty
        self._on_axes = rotated / self._shrunk
        self._scores, self._held_scores = basis.scores(basis.rows), basis.scores(rows)
        self.predictions = self._held_scores @ self._on_axes
        self._fitted = self._scores @ self._on_axes

    def errors(self) -> Images:
        """Squared errors."""
        r = self._y - self.predictions
        pulls = self._scores @ ((self._held_scores.T @ r) / self._shrunk) + r.sum(0) / len(self._target)
        return Images(r.square(), -2 * (self._target - self._fitted) * pulls)

    def products(self, spaces: Spaces, candidate: Candidate) -> torch.Tensor:
        """(n_bands, n_held, n_vertices) of each band, f_b (2 y - f), with f_b its part of the prediction f.

        Over bands they sum to y^2 - (y - f)^2.
        """
        index, duals = self._basis.dual(self._on_axes)
        parts = spaces.weighted(candidate, index, self._basis.rows)[:, self._rows] @ duals
        return parts * (2 * self._y - self.predictions)


def all_images(parts: Sequence[Images]) -> Images:
    """Of the parts of a fold, together."""
    return Images(torch.cat([part.values for part in parts]), torch.stack([part.pulls for part in parts]).sum(0))
