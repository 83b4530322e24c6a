"""Images x backbone -> feature store. A run that was killed goes on, and ends bit-equal to one that was not."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from featcache.backbone.extent import TIMM_SETTINGS, fit_of
from featcache.backbone.network import Backbone
from featcache.backbone.taps import Taps
from featcache.cache.keys import FeatureFacts, FeatureKey
from featcache.cache.pixels import find_pixels
from featcache.cache.sources import Source, choose_checkpoints, load_source
from featcache.cache.store import Store, create_store, list_stores, nearest, open_store, store_path
from featcache.config import ExtractConfig
from featcache.dataset.digests import id_digest, image_digest
from featcache.dataset.images import load_image
from featcache.dataset.subject import ImageSource, Subject
from featcache.machine.device import check_products, is_emulated, matrix_products, resolve_device, resolve_dtype
from featcache.machine.files import refuse_full_disk
from featcache.machine.memory import keep_freed_memory
from featcache.machine.prefetch import prefetch
from featcache.machine.progress import bar, say, size_of
from featcache.workdir import Workdir

_AHEAD = 2  # batches, at least, that are decoded before the model asks for them


@dataclass(frozen=True)
class Extracted:
    """One subject's feature store, and what it took to fill it.

    n_images, n_new : rows of the store, and those among them that this run computed
    """

    subject: str
    path: Path
    n_images: int
    n_new: int
    seconds: float


def extract(subjects: Sequence[Subject], config: ExtractConfig, work: Path | str) -> list[Extracted]:
    """Fill a feature store for every subject: rows are its training images, then its test images.

    A store is found again by what decides its rows (see `feature_key`), never by batch size, workers or paths.
    """
    work = Path(work)
    device = resolve_device(config.device)
    if device == "cpu":
        keep_freed_memory()
    check_products("dtype", config.dtype, device)
    config = replace(config, dtype=_resolve_dtype(config.dtype, device))
    choices = choose_checkpoints(subjects, config, work)
    done: list[Extracted] = []
    for number, (checkpoint, served) in enumerate(choices):
        source = load_source(checkpoint, config, device)
        if number == 0:  # the others have rows of the same size, unless their backbones differ
            _announce(source, [subject for _, its_subjects in choices for subject in its_subjects], work)
        with matrix_products(config.dtype):
            done += [_extract_subject(subject, source, config, work) for subject in served]
    return done


def _resolve_dtype(dtype: str, device: str) -> str:
    """The precision that is meant, said to the user where it was not named or will be slow."""
    resolved = resolve_dtype(dtype, device)
    if resolved != dtype:
        way_out = ", which this CPU multiplies; or --dtype float32" if resolved == "bfloat16" else ""
        say(f"arithmetic in {resolved}{way_out}")
    if is_emulated(resolved, device):
        say(f"--dtype {resolved}: no units for it were found on this CPU; expect it to be slow, or use --dtype auto")
    return resolved


def _announce(source: Source, subjects: Sequence[Subject], work: Path) -> None:
    """Say how large the cache will be. Raises StoreError if the disk is too small for it."""
    folder, per_image = Workdir(work).features, sum(row.n_bytes for row in source.rows.values())
    whole = per_image * sum(len(subject.image_ids) for subject in subjects)
    shapes = ", ".join(f"{name} {'x'.join(map(str, row.shape))}" for name, row in source.rows.items())
    say(f"{shapes}: {per_image / 1e3:.1f} kB an image, {size_of(whole)} in all")
    # a rerun needs no room for what is there
    stores = [store for store in list_stores(folder) if _reads_alike(FeatureKey.of(store), source)]
    stored = per_image * sum(min(store.committed.values()) for store in stores)
    refuse_full_disk(folder, max(whole - stored, 0))


def _reads_alike(key: FeatureKey, source: Source) -> bool:
    """Whether the rows of a store are of the same layers, images as large, and a backbone of the same name."""
    backbone = source.backbone
    taps = Taps(key.layers, dict(key.grids), key.pool)
    return (key.backbone, key.transform, taps) == (backbone.name, backbone.transform_settings, source.taps)


def feature_key(source: Source, config: ExtractConfig, subject: Subject, work: Path) -> FeatureKey:
    """Everything that decides the rows of a feature store."""
    backbone, taps = source.backbone, source.taps
    return FeatureKey(
        layers=taps.layers,
        grids=taps.grids,
        pool=taps.pool,
        subject=subject.name,
        images=image_digest(subject, work),
        image_ids=id_digest(subject),
        backbone=backbone.name,
        weights=backbone.digest,
        timm=timm.__version__,
        transform=backbone.transform_settings,
        dtype=config.dtype,
        fold=source.fold,
        fused=backbone.fused,
        code=backbone.code,
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
        with bar(f"{subject.name} {source.label}", n_images, "images", done) as advance, store.writing():
            _fill(store, images, source, config, advance)
    return Extracted(subject.name, store.path, n_images, n_images - done, time.perf_counter() - began)


def _find_or_create(subject: Subject, source: Source, config: ExtractConfig, work: Path) -> Store:
    folder, label = Workdir(work).features, f"{subject.name}-{source.label}"
    key = feature_key(source, config, subject, work)
    path = store_path(folder, label, key.to_json())
    if path.is_dir():
        return open_store(path)
    _explain_new(key, folder)
    facts = _facts(subject, source, config)
    return create_store(
        folder, label, key.to_json(), subject.image_ids, len(subject.train), source.rows, facts.to_json()
    )


def _explain_new(key: FeatureKey, folder: Path) -> None:
    """Say in what a new store differs from the nearest; another backbone or fold of its training needs no words."""
    keys = [(FeatureKey.of(store), store) for store in list_stores(folder)]
    same = (key.subject, key.backbone, key.fold)
    others = [store for other, store in keys if (other.subject, other.backbone, other.fold) == same]
    if miss := nearest(key.to_json(), others):
        changed = "; ".join(f"{name} is {ours}, was {theirs}" for name, (ours, theirs) in _in_words(key, *miss).items())
        say(f"{key.subject}: a new store, because nothing matches; nearest is {miss[0].name}: {changed}")
    if whole := next((store.name for store in others if _has_all(FeatureKey.of(store), key)), None):
        layers = ",".join(key.layers)
        say(f"{key.subject}: {whole} has these layers too; 'fit-heads --layers {layers}' reads them there")


def _has_all(other: FeatureKey, key: FeatureKey) -> bool:
    """Whether features have all layers of a key, on the same grids, and differ from it in nothing else."""
    grids = {layer: grid for layer, grid in other.grids.items() if layer in key.layers}
    pool = other.pool if grids else None
    return set(key.layers) <= set(other.layers) and replace(other, layers=key.layers, grids=grids, pool=pool) == key


def _in_words(key: FeatureKey, store: Store, changed: Mapping[str, tuple[Any, Any]]) -> Mapping[str, tuple[Any, Any]]:
    """Settings in which a key differs from that of a store; where the fit differs, not what timm has to do for it."""
    fits = fit_of(key.transform), fit_of(FeatureKey.of(store).transform)
    if fits[0] == fits[1]:
        return changed
    of_timm = {f"transform.{name}" for settings in TIMM_SETTINGS.values() for name in settings}
    return {"fit": fits} | {name: values for name, values in changed.items() if name not in of_timm}


def _facts(subject: Subject, source: Source, config: ExtractConfig) -> FeatureFacts:
    cuda = resolve_device(config.device) == "cuda"
    facts = FeatureFacts(
        origin=source.backbone.origin,
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if cuda else "cpu",
    )
    if source.checkpoint is None:
        return replace(facts, network=config.backbone.resolved_name, weights=config.backbone.resolved_weights)
    seen_ids = np.intersect1d(source.checkpoint.seen_ids, subject.image_ids).tolist()
    return replace(facts, checkpoint=source.checkpoint.name, seen_ids=tuple(seen_ids))


class BeyondFloat16Error(Exception):
    """A layer has values that float16 cannot hold."""


Reader = Callable[[Sequence[range]], Iterable[torch.Tensor]]  # (len(batch), 3, height, width) uint8 for each batch


def _fill(store: Store, images: Reader, source: Source, config: ExtractConfig, advance: Callable[[int], None]) -> None:
    """Compute and commit the rows that are missing.

    A layer that float16 cannot hold is written again as float32, from its first row: what is stored must not depend on
    where a run was interrupted.
    """
    while True:
        try:
            return _fill_arrays(store, images, source, config, advance)
        except BeyondFloat16Error as overflow:
            layer = str(overflow)
            say(f"{store.name}: {layer} has values beyond float16; it is stored as float32, from its first row")
            store.widen(layer)
            store = open_store(store.path)


def _fill_arrays(
    store: Store, images: Reader, source: Source, config: ExtractConfig, advance: Callable[[int], None]
) -> None:
    """Compute and commit the missing rows, or raise BeyondFloat16Error.

    Batches begin anew at every commit, whether or not the run was interrupted there: the sums inside a network depend
    on the shape of the batch, so only equal batches give equal bits.
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
            start = batch.stop - len(whole[layers[0]])
            # an array that is written again is behind the others, which have these rows already
            store.append({layer: whole[layer] for layer, n in store.committed.items() if n == start})
            rows = {layer: [] for layer in layers}
        advance(len(batch))


