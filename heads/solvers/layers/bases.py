"""Axes of the priors that a surface is fitted under, for every fold, and its responses on these axes."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from featcache.machine.device import matrix_products
from featcache.machine.threads import side_by_side
from heads.solvers.base import Block
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.axes import Basis, PriorView, views_under
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.layers.search import Finalists, PriorSearch
from heads.solvers.layers.sizes import LayeredSizes


class FinalBasis:
    """Axes of one prior on one fold.

    view : kernel or features that they are of
    rows : images that the fold trains on
    basis : decomposed in the format of the features, in half the time of float64 (see eigh_of)
    """

    def __init__(self, view: PriorView, rows: np.ndarray, basis: Basis) -> None:
        self.basis, self._view, self._rows = basis, view, rows
        self._precise: Basis | None = None
        self._lock = threading.Lock()

    def precise(self) -> Basis:
        """The axes in float64, computed at first use; threads that need them wait for one another."""
        with self._lock:
            if self._precise is None:
                self._precise = self._view.basis(self._rows)
            return self._precise


class SurfaceBases:
    """Axes of a surface's finalists, for each fold.

    finalists : for each fold and each of its choices
    of_fold : {prior: axes} for each fold, in the order of all priors, so that sums over them have equal bits whatever
        the other choices of a fold are
    """

    def __init__(self, finalists: Finalists, of_fold: Sequence[Mapping[Prior, FinalBasis]]) -> None:
        self.of_fold, self._finalists = of_fold, finalists

    def left_out(self, k: int, prior: Prior) -> list[int]:
        """Numbers of the choices of a fold that this prior is no finalist of."""
        return [number for number, chosen in enumerate(self._finalists[k]) if prior not in chosen]


class FoldBases:
    """Axes for every surface of a subject, computed when it is fitted, or for all surfaces at once if they are small.

    kernels : for each set of scales
    priors : to choose from
    multiples : penalties, in multiples of the mean eigenvalue
    surfaces : (n_train, n_vertices) responses of the surfaces, where they are known beforehand
    """

    def __init__(
        self,
        kernels: Sequence[LayerKernels],
        plan: FoldPlan,
        priors: Sequence[Prior],
        multiples: Sequence[float],
        surfaces: Mapping[str, Any],
    ) -> None:
        self._kernels, self._plan, self._priors, self._surfaces = list(kernels), plan, list(priors), surfaces
        self._users = [plan.users(number) for number in range(len(kernels))]
        self.sizes = self._count()
        self._search: PriorSearch | None = None
        if self.sizes.searched:
            self._search = PriorSearch(kernels, plan, priors, multiples, shared=self.sizes.folds_share)
        self._finalists: dict[str, Finalists] = {}
        self._bases: dict[tuple[Prior, int], FinalBasis] = {}

    def _count(self) -> LayeredSizes:
        rows, plan = self._kernels[0].rows, self._plan
        return LayeredSizes(
            n_train=plan.n_train,
            n_images=len(rows),
            n_fit=tuple(len(plan.outside(k)) for k in range(len(plan))),
            n_choices=max(map(plan.n_choices, range(len(plan)))),
            n_scales=len(self._kernels),
            n_features=rows.n_features,
            n_priors=len(self._priors),
            backbone_trained=plan.backbone_trained,
            n_responses=sum(responses.shape[1] for responses in self._surfaces.values()),
            held_bytes=float(sum({id(kernels.rows): kernels.rows.held_bytes for kernels in self._kernels}.values())),
        )

    def of_surface(self, block: Block) -> SurfaceBases:
        """Axes of the priors that explain the block's surface best."""
        finalists = self._finalists_of(block)
        chosen = [set().union(*choices) for choices in finalists]
        pairs = [(prior, k) for k, of_fold in enumerate(chosen) for prior in self._priors if prior in of_fold]
        # those of another surface are dropped, so that memory does not grow
        self._bases = {pair: self._bases[pair] for pair in pairs if pair in self._bases}
        self._add([pair for pair in pairs if pair not in self._bases])
        by_fold: list[dict[Prior, FinalBasis]] = [{} for _ in finalists]
        for prior, k in pairs:
            by_fold[k][prior] = self._bases[prior, k]
        return SurfaceBases(finalists, by_fold)

    def _finalists_of(self, block: Block) -> Finalists:
        """Finalists of a block's surface, or of all surfaces; of the block alone where no other response is known."""
        if self.sizes.together and block.surface in self._surfaces:
            return self._known("", list(self._surfaces.values()))
        whole = self._surfaces.get(block.surface, block.all_responses)
        return self._find([block.responses]) if whole is None else self._known(block.surface, [whole])

    def _known(self, name: str, responses: Sequence[Any]) -> Finalists:
        if name not in self._finalists:
            self._finalists[name] = self._find(responses)
        return self._finalists[name]

    def _find(self, responses: Sequence[Any]) -> Finalists:
        if self._search is None:
            return [[self._priors] * self._plan.n_choices(k) for k in range(len(self._plan))]
        with matrix_products("float32"):
            return self._search.finalists(responses, self.sizes.n_finalists)

    def _add(self, pairs: Sequence[tuple[Prior, int]]) -> None:
        """Compute axes, those of a prior and a fold on a core each."""
        with matrix_products("float32"):  # decompositions need full precision
            for kernels, users in zip(self._kernels, self._users, strict=True):
                priors = list(dict.fromkeys(prior for prior, k in pairs if k in users))
                if not priors:
                    continue
                views = dict(zip(priors, views_under(priors, kernels, self.sizes.method), strict=True))
                some = [(prior, k) for prior, k in pairs if k in users]
                tasks = [(views[prior], self._plan.outside(k)) for prior, k in some]
                made = side_by_side(_rough_basis, tasks, kernels.rows.device)
                for (prior, k), basis in zip(some, made, strict=True):
                    self._bases[prior, k] = FinalBasis(views[prior], self._plan.outside(k), basis)

    def rotated(
        self, bases: SurfaceBases, responses: torch.Tensor, targets: Sequence[torch.Tensor]
    ) -> list[dict[Prior, torch.Tensor]]:
        """(rank, n_vertices) responses of the images to fit to, on the axes of each prior, for each fold.

        responses : (n_train, n_vertices); targets : for each fold, (n_fit, n_vertices) those to fit to, centred
        """
        found: list[dict[Prior, torch.Tensor]] = [{} for _ in targets]
        for number, users in enumerate(self._users):
            if self.sizes.method != "images" and len(users) > 1:
                self._rotate_together(number, bases, responses, found)
                continue
            for k in users:
                found[k] = {prior: final.basis.rotated(targets[k]) for prior, final in bases.of_fold[k].items()}
        return found

    def _rotate_together(
        self, number: int, bases: SurfaceBases, responses: torch.Tensor, found: list[dict[Prior, torch.Tensor]]
    ) -> None:
        """The same for folds that share features: every image is multiplied once, and folds are sums of others.

        They are summed, not subtracted from a total, in which a held-out image would leave its rounding.
        """
        users, plan = self._users[number], self._plan
        common = plan.scale_rows(number)  # what all these folds fit to
        level = responses[common].mean(0)
        groups = [common, *(plan.inside(k) for k in users)]
        parts = [responses[group] - level for group in groups]
        counts, means = list(map(len, groups)), [part.mean(0) for part in parts]
        for prior in dict.fromkeys(prior for k in users for prior in bases.of_fold[k]):
            features = next(bases.of_fold[k][prior].basis.features for k in users if prior in bases.of_fold[k])
            products, sums = [], []
            for group, part in zip(groups, parts, strict=True):
                rows = features[group]
                products.append(rows.T @ part)
                sums.append(rows.sum(0))
            for place, k in enumerate(users, 1):
                if prior not in bases.of_fold[k]:
                    continue
                others = [group for group in range(len(groups)) if group != place]
                n_fit = sum(counts[g] for g in others)
                mean = torch.stack([counts[g] / n_fit * means[g] for g in others]).sum(0)
                cross = torch.stack([products[g] for g in others]).sum(0)
                cross -= torch.outer(torch.stack([sums[g] for g in others]).sum(0), mean)
                axes = bases.of_fold[k][prior].basis.axes
                assert axes is not None
                found[k][prior] = axes.T @ cross


def _rough_basis(task: tuple[PriorView, np.ndarray]) -> Basis:
    view, rows = task
    return view.basis(rows, precise=False)
