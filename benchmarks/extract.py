"""Extraction against its parts, decoding and a bare forward loop, and against the loop that most people write.

    PYTHONPATH=. python benchmarks/extract.py [--quick]

The parts run one after the other on all cores; `extract` has them side by side, hashes the files and writes a store.
What it does once for a run, before the first image, is taken off: it is the time of a rerun that finds all done. The
loops are given networks that are ready. Batch norms are folded in `extract` and not in the bare loop.
The usual loop is timm's transform in a Dataset, a DataLoader with a worker a core, contiguous float32, np.save.

A network that does next to nothing shows how many images a second extraction can feed a fast device with: decoded
images are in the cache, and the bare loop reads them, normalises them and runs the network.
"""

import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from measure import Figure, options, report, seconds
from PIL import Image

from featcache.backbone.network import Backbone, load_backbone
from featcache.cache.extract import extract
from featcache.cache.pixels import cache_pixels
from featcache.cache.store import open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import response_files
from featcache.dataset.images import load_image
from featcache.dataset.subject import Images, Subject
from featcache.machine.memory import keep_freed_memory

_SIDE = 425


def write_images(folder: Path, n_images: int, side: int = _SIDE) -> Subject:
    """Pictures as large as the challenge's, smooth with some grain: they compress about as photographs do."""
    generator, paths = np.random.default_rng(0), []
    for number in range(n_images):
        small = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.normal(0, 6, smooth.shape).astype(np.int16)
        paths.append(folder / f"train-{number + 1:04d}_nsd-{number:05d}.png")
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(paths[-1])
    half = n_images - n_images // 10
    train = Images(tuple(paths[:half]), np.arange(half))
    test = Images(tuple(paths[half:]), np.arange(half, n_images))
    return Subject("subj01", train, test, response_files(folder), {"lh": 1}, {"lh": {}}, {"lh": None}, {"lh": None})


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
    config = BackboneConfig(name=name, weights=weights)
    backbone = load_backbone(config, "cpu")
    plain = load_backbone(config, "cpu").model.to(memory_format=torch.contiguous_format)
    paths = [*subject.train.sources, *subject.test.sources]
    pixels = torch.stack([backbone.pixels(load_image(path)) for path in paths])
    ready = [
        backbone.normalise(part).contiguous(memory_format=torch.channels_last) for part in pixels.split(batch_size)
    ]
    ours = {
        dtype: ExtractConfig(
            backbone=config,
            layers=LayerConfig(layers=("pooled",)),
            dtype=dtype,
            batch_size=batch_size,
            checkpoint="none",
        )
        for dtype in ("float32", "auto")
    }
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        work = {dtype: folder / f"{name}{turn}.{dtype}" for dtype in ours}
        calls = {
            **{dtype: partial(extract, [subject], ours[dtype], work[dtype]) for dtype in ours},
            **{f"{dtype} again": partial(extract, [subject], ours[dtype], work[dtype]) for dtype in ours},
            "decoding": partial(decoding, paths, backbone),
            "forward": partial(forward, ready, backbone.model),
            "usual": partial(usual_loop, plain, paths, batch_size, folder / "usual.npy"),
        }
        for what, call in calls.items():
            times.setdefault(what, []).append(seconds(call))
    took = {what: median(each[1:]) for what, each in times.items()}  # the first round warms up
    speed = {dtype: took[dtype] - took[f"{dtype} again"] for dtype in ours}
    parts = {"extract": speed["float32"], "once": took["float32 again"], "decoding": took["decoding"]}
    parts |= {"forward": took["forward"]}
    size = f"{name}, {len(paths)} PNGs of {_SIDE} px"
    joint = (took["decoding"] + took["forward"]) / speed["float32"]
    found = [
        Figure(
            f"extract --dtype float32, {size}: speed",
            "decoding, then a bare forward loop",
            joint,
            0.9,
            at_most=False,
            details={f"{what}_seconds": value for what, value in parts.items()},
        )
    ]
    for dtype, target in (("auto", 2.0), ("float32", None)):
        error, resolved = _against(work[dtype], np.load(folder / "usual.npy"))
        details = {"dtype": resolved, "relative_error": error, "seconds": speed[dtype], "usual_seconds": took["usual"]}
        what = f"extract --dtype {dtype}, {size}: times as fast"
        found.append(Figure(what, "the usual loop", took["usual"] / speed[dtype], target, False, details=details))
    return found


_CHEAP = """
from torch import nn

class Few(nn.Module):
    def forward(self, images):
        return images[:, :, ::32, ::32].flatten(1)

class Built:
    network = Few()
    transform = {"size": 224, "mean": [0.5] * 3, "std": [0.25] * 3}

def build():
    return Built()
"""


