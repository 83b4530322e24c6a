"""The challenge's files: subjXX/{lh,rh}_pred_test.npy, and the zip of them that is handed in."""

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featcache.dataset.subject import Subject
from featcache.errors import FeatcacheError

MAX_BYTES = 300_000_000  # what the challenge takes
PREDICTIONS = "*_pred_test.npy"  # files of the predictions of one subject, in its folder
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip can hold, so that the same predictions give the same bytes
_DROPPED_BITS = np.uint32(8)  # of float32's 23: noise that no r shows, but that no compression can remove


def prediction_name(subject: Subject, surface: str) -> str:
    """Name of the file of one surface's predictions."""
    return f"{subject.name}/{PREDICTIONS.replace('*', surface)}"


def write_predictions(folder: Path, subject: Subject, surface: str, predictions: np.ndarray) -> Path:
    """Write (n_test, n_vertices) predictions as float32 with 16 significant bits.

    Rounding changes a value by less than 1 part in 65,000, and lets the full submission compress to below its limit.
    """
    path = folder / prediction_name(subject, surface)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as file:
        np.save(file, _rounded(predictions))
    os.replace(partial, path)
    return path


def _rounded(predictions: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(predictions, dtype=np.float32)
    half = np.uint32(1) << (_DROPPED_BITS - np.uint32(1))
    rounded = (((values.view(np.uint32) + half) >> _DROPPED_BITS) << _DROPPED_BITS).view(np.float32)
    # The carry would make infinity of the largest numbers, and a number of some NaN.
    return np.where(np.isfinite(values) & np.isfinite(rounded), rounded, values)


def write_zip(folder: Path, subjects: Sequence[Subject], path: Path) -> Path:
    """Zip the predictions under `folder`, check the result against the tree, and put it at `path` if it is right."""
    partial = path.with_name(f".{path.name}")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in _names(subjects):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w") as target:
                target.write((folder / name).read_bytes())
    check_submission(partial, subjects)
    os.replace(partial, path)
    return path


def _names(subjects: Sequence[Subject]) -> list[str]:
    return [prediction_name(subject, surface) for subject in subjects for surface in subject.surfaces]


def check_submission(path: Path, subjects: Sequence[Subject]) -> None:
    """Raise FeatcacheError unless the challenge would take the zip: names, shapes, type, values and size."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise _refused(path, f"at most {MAX_BYTES:,} bytes", f"{size:,}")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_files(path, archive, subjects)
    except zipfile.BadZipFile as error:
        raise _refused(path, "a whole zip", f"one that cannot be read ({error})") from error


def _check_files(path: Path, archive: zipfile.ZipFile, subjects: Sequence[Subject]) -> None:
    expected = _names(subjects)
    if sorted(archive.namelist()) != sorted(expected):
        raise _refused(path, f"the files {', '.join(expected)}", ", ".join(archive.namelist()) or "none")
    for subject in subjects:
        for surface in subject.surfaces:
            _check_file(path, archive, subject, surface)


def _check_file(path: Path, archive: zipfile.ZipFile, subject: Subject, surface: str) -> None:
    name = prediction_name(subject, surface)
    try:
        predictions = np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
    except ValueError as error:
        raise _refused(path, f"a whole .npy file of numbers in {name}", str(error)) from error
    shape = (len(subject.test), subject.n_vertices[surface])
    if predictions.shape != shape or predictions.dtype != np.float32:
        raise _refused(path, f"{name} of shape {shape}, float32", f"{predictions.shape}, {predictions.dtype}")
    if not np.isfinite(predictions).all():
        raise _refused(path, f"finite values in {name}", "NaN or infinity")


def _refused(path: Path, expected: str, found: str) -> FeatcacheError:
    return FeatcacheError(path, expected=expected, found=found, remedy="run 'blend' again")
