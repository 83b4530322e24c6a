"""Bytes of main memory that fits take, from counts alone: for solvers before they start, and for plans."""

from collections.abc import Sequence
from dataclasses import dataclass

from featcache.machine.memory import block_that_fits, memory_at_start, refuse_above, said
from featcache.machine.progress import say
from heads.config import HEADS
from heads.solvers.base import Problem
from heads.solvers.held_out import FoldPlan
from heads.solvers.ridge import MAX_NUMBERS_AT_ONCE, VERTEX_BLOCK

# shares of the free memory for features as stored, kernels of single places, and decompositions
FEATURE_SHARE, STACK_SHARE, CACHE_SHARE = 0.2, 0.2, 0.3

START_NUMBERS = 1 << 27  # weights on features from which spatial heads start, of as many vertices as that gives at once


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts that decide the memory of a fit.

    n_train, n_test : images
    n_vertices : of each surface
    n_folds : folds that are held out
    n_sources : sets of features, one for all folds or one for each
    """

    n_train: int
    n_test: int
    n_features: int
    n_vertices: tuple[int, ...]
    n_folds: int
    n_sources: int = 1

    @classmethod
    def of_matrix(cls, plan: FoldPlan, shape: Sequence[int], n_vertices: int) -> "Sizes":
        """Counts of a fit to one matrix of features of this shape, for one surface."""
        n_images, n_features = shape
        return cls(
            n_train=plan.n_train,
            n_test=n_images - plan.n_train,
            n_features=n_features,
            n_vertices=(n_vertices,),
            n_folds=len(plan),
            n_sources=plan.n_sources,
        )

    @classmethod
    def of(cls, problem: Problem, n_features: int) -> "Sizes":
        """Counts of one fit, for all surfaces of its subject."""
        return cls(
            n_train=problem.n_train,
            n_test=problem.n_test,
            n_features=n_features,
            n_vertices=problem.n_vertices,
            n_folds=len(problem.plan),
            n_sources=problem.plan.n_sources,
        )


def blockwise_bytes(sizes: Sizes) -> tuple[float, float]:
    """(fixed bytes, bytes per vertex in a block) of a fit on the axes of each fold."""
    n_train, n_test, n_features, n_folds = sizes.n_train, sizes.n_test, sizes.n_features, sizes.n_folds
    n_all, rank = n_train + n_test, min(n_features, n_train)
    features = n_all * n_features * 2 + (n_train + n_folds * n_test) * rank + n_folds * rank * n_features
    decomposition = 8 * rank * rank  # in float64, with its workspace
    # responses are a memory-mapped file; they stay in memory as long as nothing else needs it
    results = (n_all + n_train) * max(sizes.n_vertices) + 2 * n_features * sum(sizes.n_vertices)
    block = (2 * n_folds + 4) * rank + 4 * n_train + n_folds * n_test + n_features
    return 4.0 * (features + decomposition + results) + 16.0 * MAX_NUMBERS_AT_ONCE, 4.0 * block


def whole_bytes(sizes: Sizes, copies: int = 1) -> float:
    """Bytes of a fit to all vertices of a surface at once. copies : the most layers that predict one vertex"""
    n_features, n_vertices, n_all = sizes.n_features, max(sizes.n_vertices), sizes.n_train + sizes.n_test
    # by gradient: weights, gradient, both moments, and the best so far; in closed form: products with the responses,
    # their rotation to the axes, and weights
    trained = 5.0 * copies * n_features * n_vertices
    kept = (sizes.n_folds + 2.0) * n_features * n_vertices  # weights of each fold, and of two surfaces to save
    rows = sizes.n_sources * 2.0 * n_all * n_features + (2.0 * sizes.n_train + 2.0 * n_all) * n_vertices
    return 4.0 * (trained + kept + rows)


def announce_whole(problem: Problem, n_features: int, method: str) -> None:
    """Say the memory of a fit to all vertices of a surface at once. Raises ConfigError beyond --max-memory."""
    peak = memory_at_start() + whole_bytes(Sizes.of(problem, n_features), HEADS[problem.config.head].copies)
    refuse_above(problem.config.max_memory, peak)
    say(f"{problem.subject.name}: {n_features:,} features, {problem.n_train:,} images: {method}; {said(peak)}")


def choose_block(problem: Problem, n_features: int) -> int:
    """Number of vertices to fit at a time, so that memory suffices; says it, and the memory that it expects.

    Raises ConfigError if not even the smallest block fits into --max-memory.
    """
    sizes = Sizes.of(problem, n_features)
    fixed, per_vertex = blockwise_bytes(sizes)
    block = block_that_fits(fixed, per_vertex, min(VERTEX_BLOCK, max(sizes.n_vertices)), problem.config.max_memory)
    say(
        f"{problem.subject.name}: {n_features:,} features, {problem.n_train:,} images: {block:,} vertices at a time; "
        + said(memory_at_start() + fixed + block * per_vertex)
    )
    return block
