"""Work that a thread does while its caller goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Calls one function after the other, in a thread beside the caller, or at once.

    beside : False: a call is over when `start` returns
    """

    def __init__(self, beside: bool) -> None:
        self._pool = ThreadPoolExecutor(1) if beside else None
        self._last: Future[T] | None = None

    def start(self, call: Callable[[], T]) -> None:
        """Call a function, once the one before has ended. Raises what that one raised."""
        self.wait()
        if self._pool is not None:
            self._last = self._pool.submit(call)
            return
        done: Future[T] = Future()
        done.set_result(call())
        self._last = done

    def wait(self) -> T | None:
        """Result of the last function, once it has ended; None before the first. Raises what it raised, once."""
        last, self._last = self._last, None
        return None if last is None else last.result()
