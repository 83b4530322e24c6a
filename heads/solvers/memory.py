"""Bytes of memory that fits take, from counts alone: for solvers before they start, and for plans.

On a CPU all of it is main memory. On a CUDA device, features, decompositions, responses and weights of a fit lie on the
device; predictions of whole surfaces and saved weights are in main memory (`result_bytes`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featcache.machine.device_memory import block_on, on_cuda, refuse_beyond, said_on
from featcache.machine.memory import memory_at_start
from featcache.machine.progress import say
from heads.config import HEADS, FitConfig
from heads.modules.spatial import LARGEST
from heads.solvers.base import Problem
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.kernels import rows_at_once
from heads.solvers.ridge import MAX_NUMBERS_AT_ONCE, VERTEX_BLOCK

# share of the free memory for features as stored
FEATURE_SHARE = 0.2

MAX_AXES = 2048  # of a fit under the flat prior: heads.solvers.layers.axes has landmarks beyond
SPARE_VECTORS = 32  # singular vectors of a block of vertices that are kept beyond those of the shared space
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
    block = (2 * n_folds + 4) * rank + 4 * n_train + n_folds * n_test + n_features
    fixed = 4.0 * (features + decomposition) + 16.0 * MAX_NUMBERS_AT_ONCE
    return fixed + result_bytes(sizes), 4.0 * block


def result_bytes(sizes: Sizes) -> float:
    """Bytes that are in main memory wherever a fit computes: predictions of a surface, its responses, saved weights."""
    n_train, n_all = sizes.n_train, sizes.n_train + sizes.n_test
    # responses are a memory-mapped file; they stay in memory as long as nothing else needs it
    return 4.0 * ((n_all + n_train) * max(sizes.n_vertices) + 2 * sizes.n_features * sum(sizes.n_vertices))


def whole_bytes(sizes: Sizes, copies: int = 1) -> float:
    """Bytes of a fit to all vertices of a surface at once. copies : the most layers that predict one vertex"""
    n_features, n_vertices, n_all = sizes.n_features, max(sizes.n_vertices), sizes.n_train + sizes.n_test
    # by gradient: weights, gradient, both moments, and the best so far; in closed form: products with the responses,
    # their rotation to the axes, and weights
    trained = 5.0 * copies * n_features * n_vertices
    kept = (sizes.n_folds + 2.0) * n_features * n_vertices  # weights of each fold, and of two surfaces to save
    rows = sizes.n_sources * 2.0 * n_all * n_features + (2.0 * sizes.n_train + 2.0 * n_all) * n_vertices
    return 4.0 * (trained + kept + rows)


def spatial_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    config: FitConfig,
    *,
    n_outputs: int,
    n_surface: int,
    n_images: int,
    n_responses: int,
    n_folds: int,
    n_choices: int,
) -> float:
    """Bytes of spatial heads that are trained from the closed form on.

    shapes : {array: shape of a row}
    n_outputs : vertices of all surfaces and subjects; n_surface : of the largest surface
    n_images : of the subject with most; n_responses : numbers in the responses of all subjects
    n_choices : heads that are kept of each fold
    """
    spatial, batch = config.spatial, config.adamw.batch_size
    n_features = sum(map(math.prod, shapes.values()))
    n_places = sum(math.prod(shape[:-1]) for shape in shapes.values() if len(shape) > 1)
    n_read = spatial.space or n_outputs
    per_output = sum(
        shape[0] if len(shape) == 1 else spatial.rank * (math.prod(shape[:2]) + shape[2]) for shape in shapes.values()
    )
    weights = float(n_read * (per_output + len(shapes) + 1) + (n_outputs * (spatial.space + 1) if spatial.space else 0))
    # itself, gradient, both moments, as it started, as it is, the best of each choice; and those of all folds
    trained = weights * (6 + n_choices + n_folds * n_choices)
    block = min(max(START_NUMBERS // n_features, 1), n_outputs)
    # weights of a block as they are multiplied, blurred, scaled and laid by vertex; dual weights and scores
    n_columns = min(n_images, MAX_AXES)
    start = block * (8.0 * n_features + 4.0 * n_images) + 8.0 * n_images * n_columns
    # prepared rows that a kernel is of, and inner products of single places
    widest = max(math.prod(shape[:-1]) for shape in shapes.values())
    start += 3.0 * n_columns * n_features + 2.0 * widest * n_columns * min(rows_at_once(widest, n_columns), n_images)
    # blocks that wait to be one matrix, and singular vectors
    vectors = n_features * (3.0 * block + 6.0 * (spatial.space + SPARE_VECTORS)) if spatial.space else 0.0
    contracted = min(LARGEST, n_read * spatial.rank * batch * n_places)
    step = batch * (3.0 * n_features + 6.0 * n_outputs) + 4.0 * contracted + 8.0 * n_read * spatial.rank * n_places
    predicted = (2.0 * n_choices + 2.0) * n_images * n_surface
    return 1.2 * 4.0 * (n_responses + trained + max(start + vectors, step, predicted))


def announce_whole(problem: Problem, n_features: int, method: str) -> None:
    """Say the memory of a fit to all vertices of a surface at once. Raises ConfigError beyond --max-memory."""
    needed = whole_bytes(Sizes.of(problem, n_features), HEADS[problem.config.head].copies)
    announce(problem, n_features, needed, method)


def announce(problem: Problem, n_features: int, needed: float, method: str) -> None:
    """Say that a fit takes so many bytes where it computes. Raises ConfigError beyond --max-memory."""
    peak = needed + _program(problem.device)
    refuse_beyond(problem.device, problem.config.max_memory, peak)
    memory = said_on(problem.device, peak)
    say(f"{problem.subject.name}: {n_features:,} features, {problem.n_train:,} images: {method}; {memory}")


def choose_block(problem: Problem, n_features: int) -> int:
    """Number of vertices to fit at a time, so that memory suffices; says it, and the memory that it expects.

    Raises ConfigError if not even the smallest block fits into --max-memory.
    """
    sizes, device = Sizes.of(problem, n_features), problem.device
    fixed, per_vertex = blockwise_bytes(sizes)
    fixed -= result_bytes(sizes) if on_cuda(device) else 0.0
    largest = min(VERTEX_BLOCK, max(sizes.n_vertices))
    block = block_on(device, fixed, per_vertex, largest, problem.config.max_memory)
    announce(problem, n_features, fixed + block * per_vertex, f"{block:,} vertices at a time")
    return block


def _program(device: str) -> float:
    """Bytes of the program itself, which are in main memory."""
    return 0.0 if on_cuda(device) else memory_at_start()
