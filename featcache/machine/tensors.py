"""Tensors that may be larger than the memory: written to safetensors one after the other, and held in files."""

import errno
import json
import math
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
_IN_MEMORY = 32 << 20  # bytes up to which `large_zeros` takes main memory
_AT_ONCE = 64 << 20  # bytes that are copied at a time


class Digest(Protocol):
    """What hashlib's digests have in common."""

    def update(self, data: Any, /) -> None:
        """Take in the next bytes."""


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], digest: Digest | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    digest : takes in the bytes of the file as they are written, so that nobody has to read it again

    The library's own writer makes a copy of all tensors first. This one copies `_AT_ONCE` bytes at a time, so that
    tensors held in files by `large_zeros` need no memory.

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


def large_zeros(folder: Path | None, *shape: int) -> torch.Tensor:
    """float32 zeros of any size: in main memory, or above `_IN_MEMORY` in a file of this folder.

    The file has no name, so that its room on the disk is free again once the tensor is gone, however the process ends.
    """
    n_bytes = 4 * math.prod(shape)
    if folder is None or n_bytes <= _IN_MEMORY:
        return torch.zeros(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, n_bytes)  # a disk that is full later would end the process by a signal
        except AttributeError:  # not every system has it
            file.truncate(n_bytes)
        except OSError as error:
            free = os.fstatvfs(file.fileno())
            if error.errno not in _NO_PROMISE or free.f_bavail * free.f_frsize < n_bytes:
                raise
            file.truncate(n_bytes)
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=shape))
