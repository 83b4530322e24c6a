"""Faults put into the code of scores, losses, guard, commit and digests, one at a time: do the tests see each of them?

    PYTHONPATH=. python benchmarks/faults/mutation.py [--only metrics,chunks] [--n 100] [--seed 0] [--out results.json]

Cosmic Ray makes the faults (mutants.py). Each is tried in a copy of one process that has imported everything and knows
which tests reach which line, so that a mutant takes as long as the tests of its line until the first that fails. What
no test noticed is tried once more in a process that imports the changed file anew, with all tests of the file; so are
faults outside functions. `mutation_equivalents.toml` lists the mutants that no test can kill, with the reason for each.
Exits 1 where a mutant survives that is not listed.
"""

import argparse
import gc
import importlib.abc
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import coverage
import pytest
from hypothesis import Phase, settings
from mutants import Mutant, mutants_of, unspaced

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENTS = Path(__file__).with_name("mutation_equivalents.toml")
TARGETS = {
    "heads/scores/metrics.py": ["tests/scores/test_metrics.py"],
    "heads/scores/losses.py": ["tests/scores/test_losses.py"],
    "heads/scores/by_roi.py": ["tests/scores/test_by_roi.py"],
    "heads/scores/intervals.py": ["tests/scores/test_intervals.py"],
    "featcache/dataset/splits.py": ["tests/dataset/test_splits.py"],
    "featcache/dataset/digests.py": ["tests/dataset/test_digests.py"],
    "featcache/dataset/identity.py": ["tests/dataset/test_identity.py"],
    "heads/solvers/held_out.py": ["tests/solvers/test_held_out.py"],
    "featcache/cache/chunks.py": ["tests/cache/test_chunks.py", "tests/cache/test_store.py"],
    "featcache/cache/store.py": ["tests/cache/test_store.py"],
    "featcache/machine/files.py": ["tests/machine/test_files.py"],
}
_KILLED, _SURVIVED = 1, 0
_SECONDS = 60  # for the tests of one mutant, beside ten times what they take without a fault


