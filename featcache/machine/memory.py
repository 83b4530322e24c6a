"""How much main memory there is, how much a fit may take, and how it is given back."""

import ctypes
import functools
import math
import os
from contextlib import suppress
from pathlib import Path

from featcache.errors import ConfigError
from featcache.machine.progress import size_of


def free_memory() -> int:
    """Bytes of main memory that this process can still take; a container's limit counts."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path, read in _LIMITS.items():
        with suppress(OSError, ValueError, LookupError, StopIteration):
            free = min(free, read(Path(path)))
    return free


def used_memory() -> int:
    """Bytes of main memory that this process has; 0 where the system does not say."""
    with suppress(OSError, ValueError, LookupError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _available(path: Path) -> int:
    return 1024 * next(
        int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvailable")
    )


def _below_limit(path: Path) -> int:
    limit = int(path.read_text())  # 'max' is no number: no limit
    return limit - int((path.parent / "memory.current").read_text()) + _given_up(path.parent / "memory.stat")


def _given_up(path: Path) -> int:
    """What a container counts as used, but gives up when memory is asked for: files that were read."""
    with suppress(OSError, ValueError, LookupError):
        return int(dict(line.split() for line in path.read_text().splitlines())["inactive_file"])
    return 0


_LIMITS = {"/proc/meminfo": _available, "/sys/fs/cgroup/memory.max": _below_limit}


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


def give_back_memory() -> bool:
    """Return to the kernel what is free; False where the C library has no such call.

    Kept memory falls into holes as blocks of other sizes come and go: without this, eight subjects one after the other
    took 18 % more than one (docs/log.md).
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False


_LIBRARIES = 0.12e9  # bytes of libraries, and of their threads, that a first fit brings with it; measured


@functools.cache
def memory_at_start() -> int:
    """Of this process before its first fit, and what that loads: what one subject leaves is used for the next."""
    return used_memory() + int(_LIBRARIES)


def spare_memory(most: float) -> float:
    """Bytes that a fit may take: what is free, within what is left of `most`, 10^9 bytes of the process; 0: no cap."""
    return min(free_memory(), most * 1e9 - memory_at_start()) if most else free_memory()


def refuse_above(most: float, peak: float) -> None:
    """Raise ConfigError where a process is expected to take more than --max-memory, 10^9 bytes; 0: no cap."""
    if most and peak > most * 1e9:
        raise ConfigError(
            "--max-memory",
            expected=f"{math.ceil(peak / 10000000.0) / 100:g} GB or more for these images, features and vertices",
            found=f"{most:g}",
            remedy="give more, or extract fewer features",
        )


def block_that_fits(fixed: float, per_vertex: float, largest: int, most: float, least: int = 64) -> int:
    """Vertices at a time, up to `largest`, so that a fit stays in what it may take.

    fixed, per_vertex : bytes that it takes whatever the block, and for each vertex of a block

    Raises ConfigError where not even the smallest block fits into --max-memory; what is free is only a guess, and the
    system may yet give more.
    """
    spare = spare_memory(most)
    refuse_above(most, memory_at_start() + fixed + least * per_vertex)
    return int(min(max((spare - fixed) / per_vertex, least), largest))


def said(n_bytes: float) -> str:
    """For a person."""
    return f"about {size_of(n_bytes)} of memory"
