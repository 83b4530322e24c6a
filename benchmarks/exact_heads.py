"""Exact heads of a full-size subject against the one product X'Y that no method can avoid, and their peak memory.

    PYTHONPATH=. python benchmarks/exact_heads.py [--quick]

Once as one fit of all images, and once as `fit-heads` does it: five folds, out-of-fold and test predictions, responses
in a file. The product is of matrices that are in memory.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import Figure, options, paired, peak_gb, report

from featcache.dataset.algonauts import response_files
from featcache.dataset.subject import Images, Subject
from featcache.machine.memory import keep_freed_memory
from heads.config import RidgeConfig
from heads.fit.out_of_fold import predict_surface
from heads.solvers.estimator import RidgeHead
from heads.solvers.held_out import FoldPlan
from heads.solvers.ridge import VERTEX_BLOCK
from heads.solvers.ridge_folds import RidgeFolds

PENALTIES = tuple(float(10 ** (k / 3)) for k in range(-14, 16))


def make_subject(
    folder: Path, n_images: tuple[int, int], responses: torch.Tensor, n_left: int | None = None
) -> Subject:
    """A subject whose responses are in files: all vertices in one hemisphere, or `n_left` of them in the left one."""
    fmri = folder / "training_split" / "training_fmri"
    fmri.mkdir(parents=True)
    halves = {"lh": responses} if n_left is None else {"lh": responses[:, :n_left], "rh": responses[:, n_left:]}
    for hemisphere, values in halves.items():
        np.save(fmri / f"{hemisphere}_training_fmri.npy", values.numpy())
    n_train, n_test = n_images
    train = Images((folder,) * n_train, np.arange(n_train))
    test = Images((folder,) * n_test, np.arange(n_train, n_train + n_test))
    none = dict.fromkeys(halves)
    n_vertices = {hemisphere: values.shape[1] for hemisphere, values in halves.items()}
    return Subject("subj01", train, test, response_files(folder), n_vertices, {h: {} for h in halves}, none, none)


def planted(features: torch.Tensor, n_train: int, n_vertices: int) -> torch.Tensor:
    """(n_train, n_vertices) responses of planted weights, plus as much noise."""
    responses = torch.empty(n_train, n_vertices)
    for block in responses.split(VERTEX_BLOCK, dim=1):
        weights = torch.randn(features.shape[1], block.shape[1]) / features.shape[1] ** 0.5
        torch.addmm(torch.randn(block.shape), features[:n_train], weights, out=block)
    return responses


def product(features: torch.Tensor, responses: torch.Tensor) -> None:
    """X'Y, in the blocks that the heads use: no slower than in one."""
    for block in responses.split(VERTEX_BLOCK, dim=1):
        features.T @ block


def fold_by_fold(features: torch.Tensor, plan: FoldPlan, subject: Subject, save: bool) -> None:
    heads = RidgeFolds(features, plan, RidgeConfig(penalties=PENALTIES), save=save)
    predict_surface(heads, subject, "lh", lambda n: None)


def main() -> None:
    sizes = options(
        __doc__, images=(9841, 600), test_images=(159, 60), features=(2048, 128), vertices=(39548, 3000), rounds=(3, 1)
    )
    keep_freed_memory()
    torch.manual_seed(0)
    features = torch.randn(sizes.images + sizes.test_images, sizes.features)
    x, n_images = features[: sizes.images], (sizes.images, sizes.test_images)
    y = planted(features, sizes.images, sizes.vertices)
    plan = FoldPlan.of_frozen(np.arange(sizes.images), 5, 0)
    once = partial(product, x, y)
    once()
    details = {key: value for key, value in vars(sizes).items() if key != "quick"} | {"penalties": len(PENALTIES)}
    size = f"{sizes.images:,} x {sizes.features:,} -> {sizes.vertices:,}, {len(PENALTIES)} penalties"
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(Path(folder), n_images, y)
        runs = [
            (f"exact heads, {size}, per vertex", lambda: RidgeHead(PENALTIES).fit(x, y).weights_, 1.6),
            (
                "the same, with 5-fold out-of-fold and test predictions",
                partial(fold_by_fold, features, plan, subject, False),
                4.0,
            ),
            (
                "and with weights on the features to save, as fit-heads does",
                partial(fold_by_fold, features, plan, subject, True),
                None,
            ),
        ]
        for what, run, target in runs:
            ours, theirs, ratio = paired(run, once, sizes.rounds)
            gflops = 2e-9 * sizes.images * sizes.features * sizes.vertices / theirs
            measured = {"seconds": ours, "product_seconds": theirs, "product_gflops": gflops, "peak_gb": peak_gb()}
            figures.append(Figure(what, "the one product X'Y", ratio, target, details=details | measured))
    report(figures)


if __name__ == "__main__":
    main()
