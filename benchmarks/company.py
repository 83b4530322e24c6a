"""A fit of the default path beside a process that keeps all cores busy, against the same fit alone.

    PYTHONPATH=. python benchmarks/company.py [--quick]

The other process multiplies matrices with as many threads as there are cores, without a pause; between two products its
threads wait by spinning. A fair share of the cores makes a fit take twice its time.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Figure, options, paired, report
from planted import Sizes, write_subject

from heads.config import FitConfig
from heads.features.sets import feature_sets
from heads.fit.out_of_fold import predict_surface
from heads.solvers.base import Problem
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.ridge import build_layered

_BUSY = """
import torch
torch.set_num_threads({cores})
one = torch.randn(600, 600)
print("busy", flush=True)
while True:
    one @ one
"""


@contextmanager
def busy_cores() -> Iterator[None]:
    """Have another process keep every core busy."""
    code = _BUSY.format(cores=os.cpu_count())
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def fit(problem: Problem) -> None:
    solver = build_layered(problem)
    for surface in problem.subject.surfaces:
        predict_surface(solver, problem.subject, surface, lambda n: None)


def main() -> None:
    given = options(__doc__, images=(729, 60), vertices=(1870, 10), rounds=(3, 1))
    with tempfile.TemporaryDirectory() as folder:
        sizes = Sizes(images=given.images, test_images=given.images // 10, vertices=given.vertices, pooled=64)
        subject = write_subject(Path(folder), "subj01", sizes)
        (features,) = feature_sets(subject, Path(folder))
        plan = FoldPlan.of_frozen(subject.train.ids, 5, 0)
        config = FitConfig(loss="mse")
        problem = Problem(subject=subject, features=features, plan=plan, config=config, work=Path(folder))
        fit(problem)

        def in_company() -> None:
            with busy_cores():
                fit(problem)

        beside, alone, ratio = paired(in_company, lambda: fit(problem), given.rounds)
    details = {"seconds": beside, "alone seconds": alone, "features": sizes.n_features, "rounds": given.rounds}
    what = f"fit under priors, {sizes.images:,} x {sizes.n_features:,} -> {sizes.vertices:,}, beside a busy process"
    report([Figure(what, "the same alone", ratio, 2.5, details=details)])


if __name__ == "__main__":
    main()
