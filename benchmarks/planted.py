"""A subject with a planted truth for benchmarks: every vertex sees one layer of a network, through one window.

Features are smooth maps of hidden channels, mixed to as many as a layer has, with as much noise of their own. The
pooled features are made of the last layer's means, as those of a network are. Everything goes the way of features that
were made elsewhere: `Dataset.from_arrays`, `add_features`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import featcache as fc
from featcache.config import POOLED, MadeConfig
from featcache.dataset.subject import Subject
from heads.solvers.layers.priors import Prior

SIDE = 7  # places of a layer along a side
_HIDDEN = 8  # channels that a layer's channels are mixtures of
_WINDOWS, _WIDTH = 40, 0.16  # places that vertices look at, and the standard deviation of a window
_BLOCK = 512  # images that are made at a time


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a subject is.

    channels : {layer: channels of its maps}
    pooled : number of pooled features; 0: none
    signal : share of the responses' variance that features explain, from 0 at the first vertex to this at the last
    """

    images: int
    test_images: int
    vertices: int
    channels: Mapping[str, int] = field(default_factory=lambda: {f"blocks.{k}": 32 for k in range(4)})
    pooled: int = 0
    signal: float = 0.5

    @property
    def n_features(self) -> int:
        return SIDE**2 * sum(self.channels.values()) + self.pooled


def write_subject(work: Path, name: str, sizes: Sizes, seed: int = 0) -> Subject:
    """Write a subject's responses and features under a work folder, as if they had been imported and extracted."""
    rng = np.random.default_rng(seed)
    n_all = sizes.images + sizes.test_images
    maps = {layer: _maps(rng, n_all, n) for layer, n in sizes.channels.items()}
    arrays: dict[str, np.ndarray] = dict(maps)
    if sizes.pooled:
        means = list(maps.values())[-1].mean((1, 2), dtype=np.float32)
        mixed = means @ rng.standard_normal((means.shape[1], sizes.pooled), dtype=np.float32)
        arrays[POOLED] = np.maximum(mixed / mixed.std(), 0)
    left = sizes.vertices // 2
    responses, ceilings = {}, {}
    for surface, n in (("lh", left), ("rh", sizes.vertices - left)):
        ceilings[surface] = np.linspace(0, sizes.signal, n, dtype=np.float32)
        responses[surface] = _responses(rng, maps, ceilings[surface])
    work.mkdir(parents=True, exist_ok=True)
    files = {part: work / f"{name}-{part}" for part in ("train.npy", "test.npy", "features.npz", "ids.npy")}
    pictures = rng.integers(0, 256, (n_all, 8, 8, 3), dtype=np.uint8)
    np.save(files["train.npy"], pictures[: sizes.images])
    np.save(files["test.npy"], pictures[sizes.images :])
    dataset = fc.Dataset.from_arrays(
        str(files["train.npy"]),
        {surface: values[: sizes.images] for surface, values in responses.items()},
        test_images=str(files["test.npy"]),
        test_responses={surface: values[sizes.images :] for surface, values in responses.items()},
        noise_ceiling=ceilings,
        work=work,
        subject=name,
    )
    (subject,) = dataset.select(name)
    np.savez(files["features.npz"], **arrays)
    np.save(files["ids.npy"], subject.image_ids)
    fc.add_features(
        [subject], MadeConfig(features=str(files["features.npz"]), ids=files["ids.npy"], name="planted"), work
    )
    files["features.npz"].unlink()
    return subject


def _maps(rng: np.random.Generator, n_images: int, n_channels: int) -> np.ndarray:
    """(n_images, SIDE, SIDE, n_channels) float16"""
    apart = np.subtract.outer(np.arange(SIDE), np.arange(SIDE))
    blur = np.exp(-(apart**2) / 2.0).astype(np.float32)
    mixing = rng.standard_normal((_HIDDEN, n_channels), dtype=np.float32)
    maps = np.empty((n_images, SIDE, SIDE, n_channels), dtype=np.float16)
    for start in range(0, n_images, _BLOCK):
        block = maps[start : start + _BLOCK]
        hidden = rng.standard_normal((len(block), SIDE, SIDE, _HIDDEN), dtype=np.float32)
        mixed = np.einsum("hi,wj,nijc->nhwc", blur, blur, hidden, optimize=True) @ mixing
        block[:] = mixed + mixed.std() * rng.standard_normal(mixed.shape, dtype=np.float32)
    return maps


def _responses(rng: np.random.Generator, maps: Mapping[str, np.ndarray], share: np.ndarray) -> np.ndarray:
    """(n_images, n_vertices) float32 of variance 1. share : (n_vertices,) that one layer in one window explains"""
    n_images, layers = len(next(iter(maps.values()))), list(maps)
    windows = [
        Prior(*rng.uniform(0.1, 0.9, 2), _WIDTH).window((SIDE, SIDE)).astype(np.float32) for _ in range(_WINDOWS)
    ]
    layer, window = rng.integers(len(layers), size=len(share)), rng.integers(_WINDOWS, size=len(share))
    responses = rng.standard_normal((n_images, len(share)), dtype=np.float32) * np.sqrt(1 - share)
    for number, name in enumerate(layers):
        flat = maps[name].reshape(n_images, SIDE**2, -1)
        for place in np.unique(window[layer == number]):
            seen = np.concatenate(
                [
                    np.tensordot(flat[k : k + _BLOCK].astype(np.float32), windows[place], (1, 0))
                    for k in range(0, n_images, _BLOCK)
                ]
            )
            vertices = np.flatnonzero((layer == number) & (window == place))
            signal = seen @ rng.standard_normal((seen.shape[1], len(vertices)), dtype=np.float32)
            responses[:, vertices] += (signal - signal.mean(0)) / signal.std(0) * np.sqrt(share[vertices])
    return responses
