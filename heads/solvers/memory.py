"""How many bytes of main memory fits take, from counts alone: for solvers before they start, and for plans."""

from collections.abc import Sequence
from dataclasses import dataclass

from featcache.machine.memory import block_that_fits, memory_at_start, refuse_above, said
from featcache.machine.progress import say
from heads.config import HEADS
from heads.solvers.base import Problem
from heads.solvers.held_out import FoldPlan
from heads.solvers.ridge import TOGETHER, VERTEX_BLOCK

# Parts of the free memory: features as they are stored, kernels of single places, and decompositions.
FEATURE_SHARE, STACK_SHARE, CACHE_SHARE = 0.2, 0.2, 0.3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts that memory follows from.

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
    """Bytes of a fit on the axes of each fold: whatever the block of vertices, and for each vertex of a block."""
    n_train, n_test, n_features, n_folds = sizes.n_train, sizes.n_test, sizes.n_features, sizes.n_folds
    n_all, rank = n_train + n_test, min(n_features, n_train)
    features = n_all * n_features * 2 + (n_train + n_folds * n_test) * rank + n_folds * rank * n_features
    decomposition = 8 * rank * rank  # in float64, with what it works on
    # responses are a file that is mapped, and count as long as nothing else needs their place
    results = (n_all + n_train) * max(sizes.n_vertices) + 2 * n_features * sum(sizes.n_vertices)
    block = (2 * n_folds + 4) * rank + 4 * n_train + n_folds * n_test + n_features
    return 4.0 * (features + decomposition + results) + 16.0 * TOGETHER, 4.0 * block


def whole_bytes(sizes: Sizes, copies: int = 1) -> float:
    """Bytes of heads that see all vertices of a surface at once. copies : layers that predict a vertex, at most"""
    n_features, n_vertices, n_all = sizes.n_features, max(sizes.n_vertices), sizes.n_train + sizes.n_test
    # by gradient: weights, gradient, both moments, and the best so far; in closed form: products with the responses,
    # the same on the axes, and weights
    trained = 5.0 * copies * n_features * n_vertices
    kept = (sizes.n_folds + 2.0) * n_features * n_vertices  # of each fold, and of two surfaces to save
    rows = sizes.n_sources * 2.0 * n_all * n_features + (2.0 * sizes.n_train + 2.0 * n_all) * n_vertices
    return 4.0 * (trained + kept + rows)


def announce_whole(problem: Problem, n_features: int, way: str) -> None:
    """Say the memory of heads that see all vertices of a surface at once. Raises ConfigError beyond --max-memory."""
    peak = memory_at_start() + whole_bytes(Sizes.of(problem, n_features), HEADS[problem.config.head].copies)
    refuse_above(problem.config.max_memory, peak)
    say(f"{problem.subject.name}: {n_features:,} features, {problem.n_train:,} images: {way}; {said(peak)}")


def choose_block(problem: Problem, n_features: int) -> int:
    """Vertices to fit at a time, so that memory suffices; says how many, and the memory that it expects.

    Raises ConfigError where not even the smallest block fits into --max-memory.
    """
    sizes = Sizes.of(problem, n_features)
    fixed, per_vertex = blockwise_bytes(sizes)
    block = block_that_fits(fixed, per_vertex, min(VERTEX_BLOCK, max(sizes.n_vertices)), problem.config.max_memory)
    say(
        f"{problem.subject.name}: {n_features:,} features, {problem.n_train:,} images: {block:,} vertices at a time; "
        + said(memory_at_start() + fixed + block * per_vertex)
    )
    return block
