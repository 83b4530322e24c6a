"""Digests of contents: equal for files with equal contents, whatever their names and folders."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from os import stat_result
from pathlib import Path
from typing import Any

import numpy as np

from featcache.config import fingerprint, usual_workers
from featcache.dataset.images import array_row
from featcache.dataset.subject import ArrayImage, ImageSource, Subject
from featcache.machine.documents import DocumentError, HexDigest, read_document, write_document
from featcache.workdir import Workdir


def image_digests(subject: Subject, work: Path) -> list[str]:
    """Digest of each of a subject's images, in row order; remembered under `work`."""
    return DigestIndex(Workdir(work).image_index(subject.name)).digests(subject.image_sources)


def image_digest(subject: Subject, work: Path) -> str:
    """Digest of the contents of a subject's images, in row order; remembered under `work`."""
    return whole_digest(image_digests(subject, work))


def id_digest(subject: Subject) -> str:
    """Digest of the ids of a subject's images, in row order."""
    return digest_of_ids(subject.image_ids.tolist(), len(subject.train))


def digest_of_ids(ids: Sequence[int], n_train: int) -> str:
    """Digest of ids in row order, of which the first `n_train` are training images'."""
    return fingerprint({"ids": list(ids), "n_train": n_train})


def response_digest(subject: Subject, work: Path) -> str:
    """Digest of the contents of a subject's response files; remembered under `work`."""
    index = DigestIndex(Workdir(work).response_index(subject.name))
    return index.digest([subject.response_paths[surface] for surface in subject.surfaces])


def whole_digest(digests: Iterable[str]) -> str:
    """Digest of several contents, by the digest of each, in their order."""
    whole = blake2b(digest_size=16)
    for digest in digests:
        whole.update(bytes.fromhex(digest))
    return whole.hexdigest()


def subject_digests(subject: Subject) -> dict[str, dict[str, Any]]:
    """Digests of all else that training uses of a subject: noise ceilings, ROIs and fsaverage vertices, by surface."""
    vertices = {surface: None if mask is None else np.flatnonzero(mask) for surface, mask in subject.fsaverage.items()}
    return {
        "noise_ceiling": _digest_arrays(subject.noise_ceiling),
        "rois": {surface: _digest_arrays(subject.rois[surface]) for surface in subject.surfaces},
        "fsaverage": _digest_arrays(vertices),
    }


def _digest_arrays(arrays: dict[str, Any]) -> dict[str, str | None]:
    return {
        name: None if array is None else fingerprint({"values": np.asarray(array, dtype=np.float64).tolist()})
        for name, array in arrays.items()
    }


_Entry = tuple[int, int, HexDigest]  # bytes, nanoseconds and digest of a file


class DigestIndex:
    """Digests of file contents, remembered as long as a file keeps its size and modification time.

    As in git's index: the first run reads every file, later runs only ask the file system for sizes and times.
    The index is a JSON file at `path`. Without it the files are read once more; no digest changes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, _Entry] = {}
        with suppress(OSError, DocumentError):  # no index yet, or a damaged one: the files are read again
            self._known = read_document(path, dict[str, _Entry])

    def digest(self, sources: Iterable[ImageSource]) -> str:
        """Digest of the contents of some files and rows of arrays, in their order; names and folders do not matter."""
        return whole_digest(self.digests(sources))

    def digests(self, sources: Iterable[ImageSource]) -> list[str]:
        """Digest of the content of each of some files and rows of arrays."""
        times, entries = FileTimes(), dict[str, _Entry]()
        named = [(source_key(source), source) for source in sources]
        new: dict[str, ImageSource] = {}
        for name, source in named:
            now, known = times.of(source), self._known.get(name)
            if known and known[:2] == now:
                entries[name] = known
            else:
                entries[name] = (*now, "")
                new[name] = source
        if new:
            with ThreadPoolExecutor(usual_workers()) as pool:  # Python lets them read and hash side by side
                for name, digest in zip(new, pool.map(content_digest, new.values()), strict=True):
                    entries[name] = (*entries[name][:2], digest)
            self._known |= entries
            write_document(self.path, self._known)
        return [entries[name][2] for name, _ in named]


class FileTimes:
    """Sizes and modification times of files, each asked for once: many pictures may be in one file."""

    def __init__(self) -> None:
        self._status: dict[Path, stat_result] = {}

    def of(self, source: ImageSource) -> tuple[int, int]:
        """(bytes, nanoseconds) of the file that a picture is in. Raises OSError where there is none."""
        path = source.path if isinstance(source, ArrayImage) else source
        if path not in self._status:
            self._status[path] = path.stat()
        return self._status[path].st_size, self._status[path].st_mtime_ns


def source_key(source: ImageSource) -> str:
    """Name under which a picture is remembered: its absolute path and, in an array, its row."""
    if isinstance(source, ArrayImage):
        return f"{source.path.absolute()}:{source.array}[{source.row}]"
    return str(source.absolute())


def content_digest(source: ImageSource) -> str:
    """Digest of one file's content, or of one row's size and pixels; 32 hexadecimal digits."""
    if isinstance(source, ArrayImage):
        pixels = array_row(source)
        return blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).hexdigest()
    return file_digest(source)


def new_digest() -> blake2b:
    """A digest that has taken in nothing; of a file's bytes it becomes its `file_digest`."""
    return blake2b(digest_size=16)


def file_digest(path: Path) -> str:
    """Digest of one file's content, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()
