"""Feature stores -> out-of-fold and test predictions, and the weights that made them."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save

from featcache.challenge import Subject
from featcache.config import fingerprint
from featcache.contents import image_digest, response_digest, subject_digests
from featcache.device import resolve_device
from featcache.errors import StoreError
from featcache.extract import FOLDER as FEATURES
from featcache.progress import bar, say
from featcache.roi import HEMISPHERES
from featcache.splits import assign_folds, check_folds, refuse_leak
from featcache.store import Store, create_store, list_stores, open_store, store_path
from heads.config import FitConfig
from heads.metrics import VertexScores, pearson_r
from heads.ridge import LinearMap, RidgeFolds
from heads.training import AdamWFolds

FOLDER = "predictions.zarr"
WEIGHTS = "heads"

# What belongs to a subject and not to a model: without these, recipes of one model agree across subjects.
_OF_A_SUBJECT = ("subject", "images", "image_ids", "responses", "noise_ceiling", "rois")


class FoldSolver(Protocol):
    """Fits heads on all folds but one, for each fold in turn."""

    vertex_block: int | None  # vertices it takes at a time; None: all at once

    def fit(self, responses: torch.Tensor, **about: Any) -> list[LinearMap]: ...


@dataclass(frozen=True)
class Fitted:
    """One subject's prediction store for one model."""

    subject: str
    model: str
    path: Path
    weights: Path
    new: bool
    seconds: float


def fit_heads(subjects: Sequence[Subject], config: FitConfig, work: Path) -> list[Fitted]:
    """Fit the heads that `config` names to every feature store of these subjects.

    Each gives a prediction store: out-of-fold predictions of the training images, then the test images' predictions,
    the mean over the folds' heads. Raises StoreError if there is nothing to fit to.
    """
    found = [(subject, feature_stores(subject, work)) for subject in subjects]
    if not any(stores for _, stores in found):
        raise StoreError(
            f"{work / FEATURES}: expected complete features of {', '.join(s.name for s in subjects)}; "
            "found none for the images of this tree; run 'extract' first"
        )
    return [_fit_store(subject, store, config, work) for subject, stores in found for store in stores]


def feature_stores(subject: Subject, work: Path) -> list[Store]:
    """The complete feature stores of the subject's images as they are now; the others are named and left out."""
    stores = own_stores(subject, work / FEATURES, "extract")
    digest = image_digest(subject, work) if stores else ""
    return keep(subject, stores, lambda store: "" if store.recipe["images"] == digest else "made from other images")


def own_stores(subject: Subject, folder: Path, command: str) -> list[Store]:
    """The subject's stores in a folder that are complete and have the rows of its images, in their order."""
    own = [store for store in list_stores(folder) if store.recipe["subject"] == subject.name]
    if not own:
        say(f"{subject.name}: nothing in {folder}; run '{command}'")
    complete = keep(subject, own, lambda store: "" if store.complete else f"not complete, run '{command}' again")
    return keep(
        subject,
        complete,
        lambda s: "" if np.array_equal(s.image_ids, subject.image_ids) else "its images have other ids",
    )


def keep(subject: Subject, stores: Sequence[Store], fault: Callable[[Store], str]) -> list[Store]:
    """The stores without a fault; the others are named with theirs."""
    faults = {store.name: fault(store) for store in stores}
    for name, why in faults.items():
        if why:
            say(f"{subject.name}: left out {name}: {why}")
    return [store for store in stores if not faults[store.name]]


def prediction_recipe(subject: Subject, features: Store, config: FitConfig, work: Path) -> dict[str, Any]:
    """Everything that decides the rows of a prediction store."""
    recipe = {"kind": "predictions", "subject": subject.name, "features": dict(features.recipe)}
    recipe["responses"] = response_digest(subject, work)
    if config.resolved_solver == "adamw":  # the closed form needs neither
        about = subject_digests(subject)
        recipe["noise_ceiling"] = about["noise_ceiling"]
        if config.head == "roi":
            recipe["rois"] = about["rois"]
    return recipe | config.recipe()


