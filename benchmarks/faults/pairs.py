"""Two stages at once on one work folder, every pair of stages: nothing is mixed, and all is as one alone makes it.

    PYTHONPATH=. python benchmarks/faults/pairs.py [--n N] [--seed 0] [--stages ...] [--only ...] [--locks none]

A pair starts where everything is done but what the two stages make. The second starts at a random moment of the first.
While they run, the submission is read again and again: all its files must be of one blend, and so must the zip. After
them, what each publishes must be wholly of one of them, as running them in turn makes it. Then both are run again, in
turn, which must leave the files that the two alone leave. Without --n, every pair once. `--locks none`: on a file
system that has no locks.
"""

import argparse
import errno
import fcntl
import io
import itertools
import os
import random
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import stages
from stages import Ended, Room

from featcache.cache.store import open_store
from featcache.errors import FeatcacheError

_LOCKS = (".writing.lock", ".writing.marker")
_TOGETHER = ("submission", "trainings", "compared/*", "dataset/*")  # folders of work/ that are published as a whole
_BLEND = ("blend.safetensors", "weights.json", "scores.csv")
_STORES = ("work/features.zarr/", "work/predictions.zarr/", "work/heads/")


class Beside(Room):
    """The same folders, for a process whose output is kept apart."""

    @property
    def case(self) -> Path:
        return self.root.parent / "case"

    @property
    def inputs(self) -> Path:
        return self.root.parent / "inputs"


def no_locks(number: int) -> Callable[[], None]:
    """Have a file system without locks, which says so in one of several ways."""

    def refuse(*_: object) -> None:
        raise OSError((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)[number % 3], "no locks here")

    return lambda: setattr(fcntl, "flock", refuse)


@dataclass
class Watched:
    """What was read of the submission while blends replaced it.

    rest : {digest of a blend's coefficients: digests of what was beside them}
    """

    work: Path
    n_read: int = 0
    wrong: list[str] = field(default_factory=list)
    rest: dict[str, str] = field(default_factory=dict)

    def look(self) -> None:
        """Read the folder and the zip, if neither was replaced in between."""
        path, archive = self.work / "submission", self.work / "submission.zip"
        with suppress(FileNotFoundError):
            before = path.stat()
            files = {name: _digest((path / name).read_bytes()) for name in _BLEND}
            zipped = archive.read_bytes() if archive.exists() else None
            inside = {f"{one.parent.name}/{one.name}": one.read_bytes() for one in sorted(path.glob("*/*.npy"))}
            if not os.path.samestat(before, path.stat()):
                return
            self.n_read += 1
            files |= {name: _digest(content) for name, content in inside.items()}
            rest = repr(sorted(files.items())[1:])
            if self.rest.setdefault(files[_BLEND[0]], rest) != rest:
                self.wrong.append("files of two blends in the folder")
            if zipped is not None and _unzipped(zipped) != inside:
                self.wrong.append("a zip of another blend")


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def made_by(room: Room, stage: str) -> set[str]:
    """Files that a stage makes: those that are there after it and not before it."""
    return set(stages.contents(room.after(stage))) - set(stages.contents(room.before(stage)))


def undo(room: Room, made: set[str]) -> None:
    """Remove files of `case`, and folders that are empty then."""
    for name in made:
        path = room.case / name
        path.unlink(missing_ok=True) if not path.is_dir() else None
    for folder in sorted(room.case.rglob("*"), reverse=True):
        if folder.is_dir() and folder != room.case / "work":
            with suppress(OSError):
                folder.rmdir()


def contents(room: Room) -> dict[str, str]:
    """{path: digest} of `case`, without locks."""
    return {path: digest for path, digest in stages.contents(room.case).items() if not path.endswith(_LOCKS)}


def published(found: Mapping[str, str]) -> dict[str, str]:
    """{what is published in one step: digest of its files}."""
    units: dict[str, list[str]] = {}
    for path, digest in sorted(found.items()):
        parts = Path(path).parts
        if parts[0] in ("encoder", "predicted.zarr"):
            units.setdefault(parts[0], []).append(f"{path} {digest}")
        elif parts == ("work", "submission.zip"):
            units.setdefault("submission", []).append(f"{path} {digest}")
        for pattern in _TOGETHER:
            depth = 1 + len(Path(pattern).parts)
            if len(parts) > depth and Path(*parts[1:depth]).match(pattern):
                units.setdefault("/".join(parts[1:depth]), []).append(f"{path} {digest}")
    return {unit: _digest("\n".join(files).encode()) for unit, files in units.items()}


def is_whole_blend(room: Room, hurt: Callable[[], None] | None) -> bool:
    """Whether a submission is what its own coefficients give, by applying them once more."""
    submission, kept = room.case / "work" / "submission", room.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(submission, kept)
    ended = room.run("blend", hurt=hurt, arguments=("blend", "--apply", f"{kept}/blend.safetensors"))
    files = [path.relative_to(kept) for path in kept.rglob("*") if path.is_file()]
    return ended.code == 0 and all((submission / file).read_bytes() == (kept / file).read_bytes() for file in files)


def is_whole_table(folder: Path) -> bool:
    """Whether both tables of trainings have the same arms."""
    arms = {line.rsplit(",", 4)[0] for line in (folder / "values.csv").read_text().splitlines()[1:]}
    table = (folder / "arms.csv").read_text().splitlines()[1:]
    return len(arms) == len(table) and all(any(line.startswith(arm) for line in table) for arm in arms)


def is_whole_store(room: Room, path: str) -> bool:
    """Whether a file that one stage alone does not make is of a store, or of the heads of one, that is whole."""
    name = path.removeprefix("work/").split("/")[1].removesuffix(".safetensors")
    folder = "features.zarr" if path.startswith(_STORES[0]) else "predictions.zarr"
    try:
        return open_store(room.case / "work" / folder / name).complete
    except FeatcacheError:
        return False