def feeding(n_images: int, batch_size: int, rounds: int, folder: Path) -> list[Figure]:
    """Extraction over cached pixels by a network that does next to nothing; and images that subjects share."""
    (folder / "cheap.py").write_text(_CHEAP)
    network = BackboneConfig(name=f"{folder / 'cheap.py'}:build")
    subject, backbone = write_images(folder, n_images, side=64), load_backbone(network)
    pixels = cache_pixels([subject], backbone, folder, 100, os.cpu_count() or 1)[0].array
    config = ExtractConfig(
        backbone=network, layers=LayerConfig(layers=("pooled",)), dtype="float32", batch_size=batch_size
    )

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, n_images, batch_size):
            batch = torch.from_numpy(np.array(pixels[start : start + batch_size])).permute(0, 3, 1, 2)
            backbone.model(backbone.normalise(batch))

    def fresh() -> None:
        shutil.rmtree(folder / "features.zarr", ignore_errors=True)
        extract([subject], config, folder)

    times: dict[str, list[float]] = {}
    calls = {"bare": bare, "extract": fresh, "once": partial(extract, [subject], config, folder)}
    for _ in range(2 * rounds + 1):
        for what, call in calls.items():
            times.setdefault(what, []).append(seconds(call))
    took = {what: median(each[1:]) for what, each in times.items()}
    ours = max(took["extract"] - took["once"], 1e-9)
    speed = Figure(
        f"extract from the image cache, {n_images} images of 224 px, a network that does nothing: speed",
        "a bare loop over the cache",
        took["bare"] / ours,
        0.9,
        at_most=False,
        details={"images_a_second": n_images / ours, "bare_images_a_second": n_images / took["bare"]},
    )
    return [speed, sharing(subject, config, folder / "shared")]


def sharing(subject: Subject, config: ExtractConfig, work: Path) -> Figure:
    """Images that are computed for eight subjects who saw an eighth of their images in common."""
    ids, n_each = subject.image_ids, max(len(subject.image_ids) // 8, 2)
    n_shared = max(n_each // 8, 1)
    subjects = []
    for number in range(8):
        own = range(n_shared + number * (n_each - n_shared), n_shared + (number + 1) * (n_each - n_shared))
        rows = [*range(n_shared), *own]
        train = Images(tuple(subject.image_sources[row] for row in rows), ids[rows])
        subjects.append(replace(subject, name=f"subj0{number + 1}", train=train, test=Images.none()))
    done = extract(subjects, config, work)
    n_distinct, n_all = len({i for one in subjects for i in one.image_ids}), sum(one.n_images for one in done)
    return Figure(
        f"images computed for 8 subjects, of whose {n_all} images {n_distinct} differ",
        "the images that differ",
        sum(one.n_new for one in done) / n_distinct,
        1.0,
    )


def compiling(name: str, weights: str, batch_size: int, rounds: int) -> list[Figure]:
    """A compiled network against the same network, its layers by default."""
    found = []
    for dtype in ("float32", "bfloat16"):
        loaded = load_backbone(BackboneConfig(name=name, weights=weights))
        taps = loaded.taps(LayerConfig())
        plain = loaded.optimised(taps)
        began = time.perf_counter()
        compiled = plain.compiled(taps, batch_size, dtype)
        took_once = time.perf_counter() - began
        images = torch.randn(batch_size, *plain.transform_settings["input_size"])
        images = images.contiguous(memory_format=torch.channels_last)
        precision = getattr(torch, dtype)
        times: dict[str, list[float]] = {}
        with torch.inference_mode(), torch.autocast("cpu", precision, enabled=dtype != "float32"):
            for _ in range(4 * rounds + 1):
                for what, one in (("plain", plain), ("compiled", compiled)):
                    times.setdefault(what, []).append(seconds(partial(one.read, images, taps)))
        took = {what: median(each[1:]) for what, each in times.items()}
        details = {"compiled": compiled.is_compiled, "once_seconds": took_once}
        what = f"extract --compile --dtype {dtype}, {name}, batches of {batch_size}: times as fast"
        found.append(Figure(what, "the network as it is", took["plain"] / took["compiled"], None, details=details))
    return found


def _against(work: Path, plainly: np.ndarray) -> tuple[float, str]:
    """Of a store's features, norm of the difference to contiguous float32 over the norm; and their precision."""
    (path,) = (work / "features.zarr").glob("*")
    store = open_store(path)
    error = np.linalg.norm(store.read("pooled") - plainly) / np.linalg.norm(plainly)
    return float(error), store.key["dtype"]


def main() -> None:
    sizes = options(
        __doc__, images=(512, 24), large_images=(96, 0), cached_images=(4096, 64), batch_size=(32, 8), rounds=(2, 1)
    )
    keep_freed_memory()
    found: list[Figure] = []
    cases = [("tf_efficientnet_lite0", "packaged", sizes.images), ("convnext_base", "none", sizes.large_images)]
    for name, weights, n_images in cases:
        if not n_images:
            continue
        with tempfile.TemporaryDirectory() as folder:
            subject = write_images(Path(folder), n_images)
            found += figures(name, weights, subject, min(sizes.batch_size, n_images), sizes.rounds, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        found += feeding(sizes.cached_images, sizes.batch_size, sizes.rounds, Path(folder))
    if not sizes.quick:
        found += compiling("tf_efficientnet_lite0", "packaged", sizes.batch_size, sizes.rounds)
    report(found)


if __name__ == "__main__":
    main()
