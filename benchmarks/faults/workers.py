"""Two workers share a stage, and one is killed (kill -9) at a random moment: the other must end with the same files.

    PYTHONPATH=. python benchmarks/faults/workers.py [--n 20] [--seed 0] [--stages ...] [--only ...] [--machines two]

`--n` cases of every stage. Half of the moments are random in time, half are right before a random operation on files.
In one case of four a third worker begins in between. `--machines two`: each worker takes itself for another machine,
with a clock that is minutes off, on a file system whose locks hold nobody off; so a lost worker is told by its silence
alone, and one case in three has a worker that is only stopped for a while, and goes on. A case is right where the last
worker ends with exit code 0, and where all files of the work folder are those of an undisturbed run, byte for byte.
"""

import argparse
import fcntl
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import stages
from pairs import Beside
from stages import Room, Running

from featcache.errors import FeatcacheError
from featcache.machine import files, leases
from heads.commands import app, working
from heads.config import EngineConfig
from heads.recipes.steps import Step, ready

_LOST_AFTER = 2.0  # seconds of silence, between two machines
_LEFT = (".partial.", "work/units/", ".writing.lock", ".writing.marker")  # what may be there besides


def through_units(line: Sequence[str]) -> int:
    """Run a command line as units that this process shares with others; its exit code."""
    place = list(line).index("--work") if "--work" in line else -1
    work = Path(line[place + 1]) if place >= 0 else Path("work")
    try:
        step = ready(app.parser(), Step(Path("recipe"), 1, line[0], tuple(line[1:])))
        step = replace(step, options={**step.options, "work": work})
        print(working.outcome_of([step], EngineConfig(engine="here", lost_after=_LOST_AFTER)).message)
    except FeatcacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def as_worker(number: int, apart: bool, then: Callable[[], object] | None = None) -> Callable[[], None]:
    """What to do in the process of a worker before its stage. apart : whether it is on a machine of its own"""

    def begin() -> None:
        app.run = through_units
        if apart:
            machine = f"{number:08x}"
            leases.this_machine = files.this_machine = lambda: machine
            clock, offset = time.time, (number - 1) * 300.0
            time.time = lambda: clock() + offset
            fcntl.flock = lambda *_: None
        if then is not None:
            then()

    return begin


def one_case(room: Room, stage: str, seconds: float, n_operations: int, rng: random.Random, apart: bool) -> list[str]:
    """Hurt one of two workers; what is wrong afterwards, in words."""
    room.restore(room.before(stage))
    rooms = [Beside(room.root / f"worker{number}", room.stages) for number in range(3)]
    at = stages.at_operation(room, rng.randrange(max(n_operations, 1)), stages.kill_this_process)
    by_operation = rng.random() < 0.5
    first = rooms[0].start(stage, hurt=as_worker(0, apart, at if by_operation else None))
    if rng.random() < 0.7:
        time.sleep(rng.random() * seconds / 4)
    others = [rooms[1].start(stage, hurt=as_worker(1, apart))]
    if not by_operation:
        time.sleep(rng.random() * seconds)
        if apart and rng.random() < 1 / 3:
            _stop_for_a_while(first)
            others.append(first)
        else:
            first.kill()
    if rng.random() < 0.25:
        others.append(rooms[2].start(stage, hurt=as_worker(2, apart)))
    ended = [one.wait() for one in others]
    if first not in others:
        first.wait()
    last = room.run(stage, hurt=as_worker(3, False))
    differ = stages.differences(_contents(room.case), _contents(room.after(stage)))
    # `export` says that its folder is there, if a worker ended between that and its record
    wrong = [
        f"exit code {one.code}: {one.last}" for one in (*ended, last) if one.code and not (one.said and not differ)
    ]
    wrong += ["a traceback" for one in (*ended, last) if one.traceback]
    return wrong + ([stages.some(differ)] if differ else [])


def _contents(folder: Path) -> dict[str, str]:
    return {name: what for name, what in stages.contents(folder).items() if not any(part in name for part in _LEFT)}


def _stop_for_a_while(worker: Running) -> None:
    """Have a worker be silent until it is taken for lost, and go on then."""
    try:
        os.killpg(worker.pid, signal.SIGSTOP)
        time.sleep(2 * _LOST_AFTER)
        os.killpg(worker.pid, signal.SIGCONT)
    except ProcessLookupError:  # it has ended
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", choices=("one", "two"), default="one")
    given, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = stages.options(__doc__, n=20)
    rng, counts, broken = random.Random(options.seed), Counter[str](), list[str]()
    with stages.built(options.stages) as (room, seconds):
        for stage in [one for one in options.only if one != "simulate"]:
            n_operations = stages.count_operations(room, stage)
            began = time.perf_counter()
            for _ in range(options.n):
                wrong = one_case(room, stage, seconds[stage], n_operations, rng, given.machines == "two")
                counts["cases"] += 1
                counts["broken"] += bool(wrong)
                broken += [f"{stage}: {'; '.join(wrong)}"] if wrong else []
            print(f"{stage}: {options.n} cases, {time.perf_counter() - began:.0f} s", flush=True)
    for line in broken:
        print(line)
    print(", ".join(f"{what} {n}" for what, n in counts.items()))
    return 1 if counts["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