class Pairs:
    """Pairs of stages, and what came of them."""

    def __init__(self, room: Room, seconds: Mapping[str, float], rng: random.Random, locks: bool) -> None:
        self._room, self._beside = room, Beside(room.root / "beside", room.stages)
        self._beside.root.mkdir()
        self._seconds, self._rng = seconds, rng
        self._made = {stage: made_by(room, stage) for stage in room.stages}
        self._hurt = None if locks else no_locks(rng.randrange(3))
        self.counts: Counter[str] = Counter(pairs=0, broken=0)
        self.broken: list[str] = []

    def try_pair(self, one: str, other: str) -> None:
        """Run two stages at once, whichever begins, and look at what they leave."""
        early, late = sorted((one, other), key=self._room.stages.index)
        alone = self._in_turn(early, late)
        allowed = [*alone, *(self._in_turn(late, early) if early != late else ())]
        self._start(early, late)
        first, second = self._rng.sample((early, late), 2)
        delay = self._rng.random() * self._seconds[first] * 0.9
        ended, watched = self._at_once(first, second, delay)
        self.counts["pairs"] += 1
        self.counts["submissions read meanwhile"] += watched.n_read
        wrong = list(watched.wrong)
        for stage, end in ended:
            self.counts[_outcome(end)] += 1
            if end.traceback or not (end.code == 0 or end.said):
                wrong.append(f"{stage} ended with {end.code}, {end.last}")
        wrong += [*self._not_of_one(allowed), *self._not_as_alone((early, late), alone[-1])]
        self.counts["broken"] += bool(wrong)
        self.broken += [f"{first}, {second} {delay:.2f} s later: {what}" for what in dict.fromkeys(wrong)]

    def _start(self, one: str, other: str) -> None:
        """Everything is done but what these two make."""
        self._room.restore(self._room.after(self._room.stages[-1]))
        undo(self._room, self._made[one] | self._made[other])

    def _in_turn(self, first: str, second: str) -> list[dict[str, str]]:
        """What is there before, after the first, and after both."""
        self._start(first, second)
        found = [contents(self._room)]
        for stage in (first, second):
            self._room.run(stage, hurt=self._hurt)
            found.append(contents(self._room))
        return found

    def _at_once(self, first: str, second: str, delay: float) -> tuple[list[tuple[str, Ended]], Watched]:
        watched = Watched(self._room.case / "work")
        running = [(first, self._room.start(first, hurt=self._hurt))]
        begun = time.perf_counter()
        while time.perf_counter() - begun < delay:
            watched.look()
            time.sleep(0.003)
        running.append((second, self._beside.start(second, hurt=self._hurt)))
        while not all(_is_over(process.pid) for _, process in running):
            watched.look()
            time.sleep(0.003)
        return [(stage, process.wait()) for stage, process in running], watched

    def _not_of_one(self, allowed: list[dict[str, str]]) -> list[str]:
        """What is published and is none of what there is before, between or after the two in turn."""
        found, wanted = published(contents(self._room)), [published(one) for one in allowed]
        wrong = [f"{unit} is gone" for unit in wanted[0].keys() - found.keys()]
        for unit, digest in found.items():
            if all(one.get(unit) != digest for one in wanted):
                self.counts["of a moment in between"] += 1  # a blend of half of the models that the other one fitted
                if unit == "submission":
                    whole = is_whole_blend(self._room, self._hurt)
                else:
                    whole = unit == "trainings" and is_whole_table(self._room.case / "work" / unit)
                wrong += [] if whole else [f"{unit} is not of one of them"]
        return wrong

    def _not_as_alone(self, in_turn: tuple[str, str], alone: Mapping[str, str]) -> list[str]:
        """What is other than the two alone leave it, once both were run again in turn."""
        again = [self._room.run(stage, hurt=self._hurt) for stage in in_turn]
        different = stages.differences(contents(self._room), alone)
        extra = different.pop("left over", [])
        if kept := [path for path in extra if not (path.startswith(_STORES) and is_whole_store(self._room, path))]:
            different["left over"] = kept
        self.counts["whole stores of a moment in between"] += len(extra) > len(kept)
        # an output that is there already is said
        wrong = [f"run again: {end.last}" for end in again if end.traceback or (end.code and not end.said)]
        return [*wrong, *([stages.some(different)] if different else [])]


def _is_over(pid: int) -> bool:
    """Whether a child has ended; it is left for `wait` to collect."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _outcome(ended: Ended) -> str:
    if ended.traceback:
        return "tracebacks"
    if ended.code == 0:
        return "ended well"
    beside = "only writer" in ended.last or "another process" in ended.last
    return "refused beside the other" if beside else "refused for what is not there yet" if ended.said else "failed"


def main() -> int:
    """Try pairs of stages, and print what came of them; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--locks", choices=("system", "none"), default="system")
    own, sys.argv[1:] = parser.parse_known_args()
    given = stages.options(__doc__, n=0)
    rng = random.Random(given.seed)
    only = [stage for stage in given.only if stage != "simulate"]  # whose output all others read
    pairs = list(itertools.combinations_with_replacement(only, 2))
    rng.shuffle(pairs)
    with stages.built(given.stages) as (room, seconds):
        tried = Pairs(room, seconds, rng, own.locks == "system")
        with suppress(KeyboardInterrupt):  # what was tried until then is told
            for one, other in itertools.islice(itertools.cycle(pairs), given.n or len(pairs)):
                tried.try_pair(one, other)
    for line in tried.broken:
        print(line)
    print(", ".join(f"{what} {n}" for what, n in tried.counts.items()))
    return 1 if tried.counts["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
