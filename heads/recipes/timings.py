"""Short measurements on this machine: what a network, a product and a decomposition take, for estimates."""

import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from featcache.backbone.network import Backbone, load_backbone
from featcache.cache.sources import rows_of
from featcache.cache.store import Row
from featcache.config import BackboneConfig, LayerConfig
from featcache.dataset.images import load_image
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import say
from heads.blend.learn import MOST_VERTICES, Level, learn
from heads.blend.products import N_FOLDS, Moments, n_sampled
from heads.blend.uncertainty import N_BOOTSTRAPS, N_PERMUTATIONS, NULL_VERTICES
from heads.blend.weights import Groups, Judge
from heads.config import BlendConfig
from heads.solvers.ridge import eigh_of

_IMAGES = ((0.5, 16), (2.0, 4), (math.inf, 1))  # in a measured forward pass, by the seconds of one: (below, images)
_SIDE = 512  # of a decomposition that is measured, at most
_VERTICES = 1024  # of a blend that is measured


@dataclass(frozen=True)
class Network:
    """A network with random weights, as it was measured.

    load, seconds : of building it, and of one image forward
    weights, widest, kept, pixels : bytes; of an image, of its largest layer, of all its layers, and decoded
    rows : of what is read of it
    transform : an image file's pixels as the network reads them
    """

    load: float
    seconds: float
    weights: float
    widest: float
    kept: float
    pixels: float
    rows: dict[str, Row]
    transform: Callable[[Image.Image], torch.Tensor]

    @property
    def n_features(self) -> int:
        return sum(math.prod(row.shape) for row in self.rows.values())

    def decode_seconds(self, paths: Sequence[Path]) -> float:
        """Of one image, with every core at it; 0 for images that are not there yet."""
        some = [path for path in paths[:4] if path.is_file()]
        began = time.perf_counter()
        for path in some:
            self.transform(load_image(path))
        return (time.perf_counter() - began) / max(len(some), 1) / (os.cpu_count() or 1)


@functools.cache
def network(config: BackboneConfig, layers: LayerConfig, dtype: str, device: str, fold: bool) -> Network:
    """Measure one with random weights, which take as long as any. fold : its batch norms, as `extract` does."""
    say(f"measuring {config.name}" + (f" at {config.size} px" if config.size else ""))
    if device == "cpu":
        keep_freed_memory()
    gc.collect()  # the one before
    began = time.perf_counter()
    backbone = load_backbone(replace(config, weights="none"), device)
    load = time.perf_counter() - began
    taps = backbone.taps(layers)
    rows = rows_of(backbone, taps)
    read = backbone.optimised(taps) if fold else backbone
    size, half = backbone.transform_settings["input_size"], getattr(torch, dtype, torch.float32)

    def forward(n: int) -> None:
        with torch.inference_mode(), torch.autocast(device, half, enabled=half != torch.float32):
            pixels = torch.randint(256, (n, *size), dtype=torch.uint8, device=device)
            read.read(read.normalise(pixels), taps)

    one = _fastest(lambda: forward(1), device, 1)
    n = next(n for most, n in _IMAGES if one < most)  # threads that wait for each other make single images look slow
    seconds = one if n == 1 else _fastest(lambda: forward(n), device, 2) / n
    widest, kept = _layer_bytes(read, lambda: forward(1))
    weights = sum(t.numel() * t.element_size() for t in backbone.model.state_dict().values())
    return Network(load, seconds, weights, widest, kept, math.prod(size), rows, backbone.pixels)


def _layer_bytes(backbone: Backbone, forward: Callable[[], None]) -> tuple[float, float]:
    """Of one image: the largest input and output of a layer, and the outputs of all."""
    sizes: list[tuple[float, float]] = []

    def count(_: Any, inputs: Any, output: Any) -> None:
        size = sum(one.numel() * one.element_size() for one in _tensors(output))
        sizes.append((size + sum(one.numel() * one.element_size() for one in _tensors(inputs)), size))

    leaves = [one for one in backbone.model.modules() if not any(one.children())]
    hooks = [one.register_forward_hook(count) for one in leaves]
    forward()
    for hook in hooks:
        hook.remove()
    return max(both for both, _ in sizes), sum(size for _, size in sizes)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for one in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(one, torch.Tensor):
            yield one


def _fastest(action: Callable[[], Any], device: str, times: int = 3) -> float:
    """Seconds of the fastest of some, after one that is not counted."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def product_seconds(flops: float, device: str) -> float:
    """Of products of float32 matrices with so many floating-point operations."""
    return flops / _rate(device)


@functools.cache
def _rate(device: str, n: int = 1024) -> float:
    """Floating-point operations a second, of a product of float32 matrices."""
    matrix = torch.randn(n, n, device=device)
    return 2.0 * n**3 / _fastest(lambda: matrix @ matrix, device)


def blend_seconds(n_images: int, n_vertices: int, n_models: int, config: BlendConfig) -> float:
    """Of one subject's blend: moments, weights, interval and null; reading the predictions is left out."""
    each = _learning_seconds(n_models, config)
    few, sampled = min(n_vertices, MOST_VERTICES), n_sampled(n_images * (n_models + 1), n_vertices)
    # three in four passes over moments are of the vertices from which shrinkage is learnt
    learning = each * (0.75 * few + 0.25 * n_vertices + N_PERMUTATIONS * min(sampled, NULL_VERTICES))
    products = 2.0 * n_images * (n_vertices * (n_models + 2) ** 2 + 12 * N_BOOTSTRAPS * sampled)
    return learning + product_seconds(products, "cpu")


@functools.cache
def _learning_seconds(n_models: int, config: BlendConfig) -> float:
    """Of all weights of a vertex, nested and not, from made-up moments of some."""
    columns = torch.randn(N_FOLDS, _VERTICES, n_models + 2, 64) + torch.randn(N_FOLDS, _VERTICES, 1, 64)
    columns[:, :, -1] = 1
    moments = Moments((columns @ columns.transpose(2, 3)).numpy())
    every = np.arange(_VERTICES)
    groups = {"all": 0 * every, "hemisphere": every % 2, "roi": every % 32, "vertex": every}
    levels = [Level(name, Groups(labels, int(labels.max()) + 1), ()) for name, labels in groups.items()]
    judge = Judge.of([None], [_VERTICES])
    return _fastest(lambda: learn(moments, judge, levels, config), "cpu", 1) / _VERTICES


@functools.cache
def eigh_seconds(n: int, device: str) -> float:
    """Of the decomposition of an (n, n) matrix, by the cube from a smaller one where n is large."""
    small = min(n, _SIDE)
    factor = torch.randn(small, small, device=device)
    return _fastest(lambda: eigh_of(factor @ factor.T), device) * (n / small) ** 3