def model_name(recipe: dict[str, Any]) -> str:
    """The same for every subject: backbone, layers, size, head and objective in words, and a fingerprint."""
    features = {key: value for key, value in recipe["features"].items() if key not in _OF_A_SUBJECT}
    model = {key: value for key, value in recipe.items() if key not in _OF_A_SUBJECT} | {"features": features}
    layers, size = "+".join(features["layers"]), features["transform"]["input_size"][-1]
    words = f"{features['backbone']}@{size} {layers} {recipe['head']} {recipe['objective']}"
    return f"{words} {fingerprint(model)[:6]}"


def _fit_store(subject: Subject, features: Store, config: FitConfig, work: Path) -> Fitted:
    began = time.perf_counter()
    resolve_device(config.device)  # what cannot work is refused before a store is made for it
    check_folds(assign_folds(subject.train.ids, config.n_folds, config.seed), config.n_folds)
    recipe = prediction_recipe(subject, features, config, work)
    label = f"{subject.name}-{features.recipe['backbone']}-{config.head}-{config.objective}"
    path, name = store_path(work / FOLDER, label, recipe), model_name(recipe)
    weights = work / WEIGHTS / f"{path.name}.safetensors"
    store = open_store(path) if path.is_dir() else _create(work / FOLDER, label, recipe, subject, features, name)
    done = store.complete and weights.exists()
    if done:
        say(f"{subject.name}: already fitted, {path}")
    else:
        _fit(subject, features, store, config, weights)
    return Fitted(subject.name, name, path, weights, not done, time.perf_counter() - began)


def _create(folder: Path, label: str, recipe: dict[str, Any], subject: Subject, features: Store, name: str) -> Store:
    facts = {"model": name, "features": features.name, "torch": torch.__version__}
    return create_store(folder, label, recipe, subject.image_ids, len(subject.train), subject.n_vertices, facts)


def _fit(subject: Subject, features: Store, store: Store, config: FitConfig, weights: Path) -> None:
    device = resolve_device(config.device)
    folds = assign_folds(subject.train.ids, config.n_folds, config.seed)
    x = torch.cat([torch.from_numpy(features.read(layer)) for layer in features.arrays], 1).to(device)
    solver = _solver(x[: len(folds)], folds, subject.train.ids, config)
    tensors: dict[str, torch.Tensor] = {}
    n_vertices = sum(subject.n_vertices.values())
    with store.writing(), bar(f"{subject.name} {features.recipe['backbone']}", n_vertices, "vertices") as advance:
        for hemisphere in HEMISPHERES:
            predictions, head = cross_validate(solver, x, folds, subject, hemisphere, advance)
            tensors |= {f"{hemisphere}.weights": head.weights, f"{hemisphere}.intercept": head.intercept}
            _append(store, hemisphere, predictions)
        _save_weights(tensors, weights, store)


def _solver(features: torch.Tensor, folds: np.ndarray, image_ids: np.ndarray, config: FitConfig) -> FoldSolver:
    if config.resolved_solver == "exact":
        return RidgeFolds(features, folds, config.ridge)
    return AdamWFolds(features, folds, image_ids, config)


def cross_validate(
    solver: FoldSolver,
    features: torch.Tensor,
    folds: np.ndarray,
    subject: Subject,
    hemisphere: str,
    advance: Callable[[int], None],
) -> tuple[np.ndarray, LinearMap]:
    """Predictions (n_train + n_test, n_vertices) float32 of one hemisphere, and the mean of the folds' heads.

    Training rows are predicted by the head that did not see their fold; test rows by the mean head, which for linear
    maps is the mean of the heads' predictions.

    features : (n_train + n_test, n_features) float32; folds : (n_train,)
    """
    n_train = len(folds)
    refuse_leak(subject.train.ids, subject.test.ids, f"the test split of {subject.name}")
    for fold in range(folds.max() + 1):
        refuse_leak(
            subject.train.ids[folds != fold], subject.train.ids[folds == fold], f"fold {fold} of {subject.name}"
        )
    responses, ceiling = subject.responses(hemisphere), subject.noise_ceiling[hemisphere]
    n_vertices = responses.shape[1]
    predictions = np.empty((len(features), n_vertices), dtype=np.float32)
    mean = LinearMap(torch.empty(features.shape[1], n_vertices), torch.empty(n_vertices))
    trained = [_Trained(features[:n_train][folds != fold]) for fold in range(folds.max() + 1)]
    step = solver.vertex_block or max(n_vertices, 1)
    for block in (slice(start, min(start + step, n_vertices)) for start in range(0, n_vertices, step)):
        y = torch.from_numpy(np.array(responses[:, block], dtype=np.float32)).to(features.device)
        maps = solver.fit(y, noise_ceiling=ceiling, rois=tuple(subject.rois[hemisphere].values()))
        for fold, head in enumerate(comparable(maps, trained, y.mean(0))):
            held_out = np.flatnonzero(folds == fold)
            predictions[held_out, block] = head(features[held_out]).cpu().numpy()
        average = LinearMap(*(torch.stack(parts).mean(0) for parts in zip(*maps, strict=True)))
        predictions[n_train:, block] = average(features[n_train:]).cpu().numpy()
        mean.weights[:, block], mean.intercept[block] = average.weights.cpu(), average.intercept.cpu()
        advance(block.stop - block.start)
    return predictions, mean