def _plan(start: int, stop: int, span: int, batch_size: int) -> list[range]:
    """Batches of rows that never cross a multiple of `span`."""
    spans = [range(first, min(first + span, stop)) for first in range(start, stop, span)]
    return [span[i : i + batch_size] for span in spans for i in range(0, len(span), batch_size)]


def _forward(source: Source, pixels: torch.Tensor, store: Store, dtype: str) -> dict[str, torch.Tensor]:
    """{array: rows on the CPU, as they are stored}. Raises BeyondFloat16Error."""
    dtypes = {layer: str(array.dtype) for layer, array in store.arrays.items()}
    return rows_of(source.backbone, pixels, [(source.taps, dtypes)], dtype, source.device)[0]


def rows_of(
    backbone: Backbone,
    pixels: torch.Tensor,
    wanted: Sequence[tuple[Taps, Mapping[str, str]]],
    dtype: str,
    device: str,
) -> list[dict[str, torch.Tensor]]:
    """{array: rows on the CPU, as stores have them} of each of some taps, in one pass of the network.

    pixels : (n_images, 3, height, width) as `backbone.pixels` gives them
    wanted : taps, and {array: type} of their rows as stored
    dtype : precision of the network

    Raises BeyondFloat16Error for values that float16 cannot hold.
    """
    precision = getattr(torch, dtype, torch.float32)  # TF32 is no type, but how CUDA multiplies float32
    with torch.inference_mode(), torch.autocast(device, precision, enabled=precision != torch.float32):
        images, (taps, *more) = backbone.normalise(pixels.to(device)), [taps for taps, _ in wanted]
        together = backbone.read_together(images, [taps, *more]) if more else [backbone.read(images, taps)]
        return [
            {layer: _stored(layer, values, dtypes[layer]).cpu() for layer, values in rows.items()}
            for rows, (_, dtypes) in zip(together, wanted, strict=True)
        ]


