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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from heads.compare.spaces import Candidate, Spaces
from heads.config import RidgeConfig
from heads.solvers.banded import candidates as weights_of_bands
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.axes import Basis
from heads.solvers.layers.priors import Prior
from heads.solvers.ridge import held_out_errors, is_exact, penalties_of, penalty_errors

PENALTIES = tuple(10.0 ** (k / 2) for k in range(-8, 9))  # in units of the mean eigenvalue

Model = frozenset[int]  # numbers of its bands


def models_of(n_bands: int) -> list[Model]:
    """All bands, all but each in turn, and each alone; no model twice."""
    everything = frozenset(range(n_bands))
    without = [everything - {number} for number in range(n_bands)]
    return list(dict.fromkeys([everything, *without, *(frozenset({number}) for number in range(n_bands))]))


def candidates_of(n_bands: int, n_random: int, windows: Sequence[Prior], seed: int) -> list[Candidate]:
    """Under each window: equal weights, each band alone, and random ones; then all of these without each band."""
    drawn = [tuple(row) for row in weights_of_bands(n_bands, n_random, seed).tolist()]
    without = [_without(weights, number) for weights in drawn for number in range(n_bands) if weights[number] < 1]
    return [Candidate(window, weights) for window in windows for weights in dict.fromkeys([*drawn, *without])]


def _without(weights: tuple[float, ...], number: int) -> tuple[float, ...]:
    rest = 1 - weights[number]
    return tuple(0.0 if band == number else weight / rest for band, weight in enumerate(weights))


@dataclass(frozen=True)
class Held:
    """Predictions of the held-out images of one fold, less the mean response of the images to fit to.

    rows : (n,) the images
    responses : (n, n_vertices) likewise
    predictions : {model: (n, n_vertices)}
    contributions : (n_bands, n, n_vertices) of each band to the model of all bands
    """

    rows: np.ndarray
    responses: torch.Tensor
    predictions: dict[Model, torch.Tensor]
    contributions: torch.Tensor


def fit_fold(spaces: Spaces, plan: FoldPlan, k: int, responses: torch.Tensor, candidates: Sequence[Candidate]) -> Held:
    """Predict the images of the k-th held-out fold by heads that were neither fitted to nor chosen on them.

    responses : (n_train, n_vertices)
    """
    search = _Search(spaces, plan, k, responses, candidates)
    for number in range(len(candidates)):
        search.offer(number)
    return search.held()


class _Choice:
    """What one model has chosen so far, for one part of the held-out images.

    error : (n_vertices,) least error; predictions : (n, n_vertices)
    """

    def __init__(self, n: int, responses: torch.Tensor) -> None:
        self.error = torch.full((responses.shape[1],), torch.inf, dtype=torch.float64, device=responses.device)
        self.predictions = responses.new_zeros(n, responses.shape[1])


class _Search:
    """The search of one fold over candidates, in which every model keeps the best that each vertex has seen."""

    def __init__(
        self, spaces: Spaces, plan: FoldPlan, k: int, responses: torch.Tensor, candidates: Sequence[Candidate]
    ) -> None:
        self._spaces, self._candidates = spaces, candidates
        self._rows, self._parts, self._trained = plan.outside(k), plan.parts(k), plan.backbone_trained
        mean = responses[self._rows].mean(0)
        self._target = responses[self._rows] - mean
        self._squares = self._target.square().sum(0)
        self._held_out = [responses[part] - mean for part in self._parts]
        self._n_bands, n_vertices = len(candidates[0].weights), responses.shape[1]
        self._models = models_of(self._n_bands)
        self._choices = {model: [_Choice(len(part), responses) for part in self._parts] for model in self._models}
        # of the model of all bands: what was chosen, and its dual weights, from which the bands' contributions follow
        n_dual = len(self._rows) if spaces.landmarks is None else len(spaces.landmarks)
        self._index = self._rows if spaces.landmarks is None else spaces.landmarks
        self._duals = [responses.new_zeros(n_dual, n_vertices) for _ in self._parts]
        self._chosen = [torch.zeros(n_vertices, dtype=torch.long, device=responses.device) for _ in self._parts]

    def offer(self, number: int) -> None:
        """Let every vertex of every model that has the candidate's bands take it, if it is better."""
        candidate = self._candidates[number]
        models = [model for model in self._models if candidate.support <= model]
        if not models:
            return
        basis = self._spaces.basis(candidate, self._rows)
        penalties, rotated = penalties_of(basis.values, PENALTIES), basis.rotated(self._target)
        least, which = self._errors(basis, rotated, penalties).double().min(1)
        for part, rows in enumerate(self._parts):
            better = {model: least[part] < self._choices[model][part].error for model in models}
            vertices = torch.nonzero(torch.stack(list(better.values())).any(0))[:, 0]
            if not len(vertices):
                continue
            on_axes = rotated[:, vertices] / (basis.values[:, None] + penalties[which[part, vertices]])
            predictions = basis.scores(rows) @ on_axes
            for model, improved in better.items():
                taken, choice = improved[vertices], self._choices[model][part]
                choice.predictions[:, improved] = predictions[:, taken]
                choice.error[improved] = least[part, improved]
                if len(model) == self._n_bands:
                    self._duals[part][:, improved] = basis.dual(on_axes[:, taken])[1]
                    self._chosen[part][improved] = number

    def _errors(self, basis: Basis, rotated: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        """(n_parts, n_penalties, n_vertices) errors by which each part's head is chosen."""
        if self._trained:
            parts = [(basis.scores(rows), y) for rows, y in zip(self._parts, self._held_out, strict=True)]
            return held_out_errors(basis.values, rotated, penalties, parts)[:-1]
        n_images = len(self._rows)
        exact = (basis.scores(self._rows), self._target) if is_exact(RidgeConfig(), n_images) else None
        return penalty_errors(basis.values, n_images, rotated, self._squares, penalties, exact)[None]

    def held(self) -> Held:
        """What the choices predict."""
        return Held(
            rows=np.concatenate(self._parts),
            responses=torch.cat(self._held_out),
            predictions={
                model: torch.cat([choice.predictions for choice in choices]) for model, choices in self._choices.items()
            },
            contributions=torch.cat([self._contributions(part, rows) for part, rows in enumerate(self._parts)], 1),
        )

    def _contributions(self, part: int, rows: np.ndarray) -> torch.Tensor:
        """(n_bands, n, n_vertices) of one part, window by window."""
        chosen, duals = self._chosen[part], self._duals[part]
        total = duals.new_zeros(self._n_bands, len(rows), duals.shape[1])
        for window in dict.fromkeys(candidate.window for candidate in self._candidates):
            of_window = torch.tensor([one.window == window for one in self._candidates], device=chosen.device)
            vertices = torch.nonzero(of_window[chosen])[:, 0]
            if len(vertices):
                weights = duals.new_tensor([one.weights for one in self._candidates])[chosen[vertices]].T
                added = self._spaces.contributions(window, weights, self._index, duals[:, vertices], self._rows)
                total[:, :, vertices] = added[:, rows]
        return total
