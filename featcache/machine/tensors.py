"""Tensors that may be larger than the memory: written to safetensors one after the other, and held in files."""

import errno
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from featcache.machine.files import whole_file

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

    The library's own writer makes a copy of all tensors first. This one copies `_AT_ONCE` bytes at a time, so that
    tensors of a spool need no memory.

    Source: the format, https://huggingface.co/docs/safetensors
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with whole_file(path) as partial, partial.open("wb") as file:
        header_bytes: list[bytes | memoryview] = [len(text).to_bytes(8, "little") + text]
        for content in chain(header_bytes, chain.from_iterable(map(_pieces, tensors.values()))):
            file.write(content)
            if digest is not None:
                digest.update(content)
            if spool is not None:
                spool.let_go()


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
