"""Every stage meets a disk that fails: it must say so in one line, keep earlier work, and go on once that is mended.

    PYTHONPATH=. python benchmarks/faults/disk.py [--n 154] [--seed 0] [--stages simulate,extract,...] [--only ...]

full       the disk has room for a random part of what the stage writes: a small tmpfs, where one may be mounted
limit      files beyond a random size cannot be written (RLIMIT_FSIZE)
read-only  nothing can be written: the tmpfs is read only; without one, each operation that writes fails (EROFS)
no-space   every operation that writes fails from a random one on (ENOSPC)
eio-once   one random operation on files fails (EIO), reading included
eio        every operation on files fails from a random one on (EIO)
gone       the work folder is taken away before a random operation, and put back afterwards

A case is right where the stage ends with exit code 1 and one line, or with exit code 0 and the files of an undisturbed
run; where no earlier file has changed; and where the stage, run again after the fault is mended, ends with the files of
an undisturbed run, with the same bytes and no others.
"""

import errno
import os
import random
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import stages
from stages import Ended, Room

_ROOM = 1 << 29  # of the tmpfs while nothing is hurt
_ITS_OWN = 1 << 16  # a file system's own blocks, above the files


def _mount(folder: Path, *settings: str) -> bool:
    """Mount a tmpfs, or mount it again with other settings; whether that is permitted."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(settings), "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # no such command
        return False


@dataclass(frozen=True)
class Disk:
    """The folder in which stages run, and how it is hurt.

    mounted : whether it is a file system of its own
    operations : of each stage, those that write, and all
    """

    room: Room
    mounted: bool
    operations: Mapping[str, tuple[int, int]]

    def full(self, stage: str, rng: random.Random) -> Ended:
        """Run a stage on a disk that will be full."""
        before, after = (_bytes(folder) for folder in (self.room.before(stage), self.room.after(stage)))
        if not self.mounted:
            return self.no_space(stage, rng)
        used = shutil.disk_usage(self.room.case).used
        room = used + int(rng.random() * max(after - before, _ITS_OWN))
        _mount(self.room.case, "remount", f"size={room}")
        ended = self.room.run(stage)
        _mount(self.room.case, "remount", f"size={_ROOM}")
        return ended

    def limit(self, stage: str, rng: random.Random) -> Ended:
        """Run a stage that can write no file beyond a size."""
        largest = max(path.stat().st_size for path in self.room.after(stage).rglob("*") if path.is_file())
        most = int(largest ** rng.random())

        def hurt() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

        return self.room.run(stage, hurt=hurt)

    def read_only(self, stage: str, rng: random.Random) -> Ended:
        """Run a stage on a disk that cannot be written to."""
        if not self.mounted:
            return self._failing(stage, 0, errno.EROFS, reading=False)
        _mount(self.room.case, "remount", "ro")
        ended = self.room.run(stage)
        _mount(self.room.case, "remount", "rw")
        return ended

    def no_space(self, stage: str, rng: random.Random) -> Ended:
        """Run a stage whose writing operations fail from one on."""
        return self._failing(stage, rng.randrange(self.operations[stage][0]), errno.ENOSPC, reading=False)

    def eio_once(self, stage: str, rng: random.Random) -> Ended:
        """Run a stage of which one operation fails."""
        number = rng.randrange(self.operations[stage][1])
        return self.room.run(stage, hurt=stages.at_operation(self.room, number, lambda: _fail(errno.EIO), reading=True))

    def eio(self, stage: str, rng: random.Random) -> Ended:
        """Run a stage whose operations fail from one on."""
        return self._failing(stage, rng.randrange(self.operations[stage][1]), errno.EIO, reading=True)

    def gone(self, stage: str, rng: random.Random) -> Ended:
        """Run a stage whose work folder is taken away at an operation, and put it back."""
        work, taken = self.room.case / "work", self.room.case / "taken"
        number = rng.randrange(self.operations[stage][1])
        hurt = stages.at_operation(self.room, number, lambda: os.rename(work, taken), reading=True)
        ended = self.room.run(stage, hurt=hurt)
        if taken.exists():
            if ended.code == 0 and work.exists():  # what was made anew, and said to be there, stays
                shutil.copytree(work, taken, dirs_exist_ok=True)
            shutil.rmtree(work, ignore_errors=True)
            taken.rename(work)
        return ended

    def _failing(self, stage: str, number: int, code: int, reading: bool) -> Ended:
        hurt = stages.at_operation(self.room, number, lambda: _fail(code), reading=reading, always=True)
        return self.room.run(stage, hurt=hurt)


KINDS: dict[str, Callable[[Disk, str, random.Random], Ended]] = {
    "full": Disk.full,
    "limit": Disk.limit,
    "read-only": Disk.read_only,
    "no-space": Disk.no_space,
    "eio-once": Disk.eio_once,
    "eio": Disk.eio,
    "gone": Disk.gone,
}


def _fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def mounted(room: Room) -> Iterator[bool]:
    """Have the folder of cases on a tmpfs, where that is permitted, until the block ends."""
    room.case.mkdir(parents=True, exist_ok=True)
    done = _mount(room.case, f"size={_ROOM}")
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(room.case)], check=True)


def judge(room: Room, stage: str, ended: Ended) -> list[str]:
    """What is wrong after a stage was hurt, and after it was run again; runs it again."""
    wanted, earlier = stages.contents(room.after(stage)), stages.contents(room.before(stage))
    here = stages.contents(room.case)
    wrong = []
    if ended.traceback:
        wrong.append("traceback")
    elif ended.code and not ended.said:
        wrong.append("not one line")
    elif not ended.code and any(not stages.is_memory(path) for path in stages.lacking(here, wanted)):
        wrong.append("silent")
    kept = {path for path, digest in earlier.items() if wanted.get(path) == digest and digest != "an empty folder"}
    if any(here.get(path) != wanted[path] for path in kept):
        wrong.append("earlier work lost")
    again = room.run(stage)
    now = stages.differences(stages.contents(room.case), wanted)
    if not (again.code == 0 or (again.said and not now)) or now.keys() & {"missing", "other"}:
        wrong.append("does not go on")
    if "left over" in now:
        wrong.append("leftovers")
    if wrong:
        print(f"  first {ended.code}: {ended.last}\n  again {again.code}: {again.last}; {stages.some(now)}")
    return wrong


def main() -> int:
    given = stages.options(__doc__, n=7 * len(stages.STAGES), kinds=tuple(KINDS))
    rng = random.Random(given.seed)
    counts: Counter[str] = Counter()
    with stages.built(given.stages) as (room, _), mounted(room) as own_disk:
        operations = {
            stage: (stages.count_operations(room, stage), stages.count_operations(room, stage, reading=True))
            for stage in given.only
        }
        disk = Disk(room, own_disk, operations)
        cases = [(stage, kind) for stage in given.only for kind in given.kinds]
        for number in range(given.n):
            stage, kind = cases[number % len(cases)]
            room.restore(room.before(stage))
            ended = KINDS[kind](disk, stage, rng)
            counts["tried"] += 1
            counts["one line" if ended.said else "went on" if ended.code == 0 else "other ends"] += 1
            wrong = judge(room, stage, ended)
            counts.update(wrong)
            if wrong:
                counts["broken"] += 1
                print(f"{stage}, {kind}: {', '.join(wrong)}", flush=True)
    print(f"{'a tmpfs' if own_disk else 'no tmpfs'}; " + ", ".join(f"{what} {n}" for what, n in counts.items()))
    return 1 if counts["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
