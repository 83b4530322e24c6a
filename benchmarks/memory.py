"""Peak memory of exact heads at full size, and of several such subjects one after the other.

    PYTHONPATH=. python benchmarks/memory.py [--quick]

As `fit-heads` does it: both hemispheres' responses in files, out-of-fold and test predictions, weights on the features.
Each figure is of a process of its own; the subjects' files are the same, their fits are not.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Figure, options, peak_gb, report

from featcache.dataset.algonauts import response_files
from featcache.dataset.subject import Images, Subject
from featcache.machine.memory import give_back_memory, keep_freed_memory
from heads.config import RidgeConfig
from heads.fit.out_of_fold import predict_surface
from heads.solvers.held_out import FoldPlan
from heads.solvers.ridge_folds import RidgeFolds


def write(folder: Path, n_images: int, n_vertices: dict[str, int]) -> None:
    path = folder / "training_split" / "training_fmri"
    path.mkdir(parents=True)
    for hemisphere, n in n_vertices.items():
        values = np.random.default_rng(0).standard_normal((n_images, n), dtype=np.float32)
        np.save(path / f"{hemisphere}_training_fmri.npy", values)


def fit(folder: Path, n_images: int, n_test: int, n_features: int, n_vertices: dict[str, int]) -> None:
    """One subject, as `fit-heads` fits it."""
    train = Images((folder,) * n_images, np.arange(n_images))
    test = Images((folder,) * n_test, np.arange(n_images, n_images + n_test))
    nothing = dict.fromkeys(n_vertices)
    subject = Subject(
        "subj01", train, test, response_files(folder), n_vertices, {h: {} for h in n_vertices}, nothing, nothing
    )
    features = torch.randn(n_images + n_test, n_features)
    heads = RidgeFolds(features, FoldPlan.of_frozen(train.ids, 5, 0), RidgeConfig())
    saved = {h: predict_surface(heads, subject, h, lambda n: None)[1] for h in n_vertices}
    assert all(saved.values())


def main() -> None:
    if sys.argv[1:2] == ["--fit"]:
        keep_freed_memory()
        how_often, sizes = json.loads(sys.argv[2])
        for _ in range(how_often):
            fit(Path(sys.argv[3]), *sizes)
            give_back_memory()
        print(peak_gb())
        return
    sizes = options(
        __doc__, images=(9841, 400), test_images=(159, 40), features=(2048, 64), vertices=(39548, 600), subjects=(8, 2)
    )
    left = round(sizes.vertices * 19_004 / 39_548)
    n_vertices = {"lh": left, "rh": sizes.vertices - left}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), sizes.images, n_vertices)

        def peak(how_often: int) -> float:
            given = json.dumps([how_often, [sizes.images, sizes.test_images, sizes.features, n_vertices]])
            done = subprocess.run(
                [sys.executable, __file__, "--fit", given, folder], check=True, capture_output=True, text=True
            )
            return float(done.stdout)

        one, several = peak(1), peak(sizes.subjects)
    what = f"exact heads, {sizes.images:,} x {sizes.features:,} -> {sizes.vertices:,}"
    report(
        [
            Figure(f"{what}: peak memory, 10^9 bytes", "nothing: it is no ratio", one, 5),
            Figure(f"{sizes.subjects} such subjects, one after the other: peak memory", "one's", several / one, 1.1),
        ]
    )


if __name__ == "__main__":
    main()
