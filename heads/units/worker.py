"""One worker: takes units one after the other, as long as there are any."""

import gc
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from featcache.errors import BusyError, StoreError
from featcache.machine.leases import Lease
from featcache.machine.memory import give_back_memory
from featcache.machine.progress import say
from heads.config import EngineConfig
from heads.recipes.steps import Ready
from heads.units.course import Course, Ended, Look, in_one_line
from heads.units.units import Unit, record_of, timed

_BUSY = 5.0  # seconds after which a unit is tried again whose folder another process writes to
_LONG = 1.0  # seconds of a unit after which its memory is given back
_MOST_FAILURES = 3  # of different units in a row, after which it is the worker that is wrong
_one_at_a_time = threading.Lock()  # of a process whose threads are given units, as those of a Dask worker


class DismissedError(Exception):
    """A worker is done before the recipe is: nothing was left for it to take for a while."""


@dataclass
class Worker:
    """What one process does of a recipe.

    did : ids of the units that it did. again : how many of them another had done
    idle : seconds without work after which it ends; None: it stays until all is over
    """

    course: Course
    work: Path
    idle: float | None = None
    again: int = 0
    did: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)  # units that failed here
    busy: dict[str, float] = field(default_factory=dict)  # units, and when each was last found to be written to
    in_a_row: int = 0
    since: float = field(default_factory=time.monotonic)

    def turn(self, look: Look) -> bool:
        """Do one unit, if one can be taken."""
        for unit in self._wanted(look):
            lease = self.course.leases.take(unit.id, look.state(unit))
            if lease is None:
                continue
            with lease.held():
                self._do(unit, lease)
            self.since = time.monotonic()
            return True
        if self.idle is not None and time.monotonic() - self.since > self.idle:
            raise DismissedError
        return False

    def _wanted(self, look: Look) -> list[Unit]:
        """Units to try: first those that did not fail here, and the others if no other worker is there to take them."""
        now = time.monotonic()
        free = [unit for unit in look.open if now - self.busy.get(unit.id, -_BUSY) >= _BUSY]
        new = [unit for unit in free if unit.id not in self.failed]
        return new or ([] if look.n_held else free)

    def _do(self, unit: Unit, lease: Lease) -> None:
        began = time.monotonic()
        try:
            outcome, seconds = timed(unit.call)
            if outcome.code:
                raise StoreError(unit.title, expected="exit code 0", found=outcome.code, remedy=outcome.message)
            self.again += not lease.finish(record_of(unit, outcome, seconds, self.work))
            self.did.add(unit.id)
            self.in_a_row = 0
        except BusyError:  # as of a worker that was taken for lost, and was only slow
            lease.release()
            self.busy[unit.id] = time.monotonic()
        except Exception as error:
            why = in_one_line(error)
            lease.fail(why)
            say(f"{unit.title}: failed here: {why}")
            new = unit.id not in self.failed
            self.failed.add(unit.id)
            self.in_a_row += new
            if self.in_a_row >= _MOST_FAILURES and self.idle is not None:
                raise
        except BaseException:  # told to end
            lease.release()
            raise
        finally:
            if time.monotonic() - began > _LONG:  # collecting garbage takes a tenth of a second
                gc.collect()
                give_back_memory()


def take_part(
    steps: Sequence[Ready], work: Path, config: EngineConfig, idle: float | None = None
) -> tuple[Ended, Worker]:
    """Do units until all are over, beside whoever else does; how they ended, and what this process did."""
    with _one_at_a_time:
        course = Course(steps, work, config)
        worker = Worker(course, work, idle)
        with suppress(DismissedError):
            course.follow(worker.turn)
        return course.ended, worker
