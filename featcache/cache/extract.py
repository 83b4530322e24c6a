"""Images x backbone -> feature store. Killed at any moment and run again, it ends bit-equal to a run that was not."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from featcache.backbone.checkpoint import FOLDER as CHECKPOINTS
from featcache.backbone.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, refuse_trained, usable
from featcache.backbone.fuse import fuse_batch_norms
from featcache.backbone.network import Backbone, load_backbone
from featcache.backbone.taps import Taps
from featcache.cache.pixels import find_pixels
from featcache.cache.store import Row, Store, create_store, list_stores, nearest, open_store, store_path
from featcache.config import ExtractConfig
from featcache.dataset.digests import digests, id_digest, image_digest
from featcache.dataset.images import load_image
from featcache.dataset.subject import Subject
from featcache.errors import CheckpointError
from featcache.machine.device import check_products, is_emulated, matrix_products, resolve_device, resolve_dtype
from featcache.machine.files import refuse_full_disk
from featcache.machine.memory import keep_freed_memory
from featcache.machine.prefetch import prefetch
from featcache.machine.progress import bar, say, size_of

FOLDER = "features.zarr"
_ROUNDING = 1e-4  # relative difference, of a layer, that many sums in float32 may leave
_AHEAD = 2  # batches decoded before the model asks for them, at the least


@dataclass(frozen=True)
class Extracted:
    """One subject's feature store, and what it took to fill it."""

    subject: str
    path: Path
    n_images: int
    n_new: int
    seconds: float


def extract(subjects: Sequence[Subject], config: ExtractConfig, work: Path) -> list[Extracted]:
    """Fill a feature store for every subject: rows are its training images, then its test images.

    A store is found again by what decides its rows (see `feature_key`), never by batch size, workers or paths.
    """
    device = resolve_device(config.device)
    if device == "cpu":
        keep_freed_memory()
    check_products("dtype", config.dtype, device)
    if (dtype := resolve_dtype(config.dtype, device)) != config.dtype:
        say(
            f"arithmetic in {dtype}"
            + (", which this CPU multiplies; or --dtype float32" if dtype == "bfloat16" else "")
        )
    if is_emulated(dtype, device):
        say(f"--dtype {dtype}: no units for it were found on this CPU; expect it to be slow, or use --dtype auto")
    config = replace(config, dtype=dtype)
    done: list[Extracted] = []
    sources = _sources(subjects, config, work)
    for number, (checkpoint, served) in enumerate(sources):
        backbone = _load(checkpoint, config, device)
        taps = backbone.taps(config.layers)
        source = Source(fused(backbone, taps, device), checkpoint, taps, rows_of(backbone, taps), device)
        if number == 0:  # the others have rows of the same size, unless their backbones differ
            _announce(source, [subject for _, those in sources for subject in those], work)
        with matrix_products(config.dtype):
            done += [_extract_subject(subject, source, config, work) for subject in served]
    return done


def fused(backbone: Backbone, taps: Taps, device: str) -> Backbone:
    """The backbone without the batch norms that its convolutions can take over, if every layer says the same."""
    model = fuse_batch_norms(backbone.model)
    if model is backbone.model:
        return backbone
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        images = torch.randn(2, *backbone.transform_settings["input_size"]).to(
            device, memory_format=torch.channels_last
        )
        pairs = zip(taps.read(backbone.model, images).values(), taps.read(model, images).values(), strict=True)
        same = all((ours - theirs).norm() <= _ROUNDING * ours.norm() for ours, theirs in pairs)
    return replace(backbone, model=model, fused=True) if same else backbone


def rows_of(backbone: Backbone, taps: Taps) -> dict[str, Row]:
    """{array: its row} of the layers that are read."""
    return stored_rows(backbone.shapes(taps))


def stored_rows(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Row]:
    """{array: its row} for shapes of rows. Layers with places are large and stored as float16, vectors as float32."""
    return {name: Row(shape, "float16" if len(shape) > 1 else "float32") for name, shape in shapes.items()}


def _announce(source: "Source", subjects: Sequence[Subject], work: Path) -> None:
    """Say how large the cache will be, and refuse a disk that is too small for it. Raises StoreError."""
    per_image, folder = sum(row.n_bytes for row in source.rows.values()), work / FOLDER
    whole = per_image * sum(len(subject.image_ids) for subject in subjects)
    grids = ", ".join(f"{name} {'x'.join(map(str, row.shape))}" for name, row in source.rows.items())
    say(f"{grids}: {per_image / 1e3:.1f} kB an image, {size_of(whole)} in all")
    ours = source.taps.key() | {
        "backbone": source.backbone.name,
        "transform": dict(source.backbone.transform_settings),
    }
    there = [store for store in list_stores(folder) if ours.items() <= store.key.items()]
    have = per_image * sum(min(store.committed.values()) for store in there)  # a rerun needs no room for what it left
    refuse_full_disk(folder, max(whole - have, 0))


