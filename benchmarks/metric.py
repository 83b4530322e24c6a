"""How many times as fast as a loop of scipy.stats.pearsonr over the vertices `heads.metrics.pearson_r` is.

    python benchmarks/metric.py [--images 1968] [--vertices 39548]

Both run in this process on the same float32 matrices, and must agree. Without the package installed, set PYTHONPATH=.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import scipy
from scipy.stats import pearsonr

from heads.metrics import pearson_r

_N_ROUNDS = 9  # odd, so that the median is one of them
_MAX_DIFFERENCE = 1e-5  # scipy sums float32 matrices in float32


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def made_up(n_images: int, n_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and responses, (n_images, n_vertices) float32, whose true correlation is 0.45."""
    rng = np.random.default_rng(0)
    responses = rng.standard_normal((n_images, n_vertices), dtype=np.float32)
    predictions = rng.standard_normal((n_images, n_vertices), dtype=np.float32)
    predictions += responses * np.float32(0.5)
    return predictions, responses


def compare(predictions: np.ndarray, responses: np.ndarray) -> tuple[list[float], list[float], float]:
    """Seconds of scipy's loop over all vertices and of `pearson_r`, a pair a round, and how far apart the two are.

    In each round scipy takes its share of the vertices and `pearson_r` all of them, so that both meet the same load
    from whatever else runs.
    """
    scipy_seconds, our_seconds, difference = [], [], 0.0
    n_vertices = responses.shape[1]
    for vertices in np.array_split(np.arange(n_vertices), _N_ROUNDS):
        start = time.perf_counter()
        reference = [pearsonr(predictions[:, v], responses[:, v]).statistic for v in vertices]
        scipy_seconds.append((time.perf_counter() - start) * n_vertices / len(vertices))
        start = time.perf_counter()
        r = pearson_r(predictions, responses)
        our_seconds.append(time.perf_counter() - start)
        difference = max(difference, float(np.abs(r[vertices] - reference).max()))
    return scipy_seconds, our_seconds, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1968, help="rows; 1968 is a fifth of 9,841 training images")
    parser.add_argument("--vertices", type=int, default=39548, help="columns; 39548 are both hemispheres of a subject")
    options = parser.parse_args()
    if options.images < 2 or options.vertices < _N_ROUNDS:
        parser.error(f"needs at least 2 images and {_N_ROUNDS} vertices")

    scipy_seconds, our_seconds, difference = compare(*made_up(options.images, options.vertices))
    if difference > _MAX_DIFFERENCE:
        sys.exit(f"the two must agree to {_MAX_DIFFERENCE}, but differ by {difference}")
    ratios = [slow / fast for slow, fast in zip(scipy_seconds, our_seconds, strict=True)]
    report = {
        "benchmark": "metric",
        "n_images": options.images,
        "n_vertices": options.vertices,
        "scipy_seconds": round(median(scipy_seconds), 3),
        "pearson_r_seconds": round(median(our_seconds), 4),
        "ratio": round(median(ratios), 1),
        "ratio_lowest": round(min(ratios), 1),
        "ratio_highest": round(max(ratios), 1),
        "max_abs_difference": difference,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    print("{cpu}, {cores} cores, numpy {numpy}, scipy {scipy}".format(**report))
    print("scipy.stats.pearsonr in a loop {scipy_seconds} s, pearson_r {pearson_r_seconds} s".format(**report))
    print(f"ratio {{ratio}}, median of {_N_ROUNDS} ({{ratio_lowest}} to {{ratio_highest}})".format(**report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
