"""Commands whose pieces are done by an engine: lines go out, workers read them again and do units until all are over.

`python -m heads.commands.working` is a worker of --engine local; its orders come on stdin.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from featcache.errors import FeatcacheError, StoreError
from featcache.machine.progress import counted, say
from heads.config import EngineConfig
from heads.recipes.jobs import Job, Outcome
from heads.recipes.steps import Ready, Step, ready, work_of
from heads.units.course import Ended
from heads.units.units import without

_IDLE = 120.0  # seconds without work after which a worker that an engine started ends
_OPTIONS = {f"--{one.name.replace('_', '-')}" for one in fields(EngineConfig)} | {"--workers"}
_NOT_FOR_WORKERS = ("--json", "--quiet")


def shared(job: Job, group: TyperGroup) -> Job:
    """A job whose pieces an engine does, for `do`. It keeps no record of its own, since its pieces do."""
    assert job.engine is not None
    engine, steps = job.engine, list(job.steps)
    if not steps:
        words = [word for word in without(job.line, _OPTIONS) if word not in _NOT_FOR_WORKERS]
        steps = [ready(group, Step(Path("command line"), 1, words[0], tuple(words[1:])))]
    return replace(job, call=lambda: outcome_of(steps, engine), work=None)


def outcome_of(steps: Sequence[Ready], engine: EngineConfig) -> Outcome:
    """Have the units of some steps done, here or by an engine.

    Raises StoreError, with the first error, where a unit was given up; all that does not follow from it is done.
    """
    work = work_of(steps)
    if engine.engine == "here":
        from heads.units.worker import take_part

        ended, worker = take_part(steps, work, engine)
        who = f", {sum(unit.id in worker.did for unit in ended.units)} of them here"
    else:
        from heads.units.driver import drive

        orders = {
            "lines": [[ready.step.command, *ready.step.arguments] for ready in steps],
            "steps": [ready.step.number for ready in steps],
            "recipe": str(steps[0].step.recipe),
            "work": str(work),
            "folder": os.getcwd(),
            "environment": {name: value for name, value in os.environ.items() if name.startswith("FEATCACHE_")},
            "attempts": engine.attempts,
            "lost_after": engine.lost_after,
            "nodes": engine.nodes,
            "processes": engine.processes or engine.gpus,
        }
        ended = drive(steps, work, engine, engine.workers, do_units, orders)
        who = ""
    _refuse_failed(ended, alone=engine.engine == "here")
    from heads.units.course import Course

    again = Course(steps, work, engine).leases.again()
    message = f"{counted(len(ended.units), 'unit')}{who}, in {work}"
    message += f"; {again} were done twice, which changes nothing" if again else ""
    result: dict[str, Any] = {"units": len(ended.units), "again": again}
    of_steps = ended.results(steps)
    result |= of_steps[0] if len(of_steps) == 1 else {"steps": of_steps}
    return Outcome(message, result)


def _refuse_failed(ended: Ended, alone: bool) -> None:
    """Raise StoreError where a unit was given up. alone : whether no engine was asked to try it once more"""
    if not ended.failed:
        return
    for unit, failure in ended.failed.values():
        say(f"{unit.title}: given up: {failure.error}")
    unit, failure = next(iter(ended.failed.values()))
    left = f" ({', '.join(ended.not_begun)} not begun)" if ended.not_begun else ""
    raise StoreError(
        unit.title,
        expected=f"all of {counted(len(ended.units), 'unit')} done",
        found=f"{len(ended.failed)} given up{left}, this one because: {failure.error}",
        remedy="correct it, "
        + ("have them tried again by 'units --retry', and run the command again" if alone else "and run it again"),
    )


def do_units(orders: dict[str, Any]) -> dict[str, Any]:
    """Do units until all are over: what each worker of an engine calls. Returns how many it did."""
    from heads.commands.app import parser
    from heads.units.worker import take_part

    if os.environ.get("SLURM_PROCID", "0") != "0":
        return {}  # of a job on several machines, the first works, and starts what needs the others
    with _as_ordered(orders["folder"], orders["environment"]):
        group = parser()
        steps = [
            ready(group, Step(Path(orders["recipe"]), number, line[0], tuple(line[1:])))
            for number, line in zip(orders["steps"], orders["lines"], strict=True)
        ]
        settings = {name: orders[name] for name in ("attempts", "lost_after", "nodes", "processes")}
        engine = EngineConfig(engine="here", **settings)
        _, worker = take_part(steps, Path(orders["work"]), engine, _IDLE)
        return {"done": len(worker.did), "again": worker.again}


@contextmanager
def _as_ordered(folder: str, environment: Mapping[str, str]) -> Iterator[None]:
    """In the folder, and with the variables, of the process that gave the orders; of a shared process, for a while."""
    before, were = os.getcwd(), {name: os.environ.get(name) for name in environment}
    os.chdir(folder)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.chdir(before)
        for name, value in were.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def main() -> int:
    """A worker of this machine: exit code 0 where it ended by itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(json.dumps(do_units(json.load(sys.stdin))))
    except FeatcacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        code = main()
    sys.stdout.flush()
    os._exit(code)
