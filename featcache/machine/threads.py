"""Independent work on all cores, each piece on one of them."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")


def side_by_side(work: Callable[[T], U], items: Iterable[T], device: str = "cpu") -> list[U]:
    """Results of a function for each item, in order: on a CPU by as many threads as torch may use, one core each.

    torch shares each product out over its threads, which wait for each other at its end. Where another process takes a
    part of the cores, a thread is often late and the others wait by spinning: many small products then take ten times
    as long. Threads with pieces of their own wait for nobody. On an accelerator there is one thread, the caller's.

    The first error of `work` is raised, after the pieces that have begun.
    """
    items, n_threads = list(items), torch.get_num_threads()
    n_workers = min(n_threads, len(items))
    if device != "cpu" or n_workers < 2:
        return [work(item) for item in items]
    pool = ThreadPoolExecutor(n_workers, "side-by-side")
    torch.set_num_threads(1)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)
