"""Ten losses, both hemispheres, five folds from one cache, against one loss of them.

    PYTHONPATH=. python benchmarks/variants.py [--quick]

What is counted ends with out-of-fold and test predictions and weights in memory. The default solver has one model for
all ten, in closed form.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from exact_heads import make_subject, planted
from measure import Figure, options, paired, peak_gb, report

from featcache.dataset.subject import Subject
from featcache.machine.memory import keep_freed_memory
from heads.config import FitConfig
from heads.fit.out_of_fold import predict_surface
from heads.solvers.held_out import FoldPlan
from heads.solvers.ridge_folds import RidgeFolds

LOSSES = (
    "mse,pearson,mnnpc,mse+pearson,mse+mnnpc,pearson+mnnpc,mse+0.1*pearson,0.1*mse+pearson,0.1*pearson+mnnpc,"
    "0.1*mnnpc+pearson"
)


def fit(features: torch.Tensor, plan: FoldPlan, subject: Subject, config: FitConfig) -> None:
    """As `fit-heads` does it."""
    for variant in config.variants():
        solver = RidgeFolds(features, plan, variant.ridge)
        for surface in subject.surfaces:
            predict_surface(solver, subject, surface, lambda n: None)


def main() -> None:
    sizes = options(
        __doc__, images=(9841, 500), test_images=(159, 50), features=(2048, 100), vertices=(39548, 1000), rounds=(1, 1)
    )
    keep_freed_memory()
    torch.manual_seed(0)
    features = torch.randn(sizes.images + sizes.test_images, sizes.features)
    features *= torch.linspace(0, -2, sizes.features).exp()  # axes that differ, as those of images do
    plan = FoldPlan.of_frozen(np.arange(sizes.images), 5, 0)
    y = planted(features, sizes.images, sizes.vertices)
    size = f"{sizes.images:,} x {sizes.features:,} -> {sizes.vertices:,}, 5 folds"
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(Path(folder), (sizes.images, sizes.test_images), y, n_left=sizes.vertices * 12 // 25)
        del y
        one, ten = (FitConfig(loss=loss) for loss in ("mse", LOSSES))
        ours, theirs, ratio = paired(
            partial(fit, features, plan, subject, ten), partial(fit, features, plan, subject, one), sizes.rounds
        )
    details = {"seconds": ours, "one_seconds": theirs, "peak_gb": peak_gb()}
    report([Figure(f"ten losses, the one model that they are, {size}", "one of them", ratio, 3.0, details=details)])


if __name__ == "__main__":
    main()
