"""Feature stores -> out-of-fold and test predictions, and the weights that made them."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from featcache.cache.extract import FOLDER as FEATURES
from featcache.cache.store import Store, create_store, open_store, store_path
from featcache.config import LayerConfig, fingerprint
from featcache.dataset.digests import response_digest, subject_digests
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import check_folds, refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, StoreError
from featcache.machine.device import check_products, matrix_products, resolve_device
from featcache.machine.memory import give_back_memory, keep_freed_memory, memory_at_start, spare_memory
from featcache.machine.progress import bar, say
from heads.config import FitConfig, MomentsConfig, SpatialConfig, adamw_of
from heads.features.sets import FeatureSet, feature_sets, layer_of
from heads.scores.metrics import VertexScores, pearson_r
from heads.solvers.base import FoldPredictor, cross_validate
from heads.solvers.layers.ridge import METHOD
from heads.solvers.registry import FEATURE_SHARE, Shared, predictor_of, read_by_its_heads, under_priors
from heads.solvers.spatial import Member, SpatialFolds

FOLDER = "predictions.zarr"
_FOLDERS = {"responses": FOLDER, "blend": "distilled.zarr"}  # what learnt from a blend is no member of the next
WEIGHTS = "heads"

# What belongs to a subject and not to a model: without these, keys of one model agree across subjects.
_OF_A_SUBJECT = ("subject", "images", "image_ids", "responses", "noise_ceiling", "rois", "joint")


@dataclass(frozen=True)
class Fitted:
    """One subject's prediction store for one model."""

    subject: str
    model: str
    path: Path
    weights: Path
    new: bool
    seconds: float


def folder_of(config: FitConfig, work: Path) -> Path:
    """Where the predictions of such heads are."""
    return work / _FOLDERS[config.target]


def fit_heads(subjects: Sequence[Subject], config: FitConfig, work: Path) -> list[Fitted]:
    """Fit the heads that `config` names, of each of its losses, to every set of features of these subjects.

    Each gives a prediction store: out-of-fold predictions of the training images, then the test images' predictions,
    the mean over the folds' heads. Raises StoreError if there is nothing to fit to.
    """
    if resolve_device(config.device) == "cpu":
        keep_freed_memory()
    memory_at_start()
    check_products("products", config.products, config.device)
    there = [(subject, _suitable(feature_sets(subject, work), subject, config)) for subject in subjects]
    found = [(subject, [read for one in sets for read in one.reading(config.layers)]) for subject, sets in there]
    if any(sets for _, sets in there) and not any(sets for _, sets in found):
        known = dict.fromkeys(layer_of(name) for _, sets in there for one in sets for name in one.names)
        raise ConfigError(
            "--layers",
            expected=f"joint, each, or layers that were extracted ({', '.join(known)})",
            found=f"{config.layers!r}",
            remedy=f"choose among those, or extract with --layers {config.layers}",
        )
    if not any(sets for _, sets in found):
        trained = config.solver == "trained"
        raise StoreError(
            work / FEATURES,
            expected=f"complete features of {', '.join(s.name for s in subjects)}",
            found=f"none for the images of this tree{(' from a checkpoint with heads' if trained else '')}",
            remedy=("run 'pretrain' or 'finetune', then 'extract'" if trained else "run 'extract' first"),
        )
    pairs = [(subject, one) for subject, sets in found for one in sets]
    if config.solver == "trained":
        pairs = [(subject, read_by_its_heads(one, work)) for subject, one in pairs]
    variants = config.variants()
    # trained together across subjects or not, spatial heads share features and no more; other losses share all they can
    runs = [[one] for one in variants] if config.head == "spatial" else [variants]
    done = [one for together in runs for one in _fit_variants(pairs, together, work)]
    order = {id(pair[1]): number for number, pair in enumerate(pairs)}
    return [one for _, one in sorted(done, key=lambda found: order[found[0]])]


def _fit_variants(
    pairs: Sequence[tuple[Subject, FeatureSet]], variants: Sequence[FitConfig], work: Path
) -> list[tuple[int, Fitted]]:
    """(id of the features, what was fitted to them): losses one after the other on what they read once."""
    trainings = [_Trainings(pairs, one, work) for one in variants]
    done = []
    for group in trainings[0].groups():
        for subject, features in group:
            shared = Shared(len(variants))
            for config, training in zip(variants, trainings, strict=True):
                done.append((id(features), _fit_set(subject, features, config, work, training, shared)))
            del shared
            give_back_memory()
    return done


