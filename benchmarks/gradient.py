"""Heads trained by gradient against two matrix products a step, at the most that this machine multiplies.

    PYTHONPATH=. python benchmarks/gradient.py [--quick]

One epoch of the loop that `fit-heads --solver adamw` runs, on one hemisphere, under the default loss: with few images
in a batch the optimiser's passes over weights and moments, which are the same for any batch, are most of a step.
"""

import math
from functools import partial

import numpy as np
import torch
from measure import Figure, options, paired, report, seconds

from featcache.machine.memory import keep_freed_memory
from heads.config import AdamWConfig, FitConfig
from heads.modules.linear import LinearHead
from heads.scores.losses import weighted_sum
from heads.solvers.gradient import Task, train_head

BATCHES = (128, 256, 512, 1024)


def products(rows: torch.Tensor, weights: torch.Tensor, predictions: torch.Tensor) -> None:
    """One product forward and one back, of as many rows as there are."""
    torch.mm(rows, weights, out=predictions)
    rows.T @ predictions


def main() -> None:
    sizes = options(
        __doc__, images=(4096, 512), stop=(128, 32), features=(2048, 64), vertices=(20544, 500), rounds=(3, 1)
    )
    keep_freed_memory()
    torch.manual_seed(0)
    features = torch.randn(sizes.images + sizes.stop, sizes.features)
    responses = torch.randn(sizes.images + sizes.stop, sizes.vertices)
    rows = np.arange(sizes.images + sizes.stop)
    task = Task(
        features, responses, rows[: sizes.images], [rows[sizes.images :]], np.linspace(0, 1, sizes.vertices, dtype="f4")
    )
    head, loss = LinearHead(sizes.features, sizes.vertices), weighted_sum(FitConfig().terms)
    many = features[: sizes.images]
    both = partial(
        products, many, torch.randn(sizes.features, sizes.vertices), many.new_empty(len(many), sizes.vertices)
    )
    both()
    peak = min(seconds(both) for _ in range(3))  # the machine's best: what is measured against does not get slower
    figures, size = [], f"{sizes.features:,} features -> {sizes.vertices:,} vertices"
    for batch in BATCHES:
        config = AdamWConfig(epochs=1, batch_size=batch)
        ours, theirs, _ = paired(partial(train_head, head, [task], loss, config), both, sizes.rounds)
        details = {"seconds": ours, "products_seconds": min(peak, theirs), "steps": math.ceil(sizes.images / batch)}
        figures.append(
            Figure(
                f"an epoch of heads trained by gradient, {size}, {batch} images a step",
                "two products a step at this machine's best",
                min(peak, theirs) / ours,
                0.7,
                at_most=False,
                details=details,
            )
        )
    report(figures)


if __name__ == "__main__":
    main()
