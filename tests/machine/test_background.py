"""Work beside its caller: in order, one at a time, and no error is lost."""

import threading

import pytest

from featcache.machine.background import Background


@pytest.mark.parametrize("beside", [True, False])
def test_calls_run_in_order_and_give_their_results_and_errors(beside):
    work, ran = Background(beside), []
    assert work.wait() is None
    for number in range(3):
        work.start(lambda number=number: ran.append(number) or number)
    assert work.wait() == 2 and ran == [0, 1, 2] and work.wait() is None
    with pytest.raises(KeyboardInterrupt):
        work.start(raise_interrupt)
        work.wait()
    assert work.wait() is None  # said once, and nobody waits for what ended so


def raise_interrupt():
    raise KeyboardInterrupt


def test_the_caller_goes_on_while_a_call_runs():
    work, free = Background(True), threading.Event()
    work.start(lambda: free.wait(10))
    free.set()  # which a caller that waited could not
    assert work.wait() is True
