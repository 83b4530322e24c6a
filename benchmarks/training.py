"""Training speed: an epoch of stage 2, from the pixel cache, against a bare loop over ready tensors.

    python benchmarks/training.py [--backbone tf_efficientnet_lite0] [--images 256] [--size 112] [--rounds 3]
        [--compile]

The bare loop has every image as a normalised float32 tensor and every response in memory, and does nothing but forward,
backward and step, on the same network in the same process. Rounds alternate; the ratio is of the medians. With
--compile a copy of the network takes part whose backbone is compiled; its first epoch is longer by what that costs.
"""

import argparse
import copy
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.backbone.checkpoint import Checkpoint
from featcache.backbone.keys import BackboneKey, CheckpointFacts, CheckpointKey, Split, StartKey
from featcache.backbone.network import load_backbone
from featcache.cache.pixels import cache_pixels
from featcache.config import POOLED, BackboneConfig, LayerConfig
from featcache.dataset.open import open_dataset
from featcache.machine.memory import keep_freed_memory
from featcache.simulate import SimulateConfig, simulate
from heads.backbones.accelerator import make_accelerator
from heads.backbones.batches import Images
from heads.backbones.encoder import Encoder
from heads.backbones.loop import EncoderTraining
from heads.config import TrainConfig
from heads.modules.by_subject import OneSubject

SPLIT = Split(fold=0, n_folds=5, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--vertices", type=int, nargs=2, default=(475, 514))
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        tree = SimulateConfig(
            n_subjects=1,
            n_train=options.images,
            n_test=2,
            n_shared=0,
            n_vertices=tuple(options.vertices),
            image_size=64,
        )
        simulate(tree, Path(folder) / "challenge")
        print(json.dumps(measure(Path(folder), options), indent=2))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    subjects = open_dataset(folder / "challenge").subjects
    backbone = load_backbone(BackboneConfig(name=options.backbone, weights="none", size=options.size))
    images = Images(subjects, cache_pixels(subjects, backbone, folder, 10, 2), SPLIT)
    network: Any = backbone.model
    taps = backbone.taps(LayerConfig(layers=(POOLED,)))
    heads = OneSubject(network.num_features, subjects[0], 0.1)
    encoder = Encoder(network, heads, taps).requires_grad_(True)
    compiled = Encoder(copy.deepcopy(network), copy.deepcopy(heads), taps, compiled=True).requires_grad_(True)
    config = TrainConfig(epochs=2 * options.rounds + 1)
    key = CheckpointKey(
        stage="finetune",
        subjects={},
        backbone=BackboneKey(name=options.backbone, weights="none", size=options.size),
        transform={},
        timm="",
        start=StartKey(weights="", training=None),
        split=SPLIT,
        settings={},
    )
    checkpoint = Checkpoint(folder, key, CheckpointFacts(label=options.backbone, origin="random weights"))
    trainings = {
        name: EncoderTraining(one, backbone, images, config, make_accelerator("float32", "cpu"), checkpoint)
        for name, one in {"ours": encoder, "compiled": compiled}.items()
        if name == "ours" or options.compile
    }
    n_images = len(images) // config.batch_size * config.batch_size
    ready = [
        (backbone.normalise(images.read(pairs)), responses_of(images, pairs))
        for pairs in images.epoch(0, 0, config.batch_size)
    ]
    epochs = {name: training.run_epoch for name, training in trainings.items()}
    epochs["bare"] = lambda number: bare_epoch(encoder, ready, config)
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    computing: dict[str, list[float]] = {name: [] for name in epochs}  # seconds of this process's threads
    for number in range(options.rounds + 1):
        for name, epoch in epochs.items():
            began, computed = time.perf_counter(), time.process_time()
            epoch(number)
            seconds[name].append(time.perf_counter() - began)
            computing[name].append(time.process_time() - computed)
    first = {name: taken.pop(0) for name, taken in seconds.items()}  # slower: a network's first pass over such a batch
    speed = {name: n_images / float(np.median(taken)) for name, taken in seconds.items()}
    busy = {name: round(float(np.median(taken[1:])), 2) for name, taken in computing.items()}
    return {
        "backbone": f"{options.backbone}@{options.size}, batch {config.batch_size}, {torch.get_num_threads()} threads",
        "images a second": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(speed["ours"] / speed["bare"], 3),
        "ratios of rounds": [round(b / o, 3) for o, b in zip(seconds["ours"], seconds["bare"], strict=True)],
        "processor seconds of an epoch": busy,
        "seconds of the first epoch": {name: round(taken, 1) for name, taken in first.items()},
        "peak memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),  # Linux counts in KiB
    }


def responses_of(images: Images, pairs: np.ndarray) -> torch.Tensor:
    return torch.cat([target.responses for target in images.responses(pairs).targets()], 1)


def bare_epoch(encoder: Encoder, batches: list[tuple[torch.Tensor, torch.Tensor]], config: TrainConfig) -> None:
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=config.learning_rate)
    subjects = torch.zeros(config.batch_size, dtype=torch.int64)
    for pixels, responses in batches:
        optimiser.zero_grad()
        outputs = encoder(pixels, subjects)
        predictions = torch.cat([surface.mean(outputs) for surface in encoder.heads.surfaces.values()], 1)
        torch.nn.functional.smooth_l1_loss(predictions, responses).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.clip_norm)
        optimiser.step()


if __name__ == "__main__":
    main()
