"""Hostile files for every reader: nothing but FeatcacheError, in bounded time and memory.

    PYTHONPATH=. python benchmarks/faults/fuzz.py [--n 100000] [--seed 0] [--readers npy,zarr] [--number 1234]

A valid small file of every format is changed (fuzz_mutations.py) and read (fuzz_readers.py) in a process of its own.
Input n of a seed is always the same; --number reads one alone and shows what it raises. Prints how many were read,
refused by a FeatcacheError, raised anything else, took more time or memory than the limits, or ended the process; the
exit code is 1 where there is any of the last four.
"""

import argparse
import json
import logging
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 5  # that one input may take
PATIENCE = 20  # seconds until a process that does not even hear its alarm is ended
BYTES = 2 << 30  # of main memory that one input may take
FREE = 1 << 30  # bytes of free memory that readers are told of: half of it is what may be read whole
_BROKEN = ("other", "several lines", "over time", "over memory", "ended the process")


class _OverTimeError(BaseException):
    """Raised by the alarm; no reader may swallow it."""


def _alarm(*_: Any) -> None:
    raise _OverTimeError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default="", help="names with commas between them; all by default")
    parser.add_argument("--number", type=int, help="of the one input to read")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        _work(options)
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-shared-", dir=_memory()) as shared:
        os.environ.setdefault("FEATCACHE_FUZZ_SHARED", shared)
        sys.exit(_work(options) if options.number is not None else _supervise(options))


def _memory() -> str | None:
    """A folder that is in memory, where the system has one: every input is a file."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def _work(options: argparse.Namespace) -> None:
    """Read inputs one after the other and print a line for each."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory()) as folder:
        os.environ |= {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        from fuzz_readers import build

        from featcache.formats import lazy

        lazy.free_memory = lambda: FREE
        warnings.simplefilter("ignore")
        logging.disable()
        readers = build(Path(folder), set(filter(None, options.readers.split(","))))
        if options.number is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # lines for the user, and those of libraries
        _limit_memory()
        signal.signal(signal.SIGALRM, _alarm)
        numbers = [options.number] if options.number is not None else range(options.worker, options.n)
        for number in numbers:
            reader = readers[number % len(readers)]
            _say({"start": number, "reader": reader.name})
            rng = random.Random(f"{options.seed} {number}")
            _say({"number": number, **_result(reader, rng, show=options.number is not None)})


def _say(line: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(line) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def _limit_memory() -> None:
    """Reserve no more than 6 GB above what is reserved now: the machine is not to suffer."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (6 << 30), resource.RLIM_INFINITY))


def _result(reader: Any, rng: random.Random, show: bool) -> dict[str, Any]:
    from featcache.errors import FeatcacheError
    from featcache.machine.memory import forget_peak, peak_memory, used_memory

    what, place = "read", ""
    with reader.changed(rng) as path:
        forget_peak()
        before = used_memory()
        try:
            signal.alarm(SECONDS)
            try:
                reader.read(path)
            finally:
                signal.alarm(0)
        except FeatcacheError as error:
            what = "refused" if len(str(error).splitlines()) == 1 else "several lines"
            place = "" if what == "refused" else _place(error)
            if show:
                print(str(error)[:2_000], file=sys.stderr)
        except _OverTimeError as error:
            what, place = "over time", _place(error)
        except BaseException as error:
            what, place = "other", f"{type(error).__name__} {_place(error)}: {str(error)[:80]}"
            if show:
                traceback.print_exc()
        if what != "over time" and (taken := peak_memory() - before) > BYTES:
            what, place = "over memory", f"{taken / 1e9:.1f} GB"
    return {"what": what, "place": place}


def _place(error: BaseException) -> str:
    """The last line of this project that was running."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/featcache/" in frame.filename or "/heads/" in frame.filename]
    last = (ours or list(frames))[-1]
    return f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno} {last.name}"


def _supervise(options: argparse.Namespace) -> int:
    """Have workers read all inputs; one that ends or hangs is replaced by another that goes on behind its input."""
    counts: Counter[str] = Counter()
    by_reader: dict[str, Counter[str]] = {}
    faults: dict[str, list[int]] = {}
    began, following = time.monotonic(), 0

    def count(reader: str, number: int, what: str, place: str) -> None:
        counts[what] += 1
        by_reader.setdefault(reader, Counter())[what] += 1
        if what in _BROKEN:
            faults.setdefault(f"{reader}: {what} {place}", []).append(number)

    def stopped(*_: Any) -> None:
        worker.kill()
        _report(counts, by_reader, faults, time.monotonic() - began)
        os._exit(2)

    signal.signal(signal.SIGTERM, stopped)
    while following < options.n:
        arguments = ["--n", str(options.n), "--seed", str(options.seed), "--readers", options.readers]
        worker = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--worker", str(following)],
            stdout=subprocess.PIPE,
            bufsize=0,  # or a line could wait in a buffer, where `select` does not see it
        )
        assert worker.stdout is not None
        running: tuple[int, str] | None = None
        while True:
            ready, _, _ = select.select([worker.stdout], [], [], PATIENCE if running else None)
            line = worker.stdout.readline() if ready else b""
            if not line.endswith(b"\n"):
                break
            said = json.loads(line)
            if "start" in said:
                running = (said["start"], said["reader"])
                continue
            assert running is not None
            count(running[1], said["number"], said["what"], said["place"])
            following, running = said["number"] + 1, None
            if following % 2_000 == 0:
                print(f"{following:,} in {time.monotonic() - began:.0f} s: {dict(counts)}", file=sys.stderr, flush=True)
        worker.kill()
        code = worker.wait()
        if running is not None:
            count(
                running[1], running[0], "ended the process" if ready else "over time", f"(exit {code})" if ready else ""
            )
            following = running[0] + 1
        elif following < options.n:
            print(f"a worker ended by itself, exit {code}", file=sys.stderr)
            return 2
    return _report(counts, by_reader, faults, time.monotonic() - began)


def _report(
    counts: Counter[str], by_reader: dict[str, Counter[str]], faults: dict[str, list[int]], seconds: float
) -> int:
    for name, of_reader in sorted(by_reader.items()):
        print(f"{name:24} " + ", ".join(f"{what} {n:,}" for what, n in sorted(of_reader.items())))
    for fault, numbers in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"{len(numbers):6,} x {fault} (--number {numbers[0]})")
    words = ", ".join(f"{what} {counts[what]:,}" for what in ("read", "refused", *_BROKEN))
    print(f"{counts.total():,} inputs of {len(by_reader)} readers in {seconds:.0f} s: {words}")
    return int(any(counts[what] for what in _BROKEN))


if __name__ == "__main__":
    main()
