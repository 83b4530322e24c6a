"""Every file of a work folder that is read again, held against the digest or checksum that it was written with."""

import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbone.checkpoint import Checkpoint, open_checkpoint
from featcache.cache.chunks import Chunk
from featcache.cache.pixels import pixel_fault
from featcache.cache.store import Store, open_store
from featcache.dataset.digests import file_digest
from featcache.dataset.folder import record_files, subject_records
from featcache.dataset.splits import Split
from featcache.errors import FeatcacheError
from featcache.machine.documents import DAMAGED_NPZ, DocumentError, is_sealed, read_document, read_json
from featcache.machine.files import file_checksum, is_leftover, open_regular
from featcache.machine.progress import bar
from featcache.machine.tensors import has_checksum, refuse_changed_tensors
from featcache.workdir import Workdir
from heads.blend.saved import load_blend, load_nested
from heads.modules.readout import HEAD_METADATA, InFile

FEATURES, PREDICTIONS, HEADS, CHECKPOINTS = "features", "predictions", "heads", "checkpoints"
BLEND, COMPARISONS, PIXELS, DATASET, INDEXES, UNFINISHED = (
    "blend",
    "comparisons",
    "pixels",
    "dataset",
    "indexes",
    "unfinished",
)


@dataclass(frozen=True)
class Finding:
    """One file, or one part of a store, that was looked at.

    kind : of what it belongs to
    owner : the store, checkpoint or file that has to be made again where it is damaged
    fault : what is wrong with it; '' where nothing is
    sealed : whether it has a digest or a checksum; False in files of earlier versions
    part, row : of a store, the array and the first row of the chunk
    complete : whether a store has all its rows, or a comparison its table; not after a command that was interrupted
    """

    kind: str
    path: Path
    owner: Path
    fault: str = ""
    sealed: bool = True
    n_bytes: int = 0
    part: str = ""
    row: int = 0
    complete: bool = True


Look = Callable[[], Finding]


def verify(work: Path, workers: int) -> list[Finding]:
    """Look at every file under `work` that a later command reads, with so many threads. Nothing is changed."""
    files = Workdir(work)
    looks = [
        *_stores(FEATURES, files.features),
        *_stores(PREDICTIONS, files.predictions),
        *_heads(files),
        *_checkpoints(files),
        *_blend(files),
        *_others(files),
        *_dataset(files),
        *_unfinished(work),
    ]
    findings = []
    with ThreadPoolExecutor(max(workers, 1)) as pool, bar(f"verify {work}", len(looks), "files") as advance:
        for finding in pool.map(lambda look: look(), looks):
            findings.append(finding)
            advance(1)
    return findings


def _found(kind: str, path: Path, owner: Path | None = None, fault: str = "", sealed: bool = True) -> Finding:
    return Finding(kind, path, owner or path, fault, sealed, _size(path))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _checked(kind: str, path: Path, owner: Path, check: Callable[[], bool]) -> Finding:
    """A file by a check that says whether it is sealed, and raises an error of a damaged file."""
    try:
        return _found(kind, path, owner, sealed=check())
    except FileNotFoundError:
        return _found(kind, path, owner, "it is missing")
    except FeatcacheError as error:
        return _found(kind, path, owner, error.found)
    except DAMAGED_NPZ as error:
        return _found(kind, path, owner, str(error) or type(error).__name__)


def _stores(kind: str, folder: Path) -> Iterator[Look]:
    for path in sorted(folder.glob("[!.]*")):
        if not path.is_dir():
            continue
        try:
            store = open_store(path)
            chunks = {name: store.chunks(name) for name in store.arrays}
        except FeatcacheError as error:
            yield partial(_found, kind, path, path, error.found)
            continue
        committed = path / "committed.json"
        if committed.exists():
            described = _found(kind, path / "zarr.json", path, sealed=is_sealed(committed))
            yield partial(replace, described, complete=store.complete)
        elif any(path.glob("*/c/*")):  # before the first rows there is none
            yield partial(_found, kind, committed, path, "it is missing")
        for name, of_array in chunks.items():
            for number, chunk in enumerate(of_array):
                yield partial(_chunk, kind, store, name, number, chunk)


