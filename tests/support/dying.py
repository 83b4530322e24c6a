"""Processes that die, as by kill -9, at a chosen point of what they do to files."""

import itertools
import os
import sys
from collections.abc import Callable

_OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link")


def dies_before(number: int, call: Callable[[], object]) -> bool:
    """Call in a process of its own that dies before its operation on files of this number; whether it came to that."""
    child = os.fork()
    if not child:
        counted, code = itertools.count(), 1

        def die(event: str, _: object) -> None:
            if event in _OPERATIONS and next(counted) == number:
                os._exit(9)

        sys.addaudithook(die)
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def number_of_one_that_is_gone() -> int:
    """Number of a process that has ended."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child