def _stored(layer: str, values: torch.Tensor, dtype: str) -> torch.Tensor:
    stored = values.to(getattr(torch, dtype))
    if dtype == "float16" and not stored.isfinite().all() and values.isfinite().all():
        raise BeyondFloat16Error(layer)
    return stored


def _reader(subject: Subject, backbone: Backbone, config: ExtractConfig, work: Path) -> Reader:
    """What gives the pixels of each batch: the cache of pixels, if it is whole, or the image files."""
    if (pixels := find_pixels(subject, backbone, work)) is not None:
        return lambda batches: (pixels.read(batch) for batch in batches)
    return lambda batches: _decoded(batches, subject.image_sources, backbone, config)


def _decoded(
    batches: Sequence[range], sources: Sequence[ImageSource], backbone: Backbone, config: ExtractConfig
) -> Iterator[torch.Tensor]:
    """The pixels of each batch in turn, decoded by threads while the model runs.

    Pillow lets go of the interpreter while it decodes and resizes, so threads run side by side, and nothing is copied
    between processes. Only a few batches are ever in memory.
    """
    depth = _AHEAD * config.batch_size + 2 * config.workers
    rows = (row for batch in batches for row in batch)
    images = prefetch(lambda row: backbone.pixels(load_image(sources[row])), rows, depth, config.workers)
    for batch in batches:
        yield torch.stack([next(images) for _ in batch])
