"""Bytes of main memory that fits under priors take, from counts alone: for solvers before they start, and plans."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from heads.features.rows import BLOCK_BYTES
from heads.solvers.layers.axes import LANDMARKS, method_for
from heads.solvers.memory import CACHE_SHARE, STACK_SHARE
from heads.solvers.ridge import MAX_NUMBERS_AT_ONCE

SEARCH_IMAGES = 1024  # with more training images, priors are first compared on a sample of so many
FINALISTS = 8  # priors that are tried on all images after that
VERTEX_BLOCK = 4096
PENDING_BYTES = 256 << 20  # of dual weights that wait to be multiplied with features
_WEIGHTS_IN_MEMORY = 2e9  # of the weights of a surface; larger ones are held in files (featcache/machine/tensors.py)


@dataclass(frozen=True, kw_only=True)
class LayeredSizes:
    """Counts that decide the memory of a fit under priors.

    n_fit : images to fit to, for each held-out fold
    n_choices : separately chosen heads of a fold, at most
    n_scales : sets of scales of features (see FoldPlan.scale_rows)
    stack_bytes : of kernels of single places, if they are kept
    held_bytes : of features that are kept in memory
    cache_bytes : memory for decompositions
    """

    n_train: int
    n_images: int
    n_fit: tuple[int, ...]
    n_choices: int
    n_scales: int
    n_features: int
    n_priors: int
    backbone_trained: bool
    stack_bytes: float
    held_bytes: float
    cache_bytes: float

    @property
    def method(self) -> str:
        """'images', 'features' or 'landmarks' (see axes.py)."""
        return method_for(min(self.n_fit), self.n_features)

    @property
    def searched(self) -> bool:
        """Whether priors are first compared on a sample of the images."""
        return self.n_train > SEARCH_IMAGES and self.n_priors > FINALISTS

    @property
    def decomposed_bytes(self) -> float:
        """Bytes of all decompositions, which serve any responses."""
        if self.method == "images":
            per_prior = 4.0 * self.n_images * sum(self.n_fit)
        else:
            n = min(LANDMARKS, self.n_features)
            per_prior = 4.0 * n * (self.n_images * self.n_scales + n * len(self.n_fit))
        return (FINALISTS if self.searched else self.n_priors) * per_prior

    @property
    def recomputes(self) -> bool:
        """Whether decompositions do not fit into their memory and are recomputed at every use."""
        return self.decomposed_bytes > self.cache_bytes

    @property
    def n_saved(self) -> int:
        """Number of sets of weights that are saved: one for the mean over folds, or one for each."""
        return len(self.n_fit) if self.backbone_trained else 1

    def saved_bytes(self, n_vertices: int) -> float:
        """Bytes of the saved weights of a surface."""
        return 4.0 * self.n_features * n_vertices * self.n_saved

    def memory(self, n_vertices: int) -> float:
        """Bytes that a fit of a surface takes: features, decompositions, predictions of every choice, responses."""
        block = min(n_vertices, VERTEX_BLOCK) if not self.recomputes else n_vertices
        per_fold = 4.0 * self.n_images * block * self.n_choices
        # a kernel, its centred copy, and both in float64
        decomposition = 28.0 * self.n_images * (self.n_images if self.method == "images" else LANDMARKS)
        kept = 0.0 if self.recomputes else self.decomposed_bytes
        duals = 2 * min(4.0 * self.n_priors * self.n_images * block, PENDING_BYTES)
        errors = 16.0 * max(MAX_NUMBERS_AT_ONCE, self.n_train * block)
        # read, centred, scaled, blurred, weighed
        blocks = 6.0 * min(4 * self.n_images * self.n_features, BLOCK_BYTES)
        # of two surfaces, and of a block while they are computed
        weights = 2 * min(self.saved_bytes(n_vertices), _WEIGHTS_IN_MEMORY)
        weights += 12.0 * self.n_features * min(n_vertices, VERTEX_BLOCK) + min(
            self.saved_bytes(block), _WEIGHTS_IN_MEMORY
        )
        predictions = per_fold * len(self.n_fit) + 12.0 * self.n_train * block
        total = self.stack_bytes + decomposition + kept + predictions + duals + errors + blocks + weights
        return 1.2 * (total + self.held_bytes)  # a fifth more for memory that the allocator cannot reuse


def counted(
    grids: Mapping[str, tuple[int, int]], free: float, *, n_images: int, n_features: int, n_scales: int, **counts: Any
) -> LayeredSizes:
    """The counts of a fit before its features are there, with what it may keep of the memory that is free now.

    grids : {array: (height, width)}
    free : bytes of memory
    counts : the other fields, but for `stack_bytes` and `cache_bytes`
    """
    sizes = LayeredSizes(
        n_images=n_images,
        n_features=n_features,
        n_scales=n_scales,
        stack_bytes=0.0,
        cache_bytes=free * CACHE_SHARE,
        **counts,
    )
    room = free * STACK_SHARE / n_scales
    n_places = sum(math.prod(grid) for grid in grids.values())
    # kernels of single places, of all images and of those on which priors are sought, where they fit
    whole, sought = (4.0 * n_places * n**2 for n in (n_images, SEARCH_IMAGES))
    rows = 4.0 * n_images * n_features  # that kernels of all images are made of
    total = n_scales * (whole + rows) if whole <= room else 0.0
    n_sought = 1 if sizes.backbone_trained else n_scales
    total += n_sought * sought if sizes.searched and sought <= room else 0.0
    return replace(sizes, stack_bytes=total)
