"""How much main memory is free, how much of it a fit may take, and how it goes back to the system."""

import ctypes
import functools
import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

from featcache.errors import ConfigError
from featcache.machine.progress import size_of


def free_memory() -> int:
    """Bytes of main memory that this process can still take, within the limit of its container."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path, read in _LIMITS.items():
        with suppress(OSError, ValueError, LookupError, StopIteration):
            free = min(free, read(Path(path)))
    return free


def used_memory() -> int:
    """Bytes of main memory that this process holds; 0 where the system does not say."""
    with suppress(OSError, ValueError, LookupError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def forget_peak(path: Path = Path("/proc/self/clear_refs")) -> None:
    """Have `peak_memory` count from now on, where the system can; elsewhere it counts from the start of the process."""
    with suppress(OSError):
        path.write_text("5")


def peak_memory(path: Path = Path("/proc/self/status")) -> int:
    """Most bytes of main memory that this process held since `forget_peak`."""
    with suppress(OSError, ValueError, StopIteration):
        lines = path.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def _available(path: Path) -> int:
    return 1024 * next(
        int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvailable")
    )


def _below_limit(path: Path) -> int:
    limit = int(path.read_text())  # raises ValueError for 'max', which is no limit
    return limit - int((path.parent / "memory.current").read_text()) + _reclaimable(path.parent / "memory.stat")


def _reclaimable(path: Path) -> int:
    """Bytes of cached files, which a container counts as used but frees when memory is needed."""
    with suppress(OSError, ValueError, LookupError):
        return int(dict(line.split() for line in path.read_text().splitlines())["inactive_file"])
    return 0


_LIMITS = {"/proc/meminfo": _available, "/sys/fs/cgroup/memory.max": _below_limit}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's names for mallopt(3)
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for its next use; False where the C library has no such setting.

    A network on a CPU asks for the same large blocks in every batch and frees them. By default they go back to the
    kernel, which clears their pages each time: a third of the time, and more (docs/decisions/0005). With this setting
    the process holds its peak memory until it ends, or until `give_back_memory`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))


def give_back_memory() -> bool:
    """Return freed memory to the kernel; False where the C library has no such call.

    Kept memory gets holes as blocks of other sizes come and go: without this call, eight subjects one after the other
    took 18 % more memory than one (docs/decisions/0005).
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False


_LIBRARIES = 0.12e9  # bytes that libraries and their threads take from the first fit on; measured


@functools.cache
def memory_at_start() -> int:
    """Bytes of this process at the first call, and of the libraries that a fit loads.

    Later calls return the same number: memory that one subject's fit leaves behind serves the next.
    """
    return used_memory() + int(_LIBRARIES)


def spare_memory(max_memory: float) -> float:
    """Bytes that a fit may take: of free memory, and of `max_memory`, 10^9 bytes for the whole process; 0: no limit."""
    return min(free_memory(), max_memory * 1e9 - memory_at_start()) if max_memory else free_memory()


def refuse_above(max_memory: float, peak: float) -> None:
    """Raise ConfigError where a process that takes `peak` bytes exceeds `max_memory`, 10^9 bytes; 0: no limit."""
    if max_memory and peak > max_memory * 1e9:
        raise ConfigError(
            "--max-memory",
            expected=f"{math.ceil(peak / 1e7) / 100:g} GB or more for these images, features and vertices",
            found=f"{max_memory:g}",
            remedy="give more, or read fewer layers by --layers",
        )


def block_that_fits(fixed: float, per_vertex: float, largest: int, max_memory: float, least: int = 64) -> int:
    """Number of vertices to fit at a time, from `least` to `largest`, so that a fit stays within `spare_memory`.

    fixed, per_vertex : bytes that the fit takes for any block, and for each vertex of a block

    Raises ConfigError where not even the smallest block fits into `max_memory`. Free memory alone never refuses: it is
    a guess, and the system may still give more.
    """
    refuse_above(max_memory, memory_at_start() + fixed + least * per_vertex)
    return int(min(max((spare_memory(max_memory) - fixed) / per_vertex, least), largest))


def said(n_bytes: float) -> str:
    """Amount of memory as a message says it: 'about 1.2 GB of memory'."""
    return f"about {size_of(n_bytes)} of memory"