@dataclass(frozen=True)
class Source:
    """A backbone that is ready to read images.

    checkpoint : where it was trained; None for one as its weights came
    taps, rows : what is read of it, and what a row of each array is
    """

    backbone: Backbone
    checkpoint: Checkpoint | None
    taps: Taps
    rows: dict[str, Row]
    device: str

    @property
    def fold(self) -> dict[str, Any] | None:
        """What the store's key says of the training; a backbone as its weights came saw none of the images."""
        one = self.checkpoint
        if one is None:
            return None
        mean = {"soup": len(one.key.mean_of)} if one.key.mean_of else {}
        return {"stage": one.key.stage, "training": one.training, **mean, **one.key.split.to_json()}


def _sources(
    subjects: Sequence[Subject], config: ExtractConfig, work: Path
) -> list[tuple[Checkpoint | None, list[Subject]]]:
    """Which backbones read whose images: checkpoints by name, each once, or the one backbone as its weights come."""
    if config.checkpoint == "none":
        return [(None, list(subjects))]
    if config.checkpoint != "auto":
        checkpoint = find_checkpoint(work, config.checkpoint)
        _refuse_other_backbone(checkpoint, config)
        checkpoint.refuse_other_tree({subject.name: digests(subject, work) for subject in subjects})
        return [(checkpoint, list(subjects))]
    known = [one for one in list_checkpoints(work) if config.backbone.admits(one.key.backbone.name)]
    served: dict[str, tuple[Checkpoint | None, list[Subject]]] = {}
    for subject in subjects if known else ():
        for checkpoint in usable(subject, known, digests(subject, work)):
            served.setdefault(checkpoint.name, (checkpoint, []))[1].append(subject)
    if served:
        say(f"{len(served)} checkpoints in {work / CHECKPOINTS}; --checkpoint none is the backbone before training")
        names = {subject.name for _, those in served.values() for subject in those}
        for subject in subjects:
            if subject.name not in names:
                say(f"{subject.name}: left out: no checkpoint was trained on it; train one, or use --checkpoint none")
    return [served[name] for name in sorted(served)] or [(None, list(subjects))]


def _refuse_other_backbone(checkpoint: Checkpoint, config: ExtractConfig) -> None:
    trained = checkpoint.key.backbone.name
    if not config.backbone.admits(trained):
        raise CheckpointError(
            checkpoint.path,
            expected=f"a checkpoint of {config.backbone.name}",
            found=f"one of {trained}",
            remedy=f"name --backbone {trained}, or another checkpoint",
        )


def _load(checkpoint: Checkpoint | None, config: ExtractConfig, device: str) -> Backbone:
    if checkpoint is not None:
        return checkpoint.backbone(device, config.backbone.size)
    refuse_trained(config.backbone.resolved_weights, "--checkpoint")
    if config.backbone.resolved_weights == "none":
        say(f"{config.backbone.resolved_name}: random weights, as asked; the scores will show it")
    return load_backbone(config.backbone, device)


def feature_key(source: Source, config: ExtractConfig, subject: Subject, work: Path) -> dict[str, Any]:
    """Everything that decides the rows of a feature store."""
    backbone = source.backbone
    return (
        source.taps.key()
        | {
            "kind": "features",
            "subject": subject.name,
            "images": image_digest(subject, work),
            "image_ids": id_digest(subject),
            "backbone": backbone.name,
            "weights": backbone.digest,
            "timm": timm.__version__,
            "transform": dict(backbone.transform_settings),
            "dtype": config.dtype,
            "fold": source.fold,
        }
        | ({"batch_norm": "folded"} if backbone.fused else {})
    )


def _extract_subject(subject: Subject, source: Source, config: ExtractConfig, work: Path) -> Extracted:
    store = _find_or_create(subject, source, config, work)
    n_images, began = len(store.image_ids), time.perf_counter()
    done = min(store.committed.values())
    if done == n_images:
        say(f"{subject.name}: already extracted, {store.path}")
    else:
        if done:
            say(f"{subject.name}: goes on after image {done} of {n_images}")
        images = _reader(subject, source.backbone, config, work)
        with bar(f"{subject.name} {_label(source)}", n_images, "images", done) as advance, store.writing():
            _fill(store, images, source, config, advance)
    return Extracted(subject.name, store.path, n_images, n_images - done, time.perf_counter() - began)


def _label(source: Source) -> str:
    fold = source.fold
    if not fold:
        return source.backbone.name
    return f"{source.backbone.name}-{fold['stage']}{'-soup' if 'soup' in fold else ''}-fold{fold['fold']}"


def _find_or_create(subject: Subject, source: Source, config: ExtractConfig, work: Path) -> Store:
    folder, label = work / FOLDER, f"{subject.name}-{_label(source)}"
    key = feature_key(source, config, subject, work)
    path = store_path(folder, label, key)
    if path.is_dir():
        return open_store(path)
    # another backbone, or another fold of its training, explains itself
    same = {name: key[name] for name in ("subject", "backbone", "fold")}
    others = [store for store in list_stores(folder) if same.items() <= store.key.items()]
    if miss := nearest(key, others):
        changed = "; ".join(f"{name} is {ours}, was {theirs}" for name, (ours, theirs) in miss[1].items())
        say(f"{subject.name}: a new store, because nothing matches; nearest is {miss[0].name}: {changed}")
    facts = {"origin": source.backbone.origin, "torch": torch.__version__, "device": device_name(config.device)}
    if source.checkpoint is not None:
        facts["checkpoint"] = source.checkpoint.name
        facts["seen_ids"] = np.intersect1d(source.checkpoint.seen_ids, subject.image_ids).tolist()
    return create_store(folder, label, key, subject.image_ids, len(subject.train), source.rows, facts)


