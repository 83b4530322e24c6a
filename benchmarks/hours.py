"""How long the challenge would take on a GPU: a calculation from counts, of which docs/gpu.md shows the tables.

    PYTHONPATH=. python benchmarks/hours.py [--size 384]

Counted here, on networks without numbers: operations and arithmetic of a pass, and bytes of what layers put out. From
the data sheet: what the card does at most. Assumed: which part of that it reaches. No card is needed, and no time is
measured; where there is a card, benchmarks/device.py measures.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from backbones import BACKBONES, EMBEDDING
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from featcache.backbone.outline import Outline, outline
from featcache.backbone.sources.table import source_of
from featcache.config import POOLED, BackboneConfig, LayerConfig
from featcache.simulate import SimulateConfig
from heads.backbones.memory import device_memory
from heads.config import TrainConfig
from heads.solvers.layers.axes import LANDMARKS
from heads.solvers.layers.sizes import FINALISTS

# NVIDIA's data sheet of the H100 SXM, without sparsity
BFLOAT16, FLOAT32, BANDWIDTH = 989e12, 67e12, 3.35e12  # operations, operations and bytes a second
# assumed: what is reached of the arithmetic of dense layers, of products of large matrices, and of the bandwidth
OF_LAYERS, OF_PRODUCTS, OF_BANDWIDTH = 0.4, 0.7, 0.6
LAUNCH = 10e-6  # assumed: seconds in which the host starts one operation
EIGH = 1.0  # assumed: seconds of the eigenvectors of a matrix of 2,048 rows in float64
COPY = 10e9  # assumed: bytes a second from pageable to pinned memory, which one core copies
# how often a layer's output is moved: written and read; on the way back read, and its gradient written and read
FORWARD, TRAINED = 2, 5
ADAMW = (
    7 * 4 + 2 + 4
)  # bytes a weight moves: four tensors read, three written; the gradient's norm; the cast to bfloat16
FOLDS, SURFACES = 5, 2

CHALLENGE = SimulateConfig.full()
N_TRAIN, N_ALL = sum(CHALLENGE.n_train), sum(CHALLENGE.n_train) + sum(CHALLENGE.n_test)
VERTICES = sum(CHALLENGE.n_vertices)


class _Operations(TorchDispatchMode):
    """Number of operations that are started, without those that only view numbers in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += not function.is_view
        return function(*args, **kwargs or {})


@dataclass(frozen=True)
class Counts:
    """What one network takes.

    flops : of one image forward, a multiplication and an addition as two
    operations, trained_operations : of a pass forward, and forward and back
    """

    name: str
    network: Outline
    flops: float
    operations: int
    trained_operations: int

    @property
    def heads(self) -> int:
        """Weights of stage 1's heads."""
        return (self.network.n_features + EMBEDDING) * VERTICES

    @property
    def weights(self) -> float:
        return self.network.weights / 4 + self.heads

    def seconds_forward(self, n_images: int) -> float:
        """Of a batch."""
        device = n_images * (self.flops / (BFLOAT16 * OF_LAYERS) + self._moved(FORWARD))
        return max(device, self.operations * LAUNCH)

    def seconds_step(self, n_images: int) -> float:
        """Of a step of training on a batch: three times the arithmetic of a pass forward."""
        flops = 3 * (self.flops + 2 * self.heads) / (BFLOAT16 * OF_LAYERS)
        device = n_images * (flops + self._moved(TRAINED)) + ADAMW * self.weights / (BANDWIDTH * OF_BANDWIDTH)
        return max(device, self.trained_operations * LAUNCH)

    def hours(self, epochs: int, batch: int) -> float:
        """Of one stage of all folds: both stages see as many images."""
        n_steps = FOLDS * epochs * N_TRAIN * (1 - 1 / FOLDS) / batch
        n_scored = FOLDS * epochs * N_TRAIN / FOLDS / batch
        return (n_steps * self.seconds_step(batch) + n_scored * self.seconds_forward(batch)) / 3600

    def _moved(self, times: int) -> float:
        return times * self.network.kept / (BANDWIDTH * OF_BANDWIDTH)


