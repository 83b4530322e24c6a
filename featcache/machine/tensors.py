"""Tensors that may be larger than the memory: written to safetensors one after the other, and held in files.

A file of tensors says the checksum of its own content in its header, so that a changed one is noticed.
"""

import errno
import json
import math
import mmap
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import torch

from featcache.machine.documents import DocumentError, parse_json
from featcache.machine.files import open_regular, regular_status, whole_file

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_NO_PROMISE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # of a file system that cannot promise room
_ALIGNED = 8  # bytes; the header is filled up to a multiple
_CHECKSUM = "crc32c"  # name of the checksum in the metadata of a header
_UNKNOWN = "0" * 8  # stands for it while it is computed
_MOST_HEADER = 100_000_000  # bytes, which is the library's limit
_IN_MEMORY = 32 << 20  # bytes up to which `Spool.zeros` takes main memory
_AT_ONCE = 64 << 20  # bytes that are copied at a time


class Digest(Protocol):
    """What hashlib's digests have in common."""

    def update(self, data: Any, /) -> None:
        """Take in the next bytes."""


class Spool:
    """float32 tensors of any size: in main memory, or above `_IN_MEMORY` in files of a folder.

    A file has no name, so that its room on the disk is free again once its tensor is gone, however the process ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[mmap.mmap] = []

    @property
    def used(self) -> bool:
        """Whether any tensor is in a file."""
        return bool(self._files)

    def zeros(self, *shape: int) -> torch.Tensor:
        """Zeros of this shape."""
        n_bytes = 4 * math.prod(shape)
        if n_bytes <= _IN_MEMORY:
            return torch.zeros(shape)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            _reserve(file.fileno(), n_bytes)
            held = mmap.mmap(file.fileno(), n_bytes)
        self._files.append(held)
        return torch.frombuffer(held, dtype=torch.float32).view(shape)

    def let_go(self) -> None:
        """Have no part of the files in the memory of this process; what is read or written next comes back by itself.

        The system would do so too where memory is short, but until then the process looks larger than it has to be.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for held in self._files:
                held.madvise(mmap.MADV_DONTNEED)


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Make a file so long, with room on the disk: a disk that is full later would end the process by a signal."""
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except AttributeError:  # not every system has it
        os.truncate(descriptor, n_bytes)
    except OSError as error:
        free = os.fstatvfs(descriptor)
        if error.errno not in _NO_PROMISE or free.f_bavail * free.f_frsize < n_bytes:
            raise
        os.truncate(descriptor, n_bytes)


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    digest: Digest | None = None,
    spool: Spool | None = None,
) -> None:
    """Write a safetensors file, whole or not at all.

    digest : takes in the bytes of the file as they are written, so that nobody has to read it again
    spool : that holds the large ones

    Where there is no digest, the header has a checksum of the whole file, its own eight digits as zeros.

    The library's own writer makes a copy of all tensors first. This one copies `_AT_ONCE` bytes at a time, so that
    tensors of a spool need no memory.

    Source: the format, https://huggingface.co/docs/safetensors
    """
    known = dict(metadata) | ({_CHECKSUM: _UNKNOWN} if digest is None else {})
    header: dict[str, object] = {"__metadata__": known}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    checksum = 0
    with whole_file(path) as partial, partial.open("wb") as file:
        header_bytes: list[bytes | memoryview] = [len(text).to_bytes(8, "little") + text]
        for content in chain(header_bytes, chain.from_iterable(map(_pieces, tensors.values()))):
            file.write(content)
            if digest is None:
                checksum = google_crc32c.extend(checksum, np.frombuffer(content, np.uint8))
            else:
                digest.update(content)
            if spool is not None:
                spool.let_go()
        if digest is None:
            file.seek(len(header_bytes[0]) - len(text) + _checksum_at(text))
            file.write(f"{checksum:08x}".encode())


def _checksum_at(header: bytes) -> int:
    """Where the digits of the checksum are in the text of a header. Raises DocumentError where they cannot be told."""
    name = f'"{_CHECKSUM}":"'.encode()
    if header.count(name) != 1:
        raise DocumentError("its header has not one checksum")
    return header.index(name) + len(name)


def refuse_changed_tensors(path: Path, known: Collection[str]) -> None:
    """Raise DocumentError for a safetensors file that is not what was written, OSError for one that cannot be read.

    known : names of the metadata that `write_tensors` was given; of others, a damaged name cannot be told

    A file is read once in a process, as long as it keeps its size and time. Files of earlier versions have no checksum,
    and pass.
    """
    status = regular_status(path)
    if fault := _fault(path.absolute(), status.st_size, status.st_mtime_ns, frozenset(known)):
        raise DocumentError(fault)


def has_checksum(path: Path) -> bool:
    """Whether a whole safetensors file says its own checksum. Raises OSError, or DocumentError for a broken header."""
    with open_regular(path) as file:
        text = file.read(min(int.from_bytes(file.read(8), "little"), _MOST_HEADER))
    return _CHECKSUM in parse_json(text).get("__metadata__", {})


@lru_cache(maxsize=4096)
def _fault(path: Path, n_bytes: int, _time: int, known: frozenset[str]) -> str:
    """What is wrong with a file of tensors; '' where nothing is."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MOST_HEADER, n_bytes - 8):
                return "its header is cut short"
            text = file.read(length)
            metadata = parse_json(text).get("__metadata__", {})
            if _CHECKSUM not in metadata:
                others = metadata.keys() - known
                return f"its header has {', '.join(sorted(map(repr, others)))}, which nobody wrote" if others else ""
            at = _checksum_at(text)
            checksum = google_crc32c.value(start + text[:at] + _UNKNOWN.encode() + text[at + len(_UNKNOWN) :])
            while content := file.read(_AT_ONCE):
                checksum = google_crc32c.extend(checksum, np.frombuffer(content, np.uint8))
        return "" if metadata[_CHECKSUM] == f"{checksum:08x}" else "it is not what was written"
    except (DocumentError, AttributeError, TypeError) as error:
        return f"its header cannot be read ({error})"


def _pieces(tensor: torch.Tensor) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, `_AT_ONCE` at a time."""
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
    for start in range(0, numbers.numel(), _AT_ONCE):
        yield numbers[start : start + _AT_ONCE].numpy().data


def as_float32(values: np.ndarray) -> np.ndarray:
    """The same numbers in float32, themselves where they are. torch converts float16 ten times as fast as NumPy."""
    return values if values.dtype == np.float32 else torch.from_numpy(values).float().numpy()


def copy_as_float32(values: np.ndarray, place: np.ndarray) -> None:
    """Copy numbers of any type to a float32 place of their shape, as fast as `as_float32`."""
    if values.dtype == np.float16:
        torch.from_numpy(place).copy_(torch.from_numpy(values))
    else:
        place[:] = values
