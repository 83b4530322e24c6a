"""Non-negative weights of every vertex: all at once from moments, against scikit-learn vertex after vertex.

    PYTHONPATH=. python benchmarks/stacking.py [--quick]

scikit-learn is timed on some of the vertices and its time multiplied up to all: its cost is the same for each. Both
start from predictions in memory. The weights of those vertices are compared.
"""

import numpy as np
from measure import Figure, options, report, seconds
from sklearn.linear_model import LinearRegression

from featcache.device import keep_freed_memory
from heads.nnls import nnls

_BLOCK = 512  # vertices whose normal equations are made at a time


def main() -> None:
    sizes = options(__doc__, images=(984, 100), vertices=(39548, 600), models=(24, 5), sample=(400, 30))
    keep_freed_memory()
    rng = np.random.default_rng(0)
    n, v, m = sizes.images, sizes.vertices, sizes.models
    responses = rng.standard_normal((v, n), dtype=np.float32)
    noise = 1 + 2 * rng.random((v, m, 1), dtype=np.float32)  # so that every vertex has models of its own
    predictions = np.empty((v, m, n), np.float32)
    for first in range(0, v, _BLOCK):
        block = slice(first, first + _BLOCK)
        predictions[block] = responses[block, None]
        predictions[block] += noise[block] * rng.standard_normal(predictions[block].shape, dtype=np.float32)
    responses += rng.standard_normal(responses.shape, dtype=np.float32)
    gram, cross = np.empty((v, m, m), np.float32), np.empty((v, m), np.float32)
    found: list[np.ndarray] = []

    def ours() -> None:
        np.matmul(predictions, predictions.transpose(0, 2, 1), out=gram)
        np.matmul(predictions, responses[..., None], out=cross[..., None])
        found[:] = [nnls(gram, cross)]

    sample = np.linspace(0, v - 1, sizes.sample).astype(int)
    theirs = np.empty((len(sample), m))

    def one_by_one() -> None:
        for row, vertex in enumerate(sample):
            model = LinearRegression(positive=True, fit_intercept=False)
            theirs[row] = model.fit(predictions[vertex].T, responses[vertex]).coef_

    own, other = seconds(ours), seconds(one_by_one) * v / len(sample)
    difference = float(np.abs(found[0][sample] - theirs).max() / np.abs(theirs).max())
    what = f"non-negative weights of {m} models, {n:,} images, {v:,} vertices"
    report(
        [
            Figure(
                f"{what}: times as fast",
                "scikit-learn's LinearRegression(positive=True), vertex by vertex",
                other / own,
                20,
                at_most=False,
                details={"seconds": own, "sklearn_seconds": other, "sample": len(sample)},
            ),
            Figure(f"{what}: largest difference, as a part of the largest weight", "the same", difference, 1e-3),
        ]
    )


if __name__ == "__main__":
    main()
