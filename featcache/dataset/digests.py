"""What files hold, as digests: the same for equal contents, whatever the files are called and wherever they lie."""

import hashlib
import json
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from featcache.config import fingerprint
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Subject


def image_digest(subject: Subject, work: Path) -> str:
    """One digest of a subject's image contents, in row order."""
    return DigestIndex(work / "index" / f"{subject.name}.json").digest(subject.image_paths)


def id_digest(subject: Subject) -> str:
    """One digest of the ids of a subject's images, in row order."""
    return fingerprint({"ids": subject.image_ids.tolist(), "n_train": len(subject.train)})


def response_digest(subject: Subject, work: Path) -> str:
    """One digest of a subject's response files."""
    index = DigestIndex(work / "index" / f"{subject.name}-responses.json")
    return index.digest([subject.response_paths[hemisphere] for hemisphere in HEMISPHERES])


def digests(subject: Subject, work: Path) -> dict[str, str]:
    """What tells a subject of this tree from one of the same name in another."""
    return {
        "images": image_digest(subject, work),
        "image_ids": id_digest(subject),
        "responses": response_digest(subject, work),
    }


def subject_digests(subject: Subject) -> dict[str, dict[str, Any]]:
    """What gradients know of a subject besides images and responses, per hemisphere."""
    rois = {hemisphere: _digest_arrays(subject.rois[hemisphere]) for hemisphere in HEMISPHERES}
    vertices = {h: None if mask is None else np.flatnonzero(mask) for h, mask in subject.fsaverage.items()}
    return {
        "noise_ceiling": _digest_arrays(subject.noise_ceiling),
        "rois": rois,
        "fsaverage": _digest_arrays(vertices),
    }


def _digest_arrays(arrays: dict[str, Any]) -> dict[str, str | None]:
    return {
        name: None if array is None else fingerprint({"values": np.asarray(array, dtype=np.float64).tolist()})
        for name, array in arrays.items()
    }


class DigestIndex:
    """Digests of file contents, remembered as long as a file's size and modification time stay.

    What git's index does: the first run reads every file, later ones only ask the file system for its dates.
    The index is a plain JSON file; losing it costs one reading of the files and changes no digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            known = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # none yet, or damaged: it is only a memory
            known = {}
        self._known: dict[str, list] = known if isinstance(known, dict) else {}

    def digest(self, paths: Iterable[Path]) -> str:
        """One digest of the contents of these files, in this order; their names and places do not enter."""
        whole = blake2b(digest_size=16)
        fresh = {str(path.absolute()): self._entry(path) for path in paths}
        for _, _, content in fresh.values():
            whole.update(bytes.fromhex(content))
        if any(self._known.get(name) != entry for name, entry in fresh.items()):
            self._known |= fresh
            self._save()
        return whole.hexdigest()

    def _entry(self, path: Path) -> list:
        stat = path.stat()
        known = self._known.get(str(path.absolute()))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return known
        return [stat.st_size, stat.st_mtime_ns, file_digest(path)]

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(self._known))
        os.replace(partial, self.path)


def file_digest(path: Path) -> str:
    """Of what one file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
