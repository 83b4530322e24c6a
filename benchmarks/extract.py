"""Extraction against its parts, decoding and a bare forward loop, and against the loop that most people write.

    PYTHONPATH=. python benchmarks/extract.py [--quick]

The parts run one after the other on all cores; `extract` has them side by side, hashes the files and writes a store.
Batch norms are folded in `extract` and not in the bare loop. bfloat16 is `extract --dtype bfloat16`.
The usual loop is timm's transform in a Dataset, a DataLoader with a worker a core, contiguous float32, np.save.
"""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from measure import Figure, options, report
from PIL import Image

from featcache.backbone import Backbone, load_backbone
from featcache.challenge import Subject
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.device import keep_freed_memory
from featcache.extract import extract
from featcache.images import ImageFiles, load_image
from featcache.store import open_store

_SIDE = 425


def write_images(folder: Path, n_images: int) -> Subject:
    """Pictures as large as the challenge's, smooth with some grain: they compress about as photographs do."""
    generator, paths = np.random.default_rng(0), []
    for number in range(n_images):
        small = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.normal(0, 6, smooth.shape).astype(np.int16)
        paths.append(folder / f"train-{number + 1:04d}_nsd-{number:05d}.png")
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(paths[-1])
    half = n_images - n_images // 10
    train = ImageFiles(tuple(paths[:half]), np.arange(half))
    test = ImageFiles(tuple(paths[half:]), np.arange(half, n_images))
    return Subject("subj01", folder, train, test, {"lh": 1}, {"lh": {}}, {"lh": None}, {"lh": None})


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, paths: list[Path], transform: Any) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self._transform(Image.open(self._paths[row]).convert("RGB"))


@torch.no_grad()
def usual_loop(model: torch.nn.Module, paths: list[Path], batch_size: int, out: Path) -> None:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    loader = torch.utils.data.DataLoader(_Pictures(paths, transform), batch_size, num_workers=os.cpu_count() or 1)
    np.save(out, torch.cat([model(images) for images in loader]).numpy())


def decoding(paths: list[Path], backbone: Backbone) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: backbone.pixels(load_image(path)), paths))


@torch.inference_mode()
def forward(batches: list[torch.Tensor], model: torch.nn.Module) -> None:
    for batch in batches:
        model(batch)


def figures(name: str, weights: str, subject: Subject, batch_size: int, rounds: int, folder: Path) -> list[Figure]:
    config = BackboneConfig(name, weights)
    backbone = load_backbone(config, "cpu")
    plain = load_backbone(config, "cpu").model.to(memory_format=torch.contiguous_format)
    paths = [*subject.train.paths, *subject.test.paths]
    pixels = torch.stack([backbone.pixels(load_image(path)) for path in paths])
    ready = [
        backbone.normalise(part).contiguous(memory_format=torch.channels_last) for part in pixels.split(batch_size)
    ]
    settings = ExtractConfig(config, LayerConfig(("pooled",)), batch_size=batch_size, checkpoint="none")
    half = replace(settings, dtype="bfloat16")
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        work = folder / f"{name}{turn}"
        calls = {
            "extract": lambda work=work: extract([subject], settings, work),
            "bfloat16": lambda work=work: extract([subject], half, work.with_suffix(".half")),
            "decoding": lambda: decoding(paths, backbone),
            "forward": lambda: forward(ready, backbone.model),
            "usual": lambda: usual_loop(plain, paths, batch_size, folder / "usual.npy"),
        }
        for what, call in calls.items():
            began = time.perf_counter()
            call()
            times.setdefault(what, []).append(time.perf_counter() - began)
    seconds = {what: median(each[1:]) for what, each in times.items()}  # the first round warms up
    plainly = np.load(folder / "usual.npy")
    details = {f"{what}_seconds": value for what, value in seconds.items()} | {
        "relative_error": _error(folder / f"{name}{rounds}", plainly)
    }
    coarse = {"relative_error": _error(folder / f"{name}{rounds}.half", plainly)}
    size = f"{name}, {len(paths)} PNGs of {_SIDE} px"
    joint = (seconds["decoding"] + seconds["forward"]) / seconds["extract"]
    return [
        Figure(f"extract, {size}: speed", "decoding, then a bare forward loop", joint, 0.9, False, details=details),
        Figure(f"extract, {size}: times as fast", "the usual loop", seconds["usual"] / seconds["extract"], 2.0, False),
        Figure(
            f"extract --dtype bfloat16, {size}: times as fast",
            "the usual loop",
            seconds["usual"] / seconds["bfloat16"],
            at_most=False,
            details=coarse,
        ),
    ]


def _error(work: Path, plainly: np.ndarray) -> float:
    """Of a store's features, against contiguous float32: norm of the difference over the norm."""
    (store,) = (work / "features.zarr").glob("*")
    return float(np.linalg.norm(open_store(store).read("pooled") - plainly) / np.linalg.norm(plainly))


def main() -> None:
    sizes = options(__doc__, images=(512, 24), large_images=(96, 0), batch_size=(32, 8), rounds=(2, 1))
    keep_freed_memory()
    found: list[Figure] = []
    cases = [("tf_efficientnet_lite0", "packaged", sizes.images), ("convnext_base", "none", sizes.large_images)]
    for name, weights, n_images in cases:
        if not n_images:
            continue
        with tempfile.TemporaryDirectory() as folder:
            subject = write_images(Path(folder), n_images)
            found += figures(name, weights, subject, min(sizes.batch_size, n_images), sizes.rounds, Path(folder))
    report(found)


if __name__ == "__main__":
    main()
