"""Non-negative weights of every vertex: all at once from moments, against scikit-learn vertex after vertex.

    PYTHONPATH=. python benchmarks/stacking.py [--quick]

scikit-learn is timed on some of the vertices and its time multiplied up to all: its cost is the same for each. Both
start from predictions in memory. The weights of those vertices are compared.
"""

import numpy as np
import torch
from measure import Figure, options, paired, report
from sklearn.linear_model import LinearRegression

from featcache.machine.memory import keep_freed_memory
from heads.blend.nnls import nnls

_BLOCK = 512  # vertices whose normal equations are made at a time


def main() -> None:
    sizes = options(__doc__, images=(984, 100), vertices=(39548, 600), models=(24, 5), sample=(400, 30))
    keep_freed_memory()
    rng = np.random.default_rng(0)
    n, v, m = sizes.images, sizes.vertices, sizes.models
    noise = 1 + 2 * rng.random((v, m, 1), dtype=np.float32)  # so that every vertex has models of its own
    columns = np.empty((v, m + 1, n), np.float32)  # the models, the responses last, as `gather` lays them out
    for first in range(0, v, _BLOCK):
        block = slice(first, first + _BLOCK)
        signal = rng.standard_normal((len(columns[block]), 1, n), dtype=np.float32)
        columns[block] = rng.standard_normal(columns[block].shape, dtype=np.float32)
        columns[block, :-1] *= noise[block]
        columns[block] += signal
    sums = np.empty((v, m + 1, m + 1), np.float32)
    found: list[np.ndarray] = []

    def ours() -> None:
        of_all = torch.from_numpy(columns)
        torch.bmm(of_all, of_all.transpose(1, 2), out=torch.from_numpy(sums))
        found[:] = [nnls(sums[:, :-1, :-1], sums[:, :-1, -1])]

    sample = np.linspace(0, v - 1, sizes.sample).astype(int)
    theirs = np.empty((len(sample), m))

    def one_by_one() -> None:
        for row, vertex in enumerate(sample):
            model = LinearRegression(positive=True, fit_intercept=False)
            theirs[row] = model.fit(columns[vertex, :-1].T, columns[vertex, -1]).coef_

    own, of_sample, part = paired(ours, one_by_one)
    other = of_sample * v / len(sample)
    difference = float(np.abs(found[0][sample] - theirs).max() / np.abs(theirs).max())
    what = f"non-negative weights of {m} models, {n:,} images, {v:,} vertices"
    report(
        [
            Figure(
                f"{what}: times as fast",
                "scikit-learn's LinearRegression(positive=True), vertex by vertex",
                v / len(sample) / part,
                20,
                at_most=False,
                details={"seconds": own, "sklearn_seconds": other, "sample": len(sample)},
            ),
            Figure(f"{what}: largest difference, as a part of the largest weight", "the same", difference, 1e-3),
        ]
    )


if __name__ == "__main__":
    main()
