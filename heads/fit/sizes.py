"""Memory and disk that fits of heads take, from counts alone: for plans, and before the first fit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from featcache.cache.store import Row, stored_bytes
from featcache.machine.memory import free_memory
from heads.config import HEADS, FitConfig, SpatialConfig
from heads.fit.stored import type_of
from heads.modules.core import CORE, Core
from heads.solvers.base import Problem
from heads.solvers.layers.priors import DEPTHS, prior_set
from heads.solvers.layers.sizes import LayeredSizes
from heads.solvers.memory import FEATURE_SHARE, Sizes, blockwise_bytes, spatial_bytes, whole_bytes
from heads.solvers.ridge import VERTEX_BLOCK

_CHOICES_OF_A_TRAINED_FOLD = 5  # four parts of the held-out images, and one head for test images


@dataclass(frozen=True)
class Features:
    """Features of one subject, before they are there.

    rows : {array: its row}
    held_out : folds that a trained backbone did not see, one store for each; none for a frozen backbone
    n_folds : of the training
    title : that --features goes by, without digits
    """

    rows: Mapping[str, Row]
    held_out: tuple[int, ...] = ()
    n_folds: int = 0
    title: str = ""

    @property
    def backbone_trained(self) -> bool:
        return bool(self.held_out)

    @property
    def n_stores(self) -> int:
        """One for a frozen backbone, one for each held-out fold of a trained one."""
        return len(self.held_out) or 1

    @property
    def n_scales(self) -> int:
        """Sets of scales (see FoldPlan.scale_rows)."""
        return len(self.held_out) or 2

    @property
    def n_features(self) -> int:
        return sum(math.prod(row.shape) for row in self.rows.values())

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """{array: (height, width)}; a vector has one place."""
        return {name: (row.shape[0], row.shape[1]) if len(row.shape) > 1 else (1, 1) for name, row in self.rows.items()}

    @property
    def is_layered(self) -> bool:
        """Whether there are several arrays, or places of the image."""
        return len(self.rows) > 1 or any(len(row.shape) > 1 for row in self.rows.values())

    def reading(self, arrays: Sequence[str]) -> "Features":
        """Some of the arrays alone."""
        return replace(self, rows={name: self.rows[name] for name in arrays})


@dataclass(frozen=True, kw_only=True)
class FitSizes:
    """What the memory of one fit follows from.

    n_vertices : of each surface
    n_held_out : folds that are held out, in turn
    n_folds : folds that there are
    """

    n_train: int
    n_test: int
    n_vertices: tuple[int, ...]
    n_held_out: int
    n_folds: int
    features: Features

    @property
    def n_images(self) -> int:
        return self.n_train + self.n_test

    @classmethod
    def of(cls, problem: Problem) -> "FitSizes":
        """The counts of a fit whose features are there."""
        features, plan = problem.features, problem.plan
        rows = {name: Row(array.shape[1:], str(array.dtype)) for name, array in features.stores[0].arrays.items()}
        n_folds = len(np.unique(plan.folds))
        held_out = tuple(plan.held_out) if features.backbone_trained else ()
        return cls(
            n_train=problem.n_train,
            n_test=problem.n_test,
            n_vertices=problem.n_vertices,
            n_held_out=len(plan),
            n_folds=n_folds,
            features=Features({name: rows[name] for name in features.names}, held_out, n_folds),
        )


def fit_memory(sizes: FitSizes, config: FitConfig) -> float:
    """Bytes of memory of one fit, besides those of the program."""
    spec, features = config.solver_spec, sizes.features
    if (layered := _under_priors(sizes, config)) is not None:
        return layered.memory(max(sizes.n_vertices))
    flat = Sizes(
        n_train=sizes.n_train,
        n_test=sizes.n_test,
        n_features=features.n_features,
        n_vertices=sizes.n_vertices,
        n_folds=sizes.n_held_out,
        n_sources=features.n_stores,
    )
    if spec.blockwise and not features.backbone_trained:
        fixed, per_vertex = blockwise_bytes(flat)
        return fixed + per_vertex * min(VERTEX_BLOCK, max(sizes.n_vertices))
    if spec.fits and isinstance(getattr(config, HEADS[config.head].settings or "", None), SpatialConfig):
        return _of_spatial_heads(sizes, config)
    return whole_bytes(flat, HEADS[config.head].copies if spec.fits else 1)


def _of_spatial_heads(sizes: FitSizes, config: FitConfig) -> float:
    """Bytes of spatial heads of one subject."""
    n_vertices, features = sum(sizes.n_vertices), sizes.features
    return spatial_bytes(
        {name: row.shape for name, row in features.rows.items()},
        config,
        n_outputs=n_vertices,
        n_surface=max(sizes.n_vertices),
        n_images=sizes.n_images,
        n_responses=sizes.n_train * n_vertices,
        n_folds=sizes.n_held_out,
        n_choices=_CHOICES_OF_A_TRAINED_FOLD if features.backbone_trained else 1,
    )


def saved_bytes(sizes: FitSizes, config: FitConfig) -> float:
    """Bytes of the heads that one fit saves."""
    if (layered := _under_priors(sizes, config)) is not None:
        return sum(map(layered.saved_bytes, sizes.n_vertices))
    features = sizes.features
    return 4.0 * features.n_features * sum(sizes.n_vertices) * features.n_stores


def prediction_bytes(sizes: FitSizes, n_together: int, dtype: str) -> float:
    """Bytes of the predictions of one fit.

    n_together, dtype : as for `type_of`, by which they are counted: of float16, as long as none turns out too coarse
    """
    kept = type_of(dtype, n_together)
    return float(sum(stored_bytes(Row((n,), kept), sizes.n_images) for n in sizes.n_vertices))


def _under_priors(sizes: FitSizes, config: FitConfig) -> LayeredSizes | None:
    """The counts of the fit under priors, if there is one in what is fitted."""
    if not config.solver_spec.fits:
        return None
    if HEADS[config.head].under_priors:
        return _layered(_on_core(sizes, config), (None,))
    if not config.solver_spec.under_priors or not sizes.features.is_layered:
        return None
    return _layered(sizes, DEPTHS if len(sizes.features.rows) > 1 else (None,))


def _on_core(sizes: FitSizes, config: FitConfig) -> FitSizes:
    """The counts of the fit to what a core puts out, which is like a layer that was trained for each fold."""
    *grid, n_channels = Core.shape({name: row.shape for name, row in sizes.features.rows.items()}, config.core)
    rows = {CORE: Row((*grid, config.core.members * n_channels), "float16")}
    return replace(sizes, features=Features(rows, tuple(range(sizes.n_held_out)), sizes.n_folds))


def _layered(sizes: FitSizes, depths: Sequence[float | None]) -> LayeredSizes:
    """The counts of a fit under priors, with what it may keep of the memory that is free now."""
    features, free = sizes.features, free_memory()
    stored = float(sum(row.n_bytes for row in features.rows.values())) * sizes.n_images * features.n_stores
    return LayeredSizes(
        n_train=sizes.n_train,
        n_images=sizes.n_images,
        n_fit=(sizes.n_train - sizes.n_train // sizes.n_folds,) * sizes.n_held_out,
        n_choices=_CHOICES_OF_A_TRAINED_FOLD if features.backbone_trained else 1,
        n_scales=features.n_scales,
        n_features=features.n_features,
        n_priors=len(prior_set(features.grids, depths, sizes.n_train)),
        backbone_trained=features.backbone_trained,
        n_responses=sum(sizes.n_vertices),
        held_bytes=min(stored, free * FEATURE_SHARE),
    )
