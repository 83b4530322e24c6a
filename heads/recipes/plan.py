"""What the steps of a recipe are expected to take, before any of them runs.

Counts come from the tree, or from the step that will simulate it. Times come from a forward pass of each network, a
matrix product and a decomposition, made here and now on the device that the step names. All of it is said as if the
work folder were empty (docs/recipes.md has what is left out, and how near it came).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from featcache.backbone.weights import check_backbone
from featcache.cache.store import Row, stored_bytes
from featcache.config import BackboneConfig, ExtractConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Challenge, ImageFiles, Subject
from featcache.errors import ConfigError, FeatcacheError
from featcache.machine.device import resolve_device, resolve_dtype
from featcache.machine.memory import free_memory, memory_at_start
from featcache.simulate import SimulateConfig
from heads.blend.products import N_FOLDS, bytes_of
from heads.config import BlendConfig, FitConfig, StageConfig
from heads.features.rows import LayerRows
from heads.features.sets import FeatureSet
from heads.recipes.steps import Ready, Step, located
from heads.recipes.timings import blend_seconds, eigh_seconds, network, product_seconds
from heads.solvers.layers.ridge import DualFolds
from heads.solvers.registry import FEATURE_SHARE, STACK_SHARE, dual_of, under_priors, whole_bytes
from heads.solvers.ridge import VERTEX_BLOCK
from heads.solvers.ridge_folds import effort_of, memory_of

_BACKWARD = 3  # forward passes that an image of training takes: one forward, about two back


@dataclass(frozen=True)
class Estimate:
    """Of one step: seconds, bytes of memory at its peak, and bytes that it leaves on the disk; None: not estimated."""

    step: Step
    seconds: float | None = None
    memory: float | None = None
    disk: float | None = None


def subjects_of(steps: Sequence[Ready]) -> list[tuple[Subject, ...]]:
    """The subjects that each step works on, as they are or as an earlier step will simulate them.

    Raises what the step would raise for a tree, a subject, a backbone or a device that is not there.
    """
    trees: dict[Any, Challenge] = {}
    found = []
    for one in steps:
        try:
            found.append(_subjects(one, trees))
            _check(one.job.config)
        except FeatcacheError as error:
            raise located(error, one.step) from error
    return found


def _subjects(one: Ready, trees: dict[Any, Challenge]) -> tuple[Subject, ...]:
    data, ceiling = one.options.get("data"), one.options.get("noise_ceiling")
    if data is None:
        return ()
    if isinstance(one.job.config, SimulateConfig):
        if not data.is_dir():
            trees[data] = simulated(one.job.config, data)
        return ()
    if data not in trees and not data.is_dir():
        raise ConfigError(
            "--data",
            expected="a challenge tree",
            found=f"no folder {data}",
            remedy="name one, or add a step that simulates it",
        )
    if one.step.command == "check":  # which lists faults, where opening would end at the first
        return ()
    key = data if data in trees else (data, ceiling)
    if key not in trees:
        trees[key] = open_challenge(data, ceiling)
    return trees[key].select(one.options.get("subject", "all"))


def _check(config: Any) -> None:
    if isinstance(config, (StageConfig, ExtractConfig)):
        check_backbone(config.backbone)
    if device := getattr(config, "device", None):
        resolve_device(device)


def simulated(config: SimulateConfig, root: Path) -> Challenge:
    """A tree that is not written yet: its counts, with numbers for ids."""

    def images(n: int) -> ImageFiles:
        return ImageFiles((root,) * n, np.arange(n))

    none: dict[str, Any] = dict.fromkeys(HEMISPHERES)
    subjects = []
    for s in config.subjects:
        n_vertices = {h: n - config.n_deleted(s, h) for h, n in zip(HEMISPHERES, config.n_vertices, strict=True)}
        train, test = images(config.train_count(s)), images(config.test_count(s))
        subjects.append(Subject(f"subj{s:02d}", train, test, {}, n_vertices, {h: {} for h in none}, none, none))
    return Challenge(root, tuple(subjects))


def estimates_of(steps: Sequence[Ready], subjects: Sequence[tuple[Subject, ...]]) -> list[Estimate]:
    """What each step is expected to take, after those before it. Measures for seconds to minutes; says what."""
    memory_at_start()
    works: dict[Path, _Work] = defaultdict(_Work)
    found = []
    for one, those in zip(steps, subjects, strict=True):
        try:
            found.append(Estimate(one.step, *works[one.options.get("work", Path())].estimate(one.job.config, those)))
        except FeatcacheError as error:
            raise located(error, one.step) from error
    return found


@dataclass(frozen=True)
class _Training:
    """Checkpoints of one training: a fold each of all its subjects, or of each of them."""

    config: StageConfig
    backbone: BackboneConfig
    subjects: tuple[str, ...]

    @property
    def folds(self) -> list[dict[str, Any]]:
        of = self.config
        each = range(of.n_folds) if of.fold is None else [of.fold]
        return [{"fold": k, "n_folds": of.n_folds, "seed": of.fold_seed} for k in each]


Costs = tuple[float | None, float | None, float | None]


@dataclass
class _Work:
    """What the steps so far will have left in a work folder.

    features : {subject: {what tells them apart: features}}
    models : {subject: what tells its models apart}
    pixels : {(subject, backbone): bytes}
    """

    trainings: list[_Training] = field(default_factory=list)
    features: dict[str, dict[Any, FeatureSet]] = field(default_factory=lambda: defaultdict(dict))
    models: dict[str, set[Any]] = field(default_factory=lambda: defaultdict(set))
    pixels: dict[Any, float] = field(default_factory=dict)
    decoded: float = 0.0  # of these, as they were counted

    def estimate(self, config: Any, subjects: Sequence[Subject]) -> Costs:
        match config:
            case StageConfig():
                return self._train(config, subjects)
            case ExtractConfig():
                return self._extract(config, subjects)
            case FitConfig():
                return self._fit(config, subjects)
            case BlendConfig():
                return self._blend(config, subjects)
        return None, None, None

    def _train(self, config: StageConfig, subjects: Sequence[Subject]) -> Costs:
        before = [one for one in self.trainings if one.config.stage == "pretrain"]
        same = [one for one in before if config.backbone.admits(one.backbone.resolved_name)]
        start = (
            same[-1].backbone if config.stage == "finetune" and config.init == "stage1" and same else config.backbone
        )
        backbone = replace(start, size=config.backbone.size or start.size)
        training = _Training(config, backbone, tuple(s.name for s in subjects))
        if training in self.trainings:
            return 0.0, 0.0, 0.0
        self.trainings.append(training)
        device = resolve_device(config.device)
        net = network(backbone, config.train.tapped, config.train.precision, device, False)
        every, folds, epochs = training.config.n_folds, len(training.folds), config.train.epochs
        n, vertices = [len(s.train) for s in subjects], [sum(s.n_vertices.values()) for s in subjects]
        images = sum(n) * (_BACKWARD * (1 - 1 / every) + 1 / every) * net.seconds
        heads = product_seconds(6.0 * sum(a * b for a, b in zip(n, vertices, strict=True)) * net.n_features, device)
        loads = folds if config.stage == "pretrain" else folds * len(subjects)
        for subject in subjects:
            self.pixels[subject.name, backbone.resolved_name, backbone.size] = len(subject.image_ids) * net.pixels
        outputs = max(vertices) * (1 if config.stage == "pretrain" else 2)  # a hemisphere's, and those of ROIs
        parameters = 4.0 * net.n_features * outputs
        # the start, the network, its gradient and both moments; what layers keep for the way back
        memory = 5 * (net.weights + parameters) + config.train.batch_size * net.kept
        seconds = loads * net.load + folds * epochs * (images + heads)
        return seconds, memory_at_start() + memory, loads * (net.weights + parameters) + self._new_pixels(config)

    def _new_pixels(self, config: StageConfig) -> float:
        """Bytes of decoded images that are not counted yet; a full folder is cleared for others."""
        before, now = self.decoded, min(sum(self.pixels.values()), config.image_cache * 1e9)
        self.decoded = max(before, now)
        return self.decoded - before

    def _extract(self, config: ExtractConfig, subjects: Sequence[Subject]) -> Costs:
        trained = [one for one in self.trainings if config.backbone.admits(one.backbone.resolved_name)]
        served = [
            one for one in trained if config.checkpoint == "auto" and set(one.subjects) & {s.name for s in subjects}
        ]
        parts = [self._extract_from(config, one, subjects) for one in served]
        parts = parts or [self._extract_from(config, None, subjects)]
        memory = max(part[1] for part in parts)
        return sum(part[0] for part in parts), memory_at_start() + memory, sum(part[2] for part in parts)

    def _extract_from(
        self, config: ExtractConfig, training: _Training | None, subjects: Sequence[Subject]
    ) -> tuple[float, float, float]:
        backbone, device = config.backbone, resolve_device(config.device)
        if training is not None:
            backbone = replace(training.backbone, size=backbone.size or training.backbone.size)
        dtype = resolve_dtype(config.dtype, device)
        net = network(backbone, config.layers, dtype, device, True)
        folds: list[Any] = [None] if training is None else training.folds
        key = (backbone, config.layers, dtype, training)
        seconds = disk = 0.0
        new = [
            s
            for s in subjects
            if (training is None or s.name in training.subjects) and key not in self.features[s.name]
        ]
        for subject in new:
            n_images = len(subject.image_ids) * len(folds)
            seconds += n_images * (net.seconds + net.decode_seconds(subject.image_paths))
            disk += len(folds) * sum(stored_bytes(row, len(subject.image_ids)) for row in net.rows.values())
            self.features[subject.name][key] = _features(subject, net.rows, folds)
        loads = len(folds) * (len(new) if training is not None and training.config.stage == "finetune" else 1)
        memory = 2 * net.weights + config.batch_size * (net.widest + 5 * net.pixels)
        return seconds + loads * net.load, memory, disk

    def _fit(self, config: FitConfig, subjects: Sequence[Subject]) -> Costs:
        parts = []
        for subject in subjects:
            for key, of in self.features[subject.name].items():
                for read in of.reading(config.layers) if of.trained or config.solver != "trained" else ():
                    for one in config.variants():
                        model = (key, read.names, repr(one.key()))
                        if model not in self.models[subject.name]:
                            self.models[subject.name].add(model)
                            parts.append(_fit_costs(subject, read, one))
        memory = memory_at_start() + max((part[1] for part in parts), default=0.0)
        return sum(part[0] for part in parts), memory, sum(part[2] for part in parts)

    def _blend(self, config: BlendConfig, subjects: Sequence[Subject]) -> Costs:
        """On the disk, the files and the zip of them."""
        seconds = memory = disk = 0.0
        for subject in subjects:
            n, vertices = len(subject.train), sum(subject.n_vertices.values())
            disk += 2 * 4.0 * len(subject.test) * vertices
            if models := self.models[subject.name]:
                n_weights = len({key[0].name for key, *_ in models}) if config.by == "backbone" else len(models)
                seconds += blend_seconds(n, vertices, n_weights, config)
                # weights of every fold in float64, of the blend and of the best single model
                weights = 16.0 * N_FOLDS * vertices * len(models)
                memory = max(memory, bytes_of(n, subject.n_vertices, len(models)) + weights)
        return seconds, memory_at_start() + memory, disk


def _features(subject: Subject, rows: dict[str, Row], folds: Sequence[Any]) -> FeatureSet:
    """Features that are not there yet: arrays of their shape that take no memory."""
    n = len(subject.image_ids)
    arrays = {name: np.broadcast_to(np.zeros((), row.dtype), (n, *row.shape)) for name, row in rows.items()}
    stores: list[Any] = [
        SimpleNamespace(arrays=arrays, image_ids=subject.image_ids, recipe={"fold": fold}, chunk_rows=lambda name: 1)
        for fold in folds
    ]
    return FeatureSet(tuple(stores))


def _fit_costs(subject: Subject, of: FeatureSet, config: FitConfig) -> tuple[float, float, float]:
    """Seconds, bytes of memory besides the program's, and bytes on the disk, of one model of one subject."""
    n, n_all, vertices = len(subject.train), len(subject.image_ids), sum(subject.n_vertices.values())
    rows, device = LayerRows(of.stores[0], of.names, "cpu", 0), resolve_device(config.device)
    n_folds, solver = len(of.held_out()) if of.trained else config.n_folds, config.resolved_solver
    heads = 4.0 * rows.n_features * vertices * (n_folds if of.trained else 1)
    memory = whole_bytes(subject, of, rows.n_features, config)
    decomposed: dict[int, int] = {}
    if config.head == "spatial" or solver in ("adamw", "trained"):
        outputs = (config.spatial.space or vertices) * config.spatial.rank if config.head == "spatial" else vertices
        passes = 0 if solver == "trained" else 3 * config.adamw.epochs * (2 if config.head == "roi" else 1)
        flops = 2.0 * n_folds * rows.n_features * (passes * n * outputs + n_all * vertices)
    elif under_priors(of, config):
        dual = _dual(subject, of, rows, config)
        flops, decomposed = dual.effort(vertices)
        held = min(sum(map(rows.n_bytes, rows.grids)) * len(of.stores), free_memory() * FEATURE_SHARE)
        memory = 1.2 * (dual.peak_bytes(max(subject.n_vertices.values())) + held)
        heads = sum(map(dual.saved_bytes, subject.n_vertices.values()))
    else:
        sizes = (n, n_all - n), rows.n_features, tuple(subject.n_vertices.values()), n_folds
        flops, decomposed = effort_of(*sizes, config.ridge)
        flops += 10.0 * n_folds * config.moments.steps * min(n, rows.n_features) * vertices * (solver == "moments")
        fixed, per_vertex = memory_of(*sizes)
        memory = memory if of.trained else fixed + per_vertex * min(VERTEX_BLOCK, max(sizes[2]))
    seconds = product_seconds(flops, device) + sum(n * eigh_seconds(side, device) for side, n in decomposed.items())
    predicted = sum(stored_bytes(Row((n,)), n_all) for n in subject.n_vertices.values())
    return seconds, memory, heads + predicted


def _dual(subject: Subject, of: FeatureSet, rows: LayerRows, config: FitConfig) -> DualFolds:
    """The solver as it will be, on kernels that are not computed."""
    free, places = free_memory(), sum(map(rows.n_places, rows.grids))

    def stack(n_images: int) -> int:
        wanted = 4 * places * n_images**2
        return wanted if wanted <= free * STACK_SHARE / len(of.stores) else 0

    prepared = 4 * len(rows) * rows.n_features if stack(len(rows)) else 0
    kernels: Any = SimpleNamespace(
        rows=rows, n_train=len(subject.train), stack_bytes=stack(len(rows)) + prepared, stack_bytes_of=stack
    )
    folds = of.folds(subject, config.n_folds, config.seed)
    held_out = of.held_out() if of.trained else list(range(config.n_folds))
    return dual_of([kernels] * len(of.stores), subject, of, folds, held_out, config, free)
