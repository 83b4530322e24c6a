"""Predictions by the heads that were trained with the backbone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from featcache.backbone.checkpoint import Checkpoint, find_checkpoint
from featcache.config import POOLED
from featcache.dataset.splits import refuse_leak
from featcache.errors import ConfigError
from featcache.machine.memory import spare_memory
from heads.features.rows import LayerRows
from heads.features.sets import FeatureSet
from heads.modules.core import core_head_of, has_core
from heads.modules.linear import LinearMap
from heads.modules.saved import linear_map_of, saved_shapes, spatial_head_of
from heads.solvers.base import Block, Fits, FoldFit, Problem, Solver, piece_of
from heads.solvers.held_out import FoldPlan
from heads.solvers.linear import FoldHeads, LinearPredictions
from heads.solvers.memory import FEATURE_SHARE, Sizes, whole_bytes

_BATCH = 256  # images a pass where heads only predict


def build(problem: Problem) -> Solver:
    """Build the solver that predicts with the heads of the checkpoints that made the features.

    Raises CheckpointError if a checkpoint is gone, ConfigError if the features lack arrays that the heads read.
    """
    features, plan, subject = problem.features, problem.plan, problem.subject
    checkpoints = _checkpoints(features, problem.work)
    for k, checkpoint in enumerate(checkpoints):
        refuse_leak(checkpoint.seen_ids, plan.image_ids[plan.inside(k)], f"the heads of {checkpoint.name}")
    saved = [(checkpoint.heads(), list(checkpoint.key.subjects)) for checkpoint in checkpoints]
    shapes = dict(saved_shapes(saved[0][0]))
    maps: dict[str, list[LinearMap]] = {}
    if not shapes:
        maps = {
            surface: [linear_map_of(*heads, subject.name, surface) for heads in saved] for surface in subject.surfaces
        }
        shapes = {POOLED: (len(maps[subject.surfaces[0]][0].weights),)}
    _refuse_missing(features, shapes)
    share = spare_memory(problem.config.max_memory) * FEATURE_SHARE / len(features.stores)
    rows = features.only(tuple(shapes)).read(problem.device, share)
    if maps:
        return TrainedMaps(maps, [layer_rows.dense() for layer_rows in rows], plan)
    head_of = core_head_of if has_core(saved[0][0]) else spatial_head_of
    heads = {surface: [head_of(*pair, subject.name, surface) for pair in saved] for surface in subject.surfaces}
    return TrainedModules(heads, rows, plan, Sizes.of(problem, rows[0].n_features))


def read_by_its_heads(features: FeatureSet, work: Path) -> FeatureSet:
    """The layers that the checkpoints' heads read. If one is missing, the features unchanged."""
    shapes = dict(saved_shapes(_checkpoints(features, work)[0].heads())) or {POOLED: ()}
    read = tuple(name for name in features.names if name in shapes)
    return features if len(read) < len(shapes) or read == features.names else features.only(read)


def _checkpoints(features: FeatureSet, work: Path) -> list[Checkpoint]:
    return [find_checkpoint(work, str(facts.checkpoint)) for facts in features.facts]


def _refuse_missing(features: FeatureSet, shapes: Mapping[str, tuple[int, ...]]) -> None:
    stored = {name: features.stores[0].arrays[name].shape[1:] for name in features.names}
    if missing := [name for name, shape in shapes.items() if stored.get(name) != shape]:
        grids = sorted({shape[0] for shape in shapes.values() if len(shape) > 1})
        raise ConfigError(
            "--solver trained",
            expected=f"features {', '.join(shapes)} in the shapes that the checkpoint's heads were trained on",
            found=f"{', '.join(missing)} missing or of another shape",
            remedy="extract with the --layers and --grid of the training"
            + (f" ({', '.join(map(str, grids))} places a side)" if grids else ""),
        )


class TrainedMaps:
    """Predictions of linear heads on pooled features.

    maps : {surface: a map for each held-out fold}
    features : (n_train + n_test, n_features) float32 for each held-out fold
    """

    vertex_block: int | None = None

    def __init__(
        self, maps: Mapping[str, Sequence[LinearMap]], features: Sequence[torch.Tensor], plan: FoldPlan
    ) -> None:
        self._maps, self._features, self._plan = maps, list(features), plan
        self._predictions = LinearPredictions(features, plan)

    def memory(self, n_vertices: int) -> float:
        n_images, n_features = self._features[0].shape
        return 4.0 * (len(self._features) * n_images * n_features + 2.0 * n_images * n_vertices)

    def fit(self, block: Block) -> Fits:
        device = block.responses.device
        maps = [LinearMap(*(part.to(device) for part in head)) for head in self._maps[block.surface]]
        return self._predictions.fits([FoldHeads([(self._plan.inside(k), head)], head) for k, head in enumerate(maps)])


class TrainedModules:
    """Predictions of heads that read the places of layers.

    heads : {surface: a head for each held-out fold}, each {array: rows} -> (n_images, n_vertices)
    rows : for each held-out fold
    """

    vertex_block: int | None = None

    def __init__(
        self, heads: Mapping[str, Sequence[nn.Module]], rows: Sequence[LayerRows], plan: FoldPlan, sizes: Sizes
    ) -> None:
        self._heads, self._rows, self._plan, self._sizes = heads, rows, plan, sizes

    def memory(self, n_vertices: int) -> float:
        return whole_bytes(self._sizes)

    def fit(self, block: Block) -> Fits:
        folds: list[FoldFit] = []
        saved: dict[tuple[str, str], torch.Tensor] = {}
        for k, (head, prefix) in enumerate(zip(self._heads[block.surface], self._plan.prefixes, strict=True)):
            (values,) = predict([head.to(block.responses.device)], self._rows[k])
            piece = piece_of(values, self._plan.inside(k), self._plan.outside(k))
            folds.append(FoldFit([piece], values[self._plan.n_train :], piece.mean, piece.std))
            saved |= {(prefix, f"head.{name}"): tensor for name, tensor in head.state_dict().items()}
        return Fits(folds, saved)


@torch.inference_mode()
def predict(heads: Sequence[Callable[..., torch.Tensor]], rows: LayerRows) -> list[torch.Tensor]:
    """Predictions of each head, (n_images, n_vertices), in one pass over the rows."""
    batches = np.array_split(np.arange(len(rows)), -(-len(rows) // _BATCH))
    parts = [[head(inputs) for head in heads] for inputs in map(rows.__getitem__, batches)]
    return [torch.cat(batches_of_head) for batches_of_head in zip(*parts, strict=True)]
