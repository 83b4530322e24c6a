"""Numbers at the ends: features and responses of every scale, through the estimators and through fit-heads and blend.

    PYTHONPATH=. python benchmarks/faults/scales.py [--n 240] [--seed 0] [--only estimators,heads]

Each case is a random subject whose features or responses are changed: times a power of ten, a column of another scale,
a column of large noise, images that are all alike, a mean that is much larger than the variation, one huge value. What
comes out is compared with ridge regression in float64 of the subject as it was (estimators), or with the same heads
fitted to it (fit-heads). A case is right, or refused by one line that names what to change. Prints how many cases were
right, refused, silently wrong or ended in any other error; the exit code is 1 where there is any of the last two.
"""

import argparse
import itertools
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

import featcache as fc
from featcache.cache.store import open_store
from featcache.config import POOLED, MadeConfig
from featcache.errors import FeatcacheError
from featcache.machine.tensors import as_float32
from heads.config import AdamWConfig, CoreConfig
from heads.fit.run import fit_heads

TOLERANCE = 0.03  # of mean r on test images
N_TRAIN, N_TEST, N_COLUMNS, N_VERTICES = 160, 80, 12, 6
NOISE = 0.5


@dataclass(frozen=True)
class Material:
    """Features of all images and responses, float64."""

    features: np.ndarray
    responses: np.ndarray


def planted(seed: int) -> Material:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(N_TRAIN + N_TEST, N_COLUMNS))
    signal = features @ rng.normal(size=(N_COLUMNS, N_VERTICES)) / N_COLUMNS**0.5
    return Material(features, signal + NOISE * rng.normal(size=signal.shape))


def with_columns(material: Material, columns: Any, change: Callable[[np.ndarray], np.ndarray]) -> Material:
    features = material.features.copy()
    features[:, columns] = change(features[:, columns])
    return Material(features, material.responses)


def _noise_column(material: Material, scale: float) -> Material:
    noise = np.random.default_rng(9).normal(size=(len(material.features), 1))
    return Material(np.hstack([material.features, scale * noise]), material.responses)


def _one_value(material: Material, row: int, value: float) -> Material:
    features = material.features.copy()
    features[row, 0] = value
    return Material(features, material.responses)


def _alike(material: Material, rounding: float) -> Material:
    rng = np.random.default_rng(9)
    features = np.ones_like(material.features) * rng.normal(size=N_COLUMNS)
    return Material(features * (1 + rounding * rng.normal(size=features.shape)), material.responses)


# name: the change, and what comes of it: 'same' scores as before; those 'without column 0', which is lost; 'none':
# predictions that say nothing, near the mean; 'far': one image alone is predicted far away, as a linear map does
CASES: dict[str, tuple[Callable[[Material], Material], str]] = {
    **{
        f"features times {s:g}": (lambda m, s=s: Material(m.features * s, m.responses), "same")
        for s in (1e-30, 1e-24, 1e-12, 1e-6, 1e-3, 1e3, 1e6, 1e12, 1e18, 1e30)
    },
    "features near the largest float32": (lambda m: Material(m.features / 5 * 3e38, m.responses), "same"),
    **{
        f"responses times {s:g}": (lambda m, s=s: Material(m.features, m.responses * s), "same")
        for s in (1e-30, 1e-18, 1e-9, 1e-4, 1e4, 1e9, 1e18, 1e30, 3e37)
    },
    **{
        f"column 0 times {s:g}": (lambda m, s=s: with_columns(m, [0], lambda x: x * s), "same")
        for s in (1e2, 1e3, 1e4, 1e6, 1e12, 1e18, 1e30)
    },
    **{
        f"half of the columns times {s:g}": (lambda m, s=s: with_columns(m, slice(0, None, 2), lambda x: x * s), "same")
        for s in (1e2, 1e4, 1e8)
    },
    **{
        f"a column of noise times {s:g}": (lambda m, s=s: _noise_column(m, s), "same")
        for s in (1e2, 1e3, 1e5, 1e10, 1e20, 1e30)
    },
    "features with a mean of 1e4": (lambda m: Material(m.features + 1e4, m.responses), "same"),
    "responses with a mean of 1e4": (lambda m: Material(m.features, m.responses + 1e4), "same"),
    "one training value of 1e30": (lambda m: _one_value(m, 3, 1e30), "without column 0"),
    "one training value of 1e6": (lambda m: _one_value(m, 3, 1e6), "without column 0"),
    "one test value of 1e30": (lambda m: _one_value(m, N_TRAIN + 3, 1e30), "far"),
    "all images alike": (lambda m: _alike(m, 0), "none"),
    "all images alike but for rounding": (lambda m: _alike(m, 3e-8), "none"),
}