class _Trainings:
    """Which subjects' spatial heads are trained together: with a shared space those of one model, else each alone."""

    def __init__(self, pairs: Sequence[tuple[Subject, FeatureSet]], config: FitConfig, work: Path) -> None:
        self._config = config
        self._made: dict[int, SpatialFolds] = {}
        self._groups: dict[str, list[tuple[Subject, FeatureSet]]] = {}
        for subject, one in pairs:
            together = config.head == "spatial" and config.spatial.space > 0 and config.solver != "trained"
            key = model_name(prediction_key(subject, one, config, work)) if together else f"{subject.name} {one.name}"
            self._groups.setdefault(f"{key} {one.names}", []).append((subject, one))

    def groups(self) -> list[list[tuple[Subject, FeatureSet]]]:
        """All of them; whoever fits one after the other trains each once."""
        return list(self._groups.values())

    def group(self, subject: Subject, features: FeatureSet) -> list[tuple[Subject, FeatureSet]]:
        """Everyone who is trained together with this one."""
        return next(group for group in self._groups.values() if (subject, features) in group)

    def predictor(self, subject: Subject, features: FeatureSet, device: str) -> FoldPredictor:
        group = self.group(subject, features)
        key = id(group)
        if key not in self._made:  # the last one alone is kept: its features fill memory
            budget = spare_memory(self._config.max_memory) * FEATURE_SHARE / sum(len(one.stores) for _, one in group)
            members = [self._member(*pair, device, budget) for pair in group]
            made = SpatialFolds(members, self._config, device)
            for number, member in enumerate(members):  # folds that are too small are refused before there is a store
                for k in range(len(member.held_out)):
                    made.split(number, k)
            self._made = {key: made}
        return self._made[key].of(group.index((subject, features)))

    def _member(self, subject: Subject, features: FeatureSet, device: str, budget: float) -> Member:
        folds = features.folds(subject, self._config.n_folds, self._config.seed)
        held_out = features.held_out() if features.trained else list(range(folds.max() + 1))
        return Member(subject, features.read(device, budget), folds, held_out, features.trained)


def _suitable(sets: Sequence[FeatureSet], subject: Subject, config: FitConfig) -> list[FeatureSet]:
    if config.solver != "trained":
        return list(sets)
    for one in sets:
        if not one.trained:
            say(f"{subject.name}: left out {one.name}: no heads were trained with a frozen backbone")
    return [one for one in sets if one.trained]


def prediction_key(subject: Subject, features: FeatureSet, config: FitConfig, work: Path) -> dict[str, Any]:
    """Everything that decides the rows of a prediction store."""
    key: dict[str, Any] = {"kind": "predictions", "subject": subject.name, "features": features.key()}
    key["responses"] = response_digest(subject, work)
    if config.resolved_solver in ("adamw", "moments"):  # the closed form needs neither
        about = subject_digests(subject)
        key["noise_ceiling"] = about["noise_ceiling"]
        if config.head == "roi":
            key["rois"] = about["rois"]
    if under_priors(features, config):
        key["kernels"] = METHOD
    key |= config.key()
    if features.trained and "n_folds" in key:  # its training chose the folds; a seed is of the loop alone
        fold = features.key()["fold"]
        key |= {"n_folds": fold["n_folds"]} | ({"seed": fold["seed"]} if key["solver"] == "exact" else {})
    return key


def model_name(key: Mapping[str, Any]) -> str:
    """The same for every subject: what tells models of one run apart in words, and a fingerprint of everything.

    Backbone, size, stage, layers and their grid, head and objective always, other settings where they are not the
    default.
    """
    fold = key["features"]["fold"]
    # a backbone that was trained has other weights for every fold and, in stage 2, for every subject
    own = (*_OF_A_SUBJECT, "weights") if fold else _OF_A_SUBJECT
    features = {name: value for name, value in key["features"].items() if name not in own}
    model = {name: value for name, value in key.items() if name not in _OF_A_SUBJECT} | {"features": features}
    read = features.get("read", features["layers"])
    layers, size = "+".join(read) if len(read) < 3 else f"{len(read)} layers", features["transform"]["input_size"][-1]
    stage = f" {fold['stage']}" if fold else ""
    if fold and "soup" in fold:
        stage += f" soup of {fold['soup']}"
    if fold and len(fold["held_out"]) < fold["n_folds"]:  # its score is over other images than a whole model's
        stage += f" fold {','.join(map(str, fold['held_out']))}"
    words = [f"{features['backbone']}@{size}{stage} {layers}", *_feature_words(features, read)]
    return " ".join([*words, *_head_words(key), *_setting_words(key), fingerprint(model)[:6]])


def _feature_words(features: Mapping[str, Any], read: Sequence[str]) -> list[str]:
    """The grids of the layers that are read, from the image on; pooling if not avg, precision if not float32."""
    grids = {"x".join(map(str, grid)): None for layer, grid in features.get("grids", {}).items() if layer in read}
    words = ["/".join(grids)] if grids else []
    words += [features["pool"]] if grids and features["pool"] != LayerConfig.pool else []
    return words + ([features["dtype"]] if features["dtype"] != "float32" else [])