def device_name(device: str) -> str:
    """What computed the rows: not part of the key, but worth knowing."""
    return torch.cuda.get_device_name() if resolve_device(device) == "cuda" else "cpu"


class _BeyondFloat16Error(Exception):
    """A layer has values that float16 cannot hold."""


def _fill(
    store: Store,
    images: "Reader",
    source: Source,
    config: ExtractConfig,
    advance: Callable[[int], None],
) -> None:
    """Compute and commit the rows that are missing.

    A layer that float16 cannot hold is written again as float32, from its first row: what is stored must not depend on
    where a run was interrupted.
    """
    while True:
        try:
            return _fill_arrays(store, images, source, config, advance)
        except _BeyondFloat16Error as overflow:
            layer = str(overflow)
            say(f"{store.name}: {layer} has values beyond float16; it is stored as float32, from its first row")
            store.widen(layer)
            store = open_store(store.path)


def _fill_arrays(
    store: Store,
    images: "Reader",
    source: Source,
    config: ExtractConfig,
    advance: Callable[[int], None],
) -> None:
    """Batches start anew at every commit, whether or not the run was interrupted there: the sums inside a network
    depend on the shape of the batch, so only equal batches give equal bits.
    """
    layers, stop = tuple(store.arrays), len(store.image_ids)
    span = max(store.chunk_rows(layer) for layer in layers)  # a multiple of the others: all are powers of two
    batches = _plan(min(store.committed.values()), stop, span, config.batch_size)
    rows: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    for batch, pixels in zip(batches, images(batches), strict=True):
        for layer, values in _forward(source, pixels, store, config.dtype).items():
            rows[layer].append(values)
        if batch.stop % span == 0 or batch.stop == stop:
            whole = {layer: torch.cat(rows.pop(layer)).numpy() for layer in layers}
            start = batch.stop - len(whole[layers[0]])  # an array that was written again is behind the others
            store.append({layer: whole[layer] for layer, n in store.committed.items() if n == start})
            rows = {layer: [] for layer in layers}
        advance(len(batch))


def _plan(start: int, stop: int, span: int, batch_size: int) -> list[range]:
    """Batches of rows that never cross a multiple of `span`."""
    spans = [range(first, min(first + span, stop)) for first in range(start, stop, span)]
    return [span[i : i + batch_size] for span in spans for i in range(0, len(span), batch_size)]


def _forward(source: Source, pixels: torch.Tensor, store: Store, dtype: str) -> dict[str, torch.Tensor]:
    """{array: rows on the CPU, as they are stored}. Raises _BeyondFloat16Error."""
    half, backbone = getattr(torch, dtype, torch.float32), source.backbone  # TF32 is no type, but how CUDA multiplies
    with torch.inference_mode(), torch.autocast(source.device, half, enabled=half != torch.float32):
        images = backbone.normalise(pixels.to(source.device))
        return {
            layer: _stored(layer, values, str(store.arrays[layer].dtype)).cpu()
            for layer, values in backbone.features(images, source.taps).items()
        }


def _stored(layer: str, values: torch.Tensor, dtype: str) -> torch.Tensor:
    stored = values.to(getattr(torch, dtype))
    if dtype == "float16" and not stored.isfinite().all() and values.isfinite().all():
        raise _BeyondFloat16Error(layer)
    return stored


Reader = Callable[[Sequence[range]], Iterator[torch.Tensor]]  # (len(batch), 3, height, width) uint8 for each batch


def _reader(subject: Subject, backbone: Backbone, config: ExtractConfig, work: Path) -> Reader:
    """Where the pixels come from: what training left, or the image files."""
    if (pixels := find_pixels(subject, backbone, work)) is not None:
        return lambda batches: (pixels.read(batch) for batch in batches)
    return lambda batches: _decoded(batches, subject.image_paths, backbone, config)


def _decoded(
    batches: Sequence[range], paths: Sequence[Path], backbone: Backbone, config: ExtractConfig
) -> Iterator[torch.Tensor]:
    """The images of each batch in turn, decoded by threads while the model runs.

    Pillow lets go of the interpreter while it decodes and resizes, so threads do, and nothing is copied between
    processes. Only a few batches are ever in memory.
    """
    depth = _AHEAD * config.batch_size + 2 * config.workers
    rows = (row for batch in batches for row in batch)
    images = prefetch(lambda row: _decode(paths[row], backbone), rows, depth, config.workers)
    for batch in batches:
        yield torch.stack([next(images) for _ in batch])


def _decode(path: Path, backbone: Backbone) -> torch.Tensor:
    return backbone.pixels(load_image(path))
