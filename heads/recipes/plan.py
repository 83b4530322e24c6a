"""Memory and disk that the steps of a recipe are expected to take, before any of them runs.

All of it is arithmetic on counts. Counts come from the dataset, or from the step that will simulate it, and from
outlines of the networks; nothing is read, loaded or measured. The work folder is taken to be empty (docs/recipes.md
says what is left out, and how near the figures came).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featcache.backbone.outline import Outline, outline
from featcache.backbone.sources.table import check_backbone
from featcache.cache.elsewhere import read_made
from featcache.cache.sources import stored_rows
from featcache.cache.store import stored_bytes
from featcache.config import BackboneConfig, ExtractConfig, MadeConfig, split_name
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.files import read_material
from featcache.dataset.open import open_dataset, scan_dataset
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Subject, names_in
from featcache.errors import ConfigError, FeatcacheError
from featcache.machine.device import check_products, network_dtype, resolve_device
from featcache.machine.memory import memory_at_start
from featcache.simulate import SimulateConfig
from featcache.workdir import WORK, Workdir, data_folder
from heads.backbones.accelerator import resolve_precision
from heads.backbones.memory import device_memory
from heads.blend.products import N_FOLDS, bytes_of
from heads.config import BlendConfig, FitConfig, StageConfig
from heads.features.sets import matches, models_of, stage_words, title_of, without_digits
from heads.fit.sizes import Features, FitSizes, fit_memory, prediction_bytes, saved_bytes
from heads.recipes.steps import Ready, Step, located


@dataclass(frozen=True)
class Estimate:
    """What one step is expected to take, in bytes; None where it is not estimated.

    memory : main memory of the process at its peak
    disk : files that the step adds
    device : memory of a CUDA device at its peak; None on a CPU as well
    """

    step: Step
    memory: float | None = None
    disk: float | None = None
    device: float | None = None


@dataclass(frozen=True)
class Counts:
    """What is counted of one subject. n_vertices : of each surface"""

    name: str
    n_train: int
    n_test: int
    n_vertices: Mapping[str, int]

    @classmethod
    def of(cls, subject: Subject) -> "Counts":
        """The counts of a subject whose files are there."""
        return cls(subject.name, len(subject.train), len(subject.test), subject.n_vertices)

    @property
    def n_images(self) -> int:
        return self.n_train + self.n_test

    @property
    def n_all_vertices(self) -> int:
        return sum(self.n_vertices.values())


def subjects_of(steps: Sequence[Ready]) -> list[list[Counts]]:
    """The subjects of each step, as they are or as an earlier step will simulate them.

    Raises what the step itself would raise for a dataset, a subject, a backbone or a device that is not there.
    """
    trees: dict[Any, list[Counts]] = {}
    subjects = []
    for ready in steps:
        try:
            subjects.append(_subjects(ready, trees))
            _check(ready.job.config)
        except FeatcacheError as error:
            raise located(error, ready.step) from error
    return subjects


def _subjects(ready: Ready, trees: dict[Any, list[Counts]]) -> list[Counts]:
    config, work = ready.job.config, ready.options.get("work", WORK)
    if isinstance(config, ImportConfig):
        _add_imported(config, Workdir(work).dataset, trees)
        return []
    if "data" not in ready.options:
        return []
    data, ceiling = _data_folder(ready.options["data"], work, trees), ready.options.get("noise_ceiling")
    if isinstance(config, SimulateConfig):
        if not data.is_dir():
            trees[data] = simulated(config)
        return []
    if data not in trees and not data.is_dir():
        raise ConfigError(
            "--data",
            expected="a dataset",
            found=f"no folder {data}",
            remedy="name one, or add a step that imports or simulates it",
        )
    if ready.step.command == "check":  # it lists faults, where opening would end at the first
        return []
    key = data if data in trees else (data, ceiling)
    if key not in trees:
        trees[key] = [Counts.of(subject) for subject in open_dataset(data, ceiling).subjects]
    by_name = {counts.name: counts for counts in trees[key]}
    return [by_name[name] for name in names_in(ready.options.get("subject", "all"), list(by_name))]


def _data_folder(data: Path | None, work: Path, trees: Mapping[Any, Any]) -> Path:
    """The folder that a step will read: an imported one, too, that an earlier step will write."""
    imported = Workdir(work).dataset
    return imported if data is None and imported in trees else data_folder(data, work)


def _add_imported(config: ImportConfig, root: Path, trees: dict[Any, list[Counts]]) -> None:
    """Add the counts of a subject that is not imported yet to those of its folder.

    Pictures are counted by name. The same picture under two names is one in the end.
    """
    others = trees.get(root)
    if others is None:
        there = scan_dataset(root)[0].subjects if root.is_dir() else ()
        others = [Counts.of(subject) for subject in there]
    material = read_material(config)
    n_test = int(material.stimuli.test.sum())
    counts = Counts(
        material.name,
        len(material.stimuli.sources) - n_test,
        n_test,
        {surface: recording.trials.shape[1] for surface, recording in material.recordings.items()},
    )
    trees[root] = [*(one for one in others if one.name != counts.name), counts]


def _check(config: Any) -> None:
    if isinstance(config, (StageConfig, ExtractConfig)):
        check_backbone(config.backbone)
    if (setting := getattr(config, "device", None)) is None:
        return
    device = resolve_device(setting)
    if isinstance(config, StageConfig):
        resolve_precision(config.train.precision, device)
    for option in ("dtype", "products"):
        check_products(option, getattr(config, option, ""), device)


def simulated(config: SimulateConfig) -> list[Counts]:
    """The counts of a tree that is not written yet."""
    return [
        Counts(
            f"subj{number:02d}",
            config.train_count(number),
            config.test_count(number),
            {h: n - config.n_deleted(number, h) for h, n in zip(HEMISPHERES, config.n_vertices, strict=True)},
        )
        for number in config.subjects
    ]


def estimates_of(steps: Sequence[Ready], subjects: Sequence[Sequence[Counts]]) -> list[Estimate]:
    """What each step is expected to take, after those before it."""
    memory_at_start()
    works: dict[Path, _Work] = defaultdict(_Work)
    estimates = []
    for ready, counts in zip(steps, subjects, strict=True):
        work = works[ready.options.get("work", Path())]
        try:
            estimates.append(Estimate(ready.step, *work.estimate(ready.job.config, counts)))
        except FeatcacheError as error:
            raise located(error, ready.step) from error
    return estimates


@dataclass(frozen=True)
class _Training:
    """Checkpoints of one training: one for each fold, of all its subjects together or of each of them."""

    config: StageConfig
    backbone: BackboneConfig
    subjects: tuple[str, ...]

    @property
    def held_out(self) -> list[int]:
        """The folds that are held out, in turn."""
        return list(range(self.config.n_folds)) if self.config.fold is None else [self.config.fold]

    def n_networks(self, subjects: Sequence[Counts]) -> int:
        """Networks that are trained, one after the other."""
        return len(self.held_out) * (1 if self.config.stage == "pretrain" else len(subjects))


Bytes = tuple[float | None, ...]  # of memory, of disk and, on CUDA, of the device's memory


@dataclass
class _Work:
    """What the steps so far will have left in one work folder.

    features : {subject: {what tells them apart: features}}
    models : {subject: what tells its models apart}
    pixels : {(subject, backbone, size, fit): bytes of decoded images}
    decoded : those of these bytes that were counted
    """

    trainings: list[_Training] = field(default_factory=list)
    features: dict[str, dict[Any, Features]] = field(default_factory=lambda: defaultdict(dict))
    models: dict[str, set[Any]] = field(default_factory=lambda: defaultdict(set))
    pixels: dict[Any, float] = field(default_factory=dict)
    decoded: float = 0.0

    def estimate(self, config: Any, subjects: Sequence[Counts]) -> Bytes:
        """Memory and disk of a step with these settings; None for a step that is not estimated."""
        match config:
            case StageConfig():
                return self._train(config, subjects)
            case ExtractConfig():
                return self._extract(config, subjects)
            case MadeConfig():
                return self._add(config, subjects)
            case FitConfig():
                return self._fit(config, subjects)
            case BlendConfig():
                return self._blend(subjects)
        return None, None

    def _train(self, config: StageConfig, subjects: Sequence[Counts]) -> Bytes:
        training = _Training(config, self._start(config), tuple(counts.name for counts in subjects))
        if training in self.trainings:
            return 0.0, 0.0
        self.trainings.append(training)
        backbone, train = training.backbone, config.train
        device = resolve_device(config.device)
        train = replace(train, precision=resolve_precision(train.precision, device))
        network = outline(backbone, train.tapped, train.precision)
        for counts in subjects:
            self._decode(counts, backbone, network)
        n_vertices = max(counts.n_all_vertices for counts in subjects)
        n_outputs = n_vertices * (1 if config.stage == "pretrain" else 2)  # stage 2 also has heads of ROIs
        trained = network.weights + 4.0 * network.n_features * n_outputs
        # of all heads of a vertex, their mean is written
        written = network.weights + 4.0 * network.n_features * n_vertices
        disk = training.n_networks(subjects) * written + self._new_pixels(config)
        if device == "cuda":
            # the start, and the copies of weights and state that are written
            memory = network.weights + (4 + bool(train.ema)) * trained
            return memory_at_start() + memory, disk, device_memory(network, trained, n_outputs, train)
        # the start, the network, its gradient and both moments; what layers keep for the way back
        return memory_at_start() + 5 * trained + train.batch_size * network.kept, disk

    def _start(self, config: StageConfig) -> BackboneConfig:
        """The network that is trained: that of the stage before, if stage 2 follows it."""
        before = [
            training.backbone
            for training in self.trainings
            if training.config.stage == "pretrain" and config.backbone.admits(training.backbone.label)
        ]
        follows = config.stage == "finetune" and config.init == "stage1" and before
        start = before[-1] if follows else config.backbone
        return config.backbone.applied_to(start)

    def _decode(self, counts: Counts, backbone: BackboneConfig, network: Outline) -> None:
        key = counts.name, backbone.label, backbone.size, backbone.resolved_fit
        self.pixels[key] = float(counts.n_images * network.pixels)

    def _new_pixels(self, config: StageConfig | ExtractConfig) -> float:
        """Bytes of decoded images that are not counted yet; a full folder is cleared for others."""
        before, now = self.decoded, min(sum(self.pixels.values()), config.image_cache * 1e9)
        self.decoded = max(before, now)
        return self.decoded - before

    def _extract(self, config: ExtractConfig, subjects: Sequence[Counts]) -> Bytes:
        names = {counts.name for counts in subjects}
        trainings: list[_Training | None] = [
            training
            for training in self.trainings
            if config.checkpoint == "auto"
            and config.backbone.admits(training.backbone.label)
            and names & set(training.subjects)
        ]
        parts = [self._extract_from(config, training, subjects) for training in trainings or [None]]
        return memory_at_start() + max(memory for memory, _ in parts), sum(disk for _, disk in parts)

    def _extract_from(
        self, config: ExtractConfig, training: _Training | None, subjects: Sequence[Counts]
    ) -> tuple[float, float]:
        backbone = config.backbone if training is None else config.backbone.applied_to(training.backbone)
        dtype = network_dtype(config.dtype, resolve_device(config.device))
        network = outline(backbone, config.layers, dtype)
        features = _features(network, backbone, training)
        key = (backbone, config.layers, dtype, training)
        disk = 0.0
        for counts in subjects:
            if (training is None or counts.name in training.subjects) and key not in self.features[counts.name]:
                if config.image_cache:
                    self._decode(counts, backbone, network)
                self.features[counts.name][key] = features
                rows = sum(stored_bytes(row, counts.n_images) for row in features.rows.values())
                disk += features.n_stores * rows
        if config.prune and training is not None and training.config.stage == "finetune":
            disk -= network.weights * training.n_networks([c for c in subjects if c.name in training.subjects])
        memory = 2.0 * network.weights + config.batch_size * (network.widest + 5 * network.pixels)
        return memory, disk + (self._new_pixels(config) if config.image_cache else 0.0)

    def _add(self, config: MadeConfig, subjects: Sequence[Counts]) -> Bytes:
        made = read_made(config.features, config.ids)
        features = Features(stored_rows(made.shapes), (), 0, config.name)
        disk = 0.0
        for counts in subjects:
            if (made.digest, config.name) not in self.features[counts.name]:
                self.features[counts.name][made.digest, config.name] = features
                disk += sum(stored_bytes(row, counts.n_images) for row in features.rows.values())
        return memory_at_start(), disk

    def _fit(self, config: FitConfig, subjects: Sequence[Counts]) -> Bytes:
        memory, disk = [0.0], 0.0
        for counts in subjects:
            for key, features in self.features[counts.name].items():
                if not matches(features.title, without_digits(config.features)):
                    continue
                for arrays in models_of(list(features.rows), config.layers):
                    for variant in config.variants():
                        if not features.backbone_trained and not variant.solver_spec.fits:
                            continue  # no heads were trained with a frozen backbone
                        model = (key, arrays, repr(variant.key()), variant.split)
                        if model not in self.models[counts.name]:
                            self.models[counts.name].add(model)
                            sizes = _fit_sizes(counts, features.reading(arrays), variant)
                            memory.append(fit_memory(sizes, variant))
                            disk += saved_bytes(sizes, variant)
                            disk += prediction_bytes(sizes, counts.n_train // sizes.n_folds, variant.dtype)
        return memory_at_start() + max(memory), disk

    def _blend(self, subjects: Sequence[Counts]) -> Bytes:
        """On the disk there are the files, and the zip of them."""
        memory = disk = 0.0
        for counts in subjects:
            disk += 2 * 4.0 * counts.n_test * counts.n_all_vertices
            if n_models := len(self.models[counts.name]):
                # weights of every fold in float64, of the blend and of the best single model
                weights = 16.0 * N_FOLDS * counts.n_all_vertices * n_models
                memory = max(memory, bytes_of(counts.n_train, counts.n_vertices, n_models) + weights)
        return memory_at_start() + memory, disk


def _features(network: Outline, backbone: BackboneConfig, training: _Training | None) -> Features:
    held_out: tuple[int, ...] = ()
    n_folds, stage = 0, ""
    if training is not None:
        held_out, n_folds = tuple(training.held_out), training.config.n_folds
        stage = stage_words(training.config.stage, split_name(training.config.split))
    title = title_of(backbone.label, network.size, backbone.resolved_fit, stage)
    return Features(stored_rows(network.shapes), held_out, n_folds, title)


def _fit_sizes(counts: Counts, features: Features, config: FitConfig) -> FitSizes:
    return FitSizes(
        n_train=counts.n_train,
        n_test=counts.n_test,
        n_vertices=tuple(counts.n_vertices.values()),
        n_held_out=features.n_stores if features.backbone_trained else config.n_folds,
        n_folds=features.n_folds if features.backbone_trained else config.n_folds,
        features=features,
    )
