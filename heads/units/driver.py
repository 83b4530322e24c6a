"""The process that starts workers, by an engine, and watches the units until they are over. It does none itself."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.errors import ConfigError, first_line
from featcache.machine.progress import counted, say, status
from featcache.workdir import Workdir
from heads.config import EngineConfig
from heads.recipes.steps import Ready
from heads.units.course import Course, Ended, Look
from heads.units.engines import Engine, Work, opened

_MOST_LOST = 10  # workers, one after the other, that ended with an error while no unit ended


@dataclass
class Driver:
    """Keeps as many workers running as there is work for.

    orders : what each worker is told
    """

    course: Course
    config: EngineConfig
    n_workers: int
    work: Work
    orders: dict[str, Any]
    logs: Path
    show: Callable[[str], None]
    stack: ExitStack
    engine: Engine | None = None
    running: set[Future[Any]] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    n_over: int = 0
    said: set[str] = field(default_factory=set)  # failures
    trouble: str = ""  # of the engine, as it was said last

    def turn(self, look: Look) -> bool:
        """See to the workers. The engine is opened by the first turn: where all is done, none is needed."""
        if self.engine is None:
            self.engine = self.stack.enter_context(opened(self.config, self.n_workers, self.logs))
            say(f"{counted(self.engine.n_workers, 'worker')}; {self.engine.address}")
        self._see_to_the_dead(look)
        if (n := self._wanted(look) - len(self.running)) > 0:
            self.running |= set(self.engine.start(self.work, self.orders, n))
        self._say_failures(look)
        if (trouble := self.engine.trouble) != self.trouble:
            self.trouble = trouble
            say(trouble or "workers can start again")
        self.show(self._described(look))
        return False

    def _wanted(self, look: Look) -> int:
        """How many workers have something to do; all of them at the beginning, when that is not known yet."""
        assert self.engine is not None
        known = any(unit.id in look.records for unit in look.units) or len(look.units) > 1
        return min(self.engine.n_workers, len(look.open)) if known or self.running else self.engine.n_workers

    def _see_to_the_dead(self, look: Look) -> None:
        n_over = len(self.course.ended.records) + len(self.course.ended.failed)
        if n_over > self.n_over:
            self.n_over, self.lost = n_over, []
        for future in [one for one in self.running if one.done()]:
            self.running.remove(future)
            try:
                future.result()
            except (Exception, CancelledError) as error:
                self.lost.append(first_line(error))
                say(f"a worker ended early: {self.lost[-1]}")
        if len(self.lost) >= _MOST_LOST:
            raise ConfigError(
                f"--engine {self.config.engine}",
                expected="workers that do a unit",
                found=f"{len(self.lost)} that ended before they did ({self.lost[-1]})",
                remedy="see what they printed, correct it, and run the command again",
            )

    def _say_failures(self, look: Look) -> None:
        for unit in look.units:
            state = look.state(unit)
            for number in sorted(state.failed):
                if (name := f"{unit.id}.{number}") not in self.said:
                    self.said.add(name)
                    failures = self.course.leases.failures(unit.id, state)
                    why = f"{failures[-1].who}: {failures[-1].error}" if failures else "its error cannot be read"
                    say(f"{unit.title}: failed, attempt {number}: {why}")

    def _described(self, look: Look) -> str:
        return described(look, self.course.ended, len(self.running))


def described(look: Look, ended: Ended, n_workers: int) -> str:
    """How far a phase is, in a line: units done, running and failed, and the time that is left."""
    n_units, n_open = len(look.units), len(look.open)
    if n_units == 1:  # before the units of a phase are known, and after them
        return f"{look.units[0].title}, {counted(n_workers, 'worker')}"
    n_failed = sum(unit.id in ended.failed for unit in look.units)
    done = [look.records[unit.id].seconds for unit in look.units if unit.id in look.records]
    words = [f"{look.phase.command}: {n_units - n_open - n_failed} of {n_units} done", f"{look.n_held} running"]
    words += [f"{n_failed} failed"] if n_failed else []
    if done and n_open and n_workers:
        words.append(f"about {_duration(n_open * sum(done) / len(done) / min(n_workers, n_open))} left")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def drive(
    steps: Sequence[Ready], work_folder: Path, config: EngineConfig, n_workers: int, work: Work, orders: dict[str, Any]
) -> Ended:
    """Have workers do the units of some steps; how they ended.

    work : what each worker calls, with `orders`
    """
    course = Course(steps, work_folder, config, anew=True)
    logs = Workdir(work_folder).units / "logs"
    with ExitStack() as stack, status() as show:
        driver = Driver(course, config, n_workers, work, orders, logs, show, stack)
        return course.follow(driver.turn)
