"""Exact heads with 5-fold out-of-fold predictions: time against the one product X'Y, and peak memory.

    python benchmarks/exact_heads.py --images 2000 --features 1280 --vertices 20000

Responses lie in a file, as a challenge's do. Everything is measured in this one run, the product before and after.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from featcache.challenge import Subject
from featcache.images import ImageFiles
from featcache.splits import assign_folds
from heads.config import RidgeConfig
from heads.folds import FrozenFolds
from heads.predictions import LinearFits, cross_validate
from heads.ridge import RidgeFolds


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in KiB


def make_subject(folder: Path, features: torch.Tensor, n_train: int, n_vertices: int) -> Subject:
    """Responses of planted weights plus noise, written in blocks of vertices."""
    path = folder / "training_split" / "training_fmri" / "lh_training_fmri.npy"
    path.parent.mkdir(parents=True)
    responses = np.lib.format.open_memmap(path, "w+", np.float32, (n_train, n_vertices))
    for start in range(0, n_vertices, 1000):
        block = features[:n_train] @ torch.randn(features.shape[1], min(1000, n_vertices - start)) / 30
        responses[:, start : start + 1000] = block + torch.randn_like(block)
    responses.flush()
    n_test = len(features) - n_train
    train = ImageFiles((folder,) * n_train, np.arange(n_train))
    test = ImageFiles((folder,) * n_test, np.arange(n_train, n_train + n_test))
    return Subject("subj01", folder, train, test, {"lh": n_vertices}, {"lh": {}}, {"lh": None}, {"lh": None})


def product_seconds(features: torch.Tensor, subject: Subject) -> float:
    """X'Y in the blocks that the heads use."""
    x, responses, seconds = features[: len(subject.train)].T.contiguous(), subject.responses("lh"), 0.0
    for start in range(0, responses.shape[1], 4096):
        y = torch.from_numpy(np.array(responses[:, start : start + 4096]))
        began = time.perf_counter()
        x @ y
        seconds += time.perf_counter() - began
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--test-images", type=int, default=200)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--vertices", type=int, default=20000)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        features = torch.randn(options.images + options.test_images, options.features)
        subject = make_subject(Path(folder), features, options.images, options.vertices)
        before, product = peak_gb(), [product_seconds(features, subject)]
        folds = assign_folds(subject.train.ids, 5, 0)
        began = time.perf_counter()
        solver = FrozenFolds(RidgeFolds(features[: options.images], folds, RidgeConfig()), folds)
        heads = LinearFits(solver, [features], options.images, [""])
        decomposed = time.perf_counter() - began
        cross_validate(heads, subject, "lh", lambda n: None)
        seconds = time.perf_counter() - began
        product.append(product_seconds(features, subject))
    result = vars(options) | {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "penalties": len(RidgeConfig().penalties),
        "product_seconds": [round(p, 2) for p in product],
        "heads_seconds": round(seconds, 2),
        "eigendecompositions_seconds": round(decomposed, 2),
        "times_the_product": round(seconds / (sum(product) / 2), 2),
        "peak_gb": round(peak_gb(), 2),
        "peak_gb_before": round(before, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
