"""How many times as fast as a loop of scipy.stats.pearsonr over the vertices `heads.scores.metrics.pearson_r` is.

    PYTHONPATH=. python benchmarks/metric.py [--quick]

Both run in this process on the same float32 matrices, and must agree.
"""

import sys
import time
from statistics import median

import numpy as np
import scipy
from measure import Figure, options, report, seconds
from scipy.stats import pearsonr

from heads.scores.metrics import pearson_r

_N_ROUNDS = 9  # odd, so that the median is one of them
_MAX_DIFFERENCE = 1e-5  # scipy sums float32 matrices in float32


def made_up(n_images: int, n_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and responses, (n_images, n_vertices) float32, whose true correlation is 0.45."""
    rng = np.random.default_rng(0)
    responses = rng.standard_normal((n_images, n_vertices), dtype=np.float32)
    predictions = rng.standard_normal((n_images, n_vertices), dtype=np.float32)
    predictions += responses * np.float32(0.5)
    return predictions, responses


def in_a_loop(predictions: np.ndarray, responses: np.ndarray) -> tuple[float, list[float]]:
    """(seconds, r) of scipy, a vertex of the predictions at a time."""
    began = time.perf_counter()
    r = [pearsonr(predictions[:, v], responses[:, v]).statistic for v in range(predictions.shape[1])]
    return time.perf_counter() - began, r


def main() -> None:
    sizes = options(__doc__, images=(1968, 200), vertices=(39548, 900))
    predictions, responses = made_up(sizes.images, sizes.vertices)
    slow, fast, reading = [], [], []
    # in each round scipy takes its share of the vertices and `pearson_r` all of them, so that both meet the same load
    for vertices in np.array_split(np.arange(sizes.vertices), _N_ROUNDS):
        took, reference = in_a_loop(predictions[:, vertices[0] : vertices[-1] + 1], responses[:, vertices[0] :])
        slow.append(took * sizes.vertices / len(vertices))
        fast.append(seconds(lambda: pearson_r(predictions, responses)))
        reading.append(seconds(lambda: (predictions.sum(), responses.sum())))
        difference = float(np.abs(pearson_r(predictions, responses)[vertices] - reference).max())
        if difference > _MAX_DIFFERENCE:
            sys.exit(f"the two must agree to {_MAX_DIFFERENCE}, but differ by {difference}")
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    details = {"seconds": median(fast), "scipy_seconds": median(slow), "lowest": min(ratios), "highest": max(ratios)}
    what = f"Pearson r, {sizes.images:,} x {sizes.vertices:,}"
    versions = {"scipy": scipy.__version__}
    report(
        [
            Figure(
                f"{what}: times as fast",
                "scipy.stats.pearsonr in a loop",
                median(ratios),
                300,
                False,
                details=details | versions,
            ),
            Figure(what, "NumPy's sum of both matrices: what reading them takes", median(fast) / median(reading)),
        ]
    )


if __name__ == "__main__":
    main()
