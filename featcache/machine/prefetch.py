"""Results that threads compute before they are needed, and work that a thread does afterwards."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(load: Callable[[T], U], items: Iterable[T], depth: int, threads: int = 1) -> Iterator[U]:
    """Yield load(item) for each item, in order, while `threads` threads load up to `depth` items in advance.

    An error of `load` is raised at its item's place and ends the iteration. Whoever leaves early does not wait for what
    is being loaded.
    """
    waiting: deque[Future[U]] = deque()
    pool = ThreadPoolExecutor(threads)
    join = True
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except GeneratorExit:
        # the garbage collector may be the one who leaves, in a thread that is about to start and holds the lock that
        # the end of a thread is waited for with
        join = False
        raise
    finally:
        pool.shutdown(join, cancel_futures=True)


@contextmanager
def afterwards(depth: int) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Run calls in one thread, one after the other, while the block goes on; yields what takes a call.

    It waits as long as `depth` calls are not done. After an error no later call is run, and the error is raised where
    the next call is taken, or at the end of the block. An error of the block itself is raised once all calls are done.
    """
    waiting: deque[Future[None]] = deque()
    failed: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        if not failed:
            try:
                call()
            except BaseException as error:
                failed.append(error)
                raise

    def take(call: Callable[[], object]) -> None:
        while len(waiting) >= depth:
            waiting.popleft().result()
        waiting.append(pool.submit(run, call))

    with ThreadPoolExecutor(1) as pool:
        yield take
        while waiting:
            waiting.popleft().result()
