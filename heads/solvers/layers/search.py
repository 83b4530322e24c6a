"""The few priors that serve a surface, found on rough kernels before any exact one is computed.

Priors are compared on a sample of the images and of the vertices, by kernels with few landmark images. That is enough
to rank them: on real recordings, 64 landmarks choose as well as the exact errors of all priors (docs/decisions/0032).
What is learnt from the chosen priors is then computed exactly.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.machine.threads import side_by_side
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers import sizes
from heads.solvers.layers.axes import Basis, basis_of_features, landmark_features
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.ridge import held_out_errors, penalties_of, penalty_errors

SEARCH_LANDMARKS, SEARCH_VERTICES = 64, 1024  # on which priors are compared, besides `sizes.SEARCH_IMAGES`

Finalists = list[list[list[Prior]]]  # for each fold and each of its choices


class _Group(NamedTuple):
    """Folds that share finalists, and the rows that these are sought on."""

    folds: list[int]
    rows: np.ndarray


class PriorSearch:
    """Rough axes of every prior and fold, which serve any responses; computed at first use.

    kernels : for each set of scales
    multiples : penalties, in multiples of the mean eigenvalue
    shared : whether folds that share scales share finalists, sought on the images that all of them train on. With many
        images these are enough, and kernels of fewer priors serve more folds
    """

    def __init__(
        self,
        kernels: Sequence[LayerKernels],
        plan: FoldPlan,
        priors: Sequence[Prior],
        multiples: Sequence[float],
        *,
        shared: bool = False,
    ) -> None:
        self._kernels, self._plan, self._priors, self._multiples = kernels, plan, priors, multiples
        shuffled = np.random.default_rng(0).permutation(plan.n_train)
        self._sample = np.sort(shuffled[: sizes.SEARCH_IMAGES])
        self._groups: list[list[_Group]] = []  # of each set of scales
        for number in range(len(kernels)):
            users = plan.users(number)
            rows = [plan.scale_rows(number)] if shared else [plan.outside(k) for k in users]
            folds = [users] if shared else [[k] for k in users]
            self._groups.append([_Group(*group) for group in zip(folds, map(self._in_sample, rows), strict=True)])
        self._bases: list[tuple[_Group, list[Basis]]] = []  # of each group, by prior

    def finalists(self, surfaces: Sequence[Any], n_finalists: int) -> Finalists:
        """The best priors of each fold. surfaces : (n_train, n_vertices) responses of each, arrays or tensors

        An image that a choice is not made on has no say in it.
        """
        y = torch.cat([self._some(responses, SEARCH_VERTICES // len(surfaces)) for responses in surfaces], 1)
        if not self._bases:
            self._bases = [made for number in range(len(self._kernels)) for made in self._rough_bases(number)]
        found: Finalists = [[] for _ in range(len(self._plan))]
        for group, bases in self._bases:
            explained = side_by_side(partial(self._explained, k=group.folds[0], responses=y), bases, y.device.type)
            by_choice = torch.stack(explained, 1)  # (n_choices, n_priors, n_vertices)
            chosen = [chosen_greedily(of_choice, n_finalists) for of_choice in by_choice]
            for k in group.folds:
                found[k] = [[self._priors[number] for number in numbers] for numbers in chosen]
        return found

    def _some(self, responses: Any, n_vertices: int) -> torch.Tensor:
        """(n_sample, n_vertices) float32 responses of some vertices."""
        columns: Any = np.sort(np.random.default_rng(1).permutation(responses.shape[1])[:n_vertices])
        columns = torch.as_tensor(columns) if isinstance(responses, torch.Tensor) else columns
        return torch.as_tensor(responses[self._sample][:, columns], device=self._kernels[0].rows.device).float()

    def _rough_bases(self, number: int) -> list[tuple[_Group, list[Basis]]]:
        """Axes of every prior for each group of a set of scales."""
        kernels, groups = self._kernels[number], self._groups[number]
        landmarks = self._in_sample(self._plan.scale_rows(number))
        landmarks = np.sort(np.random.default_rng(0).permutation(landmarks)[:SEARCH_LANDMARKS])
        across = kernels.under(self._priors, self._sample[landmarks], self._sample)
        rows = [group.rows for group in groups]
        by_prior = side_by_side(partial(_bases, landmarks=landmarks, rows=rows), across, kernels.rows.device)
        return list(zip(groups, map(list, zip(*by_prior, strict=True)), strict=True))

    def _in_sample(self, rows: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.isin(self._sample, rows))

    def _explained(self, basis: Basis, k: int, responses: torch.Tensor) -> torch.Tensor:
        """(n_choices, n_vertices) share of variance that the best penalty explains.

        By generalised cross-validation; of a backbone that was trained on these images, by held-out images.
        """
        mean = responses[basis.rows].mean(0)
        target = responses[basis.rows] - mean
        squares, penalties = target.square().sum(0), penalties_of(basis.values, self._multiples)
        rotated, n_rows = basis.rotated(target), len(basis.rows)
        if self._plan.backbone_trained:
            parts = [self._in_sample(part) for part in self._plan.parts(k)]
            errors = held_out_errors(
                basis.values, rotated, penalties, [(basis.scores(part), responses[part] - mean) for part in parts]
            )
        else:
            errors = penalty_errors(basis.values, n_rows, rotated, squares, penalties, None)[None]
        return (1 - errors.amin(1) * n_rows / squares.clamp_min(1e-12)).clamp_min(0).float()


def _bases(kernel: torch.Tensor, landmarks: np.ndarray, rows: Sequence[np.ndarray]) -> list[Basis]:
    """Axes of one prior for each group's rows. kernel : (n_sample, n_landmarks)"""
    features = landmark_features(kernel, landmarks)[0]
    return [basis_of_features(features, of_group, precise=False) for of_group in rows]


def chosen_greedily(explained: torch.Tensor, n_chosen: int) -> list[int]:
    """Numbers of priors, chosen greedily: each adds most to the explained variance, summed over vertices, of the best
    prior chosen so far. explained : (n_priors, n_vertices)
    """
    chosen: list[int] = []
    best = torch.zeros_like(explained[0])
    while len(chosen) < min(n_chosen, len(explained)):
        gains = (explained - best).clamp_min(0).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        best = torch.maximum(best, explained[chosen[-1]])
    return chosen
