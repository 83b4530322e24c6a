"""A tiny work folder, and every stage on it, each run in a process of its own that may be hurt.

A process is forked from one that has loaded everything, so that a stage takes as long as it computes. Whoever imports
this must not compute with torch, or make threads, before the last fork.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: threads do not survive a fork

import argparse
import hashlib
import importlib
import itertools
import json
import pkgutil
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import featcache
import heads
from featcache.machine import device
from heads.blend import uncertainty
from heads.commands import app

_SUBJECTS = ("--subjects", "2", "--images", "24", "--test-images", "5", "--shared", "8")
_TREE = (*_SUBJECTS, "--vertices", "90", "--image-size", "32", "--workers", "1")
_NETWORK = ("--backbone", "test_resnet", "--weights", "none", "--size", "32")
_TRAINING = ("--folds", "2", "--epochs", "2", "--batch-size", "8", "--embedding", "4", "--workers", "1")
_QUICK = ("--folds", "2", "--epochs", "2", "--batch-size", "8")
_BEFORE_TRAINING = "test_resnet@32 ??????"
_FROZEN = ("--features", _BEFORE_TRAINING, "--folds", "2")

# {stage: its command line}, in the order in which each finds what it needs; {inputs} is a folder of a user's own files
STAGES: dict[str, tuple[str, ...]] = {
    "simulate": ("simulate", "--data", "challenge", *_TREE),
    "import": ("import", "--images", "{inputs}/photos", "--responses", "{inputs}/responses.npy", "--workers", "1"),
    "extract": ("extract", *_NETWORK, "--layers", "pooled,layer2,layer4", "--checkpoint", "none", "--workers", "1"),
    "pretrain": ("pretrain", *_NETWORK, *_TRAINING),
    "finetune": ("finetune", *_NETWORK, *_TRAINING),
    "extract-trained": ("extract", *_NETWORK, "--layers", "pooled,layer4", "--workers", "1", "--image-cache", "1"),
    "add-features": ("add-features", "{inputs}/captions.npy", "--ids", "{inputs}/ids.csv", "--name", "captions"),
    "fit-ridge": ("fit-heads", "--loss", "mnnpc", "--folds", "2"),
    "fit-each": ("fit-heads", *_FROZEN, "--layers", "each", "--loss", "mse"),
    "fit-adamw": ("fit-heads", *_FROZEN, *_QUICK[2:], "--loss", "smooth_l1,pattern", "--head", "roi"),
    "fit-spatial": ("fit-heads", *_FROZEN, *_QUICK[2:], "--loss", "pearson", "--head", "spatial"),
    "fit-joint": ("fit-heads", *_FROZEN, *_QUICK[2:], "--loss", "mse", "--head", "spatial", "--space", "4"),
    "fit-core": ("fit-heads", *_FROZEN, *_QUICK[2:], "--head", "core", "--hidden", "8", "--channels", "4"),
    "fit-trained": ("fit-heads", "--features", "*pretrain*,*finetune*", "--solver", "trained"),
    "compare": (
        "compare",
        "--features",
        "layers",
        "--of",
        "test_resnet@32 ??????",
        "--folds",
        "2",
        "--candidates",
        "2",
    ),
    "blend": ("blend", "--method", "nnls"),
    "blend-again": ("blend", "--method", "uniform", "--models", "*mnnpc*"),
    "maps": ("maps", "--models", "*mnnpc*"),
    "trainings": ("trainings",),
    "predict": ("predict", "{inputs}/photos", "--out", "predicted.zarr"),
    "export": ("export", "encoder"),
    "report": ("report",),
}
NO_DATA = ("simulate", "import")  # stages that read no dataset


def load_everything() -> None:
    """Import every module of the program, so that a fork has them."""
    for package in (heads, featcache):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                with suppress(ImportError):  # of an extra that is not installed
                    importlib.import_module(module.name)
    for name in ("matplotlib.pyplot", "torch._dynamo", "PIL.Image"):
        with suppress(ImportError):
            importlib.import_module(name)


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code, or minus the signal's number; what it printed; its seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that say what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def said(self) -> bool:
        """Whether it failed as promised: exit code 1, and one line that says why, the last one."""
        return self.code == 1 and len(self.errors) == 1 and self.err.splitlines()[-1] == self.errors[0]

    @property
    def last(self) -> str:
        """The last line that it printed on stderr."""
        return (self.err.strip().splitlines() or [""])[-1]

    @property
    def traceback(self) -> bool:
        """Whether a traceback was printed."""
        return "Traceback (most recent call last)" in self.err


@dataclass(frozen=True)
class Room:
    """A folder for cases: `case`, where stages run, always of one path; `inputs`, read only; snapshots of `case`.

    stages : those that are run, in their order
    """

    root: Path
    stages: tuple[str, ...] = tuple(STAGES)

    @property
    def case(self) -> Path:
        """Folder with challenge/, work/ and what stages write beside them."""
        return self.root / "case"

    @property
    def inputs(self) -> Path:
        """Folder of a user's own files."""
        return self.root / "inputs"

    def after(self, stage: str) -> Path:
        """What `case` was after a stage that nothing disturbed."""
        return self.root / "snapshots" / stage

    def before(self, stage: str) -> Path:
        """What `case` was before it."""
        number = self.stages.index(stage)
        return self.after(self.stages[number - 1]) if number else self.root / "snapshots" / "nothing"

    def restore(self, folder: Path) -> None:
        """Make `case` what a snapshot is. Its folder stays, since it may be a disk of its own."""
        self.case.mkdir(parents=True, exist_ok=True)
        for path in self.case.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(folder, self.case, dirs_exist_ok=True)

    def keep(self, folder: Path) -> None:
        """Make a snapshot of `case`."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.case, folder)

    def start(
        self, stage: str, *more: str, hurt: Callable[[], object] | None = None, arguments: Sequence[str] = ()
    ) -> Running:
        """Begin a stage in a process of its own.

        more : options after those of the stage
        hurt : called in that process before the stage
        arguments : a command line instead of the stage's
        """
        line = [part.format(inputs=self.inputs) for part in (*(arguments or STAGES[stage]), *more)]
        if line[0] != "simulate":
            line += ["--work", "work"]
        if line[0] not in NO_DATA:
            line += ["--data", "challenge"]
        out, err = os.pipe(), os.pipe()  # and not files, whose size may be limited
        sys.stdout.flush()
        sys.stderr.flush()
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            _be_stage(line, self.case, out[1], err[1], hurt)
        with suppress(OSError):
            os.setpgid(pid, pid)
        for end in (out[1], err[1]):
            os.close(end)
        for end in (out[0], err[0]):
            os.set_blocking(end, False)
        return Running(pid, (out[0], err[0]), began)

    def run(
        self, stage: str, *more: str, hurt: Callable[[], object] | None = None, arguments: Sequence[str] = ()
    ) -> Ended:
        """Run a stage to its end, as for `start`."""
        return self.start(stage, *more, hurt=hurt, arguments=arguments).wait()


@dataclass(frozen=True)
class Running:
    """A process that runs a stage. pipes : ends of what it prints on stdout and stderr"""

    pid: int
    pipes: tuple[int, int]
    began: float

    def kill(self) -> None:
        """Kill it and its own processes, as `kill -9` does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, most: float = 300) -> Ended:
        """Wait for its end; it is killed after so many seconds, and its code is that of SIGKILL then."""
        printed = [b"", b""]
        ended = False
        while not ended:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            ended = bool(pid)
            printed = [before + _read(pipe) for before, pipe in zip(printed, self.pipes, strict=True)]
            if time.perf_counter() - self.began > most:
                self.kill()
            if not ended:
                time.sleep(0.002)
        self.kill()  # what it started, if it left any
        seconds = time.perf_counter() - self.began
        for pipe in self.pipes:
            os.close(pipe)
        out, err = (text.decode(errors="replace") for text in printed)
        return Ended(os.waitstatus_to_exitcode(status), out, err, seconds)


