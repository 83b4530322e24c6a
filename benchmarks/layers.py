"""Closed-form heads on several layers against himalaya: the same features, folds, penalties and threads, one process.

    python benchmarks/layers.py --data TREE --work WORK --subjects 1,6 --threads 1
    python benchmarks/layers.py --synthetic 400 4 7 32 500    (images, layers, side of the grid, channels, vertices)

himalaya must be installed. WORK holds extracted layers with places. Every method is scored by r of the out-of-fold
predictions of 5 folds by image id, the folds' predictions set to one level and scale; himalaya chooses by 5-fold
cross-validation within the training images of each. Seconds run from features in memory to these predictions; ours
include the test images' predictions and the weights. himalaya gets what makes it faster at the same result: kernels
computed once for all folds, data centred once for each, and groups rotated to no more columns than images.

Seconds are of the clock; on a shared machine compare cpu_seconds. added_gb is the most memory above what the process
held before the method.
"""

import argparse
import ctypes
import gc
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import himalaya
import numpy as np
import torch
from himalaya.backend import set_backend
from himalaya.kernel_ridge import KernelRidgeCV, MultipleKernelRidgeCV
from himalaya.ridge import GroupRidgeCV, RidgeCV
from sklearn.model_selection import KFold
from threadpoolctl import threadpool_limits

from featcache.cache.store import Row, Store, create_store
from featcache.config import POOLED
from featcache.dataset.algonauts import response_files
from featcache.dataset.open import open_dataset
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Images, Subject
from featcache.machine.memory import keep_freed_memory
from heads.config import RidgeConfig
from heads.features.rows import LayerRows
from heads.features.sets import feature_sets
from heads.fit.out_of_fold import predict_surface
from heads.scores.metrics import pearson_r
from heads.solvers.base import Piece, Solver, comparable, mean_and_std
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import DEPTHS, Prior, prior_set
from heads.solvers.layers.ridge import PENALTIES as OUR_PENALTIES
from heads.solvers.layers.ridge import LayeredRidge, scaled_kernels
from heads.solvers.ridge import eigh_of
from heads.solvers.ridge_folds import RidgeFolds

N_FOLDS = INNER_FOLDS = 5
PENALTIES = RidgeConfig().penalties
REFERENCE = "ours: layers, set of priors"
BATCH_BYTES = 1e9  # of himalaya's matrices of several penalties
TARGETS_BATCH = 2048


@dataclass(frozen=True)
class Case:
    """One subject. responses : (n_train, n_vertices) float32 of all hemispheres; folds : (n_train,)"""

    subject: Subject
    store: Store
    arrays: tuple[str, ...]
    rows: LayerRows
    responses: torch.Tensor
    folds: np.ndarray

    def reading(self, *arrays: str) -> LayerRows:
        return LayerRows(self.store, arrays, "cpu", np.inf)


# A method of himalaya: rows to train on, their centred responses -> predictions of all training images, centred.
Fit = Callable[[np.ndarray, torch.Tensor], Any]


def case_of(subject: Subject, store: Store, arrays: tuple[str, ...]) -> Case:
    responses = np.concatenate([np.asarray(subject.responses(h), np.float32) for h in subject.n_vertices], 1)
    folds = assign_folds(subject.train.ids, N_FOLDS, 0)
    rows = LayerRows(store, arrays, "cpu", np.inf)
    return Case(subject, store, arrays, rows, torch.from_numpy(responses), folds)


def real_cases(options: argparse.Namespace) -> Iterator[Case]:
    for subject in open_dataset(options.data).select(options.subjects):
        sets = [one for one in feature_sets(subject, options.work) if one.has_places and not one.backbone_trained]
        if not sets:
            raise SystemExit(f"{options.work}: no layers with places of {subject.name}; extract with --layers")
        yield case_of(subject, sets[0].stores[0], sets[0].names)


