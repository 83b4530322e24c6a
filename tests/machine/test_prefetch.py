import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

import pytest

from featcache.machine.prefetch import afterwards, prefetch

PATIENCE = 60  # seconds that a thread may take to come to what is expected of it


@pytest.mark.parametrize(("depth", "threads"), [(0, 1), (1, 1), (2, 1), (3, 2), (50, 4)])
def test_every_result_comes_once_and_in_turn(depth, threads):
    assert list(prefetch(lambda n: n * n, range(20), depth, threads)) == [n * n for n in range(20)]
    assert list(prefetch(lambda n: n, [], depth, threads)) == []


def test_results_that_are_ready_early_wait_for_their_turn():
    last = threading.Event()

    def load(n: int) -> int:
        if n == 0:
            assert last.wait(PATIENCE)
        if n == 3:
            last.set()
        return n

    assert list(prefetch(load, range(4), depth=3, threads=2)) == [0, 1, 2, 3]


def test_the_next_ones_are_loaded_while_one_is_used():
    began = [threading.Event() for _ in range(6)]
    results = prefetch(lambda n: began[n].set(), range(6), depth=2)
    next(results)
    assert began[1].wait(PATIENCE) and began[2].wait(PATIENCE)
    results.close()


@pytest.mark.parametrize(("depth", "threads"), [(0, 1), (1, 2), (3, 2)])
def test_no_more_are_begun_than_asked_for(depth, threads):
    begun: list[int] = []
    for taken, _ in enumerate(prefetch(begun.append, range(12), depth, threads), start=1):
        assert len(begun) <= taken + depth
    assert sorted(begun) == list(range(12))


def test_items_are_taken_as_they_are_needed():
    assert list(islice(prefetch(str, count(), depth=3, threads=2), 5)) == list("01234")


def test_an_error_comes_at_its_place_and_ends_it():
    begun: list[int] = []

    def load(n: int) -> float:
        begun.append(n)
        return 1 / (n - 2)

    results = prefetch(load, range(100), depth=3, threads=2)
    assert [next(results), next(results)] == [-0.5, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == [] and max(begun) <= 2 + 3


def test_an_interruption_inside_a_thread_reaches_whoever_waits():
    def load(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(prefetch(load, range(3), depth=1))


def test_leaving_early_begins_nothing_more_and_leaves_no_thread(monkeypatch):
    """The one thread is held in item 1 until what waits behind it has been given up."""
    before, given_up, begun = threading.active_count(), threading.Event(), []

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            given_up.set()
            super().shutdown(wait)

    def load(n: int) -> None:
        begun.append(n)
        assert n == 0 or given_up.wait(PATIENCE)

    monkeypatch.setattr("featcache.machine.prefetch.ThreadPoolExecutor", Pool)
    results = prefetch(load, range(100), depth=4)
    next(results)
    results.close()
    until = time.monotonic() + PATIENCE
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before and begun in ([0], [0, 1])


@pytest.mark.skipif(not hasattr(threading, "_shutdown_locks_lock"), reason="this Python has no such lock")
def test_the_garbage_collector_may_end_it_in_a_thread_that_starts():
    """A new thread holds a lock for a moment in which garbage may be collected; the end of a thread needs that lock."""
    results = prefetch(lambda n: n, count(), depth=2, threads=2)
    next(results)
    cycle = [results]
    cycle.append(cycle)
    del results

    def collect() -> None:
        with threading._shutdown_locks_lock:
            gc.collect()

    gc.disable()
    try:
        del cycle
        starting = threading.Thread(target=collect, daemon=True)
        starting.start()
        starting.join(PATIENCE)
    finally:
        gc.enable()
    assert not starting.is_alive()


# --- afterwards


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_calls_are_run_in_turn_and_all_of_them(depth):
    done: list[int] = []
    with afterwards(depth) as then:
        for n in range(20):
            then(lambda n=n: done.append(n))
    assert done == list(range(20))


def test_the_block_goes_on_beside_a_call_and_waits_at_the_depth():
    gone_on, done, taken = threading.Event(), threading.Semaphore(0), []

    def call() -> None:
        assert gone_on.wait(PATIENCE)
        done.release()

    with afterwards(2) as then:
        then(call)
        then(call)
        gone_on.set()  # reached, though no call is done
        for n in range(6):  # the call that makes room is done before the next is taken
            then(call)
            assert done.acquire(timeout=PATIENCE)
            taken.append(n)
    assert taken == list(range(6))


def test_after_an_error_no_call_is_run_and_the_error_is_raised():
    done: list[int] = []

    def call(n: int) -> None:
        if n == 3:
            raise KeyError(n)
        done.append(n)

    with pytest.raises(KeyError), afterwards(2) as then:
        for n in range(100):
            then(lambda n=n: call(n))
    assert done == [0, 1, 2]
    with pytest.raises(KeyError), afterwards(50) as then:  # at the end of the block at the latest
        for n in range(2, 6):
            then(lambda n=n: call(n))
    assert done == [0, 1, 2, 2]


def test_what_was_taken_is_done_before_an_error_of_the_block_is_raised():
    done: list[int] = []
    with pytest.raises(ZeroDivisionError), afterwards(50) as then:
        for n in range(20):
            then(lambda n=n: done.append(n))
        _ = 1 / 0
    assert done == list(range(20))
