"""Closed form under priors, the default of `fit-heads` on layers, against himalaya's searches over bands of features.

    PYTHONPATH=. python benchmarks/priors.py [--quick]

Simulated layers of 7 x 7 places; each vertex sees one layer through one window (planted.py). Everybody fits to the same
images, once, and predicts the same held-out ones. himalaya gets kernels that are made before its time starts: of each
layer; of each layer in each quarter of the image; and of each of our priors (not with the most images). It tries random
weights of them, or each alone and all alike. The fastest setting counts whose test r is at most 0.001 below ours; if
there is none, at most 0.001 below its best. Scores are compared with its best. In our time are kernels, and weights on
the features.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import Figure, options, report
from planted import SIDE, Sizes, write_subject

from featcache.machine.memory import keep_freed_memory
from featcache.machine.tensors import Spool
from heads.config import FitConfig, RidgeConfig
from heads.features.rows import LayerRows
from heads.features.sets import feature_sets
from heads.fit.out_of_fold import predict_surface
from heads.scores.metrics import pearson_r
from heads.solvers.base import Problem
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import DEPTHS, prior_set
from heads.solvers.layers.ridge import build_layered

_INNER_FOLDS = 5
_EQUAL_R = 0.001
_TARGETS = 2048  # vertices that himalaya takes at a time; all of some thousand, or 512, take it as long
_FEW, _SOME = 300, 1250  # images up to which slow settings, and many kernels, are tried


class Data(NamedTuple):
    """One subject's arrays.

    train, held_out : rows to fit to and to score on
    responses : (n_images, n_vertices)
    groups : [(n_images, n_features of a layer)]
    kernels : {name: (n_bands, n_images, n_images)}
    """

    train: np.ndarray
    held_out: np.ndarray
    responses: np.ndarray
    groups: list[torch.Tensor]
    kernels: dict[str, torch.Tensor]


Run = Callable[[], np.ndarray]  # fits and returns predictions of the held-out images, (n_held_out, n_vertices)


def ours(problem: Problem, held_out: np.ndarray) -> np.ndarray:
    """As `fit-heads` does it, from the store to predictions and weights."""
    solver, subject, spool = build_layered(problem), problem.subject, Spool(problem.work / "heads")
    surfaces = [predict_surface(solver, subject, s, lambda n: None, spool=spool)[0] for s in subject.surfaces]
    return np.concatenate(surfaces, 1)[held_out]


def problem_of(work: Path, sizes: Sizes) -> tuple[Problem, Data]:
    """A simulated subject, of whose images the last fifth is held out."""
    subject = write_subject(work, "subj01", sizes)
    folds = np.ones(sizes.images, dtype=np.int64)
    folds[-sizes.images // 5 :] = 0
    plan = FoldPlan(image_ids=subject.train.ids, folds=folds, held_out=(0,), backbone_trained=False)
    (features,) = feature_sets(subject, work)
    problem = Problem(subject=subject, features=features, plan=plan, config=FitConfig(loss="mse"), work=work)
    responses = np.concatenate([np.asarray(subject.responses(s)) for s in subject.surfaces], 1)
    (rows,), train = features.read("cpu", np.inf), plan.outside(0)
    maps = [scaled(rows.read(name, 0, sizes.images), train) for name in rows.grids]
    groups = [values.flatten(1) for values in maps]
    quarter = np.add.outer(2 * (np.arange(SIDE) > SIDE // 2), np.arange(SIDE) > SIDE // 2).ravel()
    kernels = {"layers": torch.stack([x @ x.T for x in groups])}
    if sizes.images <= _SOME:
        parts = [values[:, quarter == k].flatten(1) for values in maps for k in range(4)]
        kernels["layers x quarters"] = torch.stack([x @ x.T for x in parts])
        kernels["our priors"] = kernels_of_priors(rows, train, sizes.images)
    of_unit_trace = {name: k / k[:, train, train].mean(1)[:, None, None] for name, k in kernels.items()}
    return problem, Data(train, plan.inside(0), responses, groups, of_unit_trace)


def scaled(maps: torch.Tensor, train: np.ndarray) -> torch.Tensor:
    """Features of zero mean and of variance 1 over the training images. maps : (n_images, n_places, n_channels)"""
    std, mean = torch.std_mean(maps[train], 0)
    return (maps - mean) / torch.where(std > 0, std, 1)


def kernels_of_priors(rows: LayerRows, train: np.ndarray, n_images: int) -> torch.Tensor:
    """(n_priors, n_images, n_images), centred over the training images."""
    made = LayerKernels(rows, train, whole=True)
    priors = prior_set(rows.grids, DEPTHS, n_images)
    kernels = made.under(priors)[:, :n_images, :n_images]
    means = kernels[:, train].mean(1)
    return kernels - means[:, None] - means[:, :, None] + means[:, train].mean(1)[:, None, None]


def himalaya_runs(data: Data, draws: tuple[int, ...], gradient_steps: int) -> Iterator[tuple[str, str, Run]]:
    """(peer, setting, run) of everything that is tried."""
    from himalaya.kernel_ridge import MultipleKernelRidgeCV
    from himalaya.ridge import GroupRidgeCV

    train, held_out, level = data.train, data.held_out, data.responses[data.train].mean(0)
    target = data.responses[train] - level
    alphas = np.array(RidgeConfig().penalties, dtype=np.float32)[::3]  # as many as we try: one per decade

    def of_kernels(kernels: torch.Tensor, solver: str, params: dict[str, Any]) -> np.ndarray:
        model = MultipleKernelRidgeCV(
            "precomputed", solver=solver, solver_params=params, cv=_INNER_FOLDS, random_state=0
        )
        model.fit(kernels[:, train][:, :, train].numpy(), target)
        return np.asarray(model.predict(kernels[:, held_out][:, :, train].numpy())) + level

    def of_groups(params: dict[str, Any]) -> np.ndarray:
        groups = [(x / x[train].square().sum(1).mean().sqrt()).numpy() for x in data.groups]
        model = GroupRidgeCV("input", solver_params=params, cv=_INNER_FOLDS, random_state=0)
        model.fit([x[train] for x in groups], target)
        return np.asarray(model.predict([x[held_out] for x in groups])) + level

    shared = {"progress_bar": False, "alphas": alphas, "n_targets_batch": _TARGETS}
    for name, kernels in data.kernels.items():
        searches: dict[str, Any] = {"each alone and all alike": alone_and_alike(len(kernels))}
        if name != "our priors":
            searches |= {f"{n} draws": n for n in draws}
        for words, n_iter in searches.items():
            params = {**shared, "n_iter": n_iter}
            run = partial(of_kernels, kernels, "random_search", params)
            yield "MultipleKernelRidgeCV", f"{name}, {words}", run
    if len(train) > _FEW:  # neither of these was ever the best with few images
        return
    params = {"progress_bar": False, "n_targets_batch": _TARGETS, "max_iter": gradient_steps}
    setting = f"layers, hyper-gradient, {gradient_steps} steps"
    yield "MultipleKernelRidgeCV", setting, partial(of_kernels, data.kernels["layers"], "hyper_gradient", params)
    some_of_all = np.maximum(alone_and_alike(len(data.groups)), 1e-6)  # it divides by them
    for words, n_iter in (*((f"{n} draws", n) for n in draws[:1]), ("each alone and all alike", some_of_all)):
        yield "GroupRidgeCV", f"layers, {words}", partial(of_groups, {**shared, "n_iter": n_iter, "warn": False})


def alone_and_alike(n_bands: int) -> np.ndarray:
    """(1 + n_bands, n_bands) weights to try: all bands alike, and each alone."""
    return np.concatenate([np.full((1, n_bands), 1 / n_bands), np.eye(n_bands)]).astype(np.float32)


def timed(run: Run, data: Data) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    with np.errstate(divide="ignore"):  # himalaya takes the logarithm of weights, which may be 0
        predictions = run()
    taken = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return taken | {"r": float(pearson_r(predictions, data.responses[data.held_out]).mean())}


def compare(n_images: int, n_vertices: int, draws: tuple[int, ...], gradient_steps: int) -> list[Figure]:
    """Rows of one number of images to fit to."""
    sizes = Sizes(images=n_images + n_images // 4, test_images=2, vertices=n_vertices)
    with tempfile.TemporaryDirectory() as folder:
        problem, data = problem_of(Path(folder), sizes)
        runs = [timed(lambda: ours(problem, data.held_out), data) for _ in range(2)]
        mine = min(runs, key=lambda run: run["seconds"])
    what = f"heads under priors, {n_images:,} x {sizes.n_features:,} -> {n_vertices:,}"
    print(f"{what}: {mine}", flush=True)
    peers: dict[str, dict[str, dict[str, float]]] = {}
    for peer, setting, run in himalaya_runs(data, draws, gradient_steps):
        peers.setdefault(peer, {})[setting] = timed(run, data)
        print(f"{n_images:,} images, {peer}, {setting}: {peers[peer][setting]}", flush=True)
    figures = []
    for peer, tried in peers.items():
        most = max(run["r"] for run in tried.values())
        wanted = min(mine["r"], most) - _EQUAL_R
        as_good = {setting: run for setting, run in tried.items() if run["r"] >= wanted}
        best = min(as_good, key=lambda setting: as_good[setting]["seconds"])
        chosen = {f"peer_{key}": value for key, value in tried[best].items()}
        details = {**mine, "best": best, **chosen, "tried": tried}
        against = f"himalaya {peer}"
        figures += [
            Figure(
                f"{what}: times as fast", against, chosen["peer_seconds"] / mine["seconds"], 10, False, details=details
            ),
            Figure(f"{what}: test r less the peer's", against, mine["r"] - most, -0.001, False),
        ]
    return figures


def main() -> None:
    sizes = options(__doc__, few=(200, 40), some=(1000, 0), many=(4000, 0), vertices=(2000, 30))
    keep_freed_memory()
    # with draws of the random search: as many as leave the whole run at some minutes
    planned = [(sizes.few, (20, 100)), (sizes.some, (20,)), (sizes.many, ())]
    counts = [(n, draws) for n, draws in planned if n]
    try:
        from himalaya.backend import set_backend

        set_backend("numpy")  # on a CPU it is the faster of the two (docs/layers.md)
    except ImportError:
        note = "himalaya is not installed: pip install featcache[bench]"
        report([Figure(f"heads under priors, {n:,} images", "himalaya", None, 10, False, note) for n, _ in counts])
        return
    figures = []
    for n, draws in counts:
        figures += compare(n, sizes.vertices, (2,) if sizes.quick else draws, 5 if sizes.quick else 20)
    report(figures)


if __name__ == "__main__":
    main()