def mean_r(predictions: np.ndarray, responses: np.ndarray) -> float:
    p, y = (values - values.mean(0) for values in (np.float64(predictions), np.float64(responses)))
    p, y = (values / np.maximum(np.abs(values).max(0), np.finfo(float).tiny) for values in (p, y))
    return float(np.mean((p * y).sum(0) / np.maximum(np.sqrt((p * p).sum(0) * (y * y).sum(0)), 1e-300)))


def fault_of(predictions: np.ndarray, changed: Material, wanted: str, r_before: float) -> str:
    """What is wrong with predictions of the test images; '' where nothing is."""
    responses, train = changed.responses[N_TRAIN:], changed.responses[:N_TRAIN]
    if not np.isfinite(predictions).all():
        return "not finite"
    unit = train.std(0)
    z = (np.float64(predictions) - train.mean(0)) / unit
    if wanted == "far":  # what is extrapolated is far away for the one image alone
        z, predictions, responses = (np.delete(values, 3, 0) for values in (z, predictions, responses))
    if np.abs(z).max() > 20:
        return f"{np.abs(z).max():.2g} standard deviations of the responses away"
    if wanted == "none":
        return "" if np.abs(z).max() < 1 else f"says {np.abs(z).max():.2g} standard deviations of nothing"
    r = mean_r(predictions, responses)
    if r < r_before - TOLERANCE:
        return f"r {r:.3f}, {r_before:.3f} before"
    size = float(np.median(z.std(0)))
    return "" if 0.3 < size < 2 else f"{size:.2g} standard deviations of the responses"


@dataclass
class Tally:
    counts: Counter[str]

    def add(self, what: str, call: Callable[[], str]) -> None:
        """Count one case. call : its fault, '' where it is right"""
        self.counts["tried"] += 1
        said = StringIO()
        try:
            with redirect_stderr(said), redirect_stdout(said):
                fault = call()
        except (FeatcacheError, ValueError) as error:
            text = str(error)
            named = isinstance(error, FeatcacheError) or text.startswith("Input ")  # scikit-learn's words
            outcome = "refused" if named and "\n" not in text.strip() else "other errors"
            self.counts[outcome] += 1
            print(f"{outcome:12} {what}: {text}", flush=True)
            return
        except Exception:  # what is counted
            self.counts["other errors"] += 1
            print(f"{'other errors':12} {what}: {traceback.format_exc()}", flush=True)
            return
        self.counts["silent" if fault else "right"] += 1
        if fault:
            print(f"{'silent':12} {what}: {fault}", flush=True)


ESTIMATORS: dict[str, Callable[[], Any]] = {
    "RidgeHead loo": lambda: fc.RidgeHead(selection="loo"),
    "RidgeHead gcv": lambda: fc.RidgeHead(selection="gcv"),
    "KernelHead": fc.KernelHead,
    "BandedRidge": fc.BandedRidge,
}


def reference(material: Material) -> np.ndarray:
    """Test predictions of ridge regression in float64, all vertices under one middling penalty."""
    train = material.features[:N_TRAIN]
    x = (material.features - train.mean(0)) / np.maximum(train.std(0), 1e-12)
    y = material.responses[:N_TRAIN]
    gram = x[:N_TRAIN].T @ x[:N_TRAIN] + 2 * np.eye(x.shape[1])
    return x[N_TRAIN:] @ np.linalg.solve(gram, x[:N_TRAIN].T @ (y - y.mean(0))) + y.mean(0)


def estimator_cases(tally: Tally, n: int, seed: int) -> None:
    grid = itertools.cycle(itertools.product(CASES, ESTIMATORS, (np.float32, np.float64)))
    for number, (case, name, dtype) in zip(range(n), grid, strict=False):
        material = planted(seed + number)
        change, wanted = CASES[case]
        known = with_columns(material, [0], np.zeros_like) if wanted == "without column 0" else material
        before = mean_r(reference(known), material.responses[N_TRAIN:])
        changed = change(material)

        def call(name: str = name, dtype: Any = dtype, changed: Material = changed, wanted: str = wanted,
                 before: float = before) -> str:  # fmt: skip
            with np.errstate(over="ignore"):
                x, y = changed.features.astype(dtype), changed.responses.astype(dtype)
            head = ESTIMATORS[name]().fit(x[:N_TRAIN], y[:N_TRAIN])
            return fault_of(head.predict(x[N_TRAIN:]), changed, wanted, before)

        tally.add(f"{name} {np.dtype(dtype).name}, {case}", call)


