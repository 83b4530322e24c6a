"""How much memory a fit may take, and what it says of it before it starts."""

import functools
import math

from featcache.errors import ConfigError
from featcache.machine.device import free_memory, used_memory
from featcache.machine.progress import size_of

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
