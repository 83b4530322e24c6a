"""What there is to do of a recipe, unit by unit, and how far it is. Nothing is done, and nothing is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from featcache.machine.leases import Leases, State
from featcache.workdir import Workdir
from heads.recipes.plan import Estimate
from heads.recipes.steps import Ready
from heads.units.units import Unit, phases_of

DONE, RUNNING, LOST, FAILED, OPEN, UNKNOWN = "done", "running", "lost", "failed", "open", "not known yet"


@dataclass(frozen=True)
class Listed:
    """One unit, or a step whose units are not known before the steps above it are done.

    id : of the unit; '' where it is not known yet
    needs : bytes of memory, disk and, on CUDA, the device; None where it is not estimated
    makes : files, from the work folder, that tell of what it made; the folder where it will be, before
    state : one of the words above
    note : who does it, or why it failed
    """

    step: int
    command: str
    unit: str
    id: str
    subjects: tuple[str, ...]
    needs: Mapping[str, float | None]
    makes: Sequence[str]
    state: str
    note: str = ""
    seconds: float | None = None

    @property
    def done(self) -> bool:
        """Whether what it makes is there."""
        return self.state == DONE


def list_units(
    steps: Sequence[Ready], work: Path, estimates: Sequence[Estimate], attempts: int, lost_after: float
) -> list[Listed]:
    """Every unit of some steps, in order. estimates : of each step

    attempts, lost_after : as the workers have them
    """
    leases = Leases(Workdir(work).units, lost_after)
    states, listed, before, over = leases.states(), list[Listed](), "", True
    of_steps = {id(ready): estimate for ready, estimate in zip(steps, estimates, strict=True)}
    for phase in phases_of(steps):
        needs = {ready.step.number: of_steps[id(ready)] for ready in phase.steps}
        if not over:
            listed += [_unknown(ready, of_steps[id(ready)], work) for ready in phase.steps]
            continue
        units = phase.units(before)
        counts = {number: sum(unit.step == number for unit in units) for number in needs}
        rows = [_row(unit, needs[unit.step], counts[unit.step], leases, states, attempts, work) for unit in units]
        listed += rows
        over = all(row.done for row in rows)
        before = ",".join([before, *(unit.id for unit in units)])
    return listed


def forget_failures(steps: Sequence[Ready], work: Path) -> int:
    """Have the units that failed tried again; how many these are. Those of steps that are not known yet have not."""
    leases, before, n = Leases(Workdir(work).units), "", 0
    states = leases.states()
    for phase in phases_of(steps):
        units = [*([phase.first(before)] if phase.has_parts else []), *phase.units(before)]
        failed = [unit.id for unit in units if states.get(unit.id, State()).failed]
        leases.forget_failures(failed)
        n += len(failed)
        if any(leases.done(unit.id) is None for unit in units):
            break
        before = ",".join([before, *(unit.id for unit in units[phase.has_parts :])])
    return n


def _row(
    unit: Unit, estimate: Estimate, n_units: int, leases: Leases, states: Mapping[str, State], attempts: int, work: Path
) -> Listed:
    state = states.get(unit.id, State())
    word, note, seconds, makes = OPEN, "", None, [_folder(unit.command, work)]
    if state.done and (record := leases.done(unit.id)) is not None:
        word, note, seconds, makes = DONE, record.host, record.seconds, sorted(record.made)
    elif state.given_up(attempts):
        failures = leases.failures(unit.id, state)
        word, note = FAILED, failures[-1].error if failures else f"{state.n_lost} workers were lost at it"
    elif state.held:
        word, note = (LOST if leases.is_lost(unit.id, state) else RUNNING), leases.holder(unit.id, state)
    needs = _needs(estimate, n_units)
    return Listed(unit.step, unit.command, unit.name, unit.id, unit.subjects, needs, makes, word, note, seconds)


def _unknown(ready: Ready, estimate: Estimate, work: Path) -> Listed:
    step = ready.step
    makes = [_folder(step.command, work)]
    return Listed(step.number, step.command, "", "", (), _needs(estimate, 1), makes, UNKNOWN)


def _needs(estimate: Estimate, n_units: int) -> dict[str, float | None]:
    """The memory of a unit is that of the largest of its step; their disk is taken to be alike."""
    disk = None if estimate.disk is None else estimate.disk / max(n_units, 1)
    return {"memory": estimate.memory, "disk": disk, "device": estimate.device}


@cache
def _folder(command: str, work: Path) -> str:
    """The folder of what a command makes, or the file, from the work folder; '' for one that makes nothing there."""
    files = Workdir(work)
    folders: dict[str, Path] = {
        "pretrain": files.checkpoints,
        "finetune": files.checkpoints,
        "extract": files.features,
        "add-features": files.features,
        "fit-heads": files.predictions,
        "blend": files.submission,
        "compare": files.compared,
        "maps": files.maps,
        "trainings": files.trainings,
        "report": files.report,
    }
    return folders[command].relative_to(work).as_posix() if command in folders else ""


def listed_as_json(listed: Sequence[Listed]) -> list[dict[str, Any]]:
    """The units as JSON has them."""
    return [{**vars(one), "needs": dict(one.needs), "done": one.done} for one in listed]
