"""Pieces of work that processes of any machine take from one folder, so that each is done once.

A piece goes by a name. Who takes it makes a lease, a file that only one process can make, and changes the file every
few seconds while it works. A lease that has not changed for long, as seen by the clock of whoever waits, is a lost
worker's; the piece is then taken under the next number. So clocks of machines are never compared, and no locks are
needed.

    <name>.<number>.lease     taken for the number-th time
    <name>.<number>.failed    and ended with an error, which it has
    <name>.<number>.released  and given back, as by a worker that was told to end
    <name>.done               and done: a record, beside which leases are removed
    <name>.<number>.again     and done, when another had done it meanwhile

A lease says who shall work, and does not keep two from writing: a worker that was only slow goes on beside the one that
took its place. What they make has to be the same, and whole or not there, whoever ends last.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from featcache.errors import StoreError
from featcache.machine.documents import DocumentError, read_document, read_json, write_document
from featcache.machine.files import replace_json, this_machine

_BEAT = 10.0  # seconds between changes of a lease
_BEAT_DIGITS = 12
_KINDS = ("lease", "failed", "released")
_MOST_LOST = 10  # workers of one piece, after which it is the piece that ends them

Stamps = Mapping[str, tuple[int, int]]  # {path, from the folder above: time in ns and size} of what a piece has made


class Done(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The record of a piece that is done.

    made : times and sizes of files that tell whether what it made is still there, by their paths from the work folder
    host : where it was done
    message, result : as its command ends with
    """

    unit: str
    made: dict[str, tuple[int, int]]
    seconds: float
    host: str
    message: str
    result: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """How a piece failed. who : host and process. error : in one line"""

    who: str
    error: str


@dataclass(frozen=True)
class State:
    """What a listing says of a piece.

    taken : number of the last lease; 0 before the first
    failed, released : numbers of the leases that ended so
    """

    done: bool = False
    taken: int = 0
    failed: frozenset[int] = frozenset()
    released: frozenset[int] = frozenset()

    @property
    def held(self) -> bool:
        """Whether the last lease has not ended, as far as a listing can say it."""
        return bool(self.taken) and self.taken not in self.failed | self.released

    @property
    def n_lost(self) -> int:
        """Leases before the last whose workers were lost."""
        return len(set(range(1, self.taken)) - self.failed - self.released)

    def given_up(self, attempts: int) -> bool:
        """Whether it has failed so often, or has ended so many workers, that nobody takes it again."""
        return (not self.held and len(self.failed) >= attempts) or self.n_lost >= _MOST_LOST


