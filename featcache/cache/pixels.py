"""Images once: decoded, resized and cropped as the network reads them, in one uint8 file a subject and size.

An epoch of training reads rows of that file and never decodes an image again; `extract` reads them too where they are
there. Rows lie in the file as they come out of the transform, one image after the other, so that any of them is one
contiguous read: (n_images, height, width, 3), the row order of every store.
"""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from featcache.backbone.network import Backbone
from featcache.config import fingerprint
from featcache.dataset.digests import image_digest
from featcache.dataset.images import load_image
from featcache.dataset.subject import Subject
from featcache.errors import StoreError
from featcache.machine.files import only_writer, replace_json
from featcache.machine.progress import bar, say

FOLDER = "pixels"
_COMMIT = 256  # images between commits: what an interruption can cost


@dataclass(frozen=True)
class Pixels:
    """The pixels of one subject's images, memory-mapped.

    array : (n_images, height, width, 3) uint8, training images and then test images
    """

    path: Path
    array: np.ndarray

    def read(self, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """(len(rows), 3, height, width) uint8, in the memory format channels_last."""
        return torch.from_numpy(np.array(self.array[rows])).permute(0, 3, 1, 2)


def find_pixels(subject: Subject, backbone: Backbone, work: Path) -> Pixels | None:
    """The subject's pixels as this backbone reads them, if they are there and whole."""
    path = _path(subject, backbone, work)
    if _committed(path) < len(subject.image_ids):
        return None
    _record(path).touch()  # what was used last is removed last
    return Pixels(path, np.load(path, mmap_mode="r"))


def cache_pixels(
    subjects: Sequence[Subject], backbone: Backbone, work: Path, limit_gb: float, workers: int
) -> list[Pixels]:
    """The pixels of every subject, made where they are missing; an interrupted run goes on where it stopped.

    Raises StoreError where they would need more than `limit_gb`, 10^9 bytes for everything in the folder, or more than
    the disk has. Pixels of other sizes or images are removed, those not used for longest first, to stay below it.
    """
    with only_writer(work / FOLDER, wait=True):
        return _cache(subjects, backbone, work, limit_gb, workers)


def _cache(subjects: Sequence[Subject], backbone: Backbone, work: Path, limit_gb: float, workers: int) -> list[Pixels]:
    paths = [_path(subject, backbone, work) for subject in subjects]
    sizes = [len(subject.image_ids) * _bytes_per_image(backbone) for subject in subjects]
    every = zip(paths, sizes, subjects, strict=True)
    missing = [(path, size, subject) for path, size, subject in every if _committed(path) < len(subject.image_ids)]
    if missing:
        new = sum(size for path, size, _ in missing if not path.exists())
        _make_room(work / FOLDER, paths, sum(sizes), new, limit_gb)
        size = backbone.transform_settings["input_size"][-1]
        say(f"images at {size} px, once: {sum(sizes) / 1e9:.2f} GB in {work / FOLDER} (at most {limit_gb:g} GB)")
    for path, _, subject in missing:
        _fill(path, subject, backbone, workers)
    for path in paths:
        _record(path).touch()
    return [Pixels(path, np.load(path, mmap_mode="r")) for path in paths]


def _path(subject: Subject, backbone: Backbone, work: Path) -> Path:
    """Named by all that decides the pixels: contents, sizes and crop, but not what is done to numbers afterwards."""
    crop = dict(backbone.transform_settings)
    if crop["crop_mode"] != "border":  # which pads with the mean
        del crop["mean"]
    del crop["std"]
    key = {"images": image_digest(subject, work), "crop": crop}
    size = backbone.transform_settings["input_size"][-1]
    return work / FOLDER / f"{subject.name}-{size}-{fingerprint(key)}.npy"


def _bytes_per_image(backbone: Backbone) -> int:
    return int(np.prod(backbone.transform_settings["input_size"]))


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


def _committed(path: Path) -> int:
    """Images that are there for good."""
    try:
        record = json.loads(_record(path).read_text())
        return int(record["images"]) if path.stat().st_size == record["bytes"] else 0
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: they are made again
        return 0


def _fill(path: Path, subject: Subject, backbone: Backbone, workers: int) -> None:
    channels, height, width = backbone.transform_settings["input_size"]
    shape = (len(subject.image_ids), height, width, channels)
    done = _committed(path)
    if not done:
        _record(path).unlink(missing_ok=True)  # of a file that was lost: it must not speak for this one
        _create(path, shape)
    array = np.lib.format.open_memmap(path, mode="r+")

    def fill(row: int) -> None:
        array[row] = backbone.pixels(load_image(subject.image_paths[row])).permute(1, 2, 0).numpy()

    with ThreadPoolExecutor(workers) as pool, bar(f"{subject.name} pixels", len(array), "images", done) as advance:
        for start in range(done, len(array), _COMMIT):
            rows = range(start, min(start + _COMMIT, len(array)))
            for _ in pool.map(fill, rows):
                advance(1)
            array.flush()
            replace_json(_record(path), {"images": rows.stop, "bytes": path.stat().st_size})


def _create(path: Path, shape: tuple[int, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    try:
        with path.open("r+b") as file:  # claim the disk now: a full one would end a write to a memory map by a signal
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # a file system that cannot promise room
        path.unlink()
        raise _no_room(path.parent, int(np.prod(shape))) from error


def _no_room(folder: Path, n_bytes: int) -> StoreError:
    return StoreError(
        folder,
        expected=f"{n_bytes / 1e9:.1f} GB of free disk for the images",
        found=f"{shutil.disk_usage(folder).free / 1e9:.1f} GB",
        remedy="make room, lower --size, or choose another --work",
    )


def _make_room(folder: Path, needed: Sequence[Path], total: int, new: int, limit_gb: float) -> None:
    if total > limit_gb * 1e9:
        raise StoreError(
            folder,
            expected=f"the images to fit into --image-cache {limit_gb:g} GB",
            found=f"{total / 1e9:.1f} GB of them at this size",
            remedy="raise it, lower --size, or choose fewer subjects",
        )
    others = sorted(set(folder.glob("*.npy")) - set(needed), key=lambda path: _used(path))
    while others and total + sum(path.stat().st_size for path in others) > limit_gb * 1e9:
        oldest = others.pop(0)
        say(f"removed {oldest}, to keep the images below {limit_gb:g} GB")
        _record(oldest).unlink(missing_ok=True)
        oldest.unlink()
    if new > shutil.disk_usage(folder).free:
        raise _no_room(folder, new)


def _used(path: Path) -> float:
    record = _record(path)
    return record.stat().st_mtime if record.exists() else 0
