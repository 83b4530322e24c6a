"""The parts of an encoder in a work folder: feature stores say which network, heads and the last blend are files."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from featcache.backbone.checkpoint import find_checkpoint
from featcache.backbone.extent import fit_of, size_of
from featcache.backbone.network import TorchBackbone
from featcache.cache.keys import FeatureFacts, FeatureKey
from featcache.cache.store import Store, open_store
from featcache.config import BackboneConfig, fingerprint
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, StoreError
from featcache.machine.folders import read_unchanged
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.blend.models import Model, choose_names, names_of, usable_models
from heads.blend.saved import BLEND, SavedBlend, load_blend, refuse_strangers
from heads.encoder.encoder import Encoder
from heads.encoder.networks import as_it_read, load_network, renamed
from heads.encoder.parts import FeaturePart, ModelPart, Parts, SubjectPart
from heads.modules.readout import HeadTensors, InFile

# what the words of a store's origin say of --weights, for stores that have no better fact
_ORIGINS = {"packaged in": "packaged", "random weights": "none"}


def encoder_of_work(
    subjects: Sequence[Subject],
    work: Path | str,
    model: str | None = None,
    network: BackboneConfig | None = None,
    device: str = "auto",
) -> Encoder:
    """The encoder that a work folder holds: the last blend, or one model.

    model : name of a model, or the six digits that end it; None: the last blend, or the only model
    network : what a network is called now, where its file or weights were moved

    Raises StoreError or ConfigError where there is nothing to predict with.
    """
    models, blend, names = models_to_use(subjects, Path(work), model)
    return Encoder(*parts_of_work(models, Path(work), blend, names, network), device)


def models_to_use(
    subjects: Sequence[Subject], work: Path, model: str | None
) -> tuple[dict[Subject, list[Model]], SavedBlend, set[str] | None]:
    """The models of each subject, the blend, and the names of the models to use without one; None for all.

    model : as of `encoder_of_work`

    Raises StoreError or ConfigError where there is nothing to predict with.
    """
    return read_unchanged(Workdir(work).submission, lambda: _models_to_use(subjects, work, model))


def _models_to_use(
    subjects: Sequence[Subject], work: Path, model: str | None
) -> tuple[dict[Subject, list[Model]], SavedBlend, set[str] | None]:
    path = Workdir(work).saved_blend
    blend = load_blend(path) if model in (None, BLEND) and path.is_file() else {}
    if model == BLEND and not blend:
        raise StoreError(path, expected="a blend", found="none", remedy="run 'blend' first")
    if blend:
        subjects = _those("the last blend", subjects, [one for one in subjects if one.name in blend], path, "blend")
    stored = {subject: usable_models(subject, work) for subject in subjects}
    some: Sequence[Subject] = [subject for subject, of_subject in stored.items() if of_subject]
    there = _those("predictions", subjects, some, Workdir(work).predictions, "extract' and 'fit-heads")
    models = {subject: stored[subject] for subject in there}
    if blend:
        refuse_strangers(path, blend, models)
        return models, {subject.name: blend[subject.name] for subject in models}, None
    return models, {}, None if model is None else choose_names(names_of(models), model)


def _those(
    what: str, asked: Sequence[Subject], found: Sequence[Subject], where: Path, command: str
) -> Sequence[Subject]:
    """The subjects that have something; the others are named. Raises StoreError where none has."""
    without = ", ".join(subject.name for subject in asked if subject not in found)
    if not found:
        raise StoreError(where, expected=f"{what} of {without}", found="none", remedy=f"run '{command}' first")
    if without:
        say(f"without {without}: not in {what}; run '{command}' for them, or leave them out with --subject")
    return found


def parts_of_work(
    models: Mapping[Subject, Sequence[Model]],
    work: Path,
    blend: SavedBlend,
    names: set[str] | None = None,
    network: BackboneConfig | None = None,
) -> "tuple[Parts, WorkTensors]":
    """The parts of a blend, or of the models of these names, and where their tensors are. names : None for all"""
    parts: dict[str, FeaturePart] = {}
    subjects: dict[str, SubjectPart] = {}
    checkpoints: dict[str, str] = {}
    for subject, of_subject in models.items():
        used = _used(of_subject, blend.get(subject.name, {}), names)
        described = {}
        for model in used:
            stores = [_feature_store(work, name, model) for name in model.facts.features.split("+")]
            arrays = tuple(model.key.features.get("read") or stores[0].arrays)
            named = [_part(store, network) for store in stores]
            parts |= {name: part for name, part, _ in named}
            checkpoints |= {part.key.weights: checkpoint for _, part, checkpoint in named if checkpoint}
            described[model.name] = ModelPart(
                name=model.name,
                features=tuple(name for name, _, _ in named),
                arrays=arrays,
                head=model.key.head,
                precision=str((model.key.settings or {}).get("precision", "float32")),
                products=model.key.products or "float32",
                predictions=model.store.name,
            )
        subjects[subject.name] = SubjectPart(
            name=subject.name,
            n_vertices=subject.n_vertices,
            models=described,
            rois=subject.rois,
            noise_ceiling=subject.noise_ceiling,
            blend=blend.get(subject.name, {}) if names is None else {},
        )
    return Parts(origin=work, features=parts, subjects=subjects), WorkTensors(work, checkpoints)


class WorkTensors:
    """Tensors in a work folder. checkpoints : {digest of the weights of a network: the checkpoint that has them}"""

    def __init__(self, work: Path, checkpoints: Mapping[str, str]) -> None:
        self._work, self._checkpoints = work, checkpoints

    def network(self, part: FeaturePart, device: str) -> TorchBackbone:
        """The network of some features, of its checkpoint or as its weights came. Raises FeatcacheError."""
        name = self._checkpoints.get(part.key.weights)
        if name is None:
            return load_network(part, part.weights, device)
        own, transform = "own" in part.key.transform, part.key.transform
        size, fit = (None, None) if own else (size_of(transform), fit_of(transform))
        return as_it_read(part, find_checkpoint(self._work, name).backbone(device, size, fit, part.network))

    def heads(self, model: ModelPart) -> HeadTensors:
        """The heads of a model. Raises StoreError for a file that is missing or damaged."""
        return InFile(Workdir(self._work).head_weights(model.predictions), model.predictions)

    def copy_heads(self, model: ModelPart, path: Path) -> None:
        """Copy the file of a model's heads."""
        self.heads(model)
        shutil.copyfile(Workdir(self._work).head_weights(model.predictions), path)


