"""A thousand fits in one process: neither memory nor the number of open files grows.

    PYTHONPATH=. python benchmarks/faults/long.py [--n 1000] [--seed 0] [--parts estimator,stores]

estimator  RidgeHead().fit and predict, on other numbers each time
stores     fit_heads on stores of features, in closed form and by gradient in turn, each a new model; every tenth
           time they are blended and predict images, and the work folder is emptied of them

Each part is run n times. What is made once has been made after a fifth of the runs, or after 20. From there on memory
may grow by GROWTH, the number of threads by POOL, and the numbers of open and mapped files not at all.
"""

import argparse
import gc
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featcache.cache.extract import extract
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.machine.progress import silenced
from featcache.simulate import SimulateConfig, simulate
from featcache.workdir import Workdir
from heads.blend import uncertainty
from heads.blend.run import blend
from heads.config import AdamWConfig, BlendConfig, FitConfig
from heads.encoder.work import encoder_of_work
from heads.fit.run import fit_heads
from heads.solvers.estimator import RidgeHead

GROWTH = 32e6  # bytes: what allocators move about in a process of 10^9
POOL = 4  # threads, which a pool of a library makes when several of its calls first meet

_TREE = SimulateConfig(
    n_subjects=1, n_train=20, n_test=2, n_shared=0, n_vertices=(40, 40), image_size=16, n_reference=50, workers=1
)
_NETWORK = BackboneConfig(name="test_resnet", weights="none", size=32)


def state() -> dict[str, int]:
    """Bytes of memory, and the numbers of open files, of mapped files and of threads, of this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        "open files": len(os.listdir("/proc/self/fd")),
        "mapped files": len({line.split(maxsplit=5)[5] for line in maps if line.count(" /")}),
        "threads": len(os.listdir("/proc/self/task")),
    }


def estimator(folder: Path, rng: np.random.Generator) -> Callable[[int], None]:
    """One fit of an estimator."""

    def run(number: int) -> None:
        x = rng.standard_normal((30 + number % 3, 12)).astype(np.float32)
        y = rng.standard_normal((len(x), 5)).astype(np.float32)
        RidgeHead().fit(x, y).predict(x)

    return run


def stores(folder: Path, rng: np.random.Generator) -> Callable[[int], None]:
    """One fit of a model of a subject."""
    simulate(_TREE, folder / "challenge")
    dataset = open_challenge(folder / "challenge")
    subjects, files = dataset.subjects, Workdir(folder / "work")
    layers = LayerConfig(layers="pooled,layer4")
    extract(subjects, ExtractConfig(backbone=_NETWORK, layers=layers, workers=1, dtype="float32"), files.root)
    photo = next((folder / "challenge").rglob("train-*.png"))

    def run(number: int) -> None:
        closed = number % 2 == 0
        adamw = AdamWConfig(epochs=1)
        config = FitConfig(loss="mse" if closed else "smooth_l1", n_folds=2, seed=number, adamw=adamw)
        (fitted,) = fit_heads(subjects, config, files.root)
        assert fitted.new
        if number % 10 == 9:
            blend(dataset, BlendConfig(method="uniform", per="all"), files.root)
            encoder_of_work(subjects, files.root, None, _NETWORK, "cpu").predict([photo])
            for made in (files.predictions, files.heads):
                shutil.rmtree(made)

    return run


PARTS = {"estimator": estimator, "stores": stores}


def grown(run: Callable[[int], None], n: int) -> dict[str, int]:
    """What there is more of after n runs than after the first of them."""
    first = max(n // 5, min(n // 2, 20))  # after what every tenth run does
    for number in range(first):
        run(number)
    before = state()
    for number in range(first, n):
        run(number)
    return {what: size - before[what] for what, size in state().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="runs of each part [1000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS), help="[all]")
    given = parser.parse_args()
    uncertainty.N_PERMUTATIONS = 1
    broken = []
    for part in given.parts.split(","):
        with tempfile.TemporaryDirectory(prefix="faults-") as folder, silenced(True):
            more = grown(PARTS[part](Path(folder), np.random.default_rng(given.seed)), given.n)
        print(f"{part}, {given.n} runs: more " + ", ".join(f"{what} {size:,}" for what, size in more.items()))
        if more.pop("memory") > GROWTH or more.pop("threads") > POOL or any(size > 0 for size in more.values()):
            broken.append(part)
    print(f"tried {len(given.parts.split(','))}, grown {len(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
