"""A subject whose surfaces each look at one place of one layer, with features in a work folder, ready for fit-heads."""

from pathlib import Path

import numpy as np
from PIL import Image

from featcache.cache.store import Row, Store, create_store
from featcache.dataset.algonauts import response_files
from featcache.dataset.digests import image_digest
from featcache.dataset.subject import Images, Subject
from featcache.workdir import Workdir
from support.keys import feature_key

SHAPES = {"near": (4, 4, 6), "far": (3, 3, 8), "pooled": (5,)}
PLANTED = {"lh": ("near", (1, 2)), "rh": ("far", (2, 0))}  # the layer and the place that a surface looks at
N_TRAIN, N_TEST = 240, 10
TRANSFORM = {"input_size": [3, 32, 32], "crop_pct": 0.8, "crop_mode": "center"}  # sees 0.1 to 0.9 of each side
N_VERTICES = {"lh": 6, "rh": 4}


def planted_subject(folder: Path, values, noise=0.5) -> Subject:
    rng = np.random.default_rng(1)
    train, test = (
        Images(tuple(folder / f"{number}.png" for number in ids), ids)
        for ids in (rng.permutation(73_000)[:N_TRAIN], 80_000 + np.arange(N_TEST))
    )
    rois = {
        surface: {"V1v": np.arange(n) < 2, "FFA": np.arange(n) == n - 1, "nothing": np.zeros(n, bool)}
        for surface, n in N_VERTICES.items()
    }
    rois["rh"].pop("FFA")
    for surface in rois:  # an ROI that is empty on the first surface comes after those that are not
        rois[surface] = {"right": np.arange(N_VERTICES[surface]) == (0 if surface == "rh" else -1)} | rois[surface]
    nothing = dict.fromkeys(N_VERTICES)
    subject = Subject("subj01", train, test, response_files(folder / "subj01"), N_VERTICES, rois, nothing, nothing)
    for surface, (layer, (i, j)) in PLANTED.items():
        seen = values[layer][:N_TRAIN, i, j].astype(np.float64)
        signal = seen @ rng.normal(size=(seen.shape[1], N_VERTICES[surface]))
        path = subject.response_paths[surface]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, (signal / signal.std(0) + noise * rng.normal(size=signal.shape)).astype(np.float32))
    for number, path in enumerate(subject.image_sources):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)  # nobody reads more of them than their shape
    return subject


def planted_features(folder: Path, work: Path) -> Subject:
    """The subject, whose features are in the work folder."""
    rng = np.random.default_rng(0)
    values = {
        name: (2 * rng.normal(size=(N_TRAIN + N_TEST, *shape)) + rng.normal(size=shape[-1])).astype(
            np.float16 if len(shape) > 1 else np.float32
        )
        for name, shape in SHAPES.items()
    }
    subject = planted_subject(folder, values)
    store_features(work, subject.image_ids, values, image_digest(subject, work))
    return subject


def store_features(work: Path, image_ids: np.ndarray, values, images: str = "") -> Store:
    """A whole feature store of the subject's images."""
    rows = {name: Row(array.shape[1:], str(array.dtype)) for name, array in values.items()}
    grids = {name: list(array.shape[1:3]) for name, array in values.items() if array.ndim > 2}
    key = feature_key("subj01", images=images, layers=list(values), grids=grids, pool="avg", transform=TRANSFORM)
    store = create_store(Workdir(work).features, "subj01-planted", key, image_ids, N_TRAIN, rows, {})
    store.append(values)
    return store
