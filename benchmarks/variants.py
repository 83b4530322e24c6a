"""Ten losses, both hemispheres, five folds from one cache, against one loss of them.

    PYTHONPATH=. python benchmarks/variants.py [--quick]

Heads are fitted as `fit-heads --solver moments` does it: losses one after the other on shared axes and products. What
is counted ends with out-of-fold and test predictions and weights in memory. Under `--solver auto` the same ten losses
are one model, in closed form, and cost what one of them does.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from exact_heads import make_subject, planted
from measure import Figure, options, peak_gb, report, seconds

from featcache.challenge import Subject
from featcache.device import keep_freed_memory
from featcache.splits import assign_folds
from heads.config import FitConfig, MomentsConfig
from heads.moments import MomentFits
from heads.predictions import cross_validate

LOSSES = (
    "mse,pearson,mnnpc,mse+pearson,mse+mnnpc,pearson+mnnpc,mse+0.1*pearson,0.1*mse+pearson,0.1*pearson+mnnpc,"
    "0.1*mnnpc+pearson"
)


def fit(features: torch.Tensor, folds: np.ndarray, subject: Subject, variants: list[FitConfig]) -> None:
    shared = MomentFits(features, folds, variants[0].terms, MomentsConfig(), keep=len(variants) > 1)
    for one in variants:
        for hemisphere in subject.n_vertices:
            cross_validate(shared.with_terms(one.terms), subject, hemisphere, lambda n: None)


def main() -> None:
    sizes = options(
        __doc__, images=(9841, 500), test_images=(159, 50), features=(2048, 100), vertices=(39548, 1000), rounds=(1, 1)
    )
    keep_freed_memory()
    torch.manual_seed(0)
    features = torch.randn(sizes.images + sizes.test_images, sizes.features)
    features *= torch.linspace(0, -2, sizes.features).exp()  # axes that differ, as those of images do
    folds = assign_folds(np.arange(sizes.images), 5, 0)
    y = planted(features, sizes.images, sizes.vertices)
    variants = FitConfig(LOSSES, solver="moments").variants()
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(Path(folder), (sizes.images, sizes.test_images), y, n_left=sizes.vertices * 12 // 25)
        del y
        fit(features, folds, subject, variants[:1])
        one = min(seconds(lambda: fit(features, folds, subject, variants[:1])) for _ in range(sizes.rounds))
        ten = min(seconds(lambda: fit(features, folds, subject, variants)) for _ in range(sizes.rounds))
        peak = peak_gb()
    size = f"{sizes.images:,} x {sizes.features:,} -> {sizes.vertices:,}"
    details = {"seconds": ten, "one_seconds": one, "peak_gb": peak}
    report([Figure(f"ten losses from moments, {size}, 5 folds", "one of them", ten / one, 3.0, details=details)])


if __name__ == "__main__":
    main()