_QUICK = AdamWConfig(epochs=40, batch_size=20, learning_rate=0.01)
HEADS: dict[str, tuple[dict[str, Any], bool]] = {  # settings, and whether on maps
    "ridge": ({"loss": "mse"}, False),
    "ridge on layers": ({"loss": "mse"}, True),
    "adamw mse": ({"loss": "mse", "solver": "adamw"}, False),
    "adamw pearson": ({"loss": "pearson", "solver": "adamw"}, False),
    "roi": ({"loss": "pearson", "head": "roi"}, False),
    "spatial": ({"loss": "mse", "head": "spatial", "solver": "adamw"}, True),
    "core": ({"loss": "mse", "head": "core", "solver": "adamw", "core": CoreConfig(members=1)}, True),
}


def fitted(work: Path, material: Material, head: str) -> np.ndarray:
    """Test predictions of heads that go the whole way: import, add-features, fit-heads, blend."""
    settings, maps = HEADS[head]
    work.mkdir(parents=True)
    x = material.features
    n_train = N_TRAIN
    pictures = np.random.default_rng(5).integers(0, 256, (len(x), 8, 8, 3), dtype=np.uint8)
    for part, rows in (("train", slice(0, n_train)), ("test", slice(n_train, None))):
        np.save(work / f"{part}.npy", pictures[rows])
    dataset = fc.Dataset.from_arrays(
        str(work / "train.npy"),
        {"lh": material.responses[:n_train].astype(np.float32)},
        test_images=str(work / "test.npy"),
        test_responses={"lh": material.responses[n_train:].astype(np.float32)},
        noise_ceiling={"lh": np.full(material.responses.shape[1], 0.8, np.float32)},
        rois={"lh": {"V1": np.arange(material.responses.shape[1]) < 3}},
        work=work,
    )
    (subject,) = dataset.subjects
    arrays = {POOLED: x.astype(np.float32)}
    if maps:
        arrays = {"low": np.repeat(x[:, None, None], 2, 1).repeat(2, 2).astype(np.float32), **arrays}
    np.savez(work / "features.npz", **arrays)
    np.save(work / "ids.npy", subject.image_ids)
    made = MadeConfig(features=str(work / "features.npz"), ids=work / "ids.npy", name="planted")
    fc.add_features([subject], made, work)
    config = fc.FitConfig(n_folds=3, **{"adamw": _QUICK} | settings)
    (fit,) = fit_heads([subject], config, work)
    fc.blend(dataset, fc.BlendConfig(), work)
    store = open_store(fit.path)
    return as_float32(store.read("lh", store.n_train))


def head_cases(tally: Tally, n: int, seed: int) -> None:
    material = planted(seed)
    before: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        grid = itertools.product(HEADS, CASES)
        works = (Path(folder) / str(number) for number in itertools.count())
        for _, (head, case) in zip(range(n), _spread(list(grid), seed), strict=False):
            if head not in before:
                with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
                    before[head] = mean_r(fitted(next(works), material, head), material.responses[N_TRAIN:])
            change, wanted = CASES[case]
            changed = change(material)

            def call(head: str = head, changed: Material = changed, wanted: str = wanted) -> str:
                with np.errstate(over="ignore"):
                    return fault_of(fitted(next(works), changed, head), changed, wanted, before[head])

            tally.add(f"fit-heads {head}, {case}", call)
    print("before       " + ", ".join(f"{head} r {r:.3f}" for head, r in before.items()))


def _spread(cases: list[Any], seed: int) -> Iterator[Any]:
    yield from (cases[number] for number in np.random.default_rng(seed).permutation(len(cases)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=10_000, help="cases of each part, at most; the grid ends by itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="estimators,heads")
    options = parser.parse_args()
    tally = Tally(Counter(tried=0, right=0, refused=0, silent=0))
    if "estimators" in options.only:
        estimator_cases(tally, min(options.n, len(CASES) * len(ESTIMATORS) * 2), options.seed)
    if "heads" in options.only:
        head_cases(tally, options.n, options.seed)
    print(", ".join(f"{what} {n}" for what, n in tally.counts.items()))
    return 1 if tally.counts["silent"] or tally.counts["other errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
