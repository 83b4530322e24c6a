"""Planted responses and features of a subject, frozen or trained once per fold, and what a solver is built from."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.cache.store import Row, Store, create_store
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject
from heads.config import FitConfig
from heads.features.sets import FeatureSet
from heads.solvers.base import Problem
from heads.solvers.held_out import FoldPlan
from support.checkpoints import N_FOLDS, write_checkpoint
from support.keys import feature_key, training_of

N_VERTICES = {"lh": 5, "rh": 4}
VECTOR = {"pooled": (6,)}
LAYERS = {"pooled": (6,), "low": (3, 3, 4)}


def planted_features(n_images: int, shapes: Mapping[str, tuple[int, ...]], fold: int = 0) -> dict[str, np.ndarray]:
    """{array: (n_images, ...)}; those of every fold have most in common."""
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        common = np.random.default_rng(number).normal(size=(n_images, *shape))
        own = np.random.default_rng([number, fold]).normal(size=common.shape)
        found[name] = (common + 0.3 * own + 1).astype(np.float16 if len(shape) > 1 else np.float32)
    return found


def planted_responses(n_train: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{surface: (n_train, n_vertices)}, linear in what features of all folds have in common."""
    rng = np.random.default_rng(7)
    flat = np.concatenate(
        [
            np.random.default_rng(number).normal(size=(n_train, *shape)).reshape(n_train, -1)
            for number, shape in enumerate(shapes.values())
        ],
        1,
    )
    found = {}
    for surface, n_vertices in N_VERTICES.items():
        signal = flat @ rng.normal(size=(flat.shape[1], n_vertices)) / np.sqrt(flat.shape[1])
        found[surface] = (3 + signal + 0.3 * rng.normal(size=signal.shape)).astype(np.float32)
    return found


def responding(subject: Subject, responses: Mapping[str, np.ndarray], folder: Path) -> Subject:
    """The subject with other responses, and with ROIs and ceilings of their vertices."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {surface: folder / f"{surface}.npy" for surface in responses}
    for surface, values in responses.items():
        np.save(paths[surface], values)
    sizes = {surface: values.shape[1] for surface, values in responses.items()}
    return replace(
        subject,
        response_paths=paths,
        n_vertices=sizes,
        rois={surface: {"early": np.arange(n) < 2, "none": np.zeros(n, bool)} for surface, n in sizes.items()},
        noise_ceiling={surface: np.linspace(0, 1, n, dtype=np.float32) for surface, n in sizes.items()},
        fsaverage=dict.fromkeys(sizes),
    )


def trained_heads(subject: Subject, shapes: Mapping[str, tuple[int, ...]], fold: int) -> dict[str, torch.Tensor]:
    """Linear heads on the pooled vector, as a checkpoint keeps them."""
    generator, heads = torch.Generator().manual_seed(fold), {}
    for surface, n_vertices in subject.n_vertices.items():
        heads[f"{subject.name}.{surface}.weights"] = torch.randn(*shapes["pooled"], n_vertices, generator=generator)
        heads[f"{subject.name}.{surface}.intercept"] = torch.randn(n_vertices, generator=generator)
    return heads


def features_of(
    subject: Subject,
    work: Path,
    shapes: Mapping[str, tuple[int, ...]] = VECTOR,
    *,
    trained: bool = False,
    checkpoints: bool = False,
) -> FeatureSet:
    """Features of a frozen backbone, or of one that was trained without each fold, with their checkpoints if wanted."""
    if not trained:
        return FeatureSet((_store(subject, work, shapes, None, {}),))
    stores = []
    for fold in range(N_FOLDS):
        facts = {"seen_ids": subject.train.ids[assign_folds(subject.train.ids, N_FOLDS, 0) != fold].tolist()}
        if checkpoints:
            heads = trained_heads(subject, shapes, fold)
            facts["checkpoint"] = write_checkpoint([subject], work, fold, heads=heads).name
        stores.append(_store(subject, work, shapes, fold, facts))
    return FeatureSet(tuple(stores))


def _store(
    subject: Subject, work: Path, shapes: Mapping[str, tuple[int, ...]], fold: int | None, facts: dict[str, Any]
) -> Store:
    values = planted_features(len(subject.image_ids), shapes, fold or 0)
    training = None if fold is None else training_of(fold, stage="finetune", n_folds=N_FOLDS)
    key = feature_key(subject.name, weights=f"w{fold}", layers=list(shapes), fold=training)
    rows = {name: Row(one.shape[1:], str(one.dtype)) for name, one in values.items()}
    store = create_store(work / "features.zarr", "f", key, subject.image_ids, len(subject.train), rows, facts)
    store.append(values)
    return store


def problem_of(subject: Subject, features: FeatureSet, config: FitConfig, work: Path, **about: Any) -> Problem:
    """What `fit-heads` would build a solver from."""
    plan = FoldPlan.of_features(subject, features, config.n_folds, config.seed)
    return Problem(subject=subject, features=features, plan=plan, config=config, work=work, **about)
