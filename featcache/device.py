"""Where tensors live."""

import ctypes

import torch

from featcache.errors import ConfigError


def resolve_device(device: str) -> str:
    """'auto' is CUDA where there is one. Raises ConfigError for a CUDA that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: expected a CUDA device; found none that torch can use; use --device cpu")
    return device


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's names for mallopt(3)
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep what a forward pass frees, for the next one; False where the C library has no such setting.

    A network on a CPU frees and asks for the same large blocks in every batch. By default they go back to the kernel,
    which clears their pages again each time: a third of the time and more (docs/log.md). The process keeps its peak
    memory for as long as it lives.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