class Leases:
    """The pieces of one folder, for one process.

    Parameters
    ----------
    folder : where the files are
    lost_after : seconds without a change after which a lease is a lost worker's
    beat : seconds between changes of this process's own leases
    clock : seconds of this process; the clock of the machine is not read
    """

    def __init__(
        self,
        folder: Path,
        lost_after: float = 120.0,
        beat: float = _BEAT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._lost_after, self._beat, self._clock = folder, lost_after, min(beat, lost_after / 4), clock
        self._seen: dict[str, tuple[bytes, float]] = {}  # a lease as it was read, and when it was first read so
        self._known: dict[str, Done] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def states(self) -> dict[str, State]:
        """What is known of every piece that was ever taken, by one listing."""
        done: set[str] = set()
        numbers: dict[str, dict[str, set[int]]] = {}  # {piece: {kind of file: numbers}}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name, _, rest = entry.name.partition(".")
                if rest == "done":
                    done.add(name)
                    continue
                number, _, kind = rest.partition(".")
                if kind in _KINDS and number.isdecimal():
                    numbers.setdefault(name, {one: set() for one in _KINDS})[kind].add(int(number))
        states = {
            name: State(
                name in done, max(set().union(*of.values())), frozenset(of["failed"]), frozenset(of["released"])
            )
            for name, of in numbers.items()
        }
        return dict.fromkeys(done - numbers.keys(), State(done=True)) | states

    def done(self, unit: str) -> Done | None:
        """The record of a piece, if what it made is as it was then; None where it has to be done, again or at all."""
        path = self._path(unit, "done")
        try:
            record = self._known.get(unit) or read_document(path, Done)
        except (OSError, DocumentError):
            return None
        if any(stamp_of(self._folder.parent / name) != tuple(stamp) for name, stamp in record.made.items()):
            self._known.pop(unit, None)
            return None
        self._known[unit] = record
        return record

    def failures(self, unit: str, state: State) -> list[Failure]:
        """How the attempts of a piece failed, in their order; those that cannot be read are left out."""
        found = []
        for number in sorted(state.failed):
            with suppress(OSError, DocumentError, LookupError, TypeError):
                content = read_json(self._path(unit, f"{number}.failed"))
                found.append(Failure(str(content["who"]), str(content["error"])))
        return found

    def is_lost(self, unit: str, state: State) -> bool:
        """Whether the worker that holds a piece is gone: of this machine, or one that has long been silent."""
        path = self._path(unit, f"{state.taken}.lease")
        try:
            content = path.read_bytes()
        except OSError:  # it is over
            return False
        before, since = self._seen.setdefault(path.name, (content, self._clock()))
        if content != before:
            self._seen[path.name] = content, self._clock()
            return False
        return _is_gone(content) or self._clock() - since > self._lost_after

    def holder(self, unit: str, state: State) -> str:
        """Host and process that hold a piece, in words; '' where it cannot be told."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            who = json.loads(self._path(unit, f"{state.taken}.lease").read_bytes().splitlines()[0])
            return f"process {who['process']} of {who['host']}"
        return ""

    def take(self, unit: str, state: State) -> "Lease | None":
        """A lease of a piece that is free or lost in a state; None where another process was faster."""
        if state.held and not self.is_lost(unit, state):
            return None
        lease = Lease(self, unit, state.taken + 1)
        if not lease.begin():
            return None
        if self.done(unit) is not None:  # since that listing
            self._remove(unit, lease.number)
            return None
        return lease

    def forget_failures(self, units: Collection[str]) -> None:
        """Remove what is known of failed attempts, so that these pieces are tried again."""
        states = self.states()
        for unit in units:
            state = states.get(unit, State())
            if not state.held:
                self._remove(unit, state.taken)

    def again(self) -> int:
        """How often a piece was done when another had done it meanwhile."""
        with os.scandir(self._folder) as entries:
            return sum(entry.name.endswith(".again") for entry in entries)

    def _path(self, unit: str, rest: str) -> Path:
        return self._folder / f"{unit}.{rest}"

    def _remove(self, unit: str, last: int) -> None:
        """Remove the leases of a piece up to a number, and how they ended."""
        for number in range(1, last + 1):
            for kind in _KINDS:
                self._path(unit, f"{number}.{kind}").unlink(missing_ok=True)


@dataclass(eq=False)
class Lease:
    """A piece that this process has taken. Use it as `with lease.held(): ...`, then `finish` or `fail`."""

    leases: Leases
    unit: str
    number: int
    _over: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> bool:
        """Make the file; whether this process is the one that could."""
        who = {"machine": this_machine(), "host": socket.gethostname(), "process": os.getpid(), "began": _began()}
        return _created(self._path("lease"), f"{json.dumps(who)}\n{0:0{_BEAT_DIGITS}d}\n".encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Change the lease every few seconds while the block runs."""
        beats = threading.Thread(target=self._keep_changing, daemon=True)
        beats.start()
        try:
            yield
        finally:
            self._over.set()
            beats.join()

    def finish(self, record: Done) -> bool:
        """Record that the piece is done; whether this process is the first. Its leases are removed."""
        path = self.leases._path(self.unit, "done")
        first = self.leases.done(self.unit) is None
        if not first:
            _created(self._path("again"), b"")
        write_document(path, msgspec.to_builtins(record))
        self.leases._known.pop(self.unit, None)
        self.leases._remove(self.unit, self.number)
        return first

    def fail(self, error: str) -> None:
        """Record that this attempt failed, with its error in one line."""
        self._over.set()
        replace_json(self._path("failed"), {"who": f"process {os.getpid()} of {socket.gethostname()}", "error": error})

    def release(self) -> None:
        """Give the piece back as it is: this was no attempt."""
        self._over.set()
        with suppress(OSError):
            _created(self._path("released"), b"")

    def _path(self, kind: str) -> Path:
        return self.leases._path(self.unit, f"{self.number}.{kind}")

    def _keep_changing(self) -> None:
        number = 0
        while not self._over.wait(self.leases._beat):
            number += 1
            with suppress(OSError):  # a disk that is away for a moment, or a lease that was removed
                file = os.open(self._path("lease"), os.O_RDWR)
                try:
                    place = os.fstat(file).st_size - _BEAT_DIGITS - 1
                    os.pwrite(file, f"{number:0{_BEAT_DIGITS}d}".encode(), max(place, 0))
                    os.fsync(file)
                finally:
                    os.close(file)


def stamp_of(path: Path) -> tuple[int, int] | None:
    """Time in ns and size of a file, which change with it; None where there is none."""
    try:
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    except OSError:
        return None


def _created(path: Path, content: bytes) -> bool:
    """Make a new file; False where there is one. Raises StoreError for a folder that was taken away."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise StoreError(
            path.parent, expected="the folder of leases", found="that it is gone", remedy="run the command again"
        ) from error
    try:
        os.write(file, content)
        os.fsync(file)
    finally:
        os.close(file)
    return True


def _is_gone(content: bytes) -> bool:
    """Whether a lease is of a process of this machine that has ended, or whose number another process has now."""
    try:
        who = json.loads(content.splitlines()[0])
        mine, process, began = who["machine"] == this_machine(), int(who["process"]), who["began"]
    except (ValueError, LookupError, TypeError):  # not written yet
        return False
    return mine and began is not None and _began(process) != began


def _began(process: int | None = None) -> int | None:
    """When a process of this machine began, in ticks of its clock; None where there is none, or the system hides it."""
    try:
        status = Path(f"/proc/{process or os.getpid()}/stat").read_text()
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()  # the name before it may have spaces
    return None if fields[0] in "ZX" else int(fields[19])
