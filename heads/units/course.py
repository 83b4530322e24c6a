"""Going through the units of a recipe, phase by phase, whoever does them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.errors import FeatcacheError, first_line
from featcache.machine.leases import Done, Failure, Leases, State
from featcache.workdir import Workdir
from heads.config import EngineConfig
from heads.recipes.steps import Ready
from heads.units.torchrun import Devices
from heads.units.units import Phase, Unit, merged, phases_of

FIRST_WAIT, LONGEST_WAIT = 0.02, 2.0  # seconds between two looks at the folder


@dataclass
class Ended:
    """How the units of a recipe have ended so far.

    records : of the units that are done, by their id, in the order of the units
    failed : units that are given up, each with its last error
    not_begun : steps that are left out because of them
    """

    units: list[Unit] = field(default_factory=list)
    records: dict[str, Done] = field(default_factory=dict)
    failed: dict[str, tuple[Unit, Failure]] = field(default_factory=dict)
    not_begun: list[str] = field(default_factory=list)

    @property
    def subjects(self) -> set[str]:
        """Subjects that lack the results of a unit that was given up."""
        return {subject for unit, _ in self.failed.values() for subject in unit.subjects}

    def results(self, steps: Sequence[Ready]) -> list[dict[str, Any]]:
        """The result of each step, as of one command."""
        of_steps: dict[int, list[Mapping[str, Any]]] = {ready.step.number: [] for ready in steps}
        for unit in self.units:
            if unit.id in self.records:
                of_steps[unit.step].append(self.records[unit.id].result)
        return [
            {"step": ready.step.number, "command": ready.step.command} | merged(of_steps[ready.step.number])
            for ready in {ready.step.number: ready for ready in steps}.values()
        ]


@dataclass(frozen=True)
class Look:
    """The units of now, as a listing has them. open : that can be taken or are held by somebody, in order"""

    phase: Phase
    units: Sequence[Unit]
    states: Mapping[str, State]
    open: Sequence[Unit]
    records: Mapping[str, Done]

    def state(self, unit: Unit) -> State:
        """What is known of a unit."""
        return self.states.get(unit.id, State())

    @property
    def n_held(self) -> int:
        """Units that somebody works on, as far as a listing can say it."""
        return sum(self.state(unit).held for unit in self.open)


Turn = Callable[[Look], bool]  # whether it did something, so that the folder is to be looked at at once


class Course:
    """One process's way through the units of a recipe. Any number of processes may go it side by side.

    anew : whether units that failed before are tried again
    """

    def __init__(self, steps: Sequence[Ready], work: Path, config: EngineConfig, anew: bool = False) -> None:
        self.leases = Leases(Workdir(work).units, config.lost_after)
        self._steps, self._attempts = steps, config.attempts
        self._devices = Devices(config.nodes, max(config.processes or config.gpus, 1))
        self._anew, self.ended = anew, Ended()

    def follow(self, turn: Turn) -> Ended:
        """Take turns until every unit is done or given up. What follows from a unit that is given up is not begun."""
        before = ""
        for phase in phases_of(self._steps, self._devices):
            units = self._of_phase(phase, before, turn)
            before = ",".join([before, *(unit.id for unit in units)])
        return self.ended

    def _of_phase(self, phase: Phase, before: str, turn: Turn) -> list[Unit]:
        if self.ended.failed and not phase.has_parts:
            self.ended.not_begun.append(phase.command)
            return []
        but = self.ended.subjects
        if phase.has_parts and not self._until_over(phase, [phase.first(before, but)], turn):
            return []
        units = phase.units(before, but)
        if self.ended.failed and not units:
            self.ended.not_begun.append(phase.command)
        self.ended.units += units
        whole = self._until_over(phase, units, turn)
        if phase.has_parts and units and whole:
            self._until_over(phase, [phase.last(units, self.ended.records)], turn)
        return units

    def _until_over(self, phase: Phase, units: Sequence[Unit], turn: Turn) -> bool:
        """Take turns until these units are done or given up; whether all of them are done."""
        if self._anew:
            states = self.leases.states()
            self.leases.forget_failures([unit.id for unit in units if states.get(unit.id, State()).failed])
        wait = FIRST_WAIT
        while True:
            look = self._look(phase, units)
            if not look.open:
                return all(unit.id in self.ended.records for unit in units)
            if turn(look):
                wait = FIRST_WAIT
            else:
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    def _look(self, phase: Phase, units: Sequence[Unit]) -> Look:
        states, still_open = self.leases.states(), []
        for unit in units:
            state = states.get(unit.id, State())
            if unit.id in self.ended.records or unit.id in self.ended.failed:
                continue
            if state.done and (record := self.leases.done(unit.id)) is not None:
                self.ended.records[unit.id] = record
            elif state.given_up(self._attempts):
                self.ended.failed[unit.id] = unit, self._last_failure(unit, state)
            else:
                still_open.append(unit)
        return Look(phase, units, states, still_open, self.ended.records)

    def _last_failure(self, unit: Unit, state: State) -> Failure:
        failures = self.leases.failures(unit.id, state)
        lost = Failure("", f"{state.n_lost} workers were lost at it; see to their memory, or to what ended them")
        return failures[-1] if failures and len(state.failed) >= self._attempts else lost


def in_one_line(error: BaseException) -> str:
    """What is kept of an error: a user's mistake as it is said, of any other its kind and its first line."""
    return str(error) if isinstance(error, FeatcacheError) else f"{type(error).__name__}: {first_line(error)}"
