"""Digests of contents: equal for files with equal contents, whatever their names and folders."""

import hashlib
import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from featcache.config import fingerprint
from featcache.dataset.subject import Subject
from featcache.machine.files import replace_json
from featcache.workdir import Workdir


def image_digest(subject: Subject, work: Path) -> str:
    """Digest of the contents of a subject's image files, in row order; remembered under `work`."""
    return DigestIndex(Workdir(work).image_index(subject.name)).digest(subject.image_paths)


def id_digest(subject: Subject) -> str:
    """Digest of the ids of a subject's images, in row order."""
    return fingerprint({"ids": subject.image_ids.tolist(), "n_train": len(subject.train)})


def response_digest(subject: Subject, work: Path) -> str:
    """Digest of the contents of a subject's response files; remembered under `work`."""
    index = DigestIndex(Workdir(work).response_index(subject.name))
    return index.digest([subject.response_paths[surface] for surface in subject.surfaces])


def digests(subject: Subject, work: Path) -> dict[str, str]:
    """Digests by which a subject differs from a subject of the same name in another dataset."""
    return {
        "images": image_digest(subject, work),
        "image_ids": id_digest(subject),
        "responses": response_digest(subject, work),
    }


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


class DigestIndex:
    """Digests of file contents, remembered as long as a file keeps its size and modification time.

    As in git's index: the first run reads every file, later runs only ask the file system for sizes and times.
    The index is a JSON file at `path`. Without it the files are read once more; no digest changes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            known = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # no index yet, or a damaged one: the files are read again
            known = {}
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}

    def digest(self, paths: Iterable[Path]) -> str:
        """Digest of the contents of some files, in their order, and not of their names or folders."""
        whole = blake2b(digest_size=16)
        fresh = {str(path.absolute()): self._entry(path) for path in paths}
        for _, _, content in fresh.values():
            whole.update(bytes.fromhex(content))
        if any(self._known.get(name) != entry for name, entry in fresh.items()):
            self._known |= fresh
            replace_json(self.path, self._known)
        return whole.hexdigest()

    def _entry(self, path: Path) -> list[Any]:
        stat = path.stat()
        known = self._known.get(str(path.absolute()))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return known
        return [stat.st_size, stat.st_mtime_ns, file_digest(path)]


def file_digest(path: Path) -> str:
    """Digest of one file's content, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