def synthetic_case(folder: Path, n_images: int, n_layers: int, side: int, n_channels: int, n_vertices: int) -> Case:
    """Smooth maps of a few hidden channels in each layer; a vertex sees one layer through a window."""
    rng = np.random.default_rng(0)
    n_all, names = n_images + n_images // 5, [f"layer{number}" for number in range(n_layers)]
    values = {name: smooth_maps(rng, n_all, side, n_channels) for name in names}
    values[POOLED] = values[names[-1]].mean((1, 2))
    arrays = {name: Row(one.shape[1:], str(one.dtype)) for name, one in values.items()}
    store = create_store(folder / "features", "synthetic", {}, np.arange(n_all), n_images, arrays, {})
    store.append(values)
    signal = np.stack([seen_by_one(rng, values[names[v % n_layers]][:n_images]) for v in range(n_vertices)], 1)
    noise = rng.standard_normal(signal.shape)
    path = folder / "training_split" / "training_fmri" / "lh_training_fmri.npy"
    path.parent.mkdir(parents=True)
    np.save(path, (signal / signal.std(0) + 2 * noise).astype(np.float32))
    train = Images((folder,) * n_images, np.arange(n_images))
    test = Images((folder,) * (n_all - n_images), np.arange(n_images, n_all))
    subject = Subject(
        "subj01", train, test, response_files(folder), {"lh": n_vertices}, {"lh": {}}, {"lh": None}, {"lh": None}
    )
    return case_of(subject, store, tuple(values))


def smooth_maps(rng: np.random.Generator, n_images: int, side: int, n_channels: int) -> np.ndarray:
    """(n_images, side, side, n_channels) float32"""
    apart = np.subtract.outer(np.arange(side), np.arange(side))
    blur = np.exp(-(apart**2) / 2.0)
    hidden = np.einsum("hi,wj,nijc->nhwc", blur, blur, rng.standard_normal((n_images, side, side, 8)), optimize=True)
    mixed = hidden @ rng.standard_normal((8, n_channels))
    return (mixed + mixed.std() * rng.standard_normal(mixed.shape)).astype(np.float32)


def seen_by_one(rng: np.random.Generator, maps: np.ndarray) -> np.ndarray:
    """(n_images,) what a vertex sees of maps: a few channels through a window at a random place."""
    window = Prior(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), 0.16).window((maps.shape[1], maps.shape[2]))
    return np.tensordot(window, maps.reshape(len(maps), len(window), -1), (0, 1)) @ rng.standard_normal(maps.shape[-1])


def out_of_fold(solver: Solver, case: Case) -> np.ndarray:
    """Predictions of all surfaces, (n_train, n_vertices)."""
    surfaces = [predict_surface(solver, case.subject, name, lambda n: None)[0] for name in case.subject.surfaces]
    return np.concatenate(surfaces, 1)[: len(case.folds)]


def plan_of(case: Case) -> FoldPlan:
    """The folds that everybody fits without."""
    ids = case.subject.train.ids
    return FoldPlan(image_ids=ids, folds=case.folds, held_out=tuple(range(N_FOLDS)), backbone_trained=False)


def own_pooled(case: Case) -> np.ndarray:
    return out_of_fold(RidgeFolds(case.reading(POOLED).dense(), plan_of(case), RidgeConfig()), case)


def own_layers(case: Case, priors: list[Prior]) -> np.ndarray:
    """As heads.fit.run does it."""
    kernels, subject = scaled_kernels([case.rows], plan_of(case)), case.subject
    responses = {name: subject.responses(name) for name in subject.surfaces}
    config = RidgeConfig(penalties=OUR_PENALTIES)
    return out_of_fold(LayeredRidge(kernels, plan_of(case), config, priors, responses), case)


