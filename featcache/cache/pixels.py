"""Decoded images: resized and cropped as the network reads them, in one file for each subject and size.

Training reads rows of that file in every epoch, so that each image is decoded once. `extract` reads the file too, where
it is whole. The file is a .npy array of (n_images, height, width, 3) in the row order of every store, so that each
image is one contiguous read. Its record has a checksum of every `_COMMIT` images, which are held against it when the
first of them is used.
"""

import errno
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import google_crc32c
import msgspec
import numpy as np
import torch

from featcache.backbone.network import Backbone
from featcache.config import fingerprint
from featcache.dataset.digests import image_digest
from featcache.dataset.images import load_image
from featcache.dataset.subject import Subject
from featcache.errors import StoreError, first_line
from featcache.machine.documents import Count, read_document, write_document
from featcache.machine.files import only_writer, partial_path
from featcache.machine.progress import bar, say, size_of
from featcache.workdir import Workdir

_COMMIT = 256  # images between commits, which is what an interruption can cost


class _Record(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the record beside a pixel file says of it.

    images : number of images that are whole
    bytes : size of the file
    file : its name
    checksums : crc32c of each `_COMMIT` images; None in records of earlier versions
    """

    images: Count
    bytes: Count
    file: str = ""
    checksums: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]] | None = None


@dataclass(frozen=True)
class Pixels:
    """The pixels of one subject's images, memory-mapped.

    array : (n_images, height, width, 3), training images and then test images; uint8, or float32 of a network's own
        transform
    """

    path: Path
    array: np.ndarray
    _checksums: Sequence[int] | None = field(default=None, repr=False)
    _checked: set[int] = field(default_factory=set, repr=False)

    def read(self, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """(len(rows), 3, height, width) of the file's type, in the memory format channels_last.

        Raises StoreError where images beside these are not what was written.
        """
        self._check(rows)
        return torch.from_numpy(np.array(self.array[rows])).permute(0, 3, 1, 2)

    def _check(self, rows: np.ndarray | Sequence[int]) -> None:
        """Hold the blocks of some rows against their checksums, each once."""
        if self._checksums is None:
            return
        for block in {int(row) // _COMMIT for row in rows} - self._checked:
            if _checksum(self.array, block) != self._checksums[block]:
                _record(self.path).unlink(missing_ok=True)  # so that they are decoded again
                raise StoreError(
                    self.path,
                    expected="images as they were decoded",
                    found=f"others among images {block * _COMMIT} to {(block + 1) * _COMMIT}",
                    remedy="run the same command again, which decodes the images of this file again",
                )
            self._checked.add(block)


def _checksum(array: np.ndarray, block: int) -> int:
    """crc32c of `_COMMIT` images of an array, of which the last block may have fewer."""
    images = np.ascontiguousarray(array[block * _COMMIT : (block + 1) * _COMMIT])
    return int(google_crc32c.value(images.reshape(-1).view(np.uint8)))


def find_pixels(subject: Subject, backbone: Backbone, work: Path) -> Pixels | None:
    """The subject's pixels as this backbone reads them; None if the file is missing or not whole."""
    path = _path(subject, backbone, work)
    if _committed(path, subject, backbone).images < len(subject.image_ids):
        return None
    return _open(path, subject, backbone)


def cache_pixels(
    subjects: Sequence[Subject], backbone: Backbone, work: Path, limit_gb: float, workers: int
) -> list[Pixels]:
    """The pixels of every subject, made where they are missing; an interrupted run goes on where it stopped.

    limit_gb : 10^9 bytes that all files of the folder may take. Pixels of other sizes or images are removed to stay
        below it, those first that were not used for longest
    workers : threads that decode images

    Raises StoreError where these subjects alone need more than the limit, or more than the disk has.
    """
    folder = Workdir(work).pixels
    n_bytes = {subject.name: len(subject.image_ids) * _bytes_per_image(backbone) for subject in subjects}
    with only_writer(folder, wait=True):
        paths = {subject.name: _path(subject, backbone, work) for subject in subjects}
        missing = [
            subject
            for subject in subjects
            if _committed(paths[subject.name], subject, backbone).images < len(subject.image_ids)
        ]
        if missing:
            total = sum(n_bytes.values())
            new = sum(n_bytes[subject.name] for subject in missing if not paths[subject.name].exists())
            _make_room(folder, list(paths.values()), total, new, limit_gb)
            size = backbone.transform_settings["input_size"][-1]
            say(f"images at {size} px, once: {size_of(total)} in {folder} (at most {limit_gb:g} GB)")
        for subject in missing:
            _fill(paths[subject.name], subject, backbone, workers)
        return [_open(paths[subject.name], subject, backbone) for subject in subjects]


def _open(path: Path, subject: Subject, backbone: Backbone) -> Pixels:
    """The pixels of a file that is whole."""
    checksums = _committed(path, subject, backbone).checksums
    _record(path).touch()  # the time of use: files that were used last are removed last
    return Pixels(path, np.load(path, mmap_mode="r"), checksums)


def _path(subject: Subject, backbone: Backbone, work: Path) -> Path:
    """Where the pixels of a subject are: named by what decides them, the image files, the size and the crop.

    The mean and deviation, which the network's input is normalised by, do not enter: they are applied later.
    """
    crop = dict(backbone.transform_settings)
    if crop.get("crop_mode") != "border":  # which pads with the mean
        crop.pop("mean", None)
    crop.pop("std", None)
    if backbone.transform_settings.get("own"):  # its function is part of its code
        crop["code"] = dict(backbone.code)
    key = {"images": image_digest(subject, work), "crop": crop}
    size = backbone.transform_settings["input_size"][-1]
    return Workdir(work).pixels / f"{subject.name}-{size}-{fingerprint(key)}.npy"


def _bytes_per_image(backbone: Backbone) -> int:
    n_values = math.prod(backbone.transform_settings["input_size"])
    return int(n_values * np.dtype(backbone.pixel_dtype).itemsize)


def _record(path: Path) -> Path:
    """The file that says how many images of a pixel file are whole, and how large the file is."""
    return path.with_suffix(".json")


def _committed(path: Path, subject: Subject, backbone: Backbone) -> _Record:
    """What the record of a pixel file says; of no images where it is missing, damaged or of another file."""
    nothing = _Record(0, 0, path.name, [])
    try:
        record = read_document(_record(path), _Record)
        if path.stat().st_size != record.bytes or record.file not in ("", path.name):
            return nothing
        n_blocks = -(-record.images // _COMMIT)
        if record.checksums is not None and len(record.checksums) != n_blocks:
            return nothing
        array = np.load(path, mmap_mode="r")
        return record if _is_like(array, subject, backbone) else nothing
    except (OSError, ValueError):  # none yet, or damaged: the images are decoded again
        return nothing


def forget_pixels(path: Path) -> None:
    """Have a pixel file decoded again: remove it and its record."""
    _record(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def pixel_fault(path: Path) -> tuple[str, bool]:
    """What is wrong with a pixel file, '' where nothing is, and whether its record has checksums. All of it is read."""
    try:
        record = read_document(_record(path), _Record)
        if path.stat().st_size != record.bytes or record.file not in ("", path.name):
            return "its record is of another file", True
        if record.checksums is None:
            return "", False
        array = np.load(path, mmap_mode="r")
        bad = [block for block, known in enumerate(record.checksums) if _checksum(array, block) != known]
    except FileNotFoundError:
        return "it has no record", True
    except (OSError, ValueError, EOFError) as error:
        return f"it cannot be read ({first_line(error)})", True
    return (f"images {bad[0] * _COMMIT} to {(bad[0] + 1) * _COMMIT} are not what was written" if bad else ""), True


def _shape(subject: Subject, backbone: Backbone) -> tuple[int, ...]:
    channels, height, width = backbone.transform_settings["input_size"]
    return (len(subject.image_ids), height, width, channels)


def _is_like(array: np.ndarray, subject: Subject, backbone: Backbone) -> bool:
    """Whether a pixel file has the shape and type of a subject's images as a backbone reads them."""
    expected = np.dtype(backbone.pixel_dtype)
    return array.shape == _shape(subject, backbone) and array.dtype == expected and bool(array.flags.c_contiguous)


def _fill(path: Path, subject: Subject, backbone: Backbone, workers: int) -> None:
    """Decode the images that a pixel file lacks, and commit them as they come."""
    record = _committed(path, subject, backbone)
    done, checksums = record.images, record.checksums
    if not done:
        _record(path).unlink(missing_ok=True)  # the record of a file that was lost must not count for this one
        if not _has_room(path, subject, backbone):
            _create(path, _shape(subject, backbone), backbone.pixel_dtype)
        checksums = []
    array = np.lib.format.open_memmap(path, mode="r+")

    def fill(row: int) -> None:
        array[row] = backbone.pixels(load_image(subject.image_sources[row])).permute(1, 2, 0).numpy()

    with ThreadPoolExecutor(workers) as pool, bar(f"{subject.name} pixels", len(array), "images", done) as advance:
        for start in range(done, len(array), _COMMIT):
            rows = range(start, min(start + _COMMIT, len(array)))
            for _ in pool.map(fill, rows):
                advance(1)
            array.flush()
            if checksums is not None:
                checksums = [*checksums, _checksum(array, start // _COMMIT)]
            whole = _Record(rows.stop, path.stat().st_size, path.name, checksums)
            write_document(_record(path), msgspec.to_builtins(whole))


def _has_room(path: Path, subject: Subject, backbone: Backbone) -> bool:
    """Whether there is a file for these images, whatever is in it yet.

    Where locks hold nobody off, another process may be writing to it: the same bytes to the same places.
    """
    try:
        return _is_like(np.load(path, mmap_mode="r"), subject, backbone)
    except (OSError, ValueError):
        return False


def _create(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Make an empty pixel file that has its room on the disk. Raises StoreError where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.dtype(dtype), shape=shape).flush()
        try:
            with partial.open("r+b") as file:  # a disk that is full later would end the process by a signal
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_room(path.parent, math.prod(shape) * np.dtype(dtype).itemsize) from error
        os.replace(partial, path)  # never in place: whoever has the older file in memory keeps it
    finally:
        partial.unlink(missing_ok=True)


def _no_room(folder: Path, n_bytes: int) -> StoreError:
    return StoreError(
        folder,
        expected=f"{size_of(n_bytes)} of free disk for the images",
        found=size_of(shutil.disk_usage(folder).free),
        remedy="make room, lower --size, or choose another --work",
    )


def _make_room(folder: Path, needed: Sequence[Path], total: int, new: int, limit_gb: float) -> None:
    """Remove pixel files until everything fits below the limit. Raises StoreError where it cannot.

    needed, total : the files that must stay, and their bytes once they are whole
    new : bytes of those that are not there yet
    """
    if total > limit_gb * 1e9:
        raise StoreError(
            folder,
            expected=f"the images to fit into --image-cache {limit_gb:g} GB",
            found=f"{size_of(total)} of them at this size",
            remedy=f"give --image-cache {math.ceil(total / 1e6) / 1e3:g} or more, lower --size, or choose fewer "
            "subjects",
        )
    others = sorted(set(folder.glob("*.npy")) - set(needed), key=_last_used)
    while others and total + sum(path.stat().st_size for path in others) > limit_gb * 1e9:
        oldest = others.pop(0)
        say(f"removed {oldest}, to keep the images below {limit_gb:g} GB")
        forget_pixels(oldest)
    if new > shutil.disk_usage(folder).free:
        raise _no_room(folder, new)


def _last_used(path: Path) -> float:
    """Time at which a pixel file was last used; 0 for one without a record, which is not whole."""
    record = _record(path)
    return record.stat().st_mtime if record.exists() else 0
