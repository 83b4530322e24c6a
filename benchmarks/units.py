"""Units: what sharing them costs beside the work, how long a list of many takes, and what a second worker brings.

PYTHONPATH=. python benchmarks/units.py [--quick]

Workers have one thread each, so that a machine of two cores holds two of them.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import Figure, options, report, seconds

import cli
from featcache.cache.store import create_store, open_store
from featcache.machine.progress import silenced
from featcache.workdir import Workdir
from heads.commands.app import parser
from heads.config import EngineConfig
from heads.recipes.jobs import Job, Outcome, Part
from heads.recipes.plan import Estimate
from heads.recipes.steps import Ready, Step, ready
from heads.units.listing import list_units
from heads.units.worker import take_part

ROOT = Path(__file__).resolve().parents[1]
_LOSSES = [f"smooth_l1+{weight}*pattern" for weight in range(1, 11)]
_NETWORK = ("--backbone", "tf_efficientnet_lite0", "--weights", "none", "--layers", "pooled,blocks.4")
_TREE = ("--test-images", "20", "--shared", "10", "--image-size", "128", "--workers", "2")


def overhead(folder: Path, n_units: int) -> Figure:
    """Units that do nothing: all that is left is what sharing costs."""

    def parts(_: object) -> list[Part]:
        return [Part(f"p{n}", ("subj01",), {"n": n}, lambda: Outcome("", {})) for n in range(n_units)]

    work = folder / "nothing"
    work.mkdir()
    job = Job(None, lambda: Outcome("", {}), work=work, parts=parts)
    step = Ready(Step(Path("recipe"), 1, "extract"), job, {"work": work})
    took = seconds(lambda: take_part([step], work, EngineConfig(engine="here")))
    details = {"seconds_a_unit": took / n_units}
    return Figure(f"sharing one of {n_units:,} units", "0.3 s", took / n_units / 0.3, 1.0, details=details)


def run(*words: str, n_cores: int = 0) -> None:
    """A command in a process of its own, with one thread of arithmetic. n_cores : that it may run on; 0: all"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "featcache", *words]
    allowed = sorted(os.sched_getaffinity(0))[: n_cores or None]
    ended = subprocess.run(
        line,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(words)}: {ended.stderr}")


def listing(folder: Path, n_sets: int) -> Figure:
    """Every unit of a fit of many losses to many features of eight subjects."""
    data, work = folder / "many", folder / "many-work"
    tree = ("--subjects", "8", "--images", "60", "--vertices", "120")
    assert cli.run(["simulate", "--data", str(data), *tree, *_TREE]) == 0
    network = ("--backbone", "test_resnet", "--weights", "none", "--size", "32", "--layers", "pooled")
    where = ("--data", str(data), "--work", str(work))
    assert cli.run(["extract", *where, *network]) == 0
    features = Workdir(work).features
    for path in sorted(features.glob("[!.]*")):
        store = open_store(path)
        rows = {name: store.read(name) for name in store.arrays}
        for number in range(1, n_sets):
            key = {**store.key, "weights": f"{number:032x}"}
            copy = create_store(
                features,
                path.name.rpartition("-")[0],
                key,
                store.image_ids,
                store.n_train,
                {name: values.shape[1] for name, values in rows.items()},
                store.facts,
            )
            copy.append(rows)
    line = ("fit-heads", *where, "--loss", ",".join(_LOSSES), "--folds", "3")
    step = ready(parser(), Step(Path("recipe"), 1, line[0], line[1:]))
    counts = []

    def whole() -> None:
        counts.append(len(list_units([step], work, [Estimate(step.step)], 3, 120.0)))

    first, again = seconds(whole), seconds(whole)
    details = {"first_seconds": first, "seconds": again}
    return Figure(f"a list of {counts[0]:,} units of heads", "2 s", again / 2.0, 1.0, details=details)


def scaling(folder: Path, images: int, vertices: int, epochs: int) -> list[Figure]:
    """Runs of one worker on one core and of two on two. images : of each of four subjects; 0: nothing is run"""
    if not images:
        return []
    data = folder / "tree"
    tree = ("--subjects", "4", "--images", str(images), "--vertices", str(vertices))
    run("simulate", "--data", str(data), *tree, *_TREE)
    figures = []
    stages = {
        "extract": ("extract", *_NETWORK),
        "fit-heads": ("fit-heads", "--loss", "smooth_l1,pearson+smooth_l1", "--epochs", str(epochs), "--folds", "3"),
    }
    for stage, words in stages.items():
        whole, work_alone = {}, {}
        for n_workers in (1, 2):
            work = folder / str(n_workers)
            before = {path.name for path in Workdir(work).units.glob("*.done")}
            engine = ("--engine", "local", "--workers", str(n_workers))
            began = time.perf_counter()
            run(*words, "--data", str(data), "--work", str(work), *engine, n_cores=n_workers)
            whole[n_workers] = time.perf_counter() - began
            ends = [path.stat().st_mtime for path in Workdir(work).units.glob("*.done") if path.name not in before]
            work_alone[n_workers] = max(ends) - min(ends)  # from the first look at the data to the record
        details = {f"seconds_{n}": value for n, value in work_alone.items()}
        details |= {f"with_start_{n}": value for n, value in whole.items()}
        what = f"{stage}, {4 if stage == 'extract' else 8} units, a core each: two workers"
        ratio = work_alone[1] / work_alone[2]
        figures.append(Figure(what, "one, times as fast", ratio, 1.8, False, details=details))
    return figures


def main() -> None:
    sizes = options(__doc__, units=(2000, 30), sets=(125, 3), images=(700, 12), vertices=(4000, 40), epochs=(3, 1))
    with tempfile.TemporaryDirectory() as name, silenced(True):
        folder = Path(name)
        figures = [overhead(folder, sizes.units), listing(folder, sizes.sets)]
        figures += scaling(folder, sizes.images, sizes.vertices, sizes.epochs)
    report(figures)


if __name__ == "__main__":
    main()