def _chunk(kind: str, store: Store, name: str, number: int, chunk: Chunk) -> Finding:
    row = number * store.chunk_rows(name)
    sealed, n_bytes = chunk.checksum is not None, chunk.n_bytes
    return Finding(kind, chunk.path, store.path, chunk.fault, sealed, n_bytes, name, row)


def _heads(files: Workdir) -> Iterator[Look]:
    for path in sorted(files.heads.glob("[!.]*.safetensors")):
        yield partial(_checked, HEADS, path, path, partial(_check_heads, path))
    for store in sorted(files.predictions.glob("[!.]*")):
        path = files.heads / f"{store.name}.safetensors"
        if store.is_dir() and not path.exists() and _is_complete(store):
            yield partial(_found, HEADS, path, path, "it is missing")


def _is_complete(path: Path) -> bool:
    try:
        return open_store(path).complete
    except FeatcacheError:
        return False


def _check_heads(path: Path) -> bool:
    refuse_changed_tensors(path, HEAD_METADATA)
    InFile(path, path.stem)  # which refuses those of another store
    return has_checksum(path)


def _checkpoints(files: Workdir) -> Iterator[Look]:
    for path in sorted(files.checkpoints.glob("[!.]*")):
        if not path.is_dir():
            continue
        try:
            checkpoint = open_checkpoint(path)
        except FeatcacheError as error:
            yield partial(_found, CHECKPOINTS, path, path, error.found)
            continue
        description = path / "checkpoint.json"
        yield partial(_found, CHECKPOINTS, description, path, sealed=is_sealed(description))
        for name, digest in checkpoint.facts.digests.items():
            if checkpoint.facts.pruned and name.endswith("/backbone.safetensors"):
                continue
            yield partial(_checked, CHECKPOINTS, path / name, path, partial(_check_digest, path / name, digest))
        yield from _state(checkpoint)


def _state(checkpoint: Checkpoint) -> Iterator[Look]:
    if checkpoint.facts.state is not None:
        folder = checkpoint.path / checkpoint.facts.state
        yield partial(_checked, CHECKPOINTS, folder / "state.pt", folder, partial(_check_state, folder))


def _check_state(folder: Path) -> bool:
    if not (folder / "state.json").exists():
        _ = (folder / "state.pt").stat()  # of an earlier version: whether it is there is all that can be told
        return False
    return _check_digest(folder / "state.pt", read_document(folder / "state.json", dict[str, str])["state.pt"])


def _check_digest(path: Path, known: str, digest: Callable[[Path], str] = file_digest) -> bool:
    if digest(path) != known:
        raise DocumentError("it is not what was written")
    return True


def _blend(files: Workdir) -> Iterator[Look]:
    if files.saved_blend.exists():
        yield partial(_checked, BLEND, files.saved_blend, files.submission, partial(_check_blend, files.saved_blend))
    if files.blend_weights.exists():
        yield partial(_checked, BLEND, files.blend_weights, files.submission, partial(_check_json, files.blend_weights))
    try:
        known = read_document(files.blend_files, dict[str, str])
    except FileNotFoundError:
        known = {}
        if files.saved_blend.exists():
            check = partial(_refuse_lost_checksums, files.saved_blend)
            yield partial(_checked, BLEND, files.blend_files, files.submission, check)
    except (OSError, DocumentError) as error:
        known = {}
        yield partial(_found, BLEND, files.blend_files, files.submission, str(error))
    handed_in = [(files.submission / name, checksum) for name, checksum in known.items()]
    if files.blend_zip.name in known:
        handed_in.append((files.submission_zip, known[files.blend_zip.name]))
    elif files.submission_zip.exists():
        yield partial(
            _checked, BLEND, files.submission_zip, files.submission, partial(_check_zip, files.submission_zip)
        )
    for path, checksum in handed_in:
        yield partial(_checked, BLEND, path, files.submission, partial(_check_digest, path, checksum, file_checksum))


