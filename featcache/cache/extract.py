"""Images x backbone -> feature store. A run that was killed goes on, and ends bit-equal to one that was not.

Rows that another store has of the same images are taken from there (see `featcache.cache.known_rows`).
"""

import gc
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from featcache.backbone.checkpoint import prune_backbone
from featcache.backbone.extent import TIMM_SETTINGS, fit_of
from featcache.backbone.network import Backbone, say_how_it_reads
from featcache.backbone.taps import Taps
from featcache.cache.forward import BeyondFloat16Error, Rows, as_stored, start_rows
from featcache.cache.keys import FeatureFacts, FeatureKey
from featcache.cache.known_rows import KnownRows, LostRowsError, find_known
from featcache.cache.pixels import cache_pixels, find_pixels
from featcache.cache.sources import Source, choose_checkpoints, load_source
from featcache.cache.store import (
    NotFiniteError,
    Store,
    create_store,
    list_stores,
    nearest,
    open_store,
    store_path,
)
from featcache.config import ExtractConfig, settings_key
from featcache.dataset.image_lists import ImageList
from featcache.dataset.images import load_image
from featcache.dataset.subject import ImageSource, Subject, listed
from featcache.errors import BackboneError, ConfigError, StoreError
from featcache.machine.device import (
    check_products,
    is_emulated,
    matrix_products,
    network_dtype,
    pinned,
    resolve_device,
)
from featcache.machine.files import refuse_full_disk
from featcache.machine.memory import keep_freed_memory
from featcache.machine.prefetch import afterwards, prefetch
from featcache.machine.progress import bar, say, size_of
from featcache.workdir import Workdir

_AHEAD = 2  # batches, at least, that are decoded before the model asks for them
_READERS = 4  # threads, at most, that read decoded images
_BEHIND = 8  # batches, at most, that are computed before the rows of earlier ones are written


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
            say_how_it_reads(source.backbone, checkpoint is not None)
            _announce(source, [subject for _, its_subjects in choices for subject in its_subjects], work)
        with matrix_products(config.dtype):
            fitting = _fitting(source, config)
            if config.compile and not all(_is_whole(subject, source, fitting, work) for subject in served):
                source = _compiled(source, fitting)
            done += [_extract_subject(subject, source, fitting, work) for subject in served]
        if config.prune and checkpoint is not None and (removed := prune_backbone(checkpoint)):
            say(f"{checkpoint.path.name}: its backbone, {size_of(removed)}, was removed; its heads stay")
    return done


@dataclass(frozen=True)
class ExtractPart:
    """The images of one subject, read by one backbone.

    config : with the one checkpoint, or none
    inputs : what decides the rows, as JSON has it, and is the same on every machine
    """

    subjects: tuple[Subject]
    config: ExtractConfig
    inputs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Subject, and checkpoint or backbone."""
        network = self.config.backbone.label if self.config.checkpoint == "none" else Path(self.config.checkpoint).name
        return f"{self.subjects[0].name} {network}"


def extract_parts(subjects: Sequence[Subject], config: ExtractConfig, work: Path) -> list[ExtractPart]:
    """What `extract` does, in parts that share nothing but files; `extract` does each. No network is loaded."""
    parts = []
    for checkpoint, served in choose_checkpoints(subjects, config, work):
        if checkpoint is None:
            one = replace(config, checkpoint="none")
        else:
            one = replace(config, checkpoint=checkpoint.name) if config.checkpoint == "auto" else config
        trained = None if checkpoint is None else [checkpoint.name, checkpoint.facts.weights]
        for subject in served:
            images = ImageList.of(subject, work).key
            inputs = {"subject": subject.name, **images, "checkpoint": trained, "settings": settings_key(one)}
            parts.append(ExtractPart((subject,), one, inputs))
    return parts


def _is_whole(subject: Subject, source: Source, config: ExtractConfig, work: Path) -> bool:
    """Whether the features of a subject are there."""
    path = _path(subject, source, feature_key(source, config, ImageList.of(subject, work)), work)
    return path.is_dir() and open_store(path).complete


def _path(subject: Subject, source: Source, key: FeatureKey, work: Path) -> Path:
    return store_path(Workdir(work).features, _label(subject, source), key.to_json())


def _label(subject: Subject, source: Source) -> str:
    return f"{subject.name}-{source.label}"


def _resolve_dtype(dtype: str, device: str) -> str:
    """The precision that is meant, said to the user where it was not named, is less than it seems, or will be slow."""
    resolved = network_dtype(dtype, device)
    if resolved != dtype:
        way_out = f", which this {device.upper()} multiplies; or --dtype float32" if resolved != "float32" else ""
        say(f"arithmetic in {resolved}{way_out}")
    if resolved == "tf32":
        say("--dtype tf32: float32, of which products and convolutions read 10 bits behind the point")
    if is_emulated(resolved, device):
        say(f"--dtype {resolved}: no units for it were found on this CPU; expect it to be slow, or use --dtype auto")
    return resolved


def _fitting(source: Source, config: ExtractConfig) -> ExtractConfig:
    """The settings with the largest batch that the device's memory holds, halved from what was asked for; said."""
    if source.device == "cpu":
        return config
    backbone, dtypes = source.backbone, {name: row.dtype for name, row in source.rows.items()}
    gc.collect()  # the network before its batch norms were fused
    n_before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    while True:
        try:
            torch.cuda.reset_peak_memory_stats()
            shape, dtype = backbone.transform_settings["input_size"], getattr(torch, backbone.pixel_dtype)
            pixels = torch.zeros(config.batch_size, *shape, dtype=dtype, device=source.device)
            start_rows(backbone, pixels, [(source.taps, dtypes)], config.dtype, source.device)
        except torch.OutOfMemoryError:
            pass  # what it took is free once this block has ended
        else:
            taken = torch.cuda.max_memory_allocated() - n_before
            batch = f"a batch of {config.batch_size} images takes {size_of(taken)} on the device"
            say(f"{source.label}: {size_of(n_before)} of weights, {batch}, where {size_of(free)} are free")
            return config
        config = _halved(config, source)


