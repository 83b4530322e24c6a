"""A simulated subject of full size through `fit-heads`: seconds, peak memory, and priors against the pooled features.

    PYTHONPATH=. python benchmarks/full_size.py [--quick] [--subjects 8]

One subject has 9,841 images and 26,368 features: three layers of 7 x 7 places as float16, and 1,280 pooled ones. Every
vertex sees one layer through one window (planted.py). Five folds and the test images are predicted, and heads are
saved. Each command is a process of its own, whose peak of resident memory is the kernel's figure. With --subjects,
one command fits the other subjects one after the other; they differ in their seeds.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from measure import Figure, options, report
from planted import Sizes, write_subject

HERE = Path(__file__).resolve().parent
_FULL = {"blocks.3": 80, "blocks.4": 112, "blocks.6": 320}  # channels of the layers of tf_efficientnet_lite0
_QUICK = {"blocks.3": 4, "blocks.4": 6, "blocks.6": 8}


def fit(work: Path, subjects: str, layers: str) -> dict[str, Any]:
    """Run `fit-heads`: its seconds, its peak memory in 10^9 bytes, and its scores over all vertices and models."""
    arguments = ["--work", str(work), "--subject", subjects, "--loss", "mse", "--layers", layers, "--json"]
    command = [sys.executable, "-m", "cli", "fit-heads", *arguments]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"fit-heads failed: exit code {process.returncode}")
    seconds = time.perf_counter() - began
    printed = json.loads(said.splitlines()[-1])
    taken = {"seconds": seconds, "peak_gb": used.ru_maxrss * 1024 / 1e9}  # Linux counts in KiB
    for which, name in (("scores", "out_of_fold"), ("test_scores", "test")):
        last = [of_model[-1] for of_model in printed[which].values()]  # made-up subjects have models of their own
        for score, key in (("mean_r", "r"), ("accuracy", "accuracy")):
            taken[f"{name}_{key}"] = mean(of_model[score] for of_model in last)
    return taken


def figures_of(what: str, priors: dict[str, Any], pooled: dict[str, Any]) -> list[Figure]:
    """Rows of the first subject alone."""
    nothing = "nothing: it is no ratio"
    return [
        Figure(f"fit-heads under priors, {what}: minutes", nothing, priors["seconds"] / 60, 15, details=priors),
        Figure(f"fit-heads under priors, {what}: peak memory, 10^9 bytes", nothing, priors["peak_gb"], 12),
        Figure("the same on the pooled features alone: minutes", nothing, pooled["seconds"] / 60, details=pooled),
        *(
            Figure(
                f"{name} accuracy under priors, less that of the pooled features, points",
                nothing,
                priors[f"{key}_accuracy"] - pooled[f"{key}_accuracy"],
            )
            for name, key in (("out-of-fold", "out_of_fold"), ("test", "test"))
        ),
    ]


def write(work: Path, name: str, sizes: Sizes, seed: int) -> None:
    """Write a subject in a process of its own: the kernel counts the memory of this one into the peaks of `fit`."""
    given = json.dumps([str(work), name, asdict(sizes), seed])
    subprocess.run([sys.executable, __file__, "--write", given], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        work, name, fields, seed = json.loads(sys.argv[2])
        write_subject(Path(work), name, Sizes(**fields), seed)
        return
    given = options(__doc__, images=(9841, 150), test_images=(159, 30), vertices=(39548, 60), subjects=(1, 1))
    channels, pooled = (_QUICK, 32) if given.quick else (_FULL, 1280)
    sizes = Sizes(
        images=given.images, test_images=given.test_images, vertices=given.vertices, channels=channels, pooled=pooled
    )
    names = [f"subj{number + 1:02}" for number in range(given.subjects)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        for number, name in enumerate(names):
            write(work, name, sizes, number)
        pooled, priors = (fit(work, names[0], layers) for layers in ("pooled", "all"))
        what = f"{sizes.images:,} x {sizes.n_features:,} -> {sizes.vertices:,}"
        figures = figures_of(what, priors, pooled)
        if len(names) > 1:
            several = fit(work, ",".join(names[1:]), "all")
            figures.append(
                Figure(
                    f"{len(names) - 1} more such subjects, one after the other: peak memory",
                    "one's",
                    several["peak_gb"] / priors["peak_gb"],
                    1.1,
                    details=several,
                )
            )
    report(figures)


if __name__ == "__main__":
    main()
