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

from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject
from featcache.machine.memory import keep_freed_memory
from heads.config import FitConfig
from heads.solvers.base import FoldPredictor, cross_validate
from heads.solvers.moments import MomentFits
from heads.solvers.ridge_folds import RidgeFits

LOSSES = (
    "mse,pearson,mnnpc,mse+pearson,mse+mnnpc,pearson+mnnpc,mse+0.1*pearson,0.1*mse+pearson,0.1*pearson+mnnpc,"
    "0.1*mnnpc+pearson"
)


def fit(features: torch.Tensor, folds: np.ndarray, subject: Subject, config: FitConfig) -> None:
    """As `fit-heads` does it."""
    variants = config.variants()
    heads: list[FoldPredictor]
    if config.solver == "moments":
        shared = MomentFits(features, folds, variants[0].terms, config.moments, keep=len(variants) > 1)
        heads = [shared.with_terms(one.terms) for one in variants]
    else:
        heads = [RidgeFits(features, folds, one.ridge) for one in variants]
    for one in heads:
        for hemisphere in subject.n_vertices:
            cross_validate(one, subject, hemisphere, lambda n: None)


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
    size = f"{sizes.images:,} x {sizes.features:,} -> {sizes.vertices:,}, 5 folds"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(Path(folder), (sizes.images, sizes.test_images), y, n_left=sizes.vertices * 12 // 25)
        del y
        for solver, what in (("auto", "the one model that they are"), ("moments", "a model each")):
            one, ten = (FitConfig(loss=loss, solver=solver) for loss in ("mse", LOSSES))
            ours, theirs, ratio = paired(
                partial(fit, features, folds, subject, ten), partial(fit, features, folds, subject, one), sizes.rounds
            )
            details = {"seconds": ours, "one_seconds": theirs, "peak_gb": peak_gb()}
            found.append(Figure(f"ten losses, {what}, {size}", "one of them", ratio, 3.0, details=details))
    report(found)


if __name__ == "__main__":
    main()