def _read(pipe: int) -> bytes:
    """All that is in a pipe now."""
    read = b""
    with suppress(BlockingIOError):
        while part := os.read(pipe, 1 << 16):
            read += part
    return read


def _be_stage(line: Sequence[str], folder: Path, out: int, err: int, hurt: Callable[[], object] | None) -> None:
    """Run a command line in this process, which was just forked, and leave it."""
    code = 70
    try:
        os.setpgid(0, 0)
        for file, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(file, number)
        os.chdir(folder)
        _quicken()
        if hurt is not None:
            hurt()
        code = app.run(line)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _quicken() -> None:
    """Fewer shuffles, and one precision on every processor."""
    uncertainty.N_PERMUTATIONS = 1
    device._cpu_flags = lambda: set()


def write_inputs(folder: Path) -> None:
    """A user's own files: photographs, responses to them, and features made elsewhere."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "photos" / f"{number:02d}.png")
    np.save(folder / "responses.npy", rng.standard_normal((12, 10)).astype(np.float32))


def write_captions(room: Room) -> None:
    """Features of every image of the tree, made elsewhere."""
    ids = sorted({path.stem[-5:] for path in room.case.glob("challenge/*/*_split/*_images/*.png")})
    np.save(room.inputs / "captions.npy", np.random.default_rng(1).standard_normal((len(ids), 6)).astype(np.float32))
    (room.inputs / "ids.csv").write_text("\n".join(["id", *(str(int(one)) for one in ids)]) + "\n")


def build(room: Room) -> dict[str, float]:
    """Run the stages undisturbed, and keep what each left; {stage: its seconds}. Raises RuntimeError if one fails."""
    write_inputs(room.inputs)
    (room.case / "work").mkdir(parents=True)
    room.keep(room.before(room.stages[0]))
    seconds = {}
    for stage in room.stages:
        ended = room.run(stage)
        if ended.code:
            raise RuntimeError(f"{stage} fails undisturbed: {ended.err}")
        if stage == "simulate":
            write_captions(room)
        room.keep(room.after(stage))
        seconds[stage] = ended.seconds
    return seconds


# What may differ between two runs, by the end of its path: times of files and of runs, and what shows them
_OF_ITS_TIME = ("journal.jsonl", "report.html", "-imported.json", "-pictures.npz", "-responses.json")


def contents(folder: Path, exact: bool = False) -> dict[str, str]:
    """{path: digest of what it says} of every file and empty folder; a file that tells times is only there or not.

    exact : digests of bytes, and not of what they say
    """
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir():
            if not any(path.iterdir()):
                found[name] = "an empty folder"
        elif name.endswith(_OF_ITS_TIME) or path.parent.name == "index":
            found[name] = "there"
        else:
            found[name] = hashlib.blake2b(path.read_bytes() if exact else _meaning(path), digest_size=16).hexdigest()
    return found


def _meaning(path: Path) -> bytes:
    """The bytes of a file; of a safetensors file with its header in one order, which the library leaves to chance."""
    data = path.read_bytes()
    if path.suffix == ".safetensors" and len(data) >= 8:
        end = 8 + int.from_bytes(data[:8], "little")
        with suppress(ValueError):
            return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    if path.name == "encoder.json":  # it has the digest of such a file
        with suppress(ValueError):
            known = json.loads(data)
            return json.dumps(known | {"digest": None, "digests": sorted(known["digests"])}, sort_keys=True).encode()
    return data


def differences(here: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, list[str]]:
    """What is not as it should be: {'missing', 'other' or 'left over': paths}."""
    found = {
        "missing": sorted(wanted.keys() - here.keys()),
        "other": sorted(path for path in wanted.keys() & here.keys() if here[path] != wanted[path]),
        "left over": sorted(here.keys() - wanted.keys()),
    }
    return {kind: paths for kind, paths in found.items() if paths}


def lacking(here: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Files that are not there, or are others."""
    return [path for path in wanted if here.get(path) != wanted[path]]