def _check_blend(path: Path) -> bool:
    load_blend(path)
    load_nested(path)
    return has_checksum(path)


def _refuse_lost_checksums(blend: Path) -> bool:
    """False beside a blend of an earlier version, which wrote no checksums. Raises DocumentError beside another."""
    if has_checksum(blend):
        raise DocumentError("it is missing")
    return False


def _check_json(path: Path) -> bool:
    read_document(path, dict[str, Any])
    return is_sealed(path)


def _check_zip(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise DocumentError(f"{broken} in it is damaged")
    return True


def _check_npz(path: Path) -> bool:
    with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
        for name in arrays.files:
            _ = arrays[name]
    return True


def _check_split(path: Path) -> bool:
    Split.from_json(read_json(path))
    return True


def _others(files: Workdir) -> Iterator[Look]:
    for path in sorted(files.pixels.glob("[!.]*.npy")):
        yield partial(_checked, PIXELS, path, path, partial(_check_pixels, path))
    for path in sorted(files.compared.glob("*/[!.]*.npz")):
        yield partial(_checked, COMPARISONS, path, path, partial(_check_npz, path))
    for path in sorted(files.compared.glob("*/shares.json")):
        yield partial(_checked, COMPARISONS, path, path, partial(_check_shares, path))
    for folder in sorted({path.parent for path in files.compared.glob("[!.]*/[!.]*.npz")}):
        if not (folder / "shares.json").exists():  # subjects are compared, and then put together
            yield partial(replace, _found(COMPARISONS, folder), complete=False)
    for path in sorted(files.index.glob("[!.]*.npz")):
        yield partial(_checked, INDEXES, path, path, partial(_check_npz, path))
    for path in sorted([*files.index.glob("[!.]*.json"), *(files.root / "images").glob("[!.]*.json")]):
        yield partial(_checked, INDEXES, path, path, partial(_check_json, path))
    for path in (files.features.with_suffix(".index.json"), files.predictions.with_suffix(".index.json")):
        if path.exists():
            yield partial(_checked, INDEXES, path, path, partial(_check_json, path))
    for path in sorted(files.units.glob("[!.]*.done")):
        yield partial(_checked, INDEXES, path, path, partial(_check_json, path))
    for path in sorted(files.splits.glob("[!.]*.json")):
        yield partial(_checked, INDEXES, path, path, partial(_check_split, path))


def _check_shares(path: Path) -> bool:
    for subject in read_document(path, dict[str, Any]).get("keys", {}):
        if not os.path.isfile(path.with_name(f"{subject}.npz")):
            raise DocumentError(f"{subject}.npz, which it is made of, is missing")
    return is_sealed(path)


def _check_pixels(path: Path) -> bool:
    fault, sealed = pixel_fault(path)
    if fault:
        raise DocumentError(fault)
    return sealed


def _dataset(files: Workdir) -> Iterator[Look]:
    for record in subject_records(files.dataset):
        yield partial(_checked, DATASET, record, record.parent, partial(_check_json, record))
        try:
            known = record_files(record)
        except FeatcacheError:
            continue  # the record itself is found
        for name, check in known.items():
            yield partial(_checked, DATASET, record.parent / name, record.parent, check)


def _unfinished(work: Path) -> Iterator[Look]:
    """What processes that are gone left in the folder or one or two levels below."""
    for folder in [work, *(path for path in work.glob("[!.]*") if path.is_dir() and not path.is_symlink())]:
        inner = [folder] if folder == work else [folder, *(path for path in folder.glob("[!.]*") if path.is_dir())]
        for place in inner:
            for entry in os.scandir(place):
                if entry.name.startswith(".") and is_leftover(Path(entry.path)):
                    yield partial(_found, UNFINISHED, Path(entry.path), Path(entry.path), "its process is gone")
