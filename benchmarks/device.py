"""Every stage on an accelerator against a bare loop on the same device, and the card's name.

    PYTHONPATH=. python benchmarks/suite.py --only device --page docs/benchmarks.md     (its section of the page)
    PYTHONPATH=. python benchmarks/device.py [--quick] [--device cpu]

Bare loops have all that they read on the device, and do nothing but the arithmetic that cannot be left out. Every call
ends when the device has ended. Weights of networks are random. Without an accelerator nothing is measured, unless
`--quick` or `--device cpu` asks for it. It is meant to take less than 8 minutes on one card.
"""

import copy
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_heads import PENALTIES, make_subject, planted, product
from extract import write_images
from measure import Figure, options, paired, report, seconds
from planted import Sizes, write_subject

from featcache.backbone.checkpoint import Checkpoint
from featcache.backbone.keys import BackboneKey, CheckpointFacts, CheckpointKey, Split, StartKey
from featcache.backbone.network import load_backbone
from featcache.cache.extract import extract
from featcache.cache.pixels import cache_pixels
from featcache.config import POOLED, BackboneConfig, ExtractConfig, LayerConfig, usual_workers
from featcache.dataset.algonauts import response_files
from featcache.dataset.subject import Subject
from featcache.machine.device import matrix_products, network_dtype, pinned, to_host
from featcache.machine.memory import keep_freed_memory
from featcache.machine.tensors import Spool
from heads.backbones.accelerator import make_accelerator
from heads.backbones.batches import Images
from heads.backbones.encoder import Encoder
from heads.backbones.heads import build_heads
from heads.backbones.loop import EncoderTraining
from heads.config import FitConfig, RidgeConfig, StageConfig, TrainConfig
from heads.features.sets import feature_sets
from heads.fit.out_of_fold import predict_surface
from heads.solvers.base import Problem
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.axes import LANDMARKS
from heads.solvers.layers.ridge import build_layered
from heads.solvers.layers.sizes import FINALISTS
from heads.solvers.ridge import decomposed_on
from heads.solvers.ridge_folds import RidgeFolds

SPLIT = Split(fold=0, n_folds=5, seed=0)
Part = Callable[[Any, str, Path], Iterator[Figure]]  # of sizes, a device and an empty folder
_SIDE = 64  # pixels of the image files; networks read decoded images of their own size


def card(device: str) -> Figure:
    """What the figures are of."""
    name = "main memory and the CPU"
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        name = f"{torch.cuda.get_device_name()}, {about.total_memory / 1e9:.0f} GB"
    return Figure(
        "the device of these figures", "nothing: it is no ratio", None, note=f"{name}, torch {torch.__version__}"
    )


def ended(call: Callable[[], Any], device: str) -> Callable[[], None]:
    """The call, until the device has ended it."""

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def compared(
    ours: Callable[[], Any], theirs: Callable[[], Any], device: str, rounds: int
) -> tuple[float, float, float]:
    """What `paired` gives, after a call of each to warm up."""
    ours, theirs = ended(ours, device), ended(theirs, device)
    theirs()
    ours()
    return paired(ours, theirs, rounds)


