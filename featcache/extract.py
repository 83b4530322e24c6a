"""Images x backbone -> feature store. Killed at any moment and run again, it ends bit-equal to a run that was not."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from featcache.backbone import Backbone, load_backbone
from featcache.challenge import Subject
from featcache.config import ExtractConfig, fingerprint
from featcache.device import keep_freed_memory, resolve_device
from featcache.errors import BackboneError
from featcache.images import ContentIndex, load_image
from featcache.progress import bar, say
from featcache.store import Store, create_store, list_stores, nearest, open_store, store_path

FOLDER = "features.zarr"
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

    A store is found again by what decides its rows (see `feature_recipe`), never by batch size, workers or paths.
    """
    device = resolve_device(config.device)
    if device == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: on recent GPUs torch would round products to TF32
    backbone = load_backbone(config.backbone, device)
    if config.backbone.weights == "none":
        say(f"{backbone.name}: random weights, as asked; the scores will show it")
    columns = probe(backbone, config.layers, device)
    return [_extract_subject(subject, backbone, config, columns, device, work) for subject in subjects]


def image_digest(subject: Subject, work: Path) -> str:
    """One digest of a subject's image contents, in row order."""
    return ContentIndex(work / "index" / f"{subject.name}.json").digest(subject.image_paths)


def feature_recipe(backbone: Backbone, config: ExtractConfig, subject: Subject, work: Path) -> dict[str, Any]:
    """Everything that decides the rows of a feature store."""
    return {
        "kind": "features",
        "subject": subject.name,
        "images": image_digest(subject, work),
        "image_ids": fingerprint({"ids": subject.image_ids.tolist(), "n_train": len(subject.train)}),
        "backbone": backbone.name,
        "weights": backbone.digest,
        "timm": timm.__version__,
        "transform": dict(backbone.transform_recipe),
        "layers": list(config.layers),
        "dtype": config.dtype,
        "fold": None,  # of the fine-tuned checkpoint; a frozen backbone saw none of the images
    }


def probe(backbone: Backbone, layers: tuple[str, ...], device: str) -> dict[str, int]:
    """{layer: number of features}, from one empty image. Raises BackboneError if the network cannot take its size."""
    size = backbone.transform_recipe["input_size"]
    try:
        with torch.inference_mode():
            outputs = backbone.features(torch.zeros(1, *size, device=device), layers)
    except (RuntimeError, AssertionError, ValueError) as error:
        why = str(error).splitlines()[0][:120]
        raise BackboneError(
            f"--size: expected a size that {backbone.name} can take; found {size[-1]} ({why}); "
            "choose another, such as the default"
        ) from error
    return {layer: rows.shape[1] for layer, rows in outputs.items()}


def _extract_subject(
    subject: Subject, backbone: Backbone, config: ExtractConfig, columns: dict[str, int], device: str, work: Path
) -> Extracted:
    store = _find_or_create(subject, backbone, config, columns, work)
    n_images, began = len(store.image_ids), time.perf_counter()
    done = min(store.committed.values())
    if done == n_images:
        say(f"{subject.name}: already extracted, {store.path}")
    else:
        if done:
            say(f"{subject.name}: goes on after image {done} of {n_images}")
        with bar(f"{subject.name} {backbone.name}", n_images, "images", done) as advance, store.writing():
            _fill(store, subject.image_paths, backbone, config, device, advance)
    return Extracted(subject.name, store.path, n_images, n_images - done, time.perf_counter() - began)


def _find_or_create(
    subject: Subject, backbone: Backbone, config: ExtractConfig, columns: dict[str, int], work: Path
) -> Store:
    folder, label = work / FOLDER, f"{subject.name}-{backbone.name}"
    recipe = feature_recipe(backbone, config, subject, work)
    path = store_path(folder, label, recipe)
    if path.is_dir():
        return open_store(path)
    same = {"subject": subject.name, "backbone": backbone.name}  # another backbone explains itself
    others = [store for store in list_stores(folder) if same.items() <= store.recipe.items()]
    if miss := nearest(recipe, others):
        changed = "; ".join(f"{name} is {ours}, was {theirs}" for name, (ours, theirs) in miss[1].items())
        say(f"{subject.name}: a new store, because nothing matches; nearest is {miss[0].name}: {changed}")
    facts = {"origin": backbone.origin, "torch": torch.__version__, "device": device_name(config.device)}
    return create_store(folder, label, recipe, subject.image_ids, len(subject.train), columns, facts)


def device_name(device: str) -> str:
    """What computed the rows: not part of the key, but worth knowing."""
    return torch.cuda.get_device_name() if resolve_device(device) == "cuda" else "cpu"


def _fill(
    store: Store,
    paths: Sequence[Path],
    backbone: Backbone,
    config: ExtractConfig,
    device: str,
    advance: Callable[[int], None],
) -> None:
    """Compute and commit the rows that are missing.

    Batches start anew at every commit, whether or not the run was interrupted there: the sums inside a network
    depend on the shape of the batch, so only equal batches give equal bits.
    """
    layers = tuple(store.arrays)
    span = max(store.chunk_rows(layer) for layer in layers)  # a multiple of the others: all are powers of two
    batches = _plan(min(store.committed.values()), len(paths), span, config.batch_size)
    rows: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    for batch, images in zip(batches, _decoded(batches, paths, backbone, config), strict=True):
        for layer, values in _forward(backbone, images.to(device), layers, config.dtype).items():
            rows[layer].append(values)
        if batch.stop % span == 0 or batch.stop == len(paths):
            store.append({layer: torch.cat(rows.pop(layer)).numpy() for layer in layers})
            rows = {layer: [] for layer in layers}
        advance(len(batch))


def _plan(start: int, stop: int, span: int, batch_size: int) -> list[range]:
    """Batches of rows that never cross a multiple of `span`."""
    spans = [range(first, min(first + span, stop)) for first in range(start, stop, span)]
    return [span[i : i + batch_size] for span in spans for i in range(0, len(span), batch_size)]


def _forward(backbone: Backbone, images: torch.Tensor, layers: tuple[str, ...], dtype: str) -> dict[str, torch.Tensor]:
    low = dtype != "float32"
    with torch.inference_mode(), torch.autocast(images.device.type, getattr(torch, dtype), enabled=low):
        return {layer: values.float().cpu() for layer, values in backbone.features(images, layers).items()}


def _decoded(
    batches: Sequence[range], paths: Sequence[Path], backbone: Backbone, config: ExtractConfig
) -> Iterator[torch.Tensor]:
    """(len(batch), 3, height, width) for each batch in turn, decoded by threads while the model runs.

    Pillow lets go of the interpreter while it decodes and resizes, so threads do, and nothing is copied between
    processes. Only a few batches are ever in memory.
    """
    ahead = _AHEAD + 2 * config.workers // config.batch_size
    waiting: deque[list[Future[torch.Tensor]]] = deque()
    pool = ThreadPoolExecutor(config.workers)
    try:
        for batch in batches:
            waiting.append([pool.submit(_load, paths[row], backbone) for row in batch])
            if len(waiting) > ahead:
                yield torch.stack([image.result() for image in waiting.popleft()])
        while waiting:
            yield torch.stack([image.result() for image in waiting.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)


def _load(path: Path, backbone: Backbone) -> torch.Tensor:
    return backbone.transform(load_image(path))