def is_memory(path: str) -> bool:
    """Whether a file only spares a later command some time, so that a command that cannot write it may go on."""
    return path.startswith(("work/index", "work/pixels", "work/journal"))


def some(wrong: Mapping[str, Sequence[str]]) -> str:
    """Differences as a line of text has room for them."""
    return "; ".join(f"{what} {len(paths)}, such as {paths[0]}" for what, paths in wrong.items())


_WRITING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")


class Operations:
    """Calls `act(event, path)` before each operation that changes files in the folder where a stage runs.

    The operations are those that Python tells an audit hook of, and fsync.

    reading : whether opening a file to read it is such an operation too
    """

    def __init__(self, folder: Path, act: Callable[[str, str], None], reading: bool = False) -> None:
        self._folder, self._act, self._reading = f"{folder}/", act, reading

    def watch(self) -> None:
        """Begin, in this process, for the rest of its life."""
        sys.addaudithook(self._hook)
        fsync = os.fsync

        def watched(file: Any) -> None:
            self._act("fsync", "")
            fsync(file)

        os.fsync = watched

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in _WRITING:
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = path.decode()
        if not isinstance(path, str | os.PathLike):  # a descriptor
            return
        path = str(path)
        if path.startswith("/") and not path.startswith(self._folder):
            return
        if event == "open":
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes:
                event = "open to write"
            elif not self._reading:
                return
        self._act(event, path)


def count_operations(room: Room, stage: str, reading: bool = False) -> int:
    """How many operations a stage has, undisturbed; `case` is what it was after the stage then."""
    counts = room.root / "operations"
    counts.unlink(missing_ok=True)
    file = os.open(counts, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    room.restore(room.before(stage))
    room.run(stage, hurt=Operations(room.case, lambda *_: os.write(file, b"."), reading).watch)
    os.close(file)
    return counts.stat().st_size


def at_operation(
    room: Room, number: int, act: Callable[[], object], reading: bool = False, always: bool = False
) -> Callable[[], None]:
    """What to do in the process of a stage, so that it calls `act` before its operation of this number, from 0.

    always : call it before every later operation too
    """
    count = itertools.count()

    def when(*_: str) -> None:
        now = next(count)
        if now == number or (always and now > number):
            act()

    return Operations(room.case, when, reading).watch


def kill_this_process() -> None:
    """Kill this process and its own ones."""
    os.killpg(0, signal.SIGKILL)


def options(description: str | None, n: int, kinds: Sequence[str] = ()) -> argparse.Namespace:
    """Options of a script: how many cases, the seed, which stages, which kinds of faults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=n, help=f"cases [{n}]")
    parser.add_argument("--seed", type=int, default=0, help="of what is hurt, and when [0]")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to run, in their order [all]")
    parser.add_argument("--only", help="of these, the ones to hurt [all]")
    if kinds:
        parser.add_argument("--kinds", default=",".join(kinds), help="of faults [all]")
    given = parser.parse_args()
    if kinds:
        given.kinds = tuple(given.kinds.split(","))
    given.stages = tuple(given.stages.split(","))
    given.only = tuple(given.only.split(",")) if given.only else given.stages
    return given


@contextmanager
def built(stages: Sequence[str]) -> Iterator[tuple[Room, dict[str, float]]]:
    """A room with every stage done and kept, and the seconds of each."""
    load_everything()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        room = Room(Path(folder).resolve(), tuple(stages))
        yield room, build(room)
