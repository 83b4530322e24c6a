"""Full-batch gradient descent on mse, pearson and mnnpc that never looks at the images again.

With scores X (n_images, rank) on principal axes, whose variances E are X'X / n, and c = X'y / n, the weights w of a
vertex predict with variance w'Ew and covariance c'w with its responses y, of variance s^2. That is all the losses need:

    mse   w'Ew - 2 c'w + s^2        r = c'w / (s sqrt(w'Ew))

and the gradient of every sum of them is a c + b E w, with two numbers a and b a vertex: a step costs a few passes over
the weights, whatever the number of images. The intercept is the mean response, where its own gradient is 0.

Descent with Nesterov's momentum does not depend on the axes that weights are written on, so these are the steps that
`torch.optim.SGD(nesterov=True)` takes on the features, with all images in its batch. Each vertex has a step of its own:
`learning_rate` divided by the curvature along the first axis at the start, which makes it the same in any unit. A loss
that is a mean over vertices is a sum of their losses here: no vertex depends on which others are fitted with it.

A vertex starts in the direction of c, as far as fits best, and keeps the weights of the step with the least error of
generalised cross-validation, or exact leave-one-out error for few images, as closed-form heads choose their penalties
(ridge.py): on each axis the weights are some part of what least squares gives, and the parts are taken for given.
Steps are looked at further and further apart.

Nesterov 1983; Yao, Rosasco and Caponnetto 2007, https://doi.org/10.1007/s00365-006-0663-2
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from featcache.errors import ConfigError
from heads.config import MomentsConfig, RidgeConfig
from heads.solvers.base import Block, Fits, Problem
from heads.solvers.fold_axes import Fold, FoldAxes, Target
from heads.solvers.memory import Sizes, blockwise_bytes, choose_block
from heads.solvers.ridge import FULL, VERTEX_BLOCK, Eigenbasis, is_exact

_TOGETHER = 128  # vertices that take their steps together: their weights and momentum stay in a cache
_NEXT = 1.25  # factor between two steps that are looked at
_PATIENCE = 4  # looks without less error, of every vertex, after which there is no more

Terms = Sequence[tuple[float, str]]


def build(problem: Problem) -> "MomentSolver":
    """Build the solver that descends on losses from moments. Raises ConfigError for features of a trained backbone."""
    if problem.plan.trained:
        raise ConfigError(
            "--solver moments",
            expected="features of a frozen backbone",
            found=f"those of a checkpoint, {problem.features.name}",
            remedy="use --solver ridge or adamw",
        )
    return problem.shared.once("moments", lambda: _Parts(problem)).solver(problem.config.terms)


class _Parts:
    """What the solvers of several losses have in common: axes and, where there is room, what is learnt from."""

    def __init__(self, problem: Problem) -> None:
        (rows,) = problem.features.read(problem.device, 0)
        self._sizes, self._config = Sizes.of(problem, rows.n_features), problem.config.moments
        self._block, keep = choose_block(problem, rows.n_features)
        self._axes = FoldAxes(rows.dense(), problem.plan.folds, _by_rows)
        self._targets: dict[tuple[str, int], list[Target]] | None = {} if keep else None

    def solver(self, terms: Terms) -> "MomentSolver":
        return MomentSolver(
            self._axes, terms, self._config, sizes=self._sizes, vertex_block=self._block, targets=self._targets
        )


class Moments(NamedTuple):
    """What a loss needs to know of images and responses.

    variances : (rank,) of the scores along each axis
    covariances : (n_vertices, rank) of scores and responses
    inverses : (n_vertices, rank) 1 / covariances, 0 where they are 0
    response_variance : (n_vertices,), 0 for a vertex that is constant
    noise_ceiling : (n_vertices,), fraction of variance in [0, 1], or None
    n_images : that they are of
    rows : scores (n_images, rank) and responses less their mean (n_images, n_vertices) for the exact leave-one-out
        error, or None for the generalised one
    """

    variances: torch.Tensor
    covariances: torch.Tensor
    inverses: torch.Tensor
    response_variance: torch.Tensor
    noise_ceiling: torch.Tensor | None
    n_images: int
    rows: tuple[torch.Tensor, torch.Tensor] | None


def moments_of(
    target: Target, basis: Eigenbasis, noise_ceiling: torch.Tensor | None, own: torch.Tensor | None = None
) -> Moments:
    """From sums over the images of a fold; its scores, where single rows are wanted."""
    n_images = basis.n_images
    variance = target.squares / n_images
    limits = torch.finfo(variance.dtype)
    constant = variance <= (target.mean * limits.eps).square() + limits.tiny
    covariances = (target.rotated / n_images).T.contiguous()
    return Moments(
        variances=basis.values / n_images,
        covariances=covariances,
        inverses=covariances.reciprocal().masked_fill_(covariances == 0, 0),
        response_variance=variance.masked_fill(constant, 0),
        noise_ceiling=noise_ceiling,
        n_images=n_images,
        rows=None if own is None or target.rows is None else (own, target.rows),
    )


class _At(NamedTuple):
    """A loss at some weights: its value, and the factors of c and E w in its gradient, (n_vertices,) each."""

    value: torch.Tensor
    of_covariances: torch.Tensor
    of_weights: torch.Tensor


def loss_at(terms: Terms, moments: Moments, spread: torch.Tensor) -> _At:
    """The weighted sum of losses of each vertex; their mean over vertices is that of heads/scores/losses.py.

    spread : (2, n_vertices) variance of the predictions, w'Ew, and their covariance with the responses, c'w
    """
    variance, covariance = spread
    constant = (variance <= 0) | (moments.response_variance <= 0)
    safe = torch.where(constant, 1, variance)
    norm = (safe * torch.where(constant, 1, moments.response_variance)).sqrt()
    r = torch.where(constant, 0, covariance / norm)
    value, of_covariances, of_weights = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    for weight, name in terms:
        if name in _OF_R:
            part, slope = _OF_R[name](weight, (1 - r) / 2, moments.noise_ceiling)
            value += part
            of_covariances -= torch.where(constant, 0, slope / (2 * norm))
            of_weights += torch.where(constant, 0, slope * r / (2 * safe))
        else:  # mse, which alone is no function of r; `refuse_unknown` saw to that
            value += weight * (variance - 2 * covariance + moments.response_variance)
            of_covariances -= 2 * weight
            of_weights += 2 * weight
    return _At(value, of_covariances, of_weights)


def _pearson(weight: float, distance: torch.Tensor, noise_ceiling: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """The loss, and its slope as the distance (1 - r) / 2 grows."""
    return weight * distance, torch.full_like(distance, weight)


def _mnnpc(weight: float, distance: torch.Tensor, noise_ceiling: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    if noise_ceiling is None:
        return _pearson(weight, distance, None)
    ceiling = noise_ceiling.masked_fill(noise_ceiling == 0, 1)
    return weight * distance.square() / ceiling, 2 * weight * distance / ceiling


_OF_R = {"pearson": _pearson, "mnnpc": _mnnpc}  # losses that moments give through r alone


def refuse_unknown(terms: Terms) -> None:
    """Raise ConfigError for a loss that cannot be computed from moments."""
    for _, name in terms:
        if name != "mse" and name not in _OF_R:
            raise ConfigError(
                "--solver moments",
                expected=f"a loss of mse, {', '.join(_OF_R)}",
                found=name,
                remedy="use --solver adamw",
            )


def spread_of(weights: torch.Tensor, scaled: torch.Tensor, moments: Moments) -> torch.Tensor:
    """(2, n_vertices) w'Ew and c'w.

    weights, scaled : w and E w, (n_vertices, rank)
    """
    return torch.stack([torch.linalg.vecdot(weights, scaled), torch.linalg.vecdot(weights, moments.covariances)])


def start_at(moments: Moments) -> torch.Tensor:
    """(n_vertices, rank) weights in the direction of c, at the scale that predicts best."""
    spread = spread_of(moments.covariances, moments.covariances * moments.variances, moments)
    return moments.covariances * _scale(spread)[:, None]


def _scale(spread: torch.Tensor) -> torch.Tensor:
    """(n_vertices,) what predictions must be multiplied with to be closest to the responses; 0 or more."""
    variance, covariance = spread
    return torch.where(variance > 0, covariance / torch.where(variance > 0, variance, 1), 0).clamp_min(0)


def descend(
    terms: Terms, moments: Moments, config: MomentsConfig, error: Callable[[torch.Tensor, Moments], torch.Tensor]
) -> torch.Tensor:
    """(n_vertices, rank) the weights whose error was least, of each vertex, at the scale that predicts best.

    error : (n_vertices,) of weights (n_vertices, rank) at that scale
    """
    weights = start_at(moments)
    scaled = weights * moments.variances
    now = loss_at(terms, moments, spread_of(weights, scaled, moments))
    curvature = now.of_weights * moments.variances.amax() if len(moments.variances) else now.of_weights
    rate = torch.where(curvature > 0, config.learning_rate / torch.where(curvature > 0, curvature, 1), 0)
    velocity, best = torch.zeros_like(weights), weights.clone()
    least, waited = error(best, moments), torch.zeros_like(rate)
    looks = set(_looks(config.steps))
    for step in range(1, config.steps + 1):
        gradient = scaled.mul_((now.of_weights * rate)[:, None])
        gradient.addcmul_(moments.covariances, (now.of_covariances * rate)[:, None])
        velocity.mul_(config.momentum).add_(gradient)
        weights.sub_(gradient).sub_(velocity, alpha=config.momentum)
        torch.mul(weights, moments.variances, out=scaled)
        spread = spread_of(weights, scaled, moments)
        now = loss_at(terms, moments, spread)
        if step in looks:
            fitting = weights * _scale(spread)[:, None]
            found = error(fitting, moments)
            better = found < least
            least = torch.where(better, found, least)
            torch.where(better[:, None], fitting, best, out=best)
            waited = torch.where(better, 0, waited + 1)
            if bool((waited >= _PATIENCE).all()):
                break
    return best


def left_out_error(weights: torch.Tensor, moments: Moments) -> torch.Tensor:
    """(n_vertices,) mean squared error on images that were left out, exact where the moments have rows.

    weights : (n_vertices, rank) at the scale that predicts best
    """
    scaled = weights * moments.variances
    # times inverses, the parts of least squares' weights; the intercept is one degree of freedom
    freedom = (torch.linalg.vecdot(scaled, moments.inverses) + 1) / moments.n_images
    if moments.rows is None:
        variance, covariance = spread_of(weights, scaled, moments)
        residual = (moments.response_variance - 2 * covariance + variance).clamp_min(0)
        error = residual / (1 - freedom).clamp_min(1e-9).square()
    else:
        scores, responses = moments.rows
        left_out = 1 - 1 / moments.n_images - scores.square() @ ((weights * moments.inverses).T / moments.n_images)
        error = ((responses - scores @ weights.T) / left_out.clamp_min(1e-6)).square().mean(0)
    return error.masked_fill(freedom > FULL, torch.inf)


def _looks(steps: int) -> Iterator[int]:
    """1, 2, 3, ... and then further and further apart; the last is always one."""
    look = 1
    while look < steps:
        yield look
        look = max(look + 1, round(look * _NEXT))
    yield steps


class MomentSolver:
    """Linear heads by full-batch descent, on features that no fold's images have shaped.

    axes : the principal axes of every fold
    targets : what is learnt from, kept for other losses, by (surface, first vertex); None: it is not kept
    """

    def __init__(
        self,
        axes: FoldAxes,
        terms: Terms,
        config: MomentsConfig,
        *,
        sizes: Sizes,
        vertex_block: int = VERTEX_BLOCK,
        targets: dict[tuple[str, int], list[Target]] | None = None,
    ) -> None:
        refuse_unknown(terms)
        self._axes, self._terms, self._config, self._sizes = axes, tuple(terms), config, sizes
        self.vertex_block: int | None = vertex_block
        self._targets = targets

    def memory(self, n_vertices: int) -> float:
        fixed, per_vertex = blockwise_bytes(replace(self._sizes, n_vertices=(n_vertices,)))
        return fixed + per_vertex * min(self.vertex_block or n_vertices, n_vertices)

    def fit(self, block: Block) -> Fits:
        ceiling = None
        if block.noise_ceiling is not None:
            responses = block.responses
            ceiling = torch.as_tensor(block.noise_ceiling, dtype=responses.dtype, device=responses.device)
        pairs = zip(self._axes.folds, self._targets_of(block), strict=True)
        return self._axes.predict(((self._solve(fold, target, ceiling), target.mean) for fold, target in pairs), True)

    def _targets_of(self, block: Block) -> Iterable[Target]:
        """What each fold learns from; computed once where it is kept."""
        targets = self._axes.targets(block.responses)
        if self._targets is None:
            return targets
        key = block.surface, block.vertices.start or 0
        if key not in self._targets:
            self._targets[key] = [
                target if _by_rows(fold.basis.n_images) else target._replace(rows=None)
                for fold, target in zip(self._axes.folds, targets, strict=True)
            ]
        return self._targets[key]

    def _solve(self, fold: Fold, target: Target, noise_ceiling: torch.Tensor | None) -> torch.Tensor:
        """Weights on the axes, (rank, n_vertices)."""
        weights = torch.empty_like(target.rotated)
        own = fold.own if _by_rows(fold.basis.n_images) else None
        for start in range(0, weights.shape[1], _TOGETHER):
            some = slice(start, start + _TOGETHER)
            rows = None if own is None or target.rows is None else target.rows[:, some]
            of_some = Target(target.mean[some], target.squares[some], target.rotated[:, some], rows)
            ceiling = None if noise_ceiling is None else noise_ceiling[some]
            moments = moments_of(of_some, fold.basis, ceiling, own)
            weights[:, some] = descend(self._terms, moments, self._config, left_out_error).T
        return weights


def _by_rows(n_images: int) -> bool:
    return is_exact(RidgeConfig(), n_images)