def _compiled(source: Source, config: ExtractConfig) -> Source:
    return replace(source, backbone=source.backbone.compiled(source.taps, config.batch_size, config.dtype))


def _halved(config: ExtractConfig, source: Source) -> ExtractConfig:
    """Settings with half the batch, said. Raises ConfigError where the device's memory is too small for one image."""
    torch.cuda.empty_cache()
    if config.batch_size == 1:
        raise ConfigError(
            "--batch-size 1",
            expected=f"memory of the device for an image of {source.backbone.transform_settings['input_size'][-1]} px",
            found=f"too little, of which {size_of(torch.cuda.mem_get_info()[0])} are free",
            remedy="end what else runs on the device, or use a smaller --size or --device cpu",
        )
    smaller = replace(config, batch_size=config.batch_size // 2)
    say(
        f"{source.label}: the device's memory is too small for {config.batch_size} images; {smaller.batch_size} a batch"
    )
    return smaller


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


def feature_key(source: Source, config: ExtractConfig, images: ImageList) -> FeatureKey:
    """Everything that decides the rows of a feature store."""
    backbone, taps = source.backbone, source.taps
    return FeatureKey(
        layers=taps.layers,
        grids=taps.grids,
        pool=taps.pool,
        subject=images.subject,
        **images.key,
        backbone=backbone.name,
        weights=backbone.digest,
        timm=timm.__version__,
        transform=backbone.transform_settings,
        dtype=config.dtype,
        fold=source.fold,
        fused=backbone.fused,
        code={**backbone.code, **taps.code},
    )


def _extract_subject(subject: Subject, source: Source, config: ExtractConfig, work: Path) -> Extracted:
    images = ImageList.of(subject, work)
    key = feature_key(source, config, images)
    folder, path = Workdir(work).features, _path(subject, source, key, work)
    store = open_store(path) if path.is_dir() else None
    n_images, began, n_new = len(images.ids), time.perf_counter(), 0
    done = 0 if store is None else min(store.committed.values())
    if done == n_images:
        say(f"{subject.name}: already extracted, {path}")
    else:
        known = find_known(folder, key.to_json(), images)
        _explain(key, known, done, work)
        # this may refuse --image-cache, which must not leave a store
        reader = _reader(subject, source.backbone, config, work, len(known.missing(range(done, n_images))))
        if store is None:
            facts = _facts(subject, source, config).to_json()
            label, n_train = _label(subject, source), len(subject.train)
            store = create_store(folder, label, key.to_json(), subject.image_ids, n_train, source.rows, facts)
        with bar(f"{subject.name} {source.label}", n_images, "images", done) as advance, store.writing():
            store = open_store(path)  # as the writer before this one left it
            n_new = _fill(store, reader, source, config, known, advance)
    return Extracted(subject.name, path, n_images, n_new, time.perf_counter() - began)


def _explain(key: FeatureKey, known: KnownRows, done: int, work: Path) -> None:
    """Say where an interrupted run goes on, which rows are known, or why there is a new store."""
    n_images = len(known.rows)
    if done:
        say(f"{key.subject}: goes on after image {done} of {n_images}")
    if len(known):
        n_missing = len(known.missing(range(done, n_images)))
        found = f"{n_images - done - n_missing} of {n_images - done} images are in {listed(known.sources)}"
        say(f"{key.subject}: {found}; {n_missing} to compute")
    if not done and key.subject not in known.subjects:
        _explain_new(key, Workdir(work).features)


def _explain_new(key: FeatureKey, folder: Path) -> None:
    """Say in what a new store differs from the nearest; another backbone or fold of its training needs no words."""
    keys = [(FeatureKey.of(store), store) for store in list_stores(folder)]
    same = (key.subject, key.backbone, key.fold)
    others = [store for other, store in keys if (other.subject, other.backbone, other.fold) == same and other != key]
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
    """Settings in which a key differs from that of a store; not what comes with another one of them.

    With other layers come their grids, and whether any is pooled; with another fit, what timm has to do for it.
    """
    if "layers" in changed:
        ours, theirs = (",".join(names) for names in changed["layers"])
        of_layers = {name for name, values in changed.items() if name.startswith(("grids.", "pool")) and None in values}
        rest = {name: values for name, values in changed.items() if name not in of_layers | {"layers"}}
        changed = {"layers": (ours, theirs), **rest}
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
        batch_size=config.batch_size,
        compiled=source.backbone.is_compiled or None,
    )
    if source.checkpoint is None:
        return replace(facts, network=config.backbone.resolved_name, weights=config.backbone.resolved_weights)
    seen_ids = np.intersect1d(source.checkpoint.seen_ids, subject.image_ids).tolist()
    return replace(facts, checkpoint=source.checkpoint.name, seen_ids=tuple(seen_ids))


