"""Groups of images that look alike, by their pixels alone.

A picture is described by its colours and by the strength of its edges in four directions, both on a coarse grid: what
a picture is like at a glance, not what it shows (Oliva and Torralba, Modeling the shape of the scene, 2001). Pictures
of nearly one description are always in one group. The rest is k-means.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.config import fingerprint, usual_workers
from featcache.dataset.digests import id_digest, image_digest
from featcache.dataset.images import load_image
from featcache.dataset.pictures import Picture, look_at, near_copies
from featcache.dataset.splits import Split
from featcache.dataset.subject import ImageSource, Subject
from featcache.machine.documents import read_json
from featcache.machine.files import replace_json
from featcache.machine.progress import bar
from featcache.workdir import Workdir

VERSION = 1  # raised where the same pictures give other groups
_SIDE, _CELLS, _DIRECTIONS = 64, 8, 4  # pixels on a side that are looked at, cells on a side, directions of edges
_EDGES = 0.5  # weight of the edges beside the colours
_FLAT = 0.5  # length of edges that pictures without any are measured against: noise is no structure


def cluster_images(subjects: Sequence[Subject], work: Path, seed: int = 0) -> dict[int, str]:
    """{id of each training image: its cluster}; computed once for these images, and remembered under `work`.

    The number of clusters is that of `n_clusters`. An image that several subjects saw is looked at once.
    """
    images = {subject.name: [image_digest(subject, work), id_digest(subject)] for subject in subjects}
    key = {"images": images, "seed": seed, "version": VERSION}
    path = Workdir(work).clusters(fingerprint(key))
    if (known := _known(path)) is not None:
        return known
    sources = _sources(subjects)
    descriptions, seen = _look(list(sources.values()))
    thumbnails = np.stack([picture.thumbnail for picture in seen])
    copies = near_copies(np.array([picture.hash for picture in seen], dtype=np.uint64), thumbnails=thumbnails)
    labels = cluster(descriptions, copies, seed)
    groups = dict(zip(sources, [f"cluster {label}" for label in labels], strict=True))
    replace_json(path, Split("cluster", groups).to_json())
    return groups


def _look(sources: Sequence[ImageSource]) -> tuple[np.ndarray, list[Picture]]:
    """Description of each picture, (n_images, n_numbers()) float32, and what tells its near copies."""
    descriptions = np.empty((len(sources), n_numbers()), np.float32)

    def look(row: int) -> Picture:
        image = load_image(sources[row])
        descriptions[row] = describe(image)
        return look_at(image)

    seen = []
    with ThreadPoolExecutor(usual_workers()) as pool, bar("looks", len(sources), "images") as advance:
        for picture in pool.map(look, range(len(sources))):
            seen.append(picture)
            advance(1)
    return descriptions, seen


def _known(path: Path) -> dict[int, str] | None:
    """Clusters that an earlier run wrote; None where there are none, or they are damaged: they are made again."""
    try:
        return dict(Split.from_json(read_json(path)).groups)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sources(subjects: Sequence[Subject]) -> dict[int, ImageSource]:
    """{id of a training image: where it is}, in rising order, from the first subject by name that saw it."""
    sources: dict[int, ImageSource] = {}
    for subject in sorted(subjects, key=lambda one: one.name, reverse=True):
        sources |= dict(zip(subject.train.ids.tolist(), subject.train.sources, strict=True))
    return dict(sorted(sources.items()))


def n_numbers() -> int:
    """Length of a description."""
    return (3 + _DIRECTIONS) * _CELLS**2


def describe(image: Image.Image) -> np.ndarray:
    """Description of a picture, (n_numbers(),) float32; the distance of two is about that of their colours, in [0, 1].

    The first are the mean colours of 8 x 8 cells; then comes the strength of edges in four directions in these cells,
    as a fraction of the strength of all.
    """
    pixels = np.asarray(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32) / 255
    colours = _cell_means(pixels)
    down, right = np.gradient(pixels.mean(-1))
    doubled, strength = 2 * np.arctan2(down, right), np.hypot(down, right)
    turns = np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS
    edges = np.sqrt(_cell_means(strength[..., None] * np.maximum(np.cos(doubled[..., None] - turns), 0)))
    edges = _EDGES * edges / (np.linalg.norm(edges) + _FLAT)
    return np.concatenate([colours.ravel() / math.sqrt(colours.size), edges.ravel()]).astype(np.float32)


def _cell_means(values: np.ndarray) -> np.ndarray:
    """Means over cells, (cells, cells, n), of values (side, side, n)."""
    size = _SIDE // _CELLS
    means: np.ndarray = values.reshape(_CELLS, size, _CELLS, size, -1).mean((1, 3))
    return means


def n_clusters(n_images: int) -> int:
    """Number of clusters of so many different images: the root of it, but 10 at least where there are as many."""
    return min(max(round(math.sqrt(n_images)), 10), n_images)


def cluster(descriptions: np.ndarray, copies: np.ndarray, seed: int = 0) -> np.ndarray:
    """Cluster of each description, (n_images,) int64, from 0 in the order of the first image of each.

    Near copies, and copies of these, count as one image. The same numbers on one thread and on many.

    copies : (n_pairs, 2), numbers of images that are near copies of each other
    """
    from sklearn.cluster import KMeans  # takes a second to import
    from threadpoolctl import threadpool_limits  # scikit-learn brings it

    firsts, places = np.unique(firsts_of(copies, len(descriptions)), return_inverse=True)
    with threadpool_limits(1):  # sums in another order would be other sums
        means = KMeans(n_clusters(len(firsts)), n_init=1, random_state=seed).fit(descriptions[firsts])
    found = means.labels_[places]
    _, first, number = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].astype(np.int64)


def firsts_of(pairs: np.ndarray, n_images: int) -> np.ndarray:
    """Number of the first image among the copies of each, and the copies of these, (n_images,) int64.

    pairs : (n_pairs, 2), as `pictures.near_copies` finds them
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n_images, n_images))
    _, first, number = np.unique(connected_components(graph, directed=False)[1], return_index=True, return_inverse=True)
    return np.asarray(first[number], dtype=np.int64)
