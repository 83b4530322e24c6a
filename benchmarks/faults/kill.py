"""Every stage is killed (kill -9) at random moments, and started again: it must end with the same files.

    PYTHONPATH=. python benchmarks/faults/kill.py [--n 200] [--seed 0] [--stages simulate,extract,...] [--only ...]

Half of the moments are random in time, half are right before a random operation on files. One restart in four is killed
too. A case is right where the last start ends with exit code 0, or says that its output is there already, and where all
files of the work folder are those of an undisturbed run, with the same bytes and no others.
"""

import random
from collections import Counter
from functools import partial

import stages
from stages import Ended, Room


def killed_in_time(room: Room, stage: str, seconds: float) -> Ended:
    """Start a stage and kill it after so many seconds, or after its end."""
    running = room.start(stage)
    return running.wait(most=seconds)


def killed_at(room: Room, stage: str, number: int) -> Ended:
    """Start a stage that is killed before its operation of this number."""
    return room.run(stage, hurt=stages.at_operation(room, number, stages.kill_this_process))


def main() -> int:
    given = stages.options(__doc__, n=200)
    rng = random.Random(given.seed)
    counts: Counter[str] = Counter()
    broken: list[str] = []
    with stages.built(given.stages) as (room, seconds):
        operations = {stage: stages.count_operations(room, stage) for stage in given.only}
        for case in range(given.n):
            stage = given.only[case % len(given.only)]
            room.restore(room.before(stage))
            for _ in range(1 + (rng.random() < 0.25)):
                hurt = rng.choice(
                    [
                        partial(killed_in_time, seconds=rng.random() * seconds[stage]),
                        partial(killed_at, number=rng.randrange(operations[stage])),
                    ]
                )
                counts["killed" if hurt(room, stage).code == -9 else "ended before"] += 1
            ended = room.run(stage)
            wrong = stages.differences(stages.contents(room.case), stages.contents(room.after(stage)))
            counts["restarts"] += 1
            counts["tracebacks"] += ended.traceback
            counts["not finished"] += not (ended.code == 0 or (ended.said and not wrong))
            counts["other bytes"] += "missing" in wrong or "other" in wrong
            counts["leftovers"] += "left over" in wrong
            if ended.code or wrong:
                counts["broken"] += not (ended.said and not wrong)
                broken.append(f"{stage}: {stages.some(wrong)}; exit code {ended.code}; {ended.last}")
    for line in broken:
        print(line)
    print(", ".join(f"{what} {n}" for what, n in counts.items()))
    return 1 if counts["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