Reader = Callable[[Sequence[Sequence[int]]], Iterable[torch.Tensor]]  # (len(batch), 3, height, width) for each batch


def _fill(
    store: Store,
    images: Reader,
    source: Source,
    config: ExtractConfig,
    known: KnownRows,
    advance: Callable[[int], None],
) -> int:
    """Compute or take, and commit the rows that are missing; returns how many images were computed.

    A layer that float16 cannot hold is written again as float32, from its first row: what is stored must not depend on
    where a run was interrupted. A known row that turns out to be damaged is computed. Where the memory of the device is
    too small for a batch, batches are half as large from the last commit on.
    """
    computed: set[int] = set()
    shown = _Shown(min(store.committed.values()), advance)
    while True:
        try:
            shown.set(min(store.committed.values()))
            _fill_arrays(store, images, source, config, known.held_as(store), shown.add, computed)
            return len(computed)
        except torch.OutOfMemoryError:
            pass  # what it took is free once this block has ended
        except BeyondFloat16Error as overflow:
            layer = str(overflow)
            say(f"{store.name}: {layer} has values beyond float16; it is stored as float32, from its first row")
            store.widen(layer)
            store = open_store(store.path)
            continue
        except NotFiniteError as error:
            remedy = "use other weights" if config.dtype == "float32" else "use --dtype float32, or other weights"
            raise _without_empty(store, error, remedy) from error
        except LostRowsError as lost:
            say(f"{lost.why.where} has {lost.why.found}; its rows are computed")
            known = lost.known
            continue
        config = _halved(config, source)
        if config.compile:
            source = _compiled(source, config)


def _without_empty(store: Store, error: NotFiniteError, remedy: str) -> StoreError:
    """The mistake with its remedy; a store that has no row yet, and can get none, is removed."""
    if not any(store.committed.values()):
        shutil.rmtree(store.path)
    return StoreError(error.where, expected=error.expected, found=error.found, remedy=remedy)


class _Shown:
    """Number of images that a bar shows as done."""

    def __init__(self, n_done: int, advance: Callable[[int], None]) -> None:
        self._n_done, self._advance = n_done, advance

    def add(self, n: int) -> None:
        """Show `n` more."""
        self._n_done += n
        self._advance(n)

    def set(self, n_done: int) -> None:
        """Show so many: fewer than before, where some are computed again."""
        self.add(n_done - self._n_done)


def _fill_arrays(
    store: Store,
    images: Reader,
    source: Source,
    config: ExtractConfig,
    known: KnownRows,
    advance: Callable[[int], None],
    computed: set[int],
) -> None:
    """Compute and commit the missing rows, or raise BeyondFloat16Error or LostRowsError.

    Batches begin anew at every commit, whether or not the run was interrupted there.

    computed : rows of images that were computed; those of this run are added
    """
    stop, span = len(store.image_ids), store.commit_rows
    spans = [range(first, min(first + span, stop)) for first in range(min(store.committed.values()), stop, span)]
    parts = [_Part(store, known, rows) for rows in spans]
    batches = [_batches(part.missing, config.batch_size) for part in parts]
    pixels = iter(images([batch for of_span in batches for batch in of_span]))
    with afterwards(_BEHIND) as then:
        for part, rows, of_span in zip(parts, spans, batches, strict=True):
            for batch in of_span:
                then(partial(part.take, _forward(source, next(pixels), store, config)))
                computed.update(batch)
                advance(len(batch))
            then(part.write)
            advance(len(rows) - sum(map(len, of_span)))


