"""Models and responses that are made up, and what blends of them are, computed image by image and vertex by vertex."""

from pathlib import Path

import numpy as np

from featcache.cache.store import Store, create_store
from featcache.dataset.algonauts import response_files
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Images, Subject
from heads.blend.models import Model
from heads.blend.products import Products
from heads.blend.weights import Groups
from heads.config import LEVELS

N_TRAIN, N_TEST, N_MODELS = 150, 40, 4
WIDTHS = {"lh": 4, "rh": 3}
N_VERTICES = sum(WIDTHS.values())
IDS = np.random.default_rng(9).permutation(73_000)[: N_TRAIN + N_TEST]
FOLDS = assign_folds(IDS[:N_TRAIN], 5, 0)
ROIS = {
    "lh": {"V1": np.array([1, 1, 0, 0], bool), "empty": np.zeros(4, bool), "early": np.array([1, 1, 1, 0], bool)},
    "rh": {"V1": np.array([0, 1, 0], bool)},
}
# of the levels that a vertex belongs to: V1 comes first, and what no ROI has is a group of its own
LABELS = {
    "all": [0, 0, 0, 0, 0, 0, 0],
    "surface": [0, 0, 0, 0, 1, 1, 1],
    "roi": [0, 0, 1, 2, 3, 4, 3],
    "vertex": [0, 1, 2, 3, 4, 5, 6],
}
assert tuple(LABELS) == LEVELS


def made_up(n_models=N_MODELS, seed=0, noise=(0.5, 1, 2, 4)):
    """Predictions (n_models, n_images, n_vertices) of models of several qualities, units and places, and responses."""
    rng = np.random.default_rng(seed)
    responses = rng.normal(size=(N_TRAIN + N_TEST, N_VERTICES)) * 3 + 1
    predictions = [
        scale * (responses + size * 3 * rng.normal(size=responses.shape)) + scale
        for size, scale in zip(np.resize(noise, n_models), np.resize([1, 0.1, 20, 2], n_models), strict=True)
    ]
    return np.stack(predictions).astype(np.float32), responses.astype(np.float32)


CASES = {
    "plain": lambda p, y: (p, y),
    "one model": lambda p, y: (p[:1], y),
    "the same model twice": lambda p, y: (p[[0, 0, 1]], y),
    "a constant model": lambda p, y: (np.stack([p[0], np.full_like(p[0], 0.3), p[1]]), y),
    "only a constant model": lambda p, y: (np.full_like(p[:1], 7.7), y),
    "a vertex where one model is constant": lambda p, y: (np.where(np.arange(N_VERTICES) == 2, p * [[[0]]] + 5, p), y),
    "large offsets": lambda p, y: (p + 1e4, y - 1e4),
    "a model the other way round": lambda p, y: (np.stack([p[0], -p[1], p[2]]), y),
    "responses that never change": lambda p, y: (p, np.where(np.arange(N_VERTICES) == 3, 1000.1, y)),
    "responses that are 0": lambda p, y: (p, np.where(np.arange(N_VERTICES) == 3, 0, y)),
}


def case(name):
    predictions, responses = CASES[name](*made_up())
    return predictions.astype(np.float32), responses.astype(np.float32)


def slow_r(blend, responses):
    """(n_vertices,), 0 where either side is constant."""
    r = np.zeros(responses.shape[1])
    for vertex, (p, y) in enumerate(zip(blend.T.astype(np.float64), responses.T.astype(np.float64), strict=True)):
        if np.ptp(y) > 0 and np.std(p) > 1e-6 * np.abs(p).max():
            r[vertex] = np.corrcoef(p, y)[0, 1]
    return r


def standardised(predictions):
    """Over the training images, per model and vertex; a constant model is 0."""
    trained = predictions[:, :N_TRAIN].astype(np.float64)
    mean, scale = trained.mean(1, keepdims=True), trained.std(1, keepdims=True)
    return (predictions - mean) / np.where(np.ptp(trained, axis=1, keepdims=True) == 0, np.inf, scale)


def mixed(weights, standard):
    """(n_images, n_vertices) of weights (n_vertices, n_models)."""
    return np.einsum("vm,miv->iv", weights, standard)


def slow_products(predictions, responses, folds=FOLDS):
    """Of standardised columns."""
    columns = np.concatenate([predictions[:, :N_TRAIN], responses[None, :N_TRAIN]])
    z = standardised(columns)
    z = np.concatenate([z, np.ones_like(z[:1])])
    return Products(np.stack([np.einsum("civ,div->vcd", *(z[:, folds == fold],) * 2) for fold in range(5)]))


def groups(level):
    labels = np.array(LABELS[level])
    return Groups(labels, labels.max() + 1)


def subject_of(folder: Path, responses, noise_ceiling=None, rois=ROIS, name="subj01") -> Subject:
    columns = dict(zip(WIDTHS, np.split(np.arange(N_VERTICES), [WIDTHS["lh"]]), strict=True))
    for hemisphere, own in columns.items():
        path = folder / "training_split" / "training_fmri" / f"{hemisphere}_training_fmri.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, responses[:N_TRAIN, own])
    train, test = (
        Images(tuple(Path(f"{image_id}.png") for image_id in ids), ids) for ids in (IDS[:N_TRAIN], IDS[N_TRAIN:])
    )
    ceilings = {h: None if noise_ceiling is None else noise_ceiling[own] for h, own in columns.items()}
    return Subject(name, train, test, response_files(folder), WIDTHS, rois, ceilings, {"lh": None, "rh": None})


def models_of(folder: Path, predictions) -> list[Model]:
    return [Model.from_store(store) for store in stores_of(folder, predictions)]


def stores_of(folder: Path, predictions) -> list[Store]:
    stores = []
    for model, of_model in enumerate(predictions):
        features = {"backbone": f"net{model // 2}", "layers": ["pooled"], "fold": None}
        features |= {"images": "", "image_ids": "", "transform": {}, "dtype": "float32"}
        fit = {"responses": "", "head": "linear", "solver": "exact", "objective": "ridge", "n_folds": 5, "seed": 0}
        key = {"subject": "subj01", "model": model, "features": features} | fit
        facts = {"model": f"model {model}", "features": f"features {model // 2}"}
        store = create_store(folder, f"model{model}", key, IDS, N_TRAIN, WIDTHS, facts)
        store.append({"lh": of_model[:, :4], "rh": of_model[:, 4:]})
        stores.append(store)
    return stores
