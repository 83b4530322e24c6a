"""Ridge heads in closed form on all folds but one, for each fold in turn, with a penalty per vertex."""

from collections.abc import Mapping, Sequence

import torch

from heads.config import RidgeConfig
from heads.solvers.base import Block, Fits, Problem, Solver
from heads.solvers.fold_axes import Fold, FoldAxes, Target
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.ridge import build_layered
from heads.solvers.linear import FoldHeads, LinearPredictions
from heads.solvers.memory import Sizes, announce_whole, blockwise_bytes, choose_block, whole_bytes
from heads.solvers.ridge import (
    VERTEX_BLOCK,
    eigenbasis,
    held_out_errors,
    is_exact,
    maps_of_penalties,
    penalty_errors,
)
from heads.solvers.units import column_units, in_units


def build(problem: Problem) -> Solver:
    """Build the closed form for the features: several layers, or one matrix, of a frozen or a trained backbone."""
    if problem.features.is_layered:
        return build_layered(problem)
    features = [rows.dense() for rows in problem.features.read(problem.device, 0)]
    # of features alone, in powers of two, and 1 unless a column varies 16 times as much as others: no choice of a fold
    units = [column_units(x[: problem.plan.n_train])[0] for x in features]
    features = [in_units(x, of_store) for x, of_store in zip(features, units, strict=True)]
    solver: Solver
    if problem.plan.backbone_trained:
        announce_whole(problem, features[0].shape[1], "closed form")
        solver = TrainedBackboneRidge(features, problem.plan, problem.config.ridge)
    else:
        block = choose_block(problem, features[0].shape[1])
        solver = RidgeFolds(features[0], problem.plan, problem.config.ridge, vertex_block=block)
    if all(bool((of_store == 1).all()) for of_store in units):
        return solver
    return _OfStored(solver, dict(zip(problem.plan.prefixes, units, strict=True)))


class _OfStored:
    """A solver whose features are in units, and which saves weights on the features as they are stored.

    units : {prefix of saved heads: (n_features,)}
    """

    def __init__(self, solver: Solver, units: Mapping[str, torch.Tensor]) -> None:
        self._solver, self._units = solver, units
        self.vertex_block = solver.vertex_block

    def memory(self, n_vertices: int) -> float:
        return self._solver.memory(n_vertices)

    def fit(self, block: Block) -> Fits:
        fits = self._solver.fit(block)
        saved = {
            (prefix, part): (values.double() / self._units[prefix][:, None]).float() if part == "weights" else values
            for (prefix, part), values in fits.saved.items()
        }
        return fits._replace(saved=saved)


class RidgeFolds:
    """Closed-form heads on features of a frozen backbone.

    features : (n_train + n_test, n_features) float32
    save : whether to return weights on the features, the mean over folds
    """

    def __init__(
        self,
        features: torch.Tensor,
        plan: FoldPlan,
        config: RidgeConfig,
        *,
        save: bool = True,
        vertex_block: int = VERTEX_BLOCK,
    ) -> None:
        self._config, self._save, self._plan, self._shape = config, save, plan, features.shape
        self.vertex_block: int | None = vertex_block
        self._axes = FoldAxes(features, plan.folds, lambda n_images: is_exact(config, n_images))

    def memory(self, n_vertices: int) -> float:
        fixed, per_vertex = blockwise_bytes(Sizes.of_matrix(self._plan, self._shape, n_vertices))
        return fixed + per_vertex * min(self.vertex_block or n_vertices, n_vertices)

    def fit(self, block: Block) -> Fits:
        targets = zip(self._axes.folds, self._axes.targets(block.responses), strict=True)
        return self._axes.predict(((self._solve(fold, target), target.mean) for fold, target in targets), self._save)

    def _solve(self, fold: Fold, target: Target) -> torch.Tensor:
        """(rank, n_vertices) weights on the axes, each vertex with the penalty of its smallest error."""
        values, n_images = fold.basis.values, fold.basis.n_images
        offered = fold.basis.penalties(self._config.penalties)
        rows = None
        if is_exact(self._config, n_images) and fold.train_scores is not None and target.rows is not None:
            rows = fold.train_scores, target.rows
        errors = penalty_errors(values, n_images, target.rotated, target.squares, offered, rows)
        return target.rotated.div_(values[:, None] + offered[errors.argmin(0)])


class TrainedBackboneRidge:
    """Closed-form heads on features of backbones that were trained without each held-out fold.

    features : (n_train + n_test, n_features) float32 for each held-out fold
    """

    vertex_block: int | None = VERTEX_BLOCK

    def __init__(self, features: Sequence[torch.Tensor], plan: FoldPlan, config: RidgeConfig) -> None:
        self._config, self._plan, self._shape = config, plan, features[0].shape
        self._parts = [plan.parts(k) for k in range(len(plan))]
        rows = [x[: plan.n_train] for x in features]
        self._bases = [eigenbasis(x[plan.outside(k)]) for k, x in enumerate(rows)]
        self._scores = [basis.scores(x) for basis, x in zip(self._bases, rows, strict=True)]
        self._predictions = LinearPredictions(features, plan)

    def memory(self, n_vertices: int) -> float:
        return whole_bytes(Sizes.of_matrix(self._plan, self._shape, n_vertices))

    def fit(self, block: Block) -> Fits:
        return self._predictions.fits(self.heads(block.responses))

    def heads(self, responses: torch.Tensor) -> list[FoldHeads]:
        """The heads of each fold, for (n_train, n_vertices) responses."""
        return [self._fit_fold(k, responses) for k in range(len(self._plan))]

    def _fit_fold(self, k: int, responses: torch.Tensor) -> FoldHeads:
        scores, rows, parts, basis = self._scores[k], self._plan.outside(k), self._parts[k], self._bases[k]
        penalties = basis.penalties(self._config.penalties)
        target = responses[rows]
        mean = target.mean(0)
        rotated = scores[rows].T @ target.sub_(mean)
        choice_inputs = [(scores[part], responses[part] - mean) for part in parts]
        errors = held_out_errors(basis.values, rotated, penalties, choice_inputs)
        maps = [maps_of_penalties(basis, rotated, mean, penalties[error.argmin(0)]) for error in errors]
        return FoldHeads(list(zip(parts, maps[:-1], strict=True)), maps[-1])
