"""Responses that a fit can use: looked through before it starts, and not half-way through it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featcache.dataset.digests import DigestIndex
from featcache.dataset.subject import Fault, Subject
from featcache.errors import DataError
from featcache.formats.npy import open_npy
from featcache.machine.documents import DocumentError, read_document, write_document
from featcache.machine.progress import say
from featcache.workdir import Workdir

_BLOCK_BYTES = 64e6
LARGEST_RESPONSE = 1e15  # whose squares float32 can still add up over all images
_SCALES = (1e-6, 1e6)  # of the standard deviation of a vertex, beyond which float32 leaves no usable loss
_SAMPLE = 256  # rows that tell it
_RULES = "2"  # those that files were held against; others are looked through again


def response_fault(path: Path) -> Fault | None:
    """Fault of a .npy file of responses with a number or a scale that no fit can use; None where there is none."""
    return _look(path)[0] or _scale_fault(path)


def _look(path: Path) -> tuple[Fault | None, int]:
    """The first fault of a file of responses, (n_images, n_vertices), and its number of constant vertices."""
    responses = open_npy(path)
    step = max(1, int(_BLOCK_BYTES // (responses.dtype.itemsize * max(responses.shape[1], 1))))
    constant = np.full(responses.shape[1], True)
    for start in range(0, len(responses), step):
        block = responses[start : start + step]
        bad = ~(np.abs(block, dtype=np.result_type(block, np.float32)) <= LARGEST_RESPONSE)  # NaN is bad too
        if bad.any():
            row, vertex = np.argwhere(bad)[0]
            more = f" (and {bad.sum() - 1} more nearby)" if bad.sum() > 1 else ""
            found = f"{block[row, vertex]} at row {start + row}, vertex {vertex}{more}"
            return Fault(path, f"finite responses, up to {LARGEST_RESPONSE:.0e}", found), 0
        constant &= (block == responses[0]).all(axis=0)
    return None, int(constant.sum())


def _scale_fault(path: Path) -> Fault | None:
    """Fault of the first vertex whose responses, by a sample of the images, are far from any usual scale."""
    responses = open_npy(path)
    sample = np.asarray(responses[:: max(len(responses) // _SAMPLE, 1)], dtype=np.float64)
    if len(sample) < 2:
        return None
    std, (low, high) = sample.std(0), _SCALES
    constant = std <= 1e-6 * np.abs(sample).max(0)  # but for rounding
    bad = np.flatnonzero(~constant & ~((std >= low) & (std <= high)))
    if not len(bad):
        return None
    more = f" (and {len(bad) - 1} more vertices)" if len(bad) > 1 else ""
    expected = f"responses whose standard deviation is from {low:.0e} to {high:.0e}"
    return Fault(path, expected, f"{std[bad[0]]:.1e} at vertex {bad[0]}{more}")


def response_fault_in(path: Path, block: np.ndarray, vertex: int) -> Fault | None:
    """Fault of some columns of a file of responses, (n_images, n_columns), of which the first is `vertex`.

    For who reads them anyway: a file that was changed and has its size and time of before is not looked through again.
    """
    if not block.size or (block.min() >= -LARGEST_RESPONSE and block.max() <= LARGEST_RESPONSE):  # NaN is neither
        return None
    row, column = np.argwhere(~(np.abs(block) <= LARGEST_RESPONSE))[0]
    found = f"{block[row, column]} at row {row}, vertex {vertex + column}"
    return Fault(path, f"finite responses, up to {LARGEST_RESPONSE:.0e}", found)


def refuse_unfit(subjects: Sequence[Subject], work: Path) -> None:
    """Raise DataError for responses that no head can be fitted to; say which vertices are constant.

    A file is read once; what was found in it is remembered under `work`, as long as it does not change.
    """
    for subject in subjects:
        _refuse_empty(subject)
        path = Workdir(work).checked_responses(subject.name)
        index = DigestIndex(Workdir(work).response_index(subject.name))
        digest = index.digest([*subject.response_paths.values(), *subject.test_response_paths.values()])
        looked_through = {"responses": digest, "rules": _RULES}
        if _known(path) != looked_through:
            _refuse_unfit(subject)
            write_document(path, looked_through)


def _known(path: Path) -> dict[str, str]:
    try:
        return read_document(path, dict[str, str])
    except (OSError, DocumentError):  # not looked through yet, or a damaged file: once more
        return {}


def _refuse_empty(subject: Subject) -> None:
    n_vertices = sum(subject.n_vertices.values())
    if len(subject.train) < 2 or not n_vertices:
        raise DataError(
            subject.name,
            expected="2 or more training images, and one or more vertices",
            found=f"{len(subject.train)} images and {n_vertices} vertices",
            remedy="choose other subjects with --subject, or give this one more",
        )


def _refuse_unfit(subject: Subject) -> None:
    n_constant: dict[str, int] = {}
    for paths in (subject.test_response_paths, subject.response_paths):
        for surface, path in paths.items():
            fault, n_constant[surface] = _look(path)
            remedy = "correct the file, or leave such images or vertices out of it; both count from 0"
            if fault is None:
                fault, remedy = _scale_fault(path), "z-score the responses, or give them in another unit"
            if fault is not None:
                raise DataError(fault.where, expected=fault.expected, found=fault.found, remedy=remedy)
    for surface, n in n_constant.items():
        if 0 < n < subject.n_vertices[surface]:
            say(f"{subject.name} {surface}: {n:,} of {subject.n_vertices[surface]:,} vertices have one response to all")
    if sum(n_constant.values()) == sum(subject.n_vertices.values()):
        raise DataError(
            subject.name,
            expected="responses that differ between images",
            found=f"the same to all {len(subject.train)} images, at every vertex",
            remedy="look for a wrong file",
        )