def of_folds(case: Case, fit: Fit) -> np.ndarray:
    """(n_train, n_vertices) out-of-fold predictions, of one level and scale over folds, as ours are."""
    pieces = []
    for k in range(N_FOLDS):
        train, held_out = np.flatnonzero(case.folds != k), np.flatnonzero(case.folds == k)
        level = case.responses[train].mean(0)
        predictions = torch.as_tensor(fit(train, case.responses[train] - level)) + level
        pieces.append(Piece(held_out, predictions[held_out], *mean_and_std(predictions[train])))
    together = np.empty(case.responses.shape, np.float32)
    for piece, values in zip(pieces, comparable(pieces, case.responses.mean(0)), strict=True):
        together[piece.rows] = values
    return together


def inner() -> KFold:
    return KFold(INNER_FOLDS, shuffle=True, random_state=0)


def batches(n_rows: int, n_columns: int) -> dict[str, Any]:
    """How much himalaya does at once: all penalties, where their matrices fit."""
    some = int(BATCH_BYTES // (4 * n_rows * n_columns))
    return {"n_targets_batch": TARGETS_BATCH, "n_alphas_batch": min(max(some, 1), len(PENALTIES))}


def alphas_of(squares: float, n_images: int) -> np.ndarray:
    """The penalties of our heads: multiples of the mean eigenvalue."""
    return np.array(PENALTIES, np.float32) * np.float32(squares / n_images)


def ridge_cv(case: Case) -> np.ndarray:
    """himalaya.ridge.RidgeCV on the pooled layer."""
    features = case.reading(POOLED).dense()[: len(case.folds)]

    def fit(train: np.ndarray, y: torch.Tensor) -> Any:
        x = features - features[train].mean(0)
        alphas = alphas_of(float(x[train].square().sum()), min(len(train), x.shape[1]))
        params = batches(*x[train].shape) | {"warn": False}
        return RidgeCV(alphas, cv=inner(), solver_params=params).fit(x[train], y).predict(x)

    return of_folds(case, fit)


def kernel_ridge_cv(case: Case, kernel: torch.Tensor) -> np.ndarray:
    """himalaya.kernel_ridge.KernelRidgeCV on one kernel of all training images."""

    def fit(train: np.ndarray, y: torch.Tensor) -> Any:
        (k,) = centred(kernel[None], train)
        alphas = alphas_of(float(k[train, train].sum()), len(train))
        params = batches(len(train), len(train))
        model = KernelRidgeCV(alphas, "precomputed", cv=inner(), solver_params=params)
        return model.fit(k[train][:, train], y).predict(k[:, train])

    return of_folds(case, fit)


def multiple_kernel_ridge_cv(case: Case, kernels: torch.Tensor, search: int | np.ndarray) -> np.ndarray:
    """himalaya.kernel_ridge.MultipleKernelRidgeCV on (n_kernels, n_train, n_train); search: its n_iter."""

    def fit(train: np.ndarray, y: torch.Tensor) -> Any:
        ks = of_one_trace(centred(kernels, train), train)
        params = batches(len(train), len(train)) | {"n_iter": search, "alphas": alphas_of(1, 1), "progress_bar": False}
        model = MultipleKernelRidgeCV("precomputed", solver_params=params, cv=inner(), random_state=0)
        return model.fit(ks[:, train][:, :, train].contiguous(), y).predict(ks[:, :, train].contiguous())

    return of_folds(case, fit)


def group_ridge_cv(case: Case, kernels: torch.Tensor, n_iter: int) -> np.ndarray:
    """himalaya.ridge.GroupRidgeCV on each layer's features, rotated to the axes that the training images span."""

    def fit(train: np.ndarray, y: torch.Tensor) -> Any:
        groups = [spanned(k, train) for k in of_one_trace(centred(kernels, train), train)]
        params = batches(sum(x.shape[1] for x in groups), len(train)) | {"n_iter": n_iter, "alphas": alphas_of(1, 1)}
        params |= {"progress_bar": False, "warn": False}
        model = GroupRidgeCV("input", solver_params=params, cv=inner(), random_state=0)
        return model.fit([x[train] for x in groups], y).predict(groups)

    return of_folds(case, fit)


def centred(kernels: torch.Tensor, train: np.ndarray) -> torch.Tensor:
    """(n_kernels, n_images, n_images) about the mean features of the training images."""
    across = kernels[:, :, train].mean(2)
    return kernels - across[:, :, None] - across[:, None] + across[:, train].mean(1)[:, None, None]


def of_one_trace(kernels: torch.Tensor, train: np.ndarray) -> torch.Tensor:
    """Their traces over training images set to the number of these, so that random shares of kernels mean the same."""
    return kernels / kernels[:, train, train].mean(1)[:, None, None]


def spanned(kernel: torch.Tensor, train: np.ndarray) -> torch.Tensor:
    """(n_images, rank) features whose inner products with training images the kernel is."""
    values, vectors = eigh_of(kernel[train][:, train])
    return kernel[:, train] @ (vectors / values.sqrt())


def pooled_kernel(case: Case) -> torch.Tensor:
    features = case.reading(POOLED).dense()[: len(case.folds)]
    features = features - features.mean(0)
    return features @ features.T


def plain_kernels(case: Case) -> torch.Tensor:
    """(n_arrays, n_train, n_train) linear kernels, every channel of unit variance over images and places."""
    n_train, kernels = len(case.folds), []
    for name in case.arrays:
        mean, variance = case.rows.mean_and_variance(name, np.arange(n_train))
        values = (case.rows.read(name, 0, n_train) - mean) / torch.where(variance > 0, variance, 1).sqrt()
        kernels.append(values.flatten(1) @ values.flatten(1).T)
    return torch.stack(kernels)


def prior_kernels(case: Case, priors: list[Prior], arrays: tuple[str, ...] = ()) -> torch.Tensor:
    """(n_priors, n_train, n_train) of the blurred features, as our heads see them."""
    n_train = len(case.folds)
    kernels = LayerKernels(case.reading(*arrays) if arrays else case.rows, np.arange(n_train))
    return torch.stack([kernels.kernel(prior)[:n_train, :n_train] for prior in priors])


def blurred_kernels(case: Case) -> torch.Tensor:
    """(n_arrays, n_train, n_train)"""
    return torch.cat([prior_kernels(case, [Prior()], (name,)) for name in case.arrays])


def methods(case: Case, options: argparse.Namespace) -> dict[str, Callable[[], np.ndarray]]:
    """By name; each has its features in memory and does all the rest."""
    priors, n_iter = prior_set(case.rows.grids, DEPTHS), options.iterations
    found: dict[str, Callable[[], np.ndarray]] = {
        REFERENCE: lambda: own_layers(case, priors),
        "ours: layers, flat prior": lambda: own_layers(case, [Prior()]),
        "KernelRidgeCV: flat prior's kernel": lambda: kernel_ridge_cv(case, prior_kernels(case, [Prior()])[0]),
        f"MultipleKernelRidgeCV: layers, {n_iter} random": lambda: multiple_kernel_ridge_cv(
            case, plain_kernels(case), n_iter
        ),
        f"MultipleKernelRidgeCV: blurred layers, {n_iter} random": lambda: multiple_kernel_ridge_cv(
            case, blurred_kernels(case), n_iter
        ),
        "MultipleKernelRidgeCV: our priors' kernels": lambda: multiple_kernel_ridge_cv(
            case, prior_kernels(case, priors), np.eye(len(priors), dtype=np.float32)
        ),
        f"GroupRidgeCV: layers, {options.group_iterations} random": lambda: group_ridge_cv(
            case, plain_kernels(case), options.group_iterations
        ),
    }
    if POOLED in case.arrays:
        found |= {
            "ours: pooled": lambda: own_pooled(case),
            "RidgeCV: pooled": lambda: ridge_cv(case),
            "KernelRidgeCV: pooled": lambda: kernel_ridge_cv(case, pooled_kernel(case)),
        }
    return {name: run for name, run in found.items() if not any(word in name for word in options.skip)}


def resident_gb(line: str) -> float:
    """VmRSS, now, or VmHWM, the most since it was reset; the most ever where there is no /proc."""
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(one for one in status if one.startswith(line)).split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in KiB


def forget_peak() -> None:
    """Give freed memory back, and have the kernel count its peak anew."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def measure(case: Case, run: Callable[[], np.ndarray]) -> dict[str, Any]:
    forget_peak()
    before, began, cpu = resident_gb("VmRSS"), time.perf_counter(), time.process_time()
    predictions = run()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    peak = resident_gb("VmHWM")
    r = pearson_r(predictions, case.responses)
    return {"r": r, "seconds": seconds, "cpu_seconds": cpu_seconds, "added_gb": peak - before, "peak_gb": peak}


def warm_up(folder: Path, options: argparse.Namespace) -> None:
    """What a library does once for a process is nobody's time."""
    for run in methods(synthetic_case(folder, 60, 2, 3, 4, 5), options).values():
        run()


def summary(runs: list[dict[str, Any]], reference: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Of one method, over all subjects together."""
    total = {key: sum(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
    found: dict[str, Any] = {"mean_r": round(float(np.concatenate([run["r"] for run in runs]).mean()), 4)}
    found["mean_r_of_subjects"] = [round(float(run["r"].mean()), 4) for run in runs]
    found |= {key: round(value, 2) for key, value in total.items()}
    if reference:
        for key, value in total.items():
            found[f"{key}_ratio"] = round(value / sum(run[key] for run in reference), 2)
    return found | {"added_gb": round(max(run["added_gb"] for run in runs), 2)}


def run_all(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    warm_up(folder / "warm", options)
    cases = [synthetic_case(folder, *options.synthetic)] if options.synthetic else real_cases(options)
    runs: dict[str, list[dict[str, Any]]] = {}
    shapes = {}
    for case in cases:
        about = {name: [*case.rows.grids[name], case.rows.channels[name]] for name in case.arrays}
        shapes[case.subject.name] = {"images": len(case.folds), "vertices": case.responses.shape[1], "arrays": about}
        for name, run in methods(case, options).items():
            runs.setdefault(name, []).append(measure(case, run))
            last = runs[name][-1]
            print(f"{case.subject.name}  {name:56} r {last['r'].mean():.4f}  {last['cpu_seconds']:8.2f} s", flush=True)
    found = {name: summary(own, runs.get(REFERENCE)) for name, own in runs.items()}
    peak = max(run["peak_gb"] for own in runs.values() for run in own)  # resetting it resets what getrusage says too
    return {"subjects": shapes, "methods": found, "peak_gb": round(peak, 2)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--subjects", default="all")
    parser.add_argument("--synthetic", type=int, nargs=5, metavar=("IMAGES", "LAYERS", "GRID", "CHANNELS", "VERTICES"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=("torch", "numpy"), default="numpy", help="himalaya's")
    parser.add_argument("--iterations", type=int, default=50, help="of the random search over kernels")
    parser.add_argument("--group-iterations", type=int, default=20, help="of the slower search over groups")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="leave out methods with any of these words in their names"
    )
    options = parser.parse_args()
    if not options.synthetic and not (options.data and options.work):
        parser.error("give --data and --work, or --synthetic")
    return options


def main() -> None:
    options = parsed()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    set_backend(options.backend)
    versions = f"torch {torch.__version__}, himalaya {himalaya.__version__} on {options.backend}"
    with threadpool_limits(options.threads), np.errstate(divide="ignore"), tempfile.TemporaryDirectory() as folder:
        result = run_all(options, Path(folder))
    result |= {
        "machine": f"{platform.machine()}, {options.threads} threads, {versions}",
        "penalties": len(PENALTIES),
        "iterations": [options.iterations, options.group_iterations],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
