"""How heads are fitted to one subject's features: the choice between solvers, and the memory that it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from featcache.backbone.checkpoint import find_checkpoint
from featcache.config import POOLED
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError
from featcache.machine.memory import block_that_fits, memory_at_start, refuse_above, said, spare_memory
from featcache.machine.progress import say
from heads.config import FitConfig
from heads.features.sets import FeatureSet
from heads.modules.saved import linear_map_of, saved_shapes, spatial_head_of
from heads.solvers.base import FoldPredictor, LinearFits
from heads.solvers.gradient import AdamWFolds
from heads.solvers.held_out import FoldSolver, FrozenFolds, TrainedFolds, TunedAdamW, TunedRidge
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import DEPTHS, prior_set
from heads.solvers.layers.ridge import PENALTIES, DualFolds
from heads.solvers.moments import MomentFits
from heads.solvers.ridge import VERTEX_BLOCK
from heads.solvers.ridge_folds import RidgeFits, memory_of
from heads.solvers.spatial import TrainedSpatialFits

# Parts of the free memory: features as they are stored, kernels of single places, and decompositions.
FEATURE_SHARE, STACK_SHARE, _CACHE_SHARE = 0.2, 0.2, 0.3

_WAYS = {
    "images": "dual, by kernels of images",
    "features": "primal",
    "landmarks": "by kernels with landmark images",
}


@dataclass
class Shared:
    """What the losses of one run have in common on one set of features; the first that needs it makes it."""

    n_losses: int
    moments: MomentFits | None = None


def under_priors(features: FeatureSet, config: FitConfig) -> bool:
    """Whether the heads are fitted under priors over layers and places."""
    return config.resolved_solver == "exact" and (features.has_places or len(features.names) > 1)


def read_by_its_heads(of: FeatureSet, work: Path) -> FeatureSet:
    """Of features that may have more layers, those that the heads of their checkpoints read."""
    shapes = dict(saved_shapes(find_checkpoint(work, of.stores[0].facts["checkpoint"]).heads()))
    read = tuple(name for name in of.names if name in (shapes or (POOLED,)))
    return of if len(read) < len(shapes or (POOLED,)) or read == of.names else replace(of, arrays=read)


def predictor_of(
    subject: Subject,
    of: FeatureSet,
    folds: np.ndarray,
    config: FitConfig,
    device: str,
    work: Path,
    shared: Shared,
) -> FoldPredictor:
    """How these heads are fitted to these features."""
    held_out = of.held_out() if of.trained else list(range(folds.max() + 1))
    names = [f"fold{k}." for k in held_out] if of.trained else [""]
    if config.resolved_solver == "trained":
        return trained_heads(subject, of, folds, device, work, config.max_memory)
    if under_priors(of, config):
        return _dual(subject, of, folds, held_out, config, device)
    if config.resolved_solver == "exact" and not of.trained:
        return _ridge(subject, of, folds, config, device)
    if config.resolved_solver == "moments":
        if shared.moments is None:
            shared.moments = _moments(subject, of, folds, config, device, shared.n_losses)
        return shared.moments.with_terms(config.terms)
    features = [rows.dense() for rows in of.read(device, 0)]
    _announce_whole(subject, of, features, config)
    return LinearFits(_solver(features, folds, subject, of, config), features, len(folds), names)


def _announce_whole(subject: Subject, of: FeatureSet, features: Sequence[torch.Tensor], config: FitConfig) -> None:
    """Say the memory of heads that see all vertices of a hemisphere at once, and refuse it beyond --max-memory."""
    n_features = features[0].shape[1]
    peak = memory_at_start() + whole_bytes(subject, of, n_features, config)
    refuse_above(config.max_memory, peak)
    way = "closed form" if config.resolved_solver == "exact" else "by gradient"
    say(f"{subject.name}: {n_features:,} features, {len(subject.train):,} images: {way}; {said(peak)}")


def whole_bytes(subject: Subject, of: FeatureSet, n_features: int, config: FitConfig) -> float:
    """What heads take that see all vertices of a hemisphere at once."""
    n_train, n_all, n_vertices = len(subject.train), len(subject.image_ids), max(subject.n_vertices.values())
    n_heads = len(of.held_out()) if of.trained else config.n_folds
    # of one head: weights, gradient, both moments, and the best so far; with ROIs two layers of them. In closed form:
    # products with the responses, the same on the axes, and weights
    trained = 5.0 * (2 if config.head == "roi" else 1) * n_features * n_vertices
    kept = (n_heads + 2.0) * n_features * n_vertices  # of each fold, and of both hemispheres to save
    rows = len(of.stores) * 2.0 * n_all * n_features + (2.0 * n_train + 2.0 * n_all) * n_vertices
    return 4.0 * (trained + kept + rows)


def _ridge(subject: Subject, of: FeatureSet, folds: np.ndarray, config: FitConfig, device: str) -> FoldPredictor:
    (rows,) = of.read(device, 0)
    block, _ = _block(subject, rows.n_features, folds, config, n_losses=1)
    return RidgeFits(rows.dense(), folds, config.ridge, vertex_block=block)


def _moments(
    subject: Subject, of: FeatureSet, folds: np.ndarray, config: FitConfig, device: str, n_losses: int
) -> MomentFits:
    if of.trained:
        raise ConfigError(
            "--solver moments",
            expected="features of a frozen backbone",
            found=f"those of a checkpoint, {of.name}",
            remedy="use --solver exact or adamw",
        )
    (rows,) = of.read(device, 0)
    block, keep = _block(subject, rows.n_features, folds, config, n_losses)
    return MomentFits(rows.dense(), folds, config.terms, config.moments, block, keep)


def _block(subject: Subject, n_features: int, folds: np.ndarray, config: FitConfig, n_losses: int) -> tuple[int, bool]:
    """Vertices at a time, and whether there is room to keep what several losses learn from; says both."""
    n_images, n_vertices = (len(subject.train), len(subject.test)), tuple(subject.n_vertices.values())
    n_folds = int(folds.max()) + 1
    fixed, per_vertex = memory_of(n_images, n_features, n_vertices, n_folds)
    largest = min(VERTEX_BLOCK, max(n_vertices))
    kept = 4.0 * n_folds * min(n_features, n_images[0]) * sum(n_vertices)
    keep = n_losses > 1 and fixed + kept + per_vertex * largest <= spare_memory(config.max_memory)
    fixed += kept if keep else 0.0
    block = block_that_fits(fixed, per_vertex, largest, config.max_memory)
    say(
        f"{subject.name}: {n_features:,} features, {len(folds):,} images: {block:,} vertices at a time; "
        + said(memory_at_start() + fixed + block * per_vertex)
    )
    return block, keep


def _dual(
    subject: Subject, of: FeatureSet, folds: np.ndarray, held_out: Sequence[int], config: FitConfig, device: str
) -> FoldPredictor:
    free = spare_memory(config.max_memory)
    rows = of.read(device, free * FEATURE_SHARE / len(of.stores))
    kernels = [LayerKernels(one, len(folds), free * STACK_SHARE / len(rows)) for one in rows]
    solver = dual_of(kernels, subject, of, folds, held_out, config, free)
    n_trained = int((folds != held_out[0]).sum())
    # a fifth for what the allocator cannot use again
    peak = memory_at_start() + 1.2 * (
        solver.peak_bytes(max(subject.n_vertices.values())) + sum(one.held_bytes for one in rows)
    )
    refuse_above(config.max_memory, peak)
    streamed = list(dict.fromkeys(name for one in rows for name in one.streamed))
    say(
        f"{subject.name}: {rows[0].n_features:,} features, {n_trained:,} images to fit to: {_WAYS[solver.way]}; "
        + said(peak)
        + (f"; {', '.join(streamed)} read from the store block by block" if streamed else "")
        + ("; too little to keep decompositions, which are made again as they are needed" if solver.forgets else "")
    )
    return solver


def dual_of(
    kernels: Sequence[LayerKernels],
    subject: Subject,
    of: FeatureSet,
    folds: np.ndarray,
    held_out: Sequence[int],
    config: FitConfig,
    free: float,
) -> DualFolds:
    """Closed form under priors, with what of the free memory it may keep decompositions in."""
    priors = prior_set(kernels[0].rows.grids, DEPTHS if len(of.names) > 1 else (None,), len(folds))
    ridge = replace(config.ridge, penalties=PENALTIES)
    return DualFolds(kernels, folds, held_out, subject.train.ids, ridge, priors, of.trained, free * _CACHE_SHARE)


def _solver(
    features: Sequence[torch.Tensor], folds: np.ndarray, subject: Subject, of: FeatureSet, config: FitConfig
) -> FoldSolver:
    """Of heads that are linear in a matrix of features."""
    ids, rows = subject.train.ids, [x[: len(folds)] for x in features]
    match config.resolved_solver, of.trained:
        case "exact", True:
            return TunedRidge(rows, folds, of.held_out(), ids, config.ridge)
        case _, True:
            return TunedAdamW(rows, folds, of.held_out(), ids, config)
        case _:
            solver = AdamWFolds(rows[0], folds, ids, config)
            solver.splits()  # what they refuse is refused before a store is made for it
            return FrozenFolds(solver, folds)


def trained_heads(
    subject: Subject, of: FeatureSet, folds: np.ndarray, device: str, work: Path, max_memory: float = 0.0
) -> FoldPredictor:
    """The heads that were trained with the backbones of these features. Raises CheckpointError where they are gone."""
    checkpoints = [find_checkpoint(work, store.facts["checkpoint"]) for store in of.stores]
    for checkpoint, fold in zip(checkpoints, of.held_out(), strict=True):
        refuse_leak(checkpoint.seen_ids, subject.train.ids[folds == fold], f"the heads of {checkpoint.name}")
    tensors = [checkpoint.heads() for checkpoint in checkpoints]
    names = [list(checkpoint.key.subjects) for checkpoint in checkpoints]
    pairs = list(zip(tensors, names, strict=True))
    maps, shapes = {}, dict(saved_shapes(tensors[0]))
    if not shapes:
        maps = {h: [linear_map_of(*pair, subject.name, h) for pair in pairs] for h in HEMISPHERES}
        shapes = {POOLED: (len(maps[HEMISPHERES[0]][0].weights),)}
    there = {name: of.stores[0].arrays[name].shape[1:] for name in of.names}
    if missing := [name for name, shape in shapes.items() if there.get(name) != shape]:
        grids = sorted({shape[0] for shape in shapes.values() if len(shape) > 1})
        raise ConfigError(
            "--solver trained",
            expected=f"the arrays that those heads read, {', '.join(shapes)}",
            found=f"no {', '.join(missing)} of their shape",
            remedy="extract with the --layers and --grid of the training"
            + (f" ({', '.join(map(str, grids))} places a side)" if grids else ""),
        )
    rows = replace(of, arrays=tuple(shapes)).read(device, spare_memory(max_memory) * FEATURE_SHARE / len(of.stores))
    if not maps:
        spatial = {h: [spatial_head_of(*pair, subject.name, h) for pair in pairs] for h in HEMISPHERES}
        return TrainedSpatialFits(spatial, rows, folds, of.held_out())
    features = [one.dense() for one in rows]
    prefixes = [f"fold{k}." for k in of.held_out()]
    return LinearFits(TrainedFolds(maps, folds, of.held_out()), features, len(folds), prefixes)
