"""Feature stores -> out-of-fold and test predictions, and the weights that made them."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from featcache.challenge import Subject
from featcache.checkpoint import find_checkpoint
from featcache.config import fingerprint
from featcache.contents import response_digest, subject_digests
from featcache.device import resolve_device
from featcache.errors import ConfigError, StoreError
from featcache.extract import FOLDER as FEATURES
from featcache.progress import bar, say
from featcache.roi import HEMISPHERES
from featcache.splits import check_folds, refuse_leak
from featcache.store import Store, create_store, open_store, store_path
from heads.config import FitConfig
from heads.encoder import linear_map_of
from heads.features import FeatureSet, feature_sets
from heads.folds import FoldHeads, FoldSolver, FrozenFolds, TrainedFolds, TunedAdamW, TunedRidge
from heads.metrics import VertexScores, pearson_r
from heads.ridge import LinearMap, RidgeFolds
from heads.training import AdamWFolds

FOLDER = "predictions.zarr"
WEIGHTS = "heads"

# What belongs to a subject and not to a model: without these, recipes of one model agree across subjects.
_OF_A_SUBJECT = ("subject", "images", "image_ids", "responses", "noise_ceiling", "rois")


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
    """Fit the heads that `config` names to every set of features of these subjects.

    Each gives a prediction store: out-of-fold predictions of the training images, then the test images' predictions,
    the mean over the folds' heads. Raises StoreError if there is nothing to fit to.
    """
    found = [(subject, _suitable(feature_sets(subject, work), subject, config)) for subject in subjects]
    if not any(sets for _, sets in found):
        raise StoreError(
            f"{work / FEATURES}: expected complete features of {', '.join(s.name for s in subjects)}; "
            f"found none for the images of this tree{_TRAINED if config.solver == 'trained' else ''}; "
            "run 'extract' first"
        )
    return [_fit_set(subject, one, config, work) for subject, sets in found for one in sets]


_TRAINED = " from a checkpoint with heads"


def _suitable(sets: Sequence[FeatureSet], subject: Subject, config: FitConfig) -> list[FeatureSet]:
    if config.solver != "trained":
        return list(sets)
    for one in sets:
        if not one.trained:
            say(f"{subject.name}: left out {one.name}: no heads were trained with a frozen backbone")
    return [one for one in sets if one.trained]


def prediction_recipe(subject: Subject, features: FeatureSet, config: FitConfig, work: Path) -> dict[str, Any]:
    """Everything that decides the rows of a prediction store."""
    recipe = {"kind": "predictions", "subject": subject.name, "features": features.recipe()}
    recipe["responses"] = response_digest(subject, work)
    if config.resolved_solver == "adamw":  # the closed form needs neither
        about = subject_digests(subject)
        recipe["noise_ceiling"] = about["noise_ceiling"]
        if config.head == "roi":
            recipe["rois"] = about["rois"]
    return recipe | config.recipe()


def model_name(recipe: dict[str, Any]) -> str:
    """The same for every subject: backbone, stage, layers, size, head and objective in words, and a fingerprint."""
    fold = recipe["features"]["fold"]
    # a backbone that was trained has other weights for every fold and, in stage 2, for every subject
    own = (*_OF_A_SUBJECT, "weights") if fold else _OF_A_SUBJECT
    features = {key: value for key, value in recipe["features"].items() if key not in own}
    model = {key: value for key, value in recipe.items() if key not in _OF_A_SUBJECT} | {"features": features}
    layers, size = "+".join(features["layers"]), features["transform"]["input_size"][-1]
    stage = f" {fold['stage']}" if fold else ""
    if fold and len(fold["held_out"]) < fold["n_folds"]:  # its score is over other images than a whole model's
        stage += f" fold {','.join(map(str, fold['held_out']))}"
    words = f"{features['backbone']}@{size}{stage} {layers} {recipe['head']} {recipe['objective']}"
    return f"{words} {fingerprint(model)[:6]}"


def _fit_set(subject: Subject, features: FeatureSet, config: FitConfig, work: Path) -> Fitted:
    began = time.perf_counter()
    device = resolve_device(config.device)  # what cannot work is refused before a store is made for it
    folds = features.folds(subject, config.n_folds, config.seed)
    check_folds(folds, folds.max() + 1)
    recipe = prediction_recipe(subject, features, config, work)
    label = f"{subject.name}-{features.label()}-{config.head}-{config.objective}"
    path, name = store_path(work / FOLDER, label, recipe), model_name(recipe)
    weights = work / WEIGHTS / f"{path.name}.safetensors"
    rows = np.flatnonzero(np.isin(folds, features.held_out())) if features.trained else np.arange(len(folds))
    if path.is_dir():
        store = open_store(path)
    else:
        ids = np.concatenate([subject.train.ids[rows], subject.test.ids])
        facts = {"model": name, "features": features.name, "torch": torch.__version__}
        store = create_store(work / FOLDER, label, recipe, ids, len(rows), subject.n_vertices, facts)
    done = store.complete and weights.exists()
    if done:
        say(f"{subject.name}: already fitted, {path}")
    else:
        x = features.read(device)
        solver = _solver(x, folds, subject, features, config, work)
        _refuse_leaks(subject, features, folds)
        _fit(subject, x, solver, rows, store, weights)
    return Fitted(subject.name, name, path, weights, not done, time.perf_counter() - began)


def _refuse_leaks(subject: Subject, features: FeatureSet, folds: np.ndarray) -> None:
    """No image that is scored may have been trained on, by the heads or by the backbone before them."""
    ids = subject.train.ids
    refuse_leak(ids, subject.test.ids, f"the test split of {subject.name}")
    for fold in np.unique(folds):
        refuse_leak(ids[folds != fold], ids[folds == fold], f"fold {fold} of {subject.name}")
    for store, seen in zip(features.stores, features.seen_ids(), strict=True):
        held_out = folds == store.recipe["fold"]["fold"] if features.trained else np.full(len(folds), True)
        refuse_leak(seen, ids[held_out], f"{store.name} of {subject.name}")
        refuse_leak(seen, subject.test.ids, f"the test split of {subject.name}")


def _solver(
    features: Sequence[torch.Tensor],
    folds: np.ndarray,
    subject: Subject,
    of: FeatureSet,
    config: FitConfig,
    work: Path,
) -> FoldSolver:
    """How these heads are fitted to these features."""
    ids, rows = subject.train.ids, [x[: len(folds)] for x in features]
    match config.resolved_solver, of.trained:
        case "trained", _:
            return TrainedFolds(trained_maps(subject, of, work), folds, of.held_out())
        case "exact", True:
            return TunedRidge(rows, folds, of.held_out(), ids, config.ridge)
        case "exact", False:
            return FrozenFolds(RidgeFolds(rows[0], folds, config.ridge), folds)
        case _, True:
            return TunedAdamW(rows, folds, of.held_out(), ids, config)
        case _:
            return FrozenFolds(AdamWFolds(rows[0], folds, ids, config), folds)


def trained_maps(subject: Subject, features: FeatureSet, work: Path) -> dict[str, list[LinearMap]]:
    """The heads that were trained with the backbones of these features. Raises CheckpointError where they are gone."""
    if list(features.stores[0].arrays) != ["pooled"]:
        raise ConfigError(
            "--solver trained: expected features of the layer pooled alone, which those heads read; found "
            f"{'+'.join(features.stores[0].arrays)}; extract with --layers pooled"
        )
    maps: dict[str, list[LinearMap]] = {hemisphere: [] for hemisphere in HEMISPHERES}
    folds = features.folds(subject)
    for store in features.stores:
        checkpoint = find_checkpoint(work, store.facts["checkpoint"])
        held_out = subject.train.ids[folds == store.recipe["fold"]["fold"]]
        refuse_leak(checkpoint.seen_ids, held_out, f"the heads of {checkpoint.name}")
        heads, names = checkpoint.heads(), list(checkpoint.recipe["subjects"])
        for hemisphere in HEMISPHERES:
            maps[hemisphere].append(linear_map_of(heads, names, subject.name, hemisphere))
    return maps


def _fit(
    subject: Subject,
    features: Sequence[torch.Tensor],
    solver: FoldSolver,
    rows: np.ndarray,
    store: Store,
    weights: Path,
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    n_vertices = sum(subject.n_vertices.values())
    with store.writing(), bar(f"{subject.name} {store.facts['model']}", n_vertices, "vertices") as advance:
        for hemisphere in HEMISPHERES:
            predictions, heads = cross_validate(solver, features, subject, hemisphere, advance)
            for prefix, head in zip(_prefixes(store), heads, strict=True):
                tensors |= {f"{prefix}{hemisphere}.{part}": values for part, values in head._asdict().items()}
            _append(store, hemisphere, np.concatenate([predictions[rows], predictions[len(subject.train) :]]))
        _save_weights(tensors, weights, store)


def _prefixes(store: Store) -> list[str]:
    """What tells the heads of folds apart, where they read different features."""
    fold = store.recipe["features"]["fold"]
    return [f"fold{k}." for k in fold["held_out"]] if fold else [""]


def cross_validate(
    solver: FoldSolver,
    features: Sequence[torch.Tensor],
    subject: Subject,
    hemisphere: str,
    advance: Callable[[int], None],
) -> tuple[np.ndarray, list[LinearMap]]:
    """Predictions (n_train + n_test, n_vertices) float32 of one hemisphere, and the heads that predict test images.

    Training rows are predicted by heads that did not see them, and are NaN where there are none; test rows by the mean
    over folds. Folds on one set of features share one head, the mean of theirs, which predicts the same.

    features : (n_train + n_test, n_features) float32, one for all folds or one for each
    """
    n_train, responses = len(subject.train), subject.responses(hemisphere)
    n_vertices = responses.shape[1]
    predictions = np.full((len(features[0]), n_vertices), np.nan, dtype=np.float32)
    final = [LinearMap(torch.empty(x.shape[1], n_vertices), torch.empty(n_vertices)) for x in features]
    spreads: dict[int, _Trained] = {}
    step = solver.vertex_block or max(n_vertices, 1)
    about = {
        "hemisphere": hemisphere,
        "noise_ceiling": subject.noise_ceiling[hemisphere],
        "rois": tuple(subject.rois[hemisphere].values()),
    }
    for block in (slice(start, min(start + step, n_vertices)) for start in range(0, n_vertices, step)):
        y = torch.from_numpy(np.array(responses[:, block], dtype=np.float32)).to(features[0].device)
        folds = solver.fit(y, **about)
        x = list(features) if len(features) > 1 else list(features) * len(folds)
        if not spreads:
            spreads = {k: _Trained(x[k][:n_train], fold) for k, fold in enumerate(folds)}
        pieces = [(k, rows, head) for k, fold in enumerate(folds) for rows, head in fold.held_out]
        level = comparable([head for *_, head in pieces], [spreads[k] for k, *_ in pieces], y.mean(0))
        for (k, rows, _), head in zip(pieces, level, strict=True):
            predictions[rows, block] = head(x[k][rows]).cpu().numpy()
        for own, average in zip(final, _finals(folds, len(features)), strict=True):
            own.weights[:, block], own.intercept[block] = average.weights.cpu(), average.intercept.cpu()
        tests = [head(x[n_train:]) for head, x in zip(_finals(folds, len(features)), features, strict=True)]
        predictions[n_train:, block] = torch.stack(tests).mean(0).cpu().numpy()
        advance(block.stop - block.start)
    return predictions, final


def _finals(folds: Sequence[FoldHeads], n_features: int) -> list[LinearMap]:
    """One map for each set of features: each fold's, or the mean over folds."""
    finals = [fold.final for fold in folds]
    if n_features > 1:
        return finals
    return [LinearMap(*(torch.stack(parts).mean(0) for parts in zip(*finals, strict=True)))]


class _Trained:
    """The features that a fold's head was trained on, as far as the spread of its predictions needs them."""

    def __init__(self, features: torch.Tensor, fold: FoldHeads) -> None:
        held_out = np.concatenate([rows for rows, _ in fold.held_out])
        features = features[np.setdiff1d(np.arange(len(features)), held_out)]
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
            scores.setdefault(one.model, []).append(score(by_name[one.subject], hemisphere, store))
    return scores


def score(subject: Subject, hemisphere: str, store: Store) -> VertexScores:
    """r of the out-of-fold predictions that a store has, with the subject's ceilings and ROIs."""
    rows = np.isin(subject.train.ids, store.image_ids[: store.n_train])
    responses = subject.responses(hemisphere)
    r = pearson_r(store.read(hemisphere, 0, store.n_train), responses if rows.all() else responses[rows])
    return VertexScores(subject.name, hemisphere, r, subject.noise_ceiling[hemisphere], subject.rois[hemisphere])