@dataclass
class Outcome:
    """What became of the mutants of one file."""

    file: str
    killed: list[Mutant] = field(default_factory=list)
    stopped: list[Mutant] = field(default_factory=list)  # killed by the limit of time
    survived: list[Mutant] = field(default_factory=list)
    equivalent: list[Mutant] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Numbers of mutants, as they are printed."""
        n_killed = len(self.killed) + len(self.stopped)
        counts = {"killed": n_killed, "of these by time": len(self.stopped), "survived": len(self.survived)}
        counts["equivalent"] = len(self.equivalent)
        return {"mutants": n_killed + len(self.survived) + len(self.equivalent), **counts}


def in_a_copy(work: Callable[[], int], seconds: float) -> int | None:
    """What `work` returns in a copy of this process; None where it takes longer."""
    sys.stdout.flush()
    if not (child := os.fork()):
        os.setpgid(0, 0)
        code = _KILLED  # an error of the machinery that a mutant brings about is seen
        try:
            code = work()
        finally:
            os._exit(code)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def code_parts(source: str, path: Path) -> tuple[dict[tuple[str, int], CodeType], list[object]]:
    """Functions of a file, {(name, line): code}, and all else that is run when it is imported."""
    functions: dict[tuple[str, int], CodeType] = {}
    imported: list[object] = []

    def visit(code: CodeType) -> None:
        plain = tuple(one for one in code.co_consts if not isinstance(one, CodeType))
        imported.append((code.co_code, code.co_names, code.co_varnames, repr(plain)))
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                is_function = inner.co_flags & 1 and not inner.co_name.startswith(("<listc", "<dictc", "<setc", "<gen"))
                if is_function:
                    functions[inner.co_qualname, inner.co_firstlineno] = inner
                    imported.append((inner.co_qualname, inner.co_firstlineno))
                else:
                    visit(inner)

    visit(compile(source, path, "exec", dont_inherit=True))
    return functions, imported


class Warm:
    """A plugin of pytest: tests run once, to see which lines they reach, and then for every mutant in a copy."""

    def __init__(self, path: Path, mutants: Sequence[Mutant], say: Callable[[str], object]) -> None:
        self.path, self.mutants, self.say = path, mutants, say
        self.results: list[int | str | None] = []  # for each mutant: exit code, None for too long, or "import"
        self.failing: list[str] = []
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed

    def _run(self, items: Sequence[pytest.Item], following: pytest.Item | None) -> Iterator[tuple[pytest.Item, bool]]:
        for item, after in zip(items, [*items[1:], following], strict=True):
            self._failed = False
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            yield item, self._failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = session.items
        measured = coverage.Coverage(data_file=None, include=[str(self.path)], config_file=False)
        seconds: dict[str, float] = {}
        measured.start()
        began = time.monotonic()
        measured.switch_context(items[0].nodeid)
        # fixtures of the session stay, and the copies use them
        for item, (_, failed) in zip([*items[1:], items[0]], self._run(items, items[0]), strict=True):
            before = items[len(seconds)].nodeid
            seconds[before] = time.monotonic() - began
            if failed:
                self.failing.append(before)
            measured.switch_context(item.nodeid)
            began = time.monotonic()
        measured.stop()
        reached = measured.get_data().contexts_by_lineno(str(self.path))
        whole = [item for item in items if item.nodeid not in self.failing]
        functions, imported = code_parts(self.path.read_text(), self.path)
        gc.unfreeze()
        living = [
            one for one in gc.get_objects() if type(one) is FunctionType and one.__code__.co_filename == str(self.path)
        ]
        for mutant in self.mutants:
            changed, changed_import = code_parts(mutant.source, self.path)
            if changed_import != imported or changed.keys() != functions.keys():
                self.results.append("import")
                continue
            tests = {test for line in range(mutant.first, mutant.last + 1) for test in reached.get(line, ())}
            chosen = sorted((item for item in whole if item.nodeid in tests), key=lambda item: seconds[item.nodeid])
            limit = _SECONDS + 10 * sum(seconds[item.nodeid] for item in chosen)

            def notice(changed: dict[tuple[str, int], CodeType] = changed, chosen: list[pytest.Item] = chosen) -> int:
                for function in living:
                    key = function.__code__.co_qualname, function.__code__.co_firstlineno
                    if key in changed:
                        function.__code__ = changed[key]
                return _KILLED if any(failed for _, failed in self._run(chosen, None)) else _SURVIVED

            self.results.append(in_a_copy(notice, limit) if chosen else _SURVIVED)
            if self.results[-1] == _SURVIVED:
                self.say(f"  not noticed, line {mutant.first}: {mutant.was}\n    -> {mutant.becomes}")
        return True


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import of one file with other code."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.name = ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def find_spec(self, name: str, *_: Any) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, self.path, "exec", dont_inherit=True), module.__dict__)


def pytest_run(tests: Sequence[str], basetemp: Path, *options: str, plugins: Sequence[object] = ()) -> int:
    """Run some tests in this process. What they say goes into a file beside `basetemp`."""
    said = os.open(basetemp.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    quick = settings(deadline=None, database=None, phases=[Phase.explicit, Phase.generate])  # nothing is made smaller
    settings.register_profile("mutation", quick)
    settings.load_profile("mutation")
    early = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", early, "--basetemp", str(basetemp)]
    return int(pytest.main([*arguments, *options, *tests], plugins=list(plugins)))


def import_everything() -> None:
    """Import what tests and code import, but nothing of the project: copies then start at once."""
    for name in (
        "torch",
        "timm",
        "zarr",
        "scipy.stats",
        "scipy.special",
        "sklearn.linear_model",
        "hypothesis.strategies",
    ):
        importlib.import_module(name)
    for name in ("accelerate", "safetensors.torch", "typer", "matplotlib.figure", "filelock", "google_crc32c", "rich"):
        importlib.import_module(name)


def attack(file: str, mutants: Sequence[Mutant], listed: frozenset[tuple[str, str]], warm_only: bool) -> Outcome:
    """Try all mutants of a file, or with `warm_only` those that are in functions."""
    path, tests, outcome = ROOT / file, TARGETS[file], Outcome(file)
    terminal = os.dup(sys.stderr.fileno())
    folder = Path(tempfile.mkdtemp(prefix="mutation-"))
    try:
        told = folder / "results.json"

        def warm() -> int:
            plugin = Warm(path, mutants, lambda text: os.write(terminal, f"{text}\n".encode()))
            pytest_run(tests, folder / "warm", plugins=[plugin])
            told.write_text(json.dumps([plugin.results, plugin.failing]))
            return 0

        in_a_copy(warm, 24 * 3600)
        results, failing = json.loads(told.read_text()) if told.exists() else ((), ())
        if len(results) != len(mutants):
            raise RuntimeError(f"{file}: the tests did not run:\n{(folder / 'warm.log').read_text()[-3000:]}")
        if failing:
            print(f"{file}: tests that fail without a fault are left out: {', '.join(failing)}", flush=True)
        deselected = [f"--deselect={test}" for test in failing]
        for mutant, result in zip(mutants, results, strict=True):
            if warm_only and result == "import":
                continue
            if result in ("import", _SURVIVED) and mutant.key not in listed and not warm_only:

                def cold(mutant: Mutant = mutant) -> int:
                    sys.meta_path.insert(0, Changed(path, mutant.source))
                    return int(pytest_run(tests, folder / "cold", "-x", *deselected) != 0)

                result = in_a_copy(cold, 10 * _SECONDS)
            if result == _SURVIVED or (result == "import" and mutant.key in listed):
                (outcome.equivalent if mutant.key in listed else outcome.survived).append(mutant)
            else:
                (outcome.stopped if result is None else outcome.killed).append(mutant)
    finally:
        os.close(terminal)
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def equivalents(file: str, mutants: Sequence[Mutant]) -> dict[tuple[str, str], str]:
    """{(was, becomes): reason} of the mutants of a file that no test can kill."""
    listed = tomllib.loads(EQUIVALENTS.read_text())
    reasons: dict[tuple[str, str], str] = {}
    for entry in listed["everywhere"]:
        was, becomes = unspaced(entry["was"]), unspaced(entry["becomes"])
        for mutant in mutants:
            line, changed = mutant.key
            places = (place for place in range(len(line)) if line.startswith(was, place))
            if any(line[:place] + becomes + line[place + len(was) :] == changed for place in places):
                reasons[mutant.key] = entry["why"]
    for entry in listed["equivalent"]:
        if entry["file"] == file:
            for becomes in [entry["becomes"]] if isinstance(entry["becomes"], str) else entry["becomes"]:
                reasons[unspaced(entry["was"]), unspaced(becomes)] = entry["why"]
    return reasons


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation of the code that must not be wrong in silence")
    parser.add_argument("--only", default="", help="names of files, with commas between them")
    parser.add_argument("--n", type=int, help="mutants of each file, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--functions", action="store_true", help="quick: only faults in functions, each tried once")
    parser.add_argument("--out", type=Path, help="JSON file of every mutant that survives")
    options = parser.parse_args()
    chosen = [file for file in TARGETS if not options.only or Path(file).stem in options.only.split(",")]
    os.chdir(ROOT)
    import_everything()
    totals, survivors = Counter[str](), []
    for file in chosen:
        mutants = mutants_of(ROOT / file)
        if options.n is not None and options.n < len(mutants):
            drawn = set(random.Random(options.seed).sample(range(len(mutants)), options.n))
            mutants = [mutant for i, mutant in enumerate(mutants) if i in drawn]
        reasons = equivalents(file, mutants)
        outcome = attack(file, mutants, frozenset(reasons), options.functions)
        print(f"{file}: " + ", ".join(f"{n} {what}" for what, n in outcome.counts().items()), flush=True)
        for mutant in outcome.survived:
            print(f"  survived, line {mutant.first}: {mutant.was}\n    -> {mutant.becomes}", flush=True)
            survivors.append({"file": file, "line": mutant.first, "was": mutant.was, "becomes": mutant.becomes})
        for mutant in outcome.equivalent:
            print(f"  equivalent, line {mutant.first}: {mutant.becomes}\n    {reasons[mutant.key]}", flush=True)
        totals.update(outcome.counts())
    print("in all: " + ", ".join(f"{n} {what}" for what, n in totals.items()))
    if options.out:
        options.out.write_text(json.dumps(survivors, indent=1))
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