class _Trained:
    """The features that a fold's head was trained on, as far as the spread of its predictions needs them."""

    def __init__(self, features: torch.Tensor) -> None:
        self.mean, self._n_images = features.mean(0), len(features)
        centred = features - self.mean
        self._tall = len(features) > features.shape[1]
        self._factor = centred.T @ centred if self._tall else centred

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """(n_vertices,) standard deviation of the predictions; 1 where they are constant."""
        product = self._factor @ weights
        squares = (weights * product).sum(0) if self._tall else product.square().sum(0)
        return torch.where(squares > 0, squares / self._n_images, 1).sqrt()


def comparable(maps: Sequence[LinearMap], trained: Sequence[_Trained], level: torch.Tensor) -> list[LinearMap]:
    """The folds' heads, with the mean and spread of their predictions of what they were trained on made equal.

    Heads of different folds differ in level and scale: a fold whose responses happen to be high leaves a low mean to
    the head trained without it, and each takes its own penalty. Pooled over folds, these steps give predictions of
    noise a correlation below 0 and take some from every real one. Level and spread are set to one number a vertex, on
    which no r depends, from nothing but the images that the head saw.

    level : (n_vertices,) mean response
    """
    spreads = torch.stack([rows.spread(head.weights) for rows, head in zip(trained, maps, strict=True)])
    weights = [head.weights * scale for head, scale in zip(maps, spreads.mean(0) / spreads, strict=True)]
    return [LinearMap(w, level - rows.mean @ w) for w, rows in zip(weights, trained, strict=True)]


def _append(store: Store, hemisphere: str, predictions: np.ndarray) -> None:
    """Write what an earlier run did not; an interrupted one left whole chunks of the same numbers."""
    step = store.chunk_rows(hemisphere)
    for start in range(store.committed[hemisphere], len(predictions), step):
        store.append({hemisphere: predictions[start : start + step]})


def _save_weights(tensors: dict[str, torch.Tensor], path: Path, store: Store) -> None:
    """safetensors: {lh,rh}.weights (n_features, n_vertices) and {lh,rh}.intercept (n_vertices,), means over folds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"model": store.facts["model"], "predictions": store.name, "features": store.facts["features"]}
    # safetensors' own writer reports a full disk as an error of its own kind
    partial.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
    partial.replace(path)


def scores_by_model(subjects: Sequence[Subject], fitted: Sequence[Fitted]) -> dict[str, list[VertexScores]]:
    """{model: out-of-fold scores of each subject and hemisphere}, with the subjects' ceilings and ROIs."""
    by_name = {subject.name: subject for subject in subjects}
    scores: dict[str, list[VertexScores]] = {}
    for one in fitted:
        store = open_store(one.path)
        for hemisphere in HEMISPHERES:
            predictions = store.read(hemisphere, 0, store.n_train)
            scores.setdefault(one.model, []).append(score(by_name[one.subject], hemisphere, predictions))
    return scores


def score(subject: Subject, hemisphere: str, predictions: np.ndarray) -> VertexScores:
    """r of predictions (n_train, n_vertices) of the training images, with the subject's ceilings and ROIs."""
    r = pearson_r(predictions, subject.responses(hemisphere))
    return VertexScores(subject.name, hemisphere, r, subject.noise_ceiling[hemisphere], subject.rois[hemisphere])