def counts_of(name: str, size: int) -> Counts:
    config = BackboneConfig(name=name, weights="none", size=size)
    network: Any = source_of(config).outline(config, "meta").model.eval()
    image = torch.zeros(1, 3, size, size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, _Operations() as forward:
        network(image)
    with _Operations() as trained:
        network.requires_grad_(True)(image).sum().backward()
    sizes = outline(config, LayerConfig(layers=(POOLED,)), "bfloat16")
    return Counts(name, sizes, flops.get_total_flops(), forward.n, trained.n)


def _header(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|"


def backbones(size: int) -> None:
    """Tables of networks and of their stages."""
    columns = (
        f"backbone at {size} px",
        "weights, M",
        "GFLOP an image",
        "MB of layers an image",
        "operations forward, in a step",
        "images/s forward, 128 a batch",
        "images/s in training, 32 a batch",
        "8 a batch",
        "device memory at 32, GB",
    )
    print(_header(columns))
    every = [counts_of(name, size) for name in BACKBONES]
    for one in every:
        train = TrainConfig(batch_size=32, precision="bfloat16")
        memory = device_memory(one.network, 4 * one.weights, VERTICES, train)
        print(
            f"| {one.name} | {one.network.weights / 4e6:.0f} | {one.flops / 1e9:.0f} | {one.network.kept / 1e6:.0f} | "
            f"{one.operations:,}, {one.trained_operations:,} | {128 / one.seconds_forward(128):,.0f} | "
            f"{32 / one.seconds_step(32):,.0f} | {8 / one.seconds_step(8):,.0f} | {memory / 1e9:.0f} |"
        )
    columns = (
        "backbone",
        "a stage, fast preset, h",
        "a stage, paper preset, h",
        "extraction, frozen, min",
        "extraction, checkpoints of both stages, h",
    )
    print("\n" + _header(columns))
    total = [0.0] * 4
    for one in every:
        once = N_ALL / 128 * one.seconds_forward(128)
        hours = one.hours(5, 32), one.hours(12, 8), once / 60, 2 * FOLDS * once / 3600
        total = [a + b for a, b in zip(total, hours, strict=True)]
        print(f"| {one.name} | {hours[0]:.1f} | {hours[1]:.1f} | {hours[2]:.1f} | {hours[3]:.2f} |")
    print(f"| all seven | {total[0]:.1f} | {total[1]:.1f} | {total[2]:.1f} | {total[3]:.2f} |")


def heads(n_features: int, n_layered: int) -> None:
    """Table of heads of one subject. n_features : pooled; n_layered : of all layers"""
    n_images, n_test = CHALLENGE.n_train[0], CHALLENGE.n_test[0]
    copied = 4.0 * (2 * n_images + n_test) * VERTICES  # responses there, predictions back
    per_vertex = 2.0 * VERTICES
    pooled = per_vertex * n_images * n_features  # X'Y; rotation, predictions and weights of each fold
    pooled += FOLDS * per_vertex * n_features * (2 * n_features + n_images / FOLDS + n_test)
    n, priors = LANDMARKS, FINALISTS["landmarks"]
    kernels = 2 * 2.0 * n_images * n * n_layered  # of both halves of the folds
    features = 2 * SURFACES * priors * 2.0 * n_images * n * n
    crossed = 2 * priors * per_vertex * n_images * n
    of_fold = priors * per_vertex * n * (n_images + 3 * n)  # predictions; to the axes, back, and to the landmarks
    saved = per_vertex * n * n_layered
    layered = kernels + features + crossed + FOLDS * (of_fold + saved)
    columns = (
        "heads of one subject",
        "TFLOP, float32",
        "s of them",
        "GB copied",
        "s of that",
        "decompositions",
        "s of them",
        "in all, s",
    )
    print(_header(columns))
    rows = [
        (f"pooled, {n_features:,} features, 5 folds", pooled, FOLDS),
        (f"layers under priors, {n_layered:,} features, 5 folds", layered, FOLDS * priors * SURFACES),
    ]
    for what, flops, n_eigh in rows:
        parts = flops / (FLOAT32 * OF_PRODUCTS), copied / COPY, n_eigh * EIGH
        print(
            f"| {what} | {flops / 1e12:,.0f} | {parts[0]:.1f} | {copied / 1e9:.1f} | {parts[1]:.1f} | {n_eigh} | "
            f"{parts[2]:.0f} | {sum(parts):.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=384, help="pixels on a side")
    size = parser.parse_args().size
    print(f"{N_TRAIN:,} training and {N_ALL - N_TRAIN:,} test images of 8 subjects, {VERTICES:,} vertices each\n")
    backbones(size)
    print()
    layers = outline(BackboneConfig(name="convnext_base", weights="none", size=size), LayerConfig())
    heads(2048, layers.n_features)


if __name__ == "__main__":
    main()
