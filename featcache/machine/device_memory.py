"""Memory of the device that computes: how much of it is free, and what to do when it is full.

On a CPU this is main memory, which `--max-memory` may limit. The memory of a CUDA device has no such option: a fit may
take what is free there.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from featcache.errors import ConfigError
from featcache.machine.memory import free_memory, refuse_above, said, spare_memory
from featcache.machine.progress import say, size_of

T = TypeVar("T")

_USABLE = 0.9  # of what is free on a CUDA device: blocks of many sizes leave holes that nothing fits into
# what CUDA's libraries say in place of torch's own error; a CPU has only a RuntimeError
_WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def on_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def free_on(device: str | torch.device) -> int:
    """Bytes of the device's memory that this process can still take, with those that torch holds and does not use."""
    if not on_cuda(device):
        return free_memory()
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def spare_on(device: str | torch.device, max_memory: float) -> float:
    """Bytes of the device's memory that a fit may take. max_memory : 10^9 bytes of main memory; 0: no limit"""
    return free_on(device) * _USABLE if on_cuda(device) else spare_memory(max_memory)


def said_on(device: str | torch.device, n_bytes: float) -> str:
    """Amount of memory as a message says it: 'about 1.2 GB of the device's memory'."""
    return f"about {size_of(n_bytes)} of the device's memory" if on_cuda(device) else said(n_bytes)


def refuse_beyond(device: str | torch.device, max_memory: float, peak: float) -> None:
    """Raise ConfigError where a CPU's process that takes `peak` bytes exceeds --max-memory, 10^9 bytes; 0: no limit.

    A CUDA device refuses nothing beforehand: `peak` is a guess, and what does not fit is said when it happens.
    """
    if not on_cuda(device):
        refuse_above(max_memory, peak)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or main memory, is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def forget_freed(device: str | torch.device) -> None:
    """Give memory that nothing uses any more back to the device, so that pieces of any size fit there again."""
    gc.collect()
    if on_cuda(device):
        torch.cuda.empty_cache()


def halving(
    call: Callable[[int], T], size: int, *, device: str | torch.device, things: str, remedy: str, least: int = 1
) -> tuple[T, int]:
    """(call(size), size), where `size` is halved, down to `least`, as often as a CUDA device is out of memory.

    call : may be called again after it failed
    things, remedy : what `size` counts, for what is said, and what to do where even `least` does not fit

    Raises ConfigError there. Other errors, and those of a CPU, are raised as they are.
    """
    while True:
        try:
            return call(size), size
        except (RuntimeError, MemoryError) as error:
            if not (on_cuda(device) and is_out_of_memory(error)):
                raise
            fault = str(error).splitlines()[0]
        # here, because an error that is being handled keeps the tensors of the call that failed
        forget_freed(device)
        if size <= least:
            raise ConfigError(
                "--device cuda", expected=f"enough memory for {size:,} {things}", found=fault, remedy=remedy
            )
        size = max(size // 2, least)
        say(f"the device's memory is full: goes on with {size:,} {things}")