class _Part:
    """The rows of one commit: taken as they come from the device, then written and committed."""

    def __init__(self, store: Store, known: KnownRows, rows: range) -> None:
        self._store, self._known, self._rows = store, known, rows
        self._values: dict[str, list[np.ndarray]] = {layer: [] for layer in store.arrays}
        # an array that is written again is behind the others, which have these rows already
        self._behind = [layer for layer, n in store.committed.items() if n <= rows.start]
        self._lost = [layer for layer in self._behind if not store.keeps(layer, rows)]

    @property
    def missing(self) -> list[int]:
        """Rows whose images have to be read."""
        return self._known.missing(self._rows) if self._lost else []

    def take(self, arrive: Callable[[], Rows]) -> None:
        """Wait for the rows of a batch. Raises BeyondFloat16Error."""
        for layer, of_batch in arrive().items():
            self._values[layer].append(of_batch.numpy())

    def write(self) -> None:
        """Write and commit all rows. Raises BeyondFloat16Error or LostRowsError for what is known, StoreError."""
        for layer in self._lost:
            whole = np.concatenate(self._values[layer]) if self._values[layer] else None
            self._known.write(self._store, layer, self._rows, whole, as_stored)
        self._store.commit(dict.fromkeys(self._behind, self._rows.stop))


def _batches(rows: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def _forward(source: Source, pixels: torch.Tensor, store: Store, config: ExtractConfig) -> Callable[[], Rows]:
    """Start a pass; the function that gives {array: rows in main memory, as they are stored}."""
    dtypes = {layer: str(array.dtype) for layer, array in store.arrays.items()}
    arrive = start_rows(
        source.backbone, pixels, [(source.taps, dtypes)], config.dtype, source.device, config.batch_size
    )
    return lambda: arrive()[0]


def _reader(subject: Subject, backbone: Backbone, config: ExtractConfig, work: Path, n_missing: int) -> Reader:
    """What gives the pixels of each batch: the cache of pixels, if it is whole or to be made, or the image files.

    n_missing : images to read; for a few, no cache is made of all
    """
    device = resolve_device(config.device)
    cached = find_pixels(subject, backbone, work)
    if cached is None and config.image_cache and 2 * n_missing >= len(subject.image_ids):
        (cached,) = cache_pixels([subject], backbone, work, config.image_cache, config.workers)
    if cached is None:
        return lambda batches: _decoded(batches, subject.image_sources, backbone, config, device)
    read, threads = cached.read, min(config.workers, _READERS)
    return lambda batches: prefetch(lambda batch: pinned(read(batch), device), batches, 2 * threads, threads)


def _decoded(
    batches: Sequence[Sequence[int]],
    sources: Sequence[ImageSource],
    backbone: Backbone,
    config: ExtractConfig,
    device: str,
) -> Iterator[torch.Tensor]:
    """The pixels of each batch in turn, decoded by threads while the model runs.

    Pillow lets go of the interpreter while it decodes and resizes, so threads run side by side, each into its place in
    the batch, and nothing is copied between processes. Only a few batches are ever in memory.
    """
    depth = _AHEAD * config.batch_size + 2 * config.workers
    shape, dtype = backbone.transform_settings["input_size"], getattr(torch, backbone.pixel_dtype)

    def places() -> Iterator[tuple[torch.Tensor, int, int]]:
        for batch in batches:
            empty = torch.empty(len(batch), *shape, dtype=dtype, memory_format=torch.channels_last)
            pixels = pinned(empty, device)
            yield from ((pixels, place, row) for place, row in enumerate(batch))

    def decode(where: tuple[torch.Tensor, int, int]) -> torch.Tensor:
        pixels, place, row = where
        image = backbone.pixels(load_image(sources[row]))
        if image.shape != pixels.shape[1:]:  # which would be spread over the place of the image
            raise BackboneError(
                backbone.name,
                expected=f"a transform that gives {tuple(shape)} of every image",
                found=f"{tuple(image.shape)} of {sources[row]}",
                remedy="correct the transform",
            )
        pixels[place] = image
        return pixels

    images = prefetch(decode, places(), depth, config.workers)
    for batch in batches:
        yield [next(images) for _ in batch][-1]
