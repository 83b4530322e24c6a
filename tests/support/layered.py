"""Subjects with planted responses to the places of cached layers, as trainings of heads take them."""

import numpy as np

from featcache.cache.store import Row, create_store
from featcache.dataset.algonauts import response_files
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Images, Subject
from heads.features.rows import LayerRows
from heads.solvers.joint import TraineeRows
from support.plans import plan_of

SHAPES = {"pooled": (5,), "near": (4, 4, 6), "far": (3, 3, 8)}
PLACE = {"lh": (1, 2), "rh": (3, 0)}  # of the layer `near`, which every vertex of a surface looks at
N_FOLDS, N_TRAIN, N_TEST = 3, 180, 40
N_VERTICES = {"lh": 6, "rh": 4}


def ids_of(n, seed=0):
    return np.random.default_rng(seed).permutation(73_000)[:n]


def values_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (3 * rng.normal(size=(n, *shape)) + rng.normal(size=shape[-1])).astype(
            np.float16 if len(shape) > 1 else np.float32
        )
        for name, shape in SHAPES.items()
    }


def store_of(folder, values, n_train=N_TRAIN):
    rows = {name: Row(one.shape[1:], str(one.dtype)) for name, one in values.items()}
    n, number = len(values["near"]), len(list(folder.iterdir())) if folder.is_dir() else 0
    store = create_store(folder, "f", {"number": number}, np.arange(n), n_train, rows, {})
    step = max(store.chunk_rows(name) for name in rows)
    for start in range(0, n, step):
        store.append({name: one[start : start + step] for name, one in values.items()})
    return store


def rows_of(folder, values, budget=np.inf, n_train=N_TRAIN):
    return LayerRows(store_of(folder, values, n_train), tuple(values), "cpu", budget)


def responses_of(values, noise=0.5, seed=1):
    """{surface: (n_images, n_vertices)}: a mixture of the channels at one place of `near`, and noise."""
    rng = np.random.default_rng(seed)
    found = {}
    for surface, (i, j) in PLACE.items():
        seen = values["near"][:, i, j].astype(np.float64)
        signal = seen @ rng.normal(size=(seen.shape[1], N_VERTICES[surface]))
        signal = (signal - signal.mean(0)) / signal.std(0)
        found[surface] = (2 + signal + noise * rng.normal(size=signal.shape)).astype(np.float32)
    return found


def subject_of(folder, name, ids, responses, ceilings=None):
    """What a training asks of a subject: responses in files, like any other's."""
    test_ids = np.arange(80_000, 80_000 + N_TEST)
    train, test = (Images(tuple(folder / str(image) for image in part), part) for part in (ids, test_ids))
    n_vertices = {surface: values.shape[1] for surface, values in responses.items()}
    nothing, paths = dict.fromkeys(n_vertices), response_files(folder / name)
    for surface, values in responses.items():
        paths[surface].parent.mkdir(parents=True, exist_ok=True)
        np.save(paths[surface], values[: len(ids)].astype(np.float32))
    rois = {surface: {} for surface in n_vertices}
    return Subject(name, train, test, paths, n_vertices, rois, ceilings or nothing, nothing)


def trainee_of(folder, planted, trained=False, budget=np.inf, name="subj01"):
    ids, values, responses = planted
    several = values if isinstance(values, list) else [values]
    rows = [rows_of(folder / "f", one, budget, len(ids)) for one in several]
    return TraineeRows(subject_of(folder, name, ids, responses), rows, plan_of(ids, N_FOLDS, trained=trained))


def joint(folder, seed, n_few=36, n_many=300, noise=1.0):
    """Two subjects whose vertices are linear in the same three numbers of an image; the second saw few images."""
    rng = np.random.default_rng(seed)
    channels = rng.normal(size=(3, 6, 1))
    trainees = []
    for number, n in enumerate((n_many, n_few)):
        values = values_of(n + N_TEST, 10 * seed + number)
        near = values["near"].astype(np.float64) - values["near"].mean((0, 1, 2), dtype=np.float64)
        latent = np.concatenate([near[:, i, j] @ channels[k] for k, (i, j) in enumerate([(0, 1), (2, 2), (3, 0)])], 1)
        latent /= latent.std(0)
        responses = {}
        for h in N_VERTICES:
            signal = latent @ rng.normal(size=(3, 12))
            signal /= signal.std(0)
            responses[h] = signal + noise * rng.normal(size=signal.shape)
        ids = ids_of(n_many, seed)
        if number:  # of the first's images, and, unless there are too few, 9 that decide when to stop
            stop = assign_folds(ids, 10, 1) == 0
            ids = ids[np.argsort(~stop, kind="stable")][stop.sum() - 9 :][:n] if stop.sum() > 9 else ids[:n]
        trainees.append(trainee_of(folder / f"{seed}-{number}", (ids, values, responses), name=f"subj0{number + 1}"))
    return trainees
