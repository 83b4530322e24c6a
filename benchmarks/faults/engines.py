"""A recipe of all stages on a real engine, whose workers are killed (kill -9) again and again: the same files.

    PYTHONPATH=. python benchmarks/faults/engines.py --engine local|submitit|slurm|dask [--n 20] [--seed 0]

`--n` runs with two workers each. Every few seconds whoever holds a unit is killed, at a random moment of it.
`submitit` is its executor of local processes, `slurm` the SLURM of this machine, `dask` a LocalCluster. A run is right
where it ends with exit code 0, and its files have the bytes that one process makes. Printed are the units at which
workers were killed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import stages

from featcache.machine.documents import read_document
from featcache.machine.leases import Done
from featcache.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
[options]
data = "challenge"
backbone = "test_resnet"
weights = "none"
size = 32

[[steps]]
run = "extract"
layers = "pooled,layer2"
checkpoint = "none"
[[steps]]
run = "pretrain"
folds = 2
epochs = 6
batch-size = 8
embedding = 4
[[steps]]
run = "finetune"
folds = 2
epochs = 6
batch-size = 8
[[steps]]
run = "extract"
layers = "pooled,layer4"
[[steps]]
run = "fit-heads"
folds = 2
loss = "mnnpc"
[[steps]]
run = "fit-heads"
folds = 2
loss = "smooth_l1"
epochs = 6
[[steps]]
run = "blend"
[[steps]]
run = "report"
"""
_SIMULATE = ("--subjects", "2", "--images", "24", "--test-images", "5", "--shared", "8", "--vertices", "90")
_NOT_COMPARED = ("units/", "journal.jsonl", "report.html", ".writing.lock", ".partial.")
_OPTIONS = {
    "local": ("--engine", "local"),
    "submitit": ("--engine", "submitit", "--cluster", "local"),
    "slurm": ("--engine", "submitit", "--cluster", "slurm"),
    "dask": ("--engine", "dask"),
}


def run(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "featcache", *words]
    return subprocess.Popen(
        line, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def contents(work: Path) -> dict[str, str]:
    found = stages.contents(work).items()
    return {name: what for name, what in found if not any(part in name for part in _NOT_COMPARED)}


class Killer(threading.Thread):
    """Kills who holds a unit, every few seconds; at most so many. units : at which"""

    def __init__(self, work: Path, rng: random.Random, most: int) -> None:
        super().__init__(daemon=True)
        self._units, self._rng, self._most = Workdir(work).units, rng, most
        self.units: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.units) < self._most and not self.over.wait(self._rng.uniform(0.5, 4)):
            leases = sorted(self._units.glob("*.lease")) if self._units.is_dir() else []
            for lease in self._rng.sample(leases, len(leases)):
                with suppress(OSError, ValueError, LookupError):
                    process = json.loads(lease.read_bytes().splitlines()[0])["process"]
                    os.kill(process, signal.SIGKILL)
                    self.units.append(lease.name.split(".")[0])
                    break


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=tuple(_OPTIONS), required=True)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, counts, hurt, broken = random.Random(given.seed), Counter[str](), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="engines-") as name, ExitStack() as stack:
        folder, options = Path(name), list(_OPTIONS[given.engine])
        if given.engine == "dask":
            import distributed

            settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
            os.environ["PYTHONPATH"] = str(ROOT)
            cluster = stack.enter_context(distributed.LocalCluster(**settings, silence_logs=50))
            options += ["--scheduler", cluster.scheduler_address]
        (folder / "recipe.toml").write_text(RECIPE)
        assert run(folder, "simulate", "--data", "challenge", *_SIMULATE, "--image-size", "32").wait() == 0
        assert run(folder, "run", "recipe.toml", "--work", "whole").wait() == 0
        wanted = contents(folder / "whole")
        for number in range(given.n):
            work, began = folder / f"work{number}", time.monotonic()
            killer = Killer(work, rng, 6)
            killer.start()
            process = run(folder, "run", "recipe.toml", "--work", work.name, "--workers", "2", *options)
            _, err = process.communicate()
            killer.over.set()
            titles = {path.stem: read_document(path, Done).unit for path in Workdir(work).units.glob("*.done")}
            hurt.update(titles.get(unit, "?").split(" ")[0] for unit in killer.units)
            differ = stages.differences(contents(work), wanted)
            counts.update(runs=1, killed=len(killer.units), broken=bool(process.returncode or differ))
            if process.returncode or differ:
                broken.append(f"run {number}: exit code {process.returncode}; {stages.some(differ)}; {err[-300:]}")
            print(f"run {number}: {len(killer.units)} killed, {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(broken))
    print(", ".join(f"{what} {n}" for what, n in counts.items()))
    print("workers killed at " + ", ".join(f"{what} {n}" for what, n in hurt.most_common()))
    return 1 if counts["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