def part_name(part: FeaturePart) -> str:
    """Name of some features, the same for every subject whose images the same network read in the same way."""
    taps = {"layers": part.key.layers, "grids": {name: list(grid) for name, grid in part.key.grids.items()}}
    rows = {name: [list(shape), dtype] for name, (shape, dtype) in part.rows.items()}
    decisive = {"network": part.network_id, "pool": part.key.pool, "rows": rows} | taps
    return f"{part.key.backbone}-{fingerprint(decisive)}"


def _part(store: Store, network: BackboneConfig | None) -> tuple[str, FeaturePart, str]:
    """Name and description of some features, and the name of their checkpoint, if there is one."""
    key, facts = FeatureKey.of(store), FeatureFacts.from_json(store.facts)
    if not key.transform:
        raise ConfigError(
            f"features {key.backbone}",
            expected="features of a network, which can read new images",
            found="features that were made elsewhere",
            remedy=f"choose another model with --model, or blend with --exclude '*{key.backbone}*'",
        )
    guessed = next((weights for words, weights in _ORIGINS.items() if (facts.origin or "").startswith(words)), "hub")
    called, weights = renamed(facts.network or key.backbone, facts.weights or facts.checkpoint, network)
    rows = {name: (tuple(array.shape[1:]), str(array.dtype)) for name, array in store.arrays.items()}
    key = replace(key, subject="", images="", image_ids="")
    part = FeaturePart(key=key, network=called, weights=weights or guessed, rows=rows)
    return part_name(part), part, facts.checkpoint or ""


def _feature_store(work: Path, name: str, model: Model) -> Store:
    path = Workdir(work).features / name
    if not path.is_dir():
        raise StoreError(
            path,
            expected=f"the features that {model.name} was fitted to, which say how images are read",
            found="no such store",
            remedy="run 'extract' again with the same settings",
        )
    return open_store(path)


def _used(models: Sequence[Model], blend: Mapping[str, object], names: set[str] | None) -> list[Model]:
    """The models that are named or, of a blend, those that it needs."""
    if names is not None:
        return [model for model in models if model.name in names]
    if not blend:
        return list(models)
    needed = {name for coefficients in blend.values() for name in coefficients.needed}  # type: ignore[attr-defined]
    return [model for model in models if model.name in needed]