def peak_of(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Peak of the device's memory, in 10^9 bytes, with what is there already; nothing on a CPU."""
    if device != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats()
    call()
    return {"device_gb": torch.cuda.max_memory_allocated() / 1e9}


def extraction(sizes: Any, device: str, folder: Path) -> Iterator[Figure]:
    """Images a second from the image cache, by precision, against forward passes over one batch on the device."""
    network = BackboneConfig(name=sizes.backbone, weights="none")
    layers = LayerConfig(layers=(POOLED,))
    subject, loaded = write_images(folder, sizes.cached_images, side=_SIDE), load_backbone(network, device)
    pixels = cache_pixels([subject], loaded, folder, 100, usual_workers())[0]
    taps = loaded.taps(layers)
    backbone = loaded.optimised(taps)
    batch = backbone.normalise(pixels.read(range(sizes.batch_size)).to(device))
    n_batches = -(-sizes.cached_images // sizes.batch_size)

    @torch.inference_mode()
    def bare(dtype: str) -> None:
        precision = getattr(torch, dtype, torch.float32)
        with matrix_products(dtype), torch.autocast(device, precision, enabled=precision != torch.float32):
            for _ in range(n_batches):
                backbone.read(batch, taps)

    every = (
        ("float32", "tf32", "bfloat16", "float16") if device == "cuda" else ("float32", network_dtype("auto", device))
    )
    for dtype in dict.fromkeys(every):
        config = ExtractConfig(backbone=network, layers=layers, dtype=dtype, batch_size=sizes.batch_size, device=device)

        def fresh(config: ExtractConfig = config) -> None:
            shutil.rmtree(folder / "features.zarr", ignore_errors=True)
            extract([subject], config, folder)

        took, bare_took, _ = compared(fresh, partial(bare, dtype), device, sizes.rounds)
        once = seconds(partial(extract, [subject], config, folder))  # finds all done
        ours = max(took - once, 1e-9)
        speeds = {"images_a_second": sizes.cached_images / ours, "bare": sizes.cached_images / bare_took}
        size = f"{network.label}@{batch.shape[-1]}, {sizes.batch_size} images a batch"
        details = speeds | {"seconds": ours, "bare_seconds": bare_took, "once_seconds": once}
        what = f"extract --dtype {dtype}, {size}, from the image cache: speed"
        yield Figure(what, "as many forward passes over one batch", bare_took / ours, details=details)


def exact_heads(sizes: Any, device: str, folder: Path) -> Iterator[Figure]:
    """Closed-form heads of a subject of full size, five folds, as `fit-heads` fits them."""
    torch.manual_seed(0)
    n_all = sizes.images + sizes.test_images
    features = torch.randn(n_all, sizes.features)
    responses = planted(features, sizes.images, sizes.vertices)
    subject = make_subject(folder, (sizes.images, sizes.test_images), responses)
    plan = FoldPlan.of_frozen(np.arange(sizes.images), 5, 0)
    on_device = features.to(device)

    def ours(save: bool) -> None:
        heads = RidgeFolds(on_device, plan, RidgeConfig(penalties=PENALTIES), save=save)
        predict_surface(heads, subject, "lh", lambda n: None, device)

    peaks = {save: peak_of(partial(ours, save), device) for save in (False, True)}
    x, y = on_device[: sizes.images], responses.to(device)

    def copied() -> None:
        """Responses to the device and as many numbers back, besides the product."""
        product(x, responses.to(device))
        y.cpu()

    size = f"{sizes.images:,} x {sizes.features:,} -> {sizes.vertices:,}, {len(PENALTIES)} penalties, 5 folds"
    runs = [
        (
            "exact heads, out-of-fold and test predictions",
            False,
            partial(product, x, y),
            "the one product X'Y on the device",
        ),
        ("the same, and weights to save", True, partial(product, x, y), "the one product X'Y on the device"),
        ("the same", True, copied, "X'Y, responses there and as many numbers back"),
    ]
    for what, save, theirs, against in runs:
        took, bare, ratio = compared(partial(ours, save), theirs, device, sizes.rounds)
        yield Figure(f"{what}, {size}", against, ratio, details={"seconds": took, "bare_seconds": bare} | peaks[save])


def priors(sizes: Any, device: str, folder: Path) -> Iterator[Figure]:
    """Closed form under priors, from a store to predictions and weights, five folds."""
    made = Sizes(images=sizes.prior_images, test_images=2, vertices=sizes.prior_vertices)
    subject = write_subject(folder, "subj01", made)
    (features,) = feature_sets(subject, folder)
    plan = FoldPlan.of_frozen(subject.train.ids, 5, 0)
    problem = Problem(
        subject=subject, features=features, plan=plan, config=FitConfig(loss="mse"), device=device, work=folder
    )
    method = build_layered(problem).method
    x, y = (torch.randn(made.images, n, device=device) for n in (made.n_features, made.vertices))

    def ours() -> None:
        solver = build_layered(problem)
        for surface in subject.surfaces:
            predict_surface(solver, subject, surface, lambda n: None, device, spool=Spool(folder / "heads"))

    def bare() -> None:
        kernel = x @ x[:LANDMARKS].T
        for _ in range(FINALISTS[method]):
            kernel.T @ y

    bare()
    took_bare = seconds(ended(bare, device))
    took = seconds(ended(ours, device))
    size = f"{made.images:,} x {made.n_features:,} -> {made.vertices:,}, 5 folds, by {method}"
    details = {"seconds": took, "bare_seconds": took_bare}
    yield Figure(
        f"heads under priors, {size}", "its inner products, and X'Y of each prior", took / took_bare, details=details
    )


def training(name: str, sizes: Any, device: str, folder: Path) -> Iterator[Figure]:
    """Steps of stage 1 a second, against forward, backward and AdamW over one batch on the device."""
    network = BackboneConfig(name=name, weights="none", size=sizes.size)
    subject, backbone = _with_responses(folder, sizes), load_backbone(network)
    images = Images([subject], cache_pixels([subject], backbone, folder, 100, usual_workers()), SPLIT)
    config = TrainConfig(epochs=sizes.rounds + 2, batch_size=sizes.train_batch)
    precision = "bfloat16" if device == "cuda" else "float32"
    taps = backbone.taps(LayerConfig(layers=(POOLED,)))
    heads = build_heads(backbone.shapes(taps), [subject], StageConfig(stage="pretrain", train=config, backbone=network))
    encoder = Encoder(backbone.model, heads, taps).requires_grad_(True)
    alone = copy.deepcopy(encoder).train()
    accelerator = make_accelerator(precision, device)
    run = EncoderTraining(encoder, backbone, images, config, accelerator, _checkpoint(folder, network))
    epochs = iter(range(config.epochs))
    peak = peak_of(lambda: run.run_epoch(next(epochs)), device)
    alone.to(device)
    pairs = images.epoch(0, 0, config.batch_size)
    pixels = backbone.normalise(images.read(pairs[0]).to(device))
    responses = torch.cat([one.responses for one in images.responses(pairs[0]).targets()], 1).to(device)
    subjects = torch.zeros(config.batch_size, dtype=torch.int64)
    optimiser = torch.optim.AdamW(alone.parameters(), lr=config.learning_rate, fused=device == "cuda" or None)

    def bare() -> None:
        for _ in pairs:
            optimiser.zero_grad()
            with torch.autocast(device, getattr(torch, precision), enabled=precision != "float32"):
                predictions = alone(pixels, subjects)
            torch.nn.functional.smooth_l1_loss(predictions.float(), responses).backward()
            optimiser.step()

    took, bare_took, ratio = compared(lambda: run.run_epoch(next(epochs)), bare, device, sizes.rounds)
    speeds = {"steps_a_second": len(pairs) / took, "bare": len(pairs) / bare_took}
    details = speeds | {"seconds": took, "bare_seconds": bare_took, "steps": len(pairs)} | peak
    size = (
        f"{network.label}@{pixels.shape[-1]}, {config.batch_size} images, {responses.shape[1]:,} vertices, {precision}"
    )
    yield Figure(f"a step of stage 1, {size}: speed", "forward, backward and AdamW", 1 / ratio, details=details)


def _with_responses(folder: Path, sizes: Any) -> Subject:
    """A subject with image files and random responses of as many vertices as a hemisphere's pair has."""
    subject = write_images(folder, sizes.train_images, side=_SIDE)
    fmri = folder / "training_split" / "training_fmri"
    fmri.mkdir(parents=True)
    rng, n_vertices = np.random.default_rng(0), {"lh": sizes.vertices // 2, "rh": sizes.vertices - sizes.vertices // 2}
    for surface, n in n_vertices.items():
        np.save(fmri / f"{surface}_training_fmri.npy", rng.standard_normal((len(subject.train), n), dtype=np.float32))
    none = dict.fromkeys(n_vertices)
    return replace(
        subject,
        response_paths=response_files(folder),
        n_vertices=n_vertices,
        rois={surface: {} for surface in n_vertices},
        noise_ceiling=none,
        fsaverage=none,
    )


def _checkpoint(folder: Path, network: BackboneConfig) -> Checkpoint:
    key = CheckpointKey(
        stage="pretrain",
        subjects={},
        backbone=BackboneKey(name=network.label, weights="none", size=network.size or 0),
        transform={},
        timm="",
        start=StartKey(weights="", training=None),
        split=SPLIT,
        settings={},
    )
    return Checkpoint(folder, key, CheckpointFacts(label=network.label, origin="random weights"))


def decompositions(sizes: Any, device: str, folder: Path) -> Iterator[Figure]:
    """Eigenvectors on the device and on the CPU: where `heads.solvers.ridge.decomposed_on` should change over."""
    for n_rows in map(int, sizes.eigh_rows.split(",")):
        for dtype in (torch.float64, torch.float32):
            half = torch.randn(n_rows, n_rows, dtype=dtype, device=device)
            gram = half @ half.T

            def on_cpu(gram: torch.Tensor = gram) -> None:
                for part in torch.linalg.eigh(gram.cpu()):
                    part.to(device)

            ours, theirs, ratio = compared(partial(torch.linalg.eigh, gram), on_cpu, device, sizes.rounds)
            details = {"seconds": ours, "cpu_seconds": theirs, "computed_on_now": decomposed_on(gram).type}
            what = f"eigenvectors of {n_rows:,} rows, {str(dtype).removeprefix('torch.')}: times as fast"
            yield Figure(what, "the CPU, with copies there and back", 1 / ratio, details=details)


def copies(sizes: Any, device: str, folder: Path) -> Iterator[Figure]:
    """Copies from and to pinned memory, against those of pageable memory."""
    what = f"a copy of {sizes.copied_mb} MB"
    if device == "cpu":
        yield Figure(what, "a copy of pageable memory", None, note="a CPU copies nothing")
        return
    pageable = torch.ones(sizes.copied_mb * 250_000)
    locked, there = pinned(pageable, device), pageable.to(device)
    ways = {
        "to the device, from pinned memory": (
            partial(locked.to, device, non_blocking=True),
            partial(pageable.to, device),
        ),
        "to the host, into pinned memory": (lambda: to_host([there])(), there.cpu),
    }
    for way, (ours, theirs) in ways.items():
        took, pageable_took, ratio = compared(ours, theirs, device, sizes.rounds)
        gb = sizes.copied_mb / 1000
        details = {"gb_a_second": gb / took, "pageable": gb / pageable_took, "seconds": took}
        yield Figure(f"{what} {way}: times as fast", "a copy of pageable memory", 1 / ratio, details=details)


def main() -> None:
    sizes = options(
        __doc__,
        device=("auto", "auto"),
        backbone=("convnext_base", "test_resnet"),
        cached_images=(4096, 24),
        batch_size=(128, 8),
        images=(9841, 120),
        test_images=(159, 10),
        features=(2048, 32),
        vertices=(39548, 200),
        prior_images=(5000, 60),
        prior_vertices=(3000, 20),
        trained=("convnext_nano,convnext_base", "test_resnet"),
        train_images=(2048, 60),
        train_batch=(32, 8),
        size=(224, 64),
        eigh_rows=("256,512,1024,2048", "32,64"),
        copied_mb=(512, 1),
        rounds=(2, 1),
    )
    device = sizes.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu" if sizes.quick else "none"
    if device == "none":
        note = "no accelerator here: nothing measured"
        report([Figure("every stage on an accelerator", "bare loops on the same device", None, note=note)])
        return
    keep_freed_memory()
    trainings = {f"training of {name}": partial(training, name) for name in sizes.trained.split(",")}
    parts: dict[str, Part] = {"extraction": extraction, "exact heads": exact_heads, "heads under priors": priors}
    parts |= trainings | {"eigenvectors": decompositions, "copies": copies}
    figures, failed = [card(device)], []
    for name, part in parts.items():
        try:  # one part that fails costs the others nothing
            with tempfile.TemporaryDirectory() as folder:
                figures += part(sizes, device, Path(folder))
        except Exception:
            traceback.print_exc()
            failed.append(name)
            figures.append(Figure(name, "a bare loop", None, note="failed"))
    report(figures)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
