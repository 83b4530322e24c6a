"""Pieces of work on a core each: in order, with one thread of torch, and with their own errors."""

import threading

import pytest
import torch

from featcache.machine.threads import side_by_side


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_are_in_the_order_of_the_items(two_threads):
    both = threading.Barrier(2, timeout=30)  # passes only where two pieces run at once

    def work(item):
        both.wait()
        return item * item

    assert side_by_side(work, range(6)) == [0, 1, 4, 9, 16, 25]


def test_a_piece_has_one_thread_and_all_come_back_afterwards(two_threads):
    assert side_by_side(lambda _: torch.get_num_threads(), range(3)) == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_an_error_of_a_piece_is_raised_and_the_threads_come_back(two_threads):
    def work(item):
        if item == 1:
            raise ZeroDivisionError("piece 1")
        return item

    with pytest.raises(ZeroDivisionError, match="piece 1"):
        side_by_side(work, range(4))
    assert torch.get_num_threads() == 2


def test_on_an_accelerator_the_caller_works_alone(two_threads):
    assert side_by_side(lambda _: threading.current_thread(), range(3), "cuda") == [threading.current_thread()] * 3


def test_nested_pieces_do_not_multiply_threads(two_threads):
    def outer(_):
        return side_by_side(lambda _: threading.current_thread(), range(3)) == [threading.current_thread()] * 3

    assert side_by_side(outer, range(2)) == [True, True]
