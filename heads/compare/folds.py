"""Banded ridge regression of one held-out fold, for the bands together, without each, and for each alone.

Let K_b be the kernel of band b. Under weights w of the bands, which sum to 1, and a penalty p, a vertex is predicted by
kernel ridge regression on sum_b w_b K_b: ridge regression with the penalty p / w_b on the weights of band b. Its
prediction is a sum over bands. Every vertex takes the window, the weights and the penalty of the least leave-one-out
error on the images to fit to (exact or generalised, as heads.solvers.ridge), or, if a backbone was trained on these
images, of the least error on the other parts of the held-out fold (see heads.solvers.held_out).

Models of fewer bands choose among the candidates in which the others have no weight: all models share decompositions.
If no band helps beside the others, the model of all bands is the model without it.

Source: Dupré la Tour et al. 2022, https://doi.org/10.1016/j.neuroimage.2022.119728
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from heads.compare.heads import Heads, Images, all_images
from heads.compare.spaces import Candidate, Spaces
from heads.config import RidgeConfig
from heads.solvers.banded import candidates as weights_of_bands
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.axes import Basis
from heads.solvers.layers.priors import Prior
from heads.solvers.ridge import held_out_errors, is_exact, penalties_of, penalty_errors

PENALTIES = tuple(10.0 ** (k / 2) for k in range(-8, 9))  # in units of the mean eigenvalue

_DIGITS = 6  # of weights of bands

Model = frozenset[int]  # numbers of its bands


def models_of(n_bands: int) -> list[Model]:
    """All bands, all but each in turn, and each alone; no model twice."""
    everything = frozenset(range(n_bands))
    without = [everything - {number} for number in range(n_bands)]
    return list(dict.fromkeys([everything, *without, *(frozenset({number}) for number in range(n_bands))]))


def candidates_of(n_bands: int, n_random: int, windows: Sequence[Prior], seed: int) -> list[Candidate]:
    """Under each window: equal weights, each band alone, and random ones; then all of these without each band."""
    drawn = weights_of_bands(n_bands, n_random, seed).numpy()
    without = [row * (np.arange(n_bands) != number) for row in drawn for number in range(n_bands) if row[number] < 1]
    # rounded, so that weights are alike that differ by the order of a sum alone, and none is too small to count
    rounded = [tuple(np.round(row / row.sum(), _DIGITS).tolist()) for row in [*drawn, *without]]
    return [Candidate(window, weights) for window in windows for weights in dict.fromkeys(rounded)]


@dataclass(frozen=True)
class Held:
    """What the held-out images of one fold, `rows`, and those that were fitted to, `fit_rows`, count for.

    squares : in the sum of squares of responses, less the mean of those fitted to
    errors : {model: in its sum of squared errors}
    products : (n_bands, n_held, n_vertices), see `Heads.products`
    """

    rows: np.ndarray
    fit_rows: np.ndarray
    squares: Images
    errors: dict[Model, Images]
    products: torch.Tensor


def fit_fold(spaces: Spaces, plan: FoldPlan, k: int, responses: torch.Tensor, candidates: Sequence[Candidate]) -> Held:
    """Predict the images of the k-th held-out fold by heads that were neither fitted to nor chosen on them.

    responses : (n_train, n_vertices)
    """
    search = _Search(spaces, plan, k, responses, len(candidates[0].weights))
    for candidate in candidates:
        search.offer(candidate)
    return search.held()


class _Best:
    """The best so far of each vertex, for one model and one part of the held-out images.

    least : (n_vertices,) least error that it was chosen by
    errors : its squared errors
    """

    def __init__(self, n_held: int, n_fit: int, like: torch.Tensor) -> None:
        self.least = torch.full((like.shape[1],), torch.inf, dtype=torch.float64, device=like.device)
        self.errors = Images(*(like.new_zeros(n, like.shape[1]) for n in (n_held, n_fit)))

    def take(self, vertices: torch.Tensor, least: torch.Tensor, errors: Images) -> None:
        """Take what is better for these vertices."""
        self.least[vertices] = least
        self.errors.values[:, vertices], self.errors.pulls[:, vertices] = errors


class _Search:
    """The search of one fold over candidates, in which every model keeps the best that each vertex has seen."""

    def __init__(self, spaces: Spaces, plan: FoldPlan, k: int, responses: torch.Tensor, n_bands: int) -> None:
        self._spaces, self._everything = spaces, frozenset(range(n_bands))
        self._rows, self._parts, self._trained = plan.outside(k), plan.parts(k), plan.backbone_trained
        mean = responses[self._rows].mean(0)
        self._target = responses[self._rows] - mean
        self._squares = self._target.square().sum(0)
        self._held_out = [responses[part] - mean for part in self._parts]
        self._best = {
            model: [_Best(len(part), len(self._rows), responses) for part in self._parts]
            for model in models_of(n_bands)
        }
        self._products = [responses.new_zeros(n_bands, len(part), responses.shape[1]) for part in self._parts]

    def offer(self, candidate: Candidate) -> None:
        """Let every vertex of every model that has the candidate's bands take it, if it is better."""
        models = [model for model in self._best if candidate.support <= model]
        basis = self._spaces.basis(candidate, self._rows)
        penalties, rotated = penalties_of(basis.values, PENALTIES), basis.rotated(self._target)
        least, which = self._errors(basis, rotated, penalties).double().min(1)
        for part in range(len(self._parts)):
            better = {model: least[part] < self._best[model][part].least for model in models}
            self._take(part, candidate, basis, rotated, penalties[which[part]], least[part], better)

    def _take(
        self,
        part: int,
        candidate: Candidate,
        basis: Basis,
        rotated: torch.Tensor,
        penalty: torch.Tensor,
        least: torch.Tensor,
        better: Mapping[Model, torch.Tensor],
    ) -> None:
        """Fit the vertices for which the candidate is better, once for all models. better : {model: (n_vertices,)}"""
        any_better = torch.stack(list(better.values())).any(0)
        if not any_better.any():
            return
        errors = self._heads(basis, rotated, penalty, part, any_better).errors()
        for model, improved in better.items():
            self._best[model][part].take(improved, least[improved], errors.at(improved[any_better]))
        if (improved := better[self._everything]).any():
            heads = self._heads(basis, rotated, penalty, part, improved)
            self._products[part][:, :, improved] = heads.products(self._spaces, candidate)

    def _heads(
        self, basis: Basis, rotated: torch.Tensor, penalty: torch.Tensor, part: int, vertices: torch.Tensor
    ) -> Heads:
        held_out = self._held_out[part][:, vertices]
        target = self._target[:, vertices]
        return Heads(basis, rotated[:, vertices], penalty[vertices], target, self._parts[part], held_out)

    def _errors(self, basis: Basis, rotated: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        """(n_parts, n_penalties, n_vertices) errors by which each part's head is chosen."""
        if self._trained:
            parts = [(basis.scores(rows), y) for rows, y in zip(self._parts, self._held_out, strict=True)]
            return held_out_errors(basis.values, rotated, penalties, parts)[:-1]
        n_images = len(self._rows)
        exact = (basis.scores(self._rows), self._target) if is_exact(RidgeConfig(), n_images) else None
        return penalty_errors(basis.values, n_images, rotated, self._squares, penalties, exact)[None]

    def held(self) -> Held:
        """What was chosen, of all parts together."""
        y = torch.cat(self._held_out)
        return Held(
            rows=np.concatenate(self._parts),
            fit_rows=self._rows,
            squares=Images(y.square(), -2 * self._target * y.sum(0) / len(self._rows)),
            errors={model: all_images([best.errors for best in parts]) for model, parts in self._best.items()},
            products=torch.cat(self._products, 1),
        )
