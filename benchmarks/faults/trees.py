"""Bad trees and tables: datasets, imports, splits and recipes with one fault each, run through the command line.

    PYTHONPATH=. python benchmarks/faults/trees.py [--n 40] [--seed 0] [--only NAME]

Every case is a small good dataset with one fault (faults_of_trees.py, faults_of_imports.py, faults_of_texts.py). A
command is right if it says one line that names what is wrong and leaves with 1, or if it does what was asked, whichever
the case expects; `check` lists its lines on stdout. Anything else breaks a promise: a traceback, a fault accepted in
silence, a good file refused, words that do not name the fault, more than 20 seconds, or 1 GB of memory. Prints counts
by kind; the exit code is 1 where a promise was broken.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults_of_imports import IMPORTS
from faults_of_texts import TEXTS
from faults_of_trees import TREES
from good_files import Case, Good, build

_SECONDS, _BYTES = 20, 1 << 30  # that one command may take
BROKEN = (
    "traceback",
    "silence",
    "good file refused",
    "other words",
    "over time",
    "over memory",
    "false advice",
    "not planted",
)
_NEVER = ("--dtype", "Traceback", "train and extract all folds")  # advice that helps with none of these faults


class _OverTimeError(BaseException):
    """Raised by the alarm; no command may swallow it."""


def cases() -> dict[str, Case]:
    """Every case by its name, 'kind: fault'."""
    return {f"{kind}: {name}": case for part in (TREES, IMPORTS, TEXTS) for (kind, name), case in part.items()}


def judge(case: Case, good: Good, here: Path) -> list[tuple[str, str]]:
    """(verdict, what was said) of each command of a case, which is made in the folder `here`."""
    try:
        lines = case.make(good, here)
    except Exception:  # of the case itself; the others go on
        return [("not planted", traceback.format_exc())]
    return [_verdict(case, line, *_run(line)) for line in lines]


def _verdict(case: Case, line: Sequence[str], code: int, text: str, seconds: float, n_bytes: int) -> tuple[str, str]:
    said = f"{' '.join(line)}\n{text}"
    errors = [one for one in text.splitlines() if one.startswith("error: ")]
    lines = text.splitlines() if line[0] == "check" else errors
    if code == -2:
        return "over time", said
    if code == -1:
        return "traceback", said
    if n_bytes > _BYTES:
        return "over memory", f"{said}\n{n_bytes / 1e9:.1f} GB"
    if any(word in one for word in _NEVER for one in errors):
        return "false advice", said
    if not code:
        return ("silence" if case.refused else "handled"), said
    if not case.refused:
        return "good file refused", said
    named = any(all(word in one for word in case.words) for one in lines)
    return ("refused" if named and (line[0] == "check" or len(errors) == 1) else "other words"), said


def _run(line: Sequence[str], limit: int = _SECONDS) -> tuple[int, str, float, int]:
    """Exit code, output, seconds and added peak memory of a command; -1 for a traceback, -2 for too much time."""
    import cli

    def ring(*_: object) -> None:
        raise _OverTimeError

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    signal.signal(signal.SIGALRM, ring)
    with _captured() as written:
        signal.alarm(limit)
        try:
            code = cli.run(list(line))
        except _OverTimeError:
            code = -2
        except BaseException:
            traceback.print_exc()
            code = -1
        finally:
            signal.alarm(0)
    added = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return code, written[0], time.perf_counter() - began, added


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Everything that is written to stdout and stderr, as one text, once the block ends."""
    written = [""]
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(number) for number in (1, 2)]
        sys.stdout.flush(), sys.stderr.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        out = os.fdopen(os.dup(file.fileno()), "w", buffering=1, errors="replace")  # a test has a stdout of its own
        try:
            with out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                yield written
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            written[0] = file.read().decode(errors="replace")


def chosen(n: int | None, seed: int, only: str) -> dict[str, Case]:
    """The cases of a run: all, or n of them drawn with a seed, or those whose names contain a text."""
    known = {name: case for name, case in cases().items() if only in name}
    names = list(known) if n is None or n >= len(known) else random.Random(seed).sample(list(known), n)
    return {name: known[name] for name in names}


def main() -> None:
    """Judge the cases and print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, help="cases, drawn with the seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="text that the names of the cases contain")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory(prefix="trees-") as folder:
        good = build(Path(folder) / "good", lambda line: _run(line, 300))
        for number, (name, case) in enumerate(chosen(options.n, options.seed, options.only).items()):
            here = Path(folder) / f"case{number}"
            here.mkdir()
            verdicts = judge(case, good, here)
            worst = next((one for one in verdicts if one[0] in BROKEN), verdicts[0])
            counts[name.partition(":")[0]][worst[0]] += 1
            if worst[0] in BROKEN:
                print(f"BROKEN {worst[0]}: {name}\n  {worst[1].strip()[-1500:]}\n", flush=True)
            shutil.rmtree(here)
    for kind, of_kind in counts.items():
        print(f"{kind}: {of_kind.total()} kinds of fault; {', '.join(f'{n} {what}' for what, n in of_kind.items())}")
    total: Counter[str] = sum(counts.values(), Counter())
    n_broken = sum(total[what] for what in BROKEN)
    print(
        f"in all {total.total()}: {total['refused']} refused by one right line, {total['handled']} handled rightly, ",
        end="",
    )
    print(f"{n_broken} broken ({', '.join(f'{total[what]} {what}' for what in BROKEN)})")
    sys.exit(1 if n_broken else 0)


if __name__ == "__main__":
    main()