def _setting_words(key: Mapping[str, Any]) -> list[str]:
    """Settings that are not what the head is fitted with where nothing is asked for."""
    usual: dict[str, Any] = {"n_folds": FitConfig.n_folds, "seed": FitConfig.seed, "products": FitConfig.products}
    given = {name: key.get(name, default) for name, default in usual.items()}
    if key["solver"] in ("adamw", "moments"):  # the closed form chooses for itself
        usual |= vars(MomentsConfig() if key["solver"] == "moments" else adamw_of(key["head"]))
        usual |= vars(SpatialConfig())
        given |= key["settings"]
    changed = {name: value for name, value in given.items() if value != usual.get(name, value)}
    return [f"{name.removeprefix('n_').replace('_', ' ')} {value}" for name, value in changed.items()]


def _head_words(key: Mapping[str, Any]) -> list[str]:
    """Head and objective; once where they are one word, as of the heads that a checkpoint brought with it."""
    solver = ["moments"] if key["solver"] == "moments" else []  # adamw has the same objectives
    target = ["distilled"] if "target" in key else []
    return list(dict.fromkeys([key["head"], *solver, key["objective"], *target]))


def _fit_set(
    subject: Subject, features: FeatureSet, config: FitConfig, work: Path, trainings: _Trainings, shared: Shared
) -> Fitted:
    began = time.perf_counter()
    device = resolve_device(config.device)  # what cannot work is refused before a store is made for it
    folds = features.folds(subject, config.n_folds, config.seed)
    check_folds(folds, folds.max() + 1)
    key = prediction_key(subject, features, config, work)
    if len(group := trainings.group(subject, features)) > 1:
        key["joint"] = {s.name: prediction_key(s, one, config, work) for s, one in group if s is not subject}
    # of the key and not of the options: those that a solver does not read must not make another store
    label = "-".join([subject.name, features.label(), *_head_words(key)])
    path, name = store_path(folder_of(config, work), label, key), model_name(key)
    weights = work / WEIGHTS / f"{path.name}.safetensors"
    rows = np.flatnonzero(np.isin(folds, features.held_out())) if features.trained else np.arange(len(folds))
    store = open_store(path) if path.is_dir() else None
    done = store is not None and store.complete and weights.exists()
    if done:
        say(f"{subject.name}: already fitted, {path}")
    else:
        _refuse_leaks(subject, features, folds)
        if config.head == "spatial" and config.resolved_solver != "trained":
            predictor = trainings.predictor(subject, features, device)
        else:
            predictor = predictor_of(subject, features, folds, config, device, work, shared)
        if store is None:
            ids = np.concatenate([subject.train.ids[rows], subject.test.ids])
            facts: dict[str, Any] = {"model": name, "features": features.name, "torch": torch.__version__}
            if features.trained:  # for whoever blends, when features and checkpoints may be gone
                facts["seen_ids"] = [seen.tolist() for seen in features.seen_ids()]
            store = create_store(folder_of(config, work), label, key, ids, len(rows), subject.n_vertices, facts)
        with matrix_products(config.products):
            _fit(subject, predictor, rows, store, weights, device)
    return Fitted(subject.name, name, path, weights, not done, time.perf_counter() - began)


def _refuse_leaks(subject: Subject, features: FeatureSet, folds: np.ndarray) -> None:
    """No image that is scored may have been trained on, by the heads or by the backbone before them."""
    ids = subject.train.ids
    refuse_leak(ids, subject.test.ids, f"the test split of {subject.name}")
    for fold in np.unique(folds):
        refuse_leak(ids[folds != fold], ids[folds == fold], f"fold {fold} of {subject.name}")
    for store, seen in zip(features.stores, features.seen_ids(), strict=True):
        held_out = folds == store.key["fold"]["fold"] if features.trained else np.full(len(folds), True)
        refuse_leak(seen, ids[held_out], f"{store.name} of {subject.name}")
        refuse_leak(seen, subject.test.ids, f"the test split of {subject.name}")


def _fit(
    subject: Subject, predictor: FoldPredictor, rows: np.ndarray, store: Store, weights: Path, device: str
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    n_vertices = sum(subject.n_vertices.values())
    with store.writing(), bar(f"{subject.name} {store.facts['model']}", n_vertices, "vertices") as advance:
        for hemisphere in HEMISPHERES:
            tensors |= _fit_hemisphere(subject, predictor, rows, store, hemisphere, advance, device)
        _save_weights(tensors, weights, store)


def _fit_hemisphere(
    subject: Subject,
    predictor: FoldPredictor,
    rows: np.ndarray,
    store: Store,
    hemisphere: str,
    advance: Callable[[int], None],
    device: str,
) -> dict[str, torch.Tensor]:
    """Store one hemisphere's predictions, which are gone before the next has its own; what is left are the heads."""
    predictions, saved = cross_validate(predictor, subject, hemisphere, advance, device)
    if len(rows) < len(subject.train):
        predictions = np.concatenate([predictions[rows], predictions[len(subject.train) :]])
    _append(store, hemisphere, predictions)
    return {f"{prefix}{hemisphere}.{part}": values for (prefix, part), values in saved.items()}


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
