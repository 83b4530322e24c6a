"""How cost grows with images, features, vertices and models: the exponent of a power law through the upper sizes.

PYTHONPATH=. python benchmarks/growth.py [--quick]
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from measure import Figure, options, report, seconds

from featcache.machine.memory import keep_freed_memory
from heads.blend.products import Products
from heads.blend.weights import Groups, Judge, stacked
from heads.solvers.estimator import RidgeHead


def heads(n_images: int, n_features: int, n_vertices: int) -> Callable[[], object]:
    x, y = torch.randn(n_images, n_features), torch.randn(n_images, n_vertices)
    return lambda: RidgeHead(selection="gcv").fit(x, y).weights_  # the exact error is for few images


def blend(n_models: int, n_vertices: int) -> Callable[[], object]:
    """Stacked weights of every vertex from products of models that share a signal."""
    rng = np.random.default_rng(0)
    sums = np.zeros((n_vertices, n_models + 2, n_models + 2))
    sums[:, :-2, :-2] = 100 + 100 * np.eye(n_models)
    sums[:, :-2, -2] = sums[:, -2, :-2] = 60 + 10 * rng.random((n_vertices, n_models))
    sums[:, -2:, -2:] = 200 * np.eye(2)
    judge = Judge(np.ones(n_vertices), np.full(n_vertices, True))
    each = Groups(np.arange(n_vertices), n_vertices)
    return lambda: stacked(Products(sums[None]).total(), each, judge)


def curve(what: str, theory: str, sizes: Sequence[int], make: Callable[[int], Callable[[], object]]) -> Figure:
    points = []
    for size in sizes:
        run = make(size)
        run()
        points.append((size, min(seconds(run) for _ in range(3))))
    upper = np.log(np.array(points[len(points) // 2 - 1 :]))
    exponent = float(np.polyfit(upper[:, 0], upper[:, 1], 1)[0])
    return Figure(f"{what}, {sizes[0]:,} to {sizes[-1]:,}", theory, exponent, details={"points": points})


def main() -> None:
    sizes = options(__doc__, scale=(8, 1))
    keep_freed_memory()
    torch.manual_seed(0)
    k = sizes.scale
    doubling = [1, 2, 4, 8]
    report(
        [
            curve(
                "seconds by images, exact heads",
                "1: X'X and X'Y; the eigenvectors and weights cost the same for all",
                [n * k * 300 for n in doubling],
                lambda n: heads(n, 32 * k, 512 * k),
            ),
            curve(
                "seconds by features, exact heads",
                "1 for X'Y, 2 for weights, 3 for eigenvectors",
                [n * k * 32 for n in doubling],
                lambda d: heads(1200 * k, d, 512 * k),
            ),
            curve(
                "seconds by vertices, exact heads",
                "1, above the cost of the eigenvectors",
                [n * k * 256 for n in doubling],
                lambda v: heads(600 * k, 64 * k, v),
            ),
            curve(
                "seconds by models, stacked weights per vertex",
                "2 for sums, up to 3 for the systems that are solved",
                [n * 5 for n in doubling],
                lambda m: blend(m, 1000 * k),
            ),
        ]
    )


if __name__ == "__main__":
    main()
