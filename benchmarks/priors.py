"""Closed form under priors, the default of `fit-heads` on layers, against himalaya's searches over bands of features.

    PYTHONPATH=. python benchmarks/priors.py [--quick]

Simulated layers of 7 x 7 places; each vertex sees one layer through one window (planted.py). Everybody fits to the same
images, once, and predicts the same held-out ones. himalaya has a kernel for each layer, or for each layer and quarter
of the image, made before its time starts. It is given several settings: of those whose test r is at most 0.001 below
its best, the fastest counts. Our time has the kernels in it, and weights on the features.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import Figure, options, report
from planted import SIDE, Sizes, write_subject

from featcache.machine.memory import keep_freed_memory
from heads.config import FitConfig, RidgeConfig
from heads.features.sets import feature_sets
from heads.fit.out_of_fold import predict_surface
from heads.scores.metrics import pearson_r
from heads.solvers.base import Problem
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.ridge import build_layered

_INNER_FOLDS = 5
_EQUAL_R = 0.001
_GROUP_IMAGES = 1000  # with more, one draw of GroupRidgeCV takes minutes
_TARGETS = (None, 512)  # of himalaya's n_targets_batch: all at once, or some


class Data(NamedTuple):
    """One subject's arrays. train, held_out : rows to fit to and to score on; bands : {name: {band: features}}"""

    train: np.ndarray
    held_out: np.ndarray
    responses: np.ndarray
    bands: dict[str, dict[str, torch.Tensor]]


Run = Callable[[], np.ndarray]  # fits and returns predictions of the held-out images, (n_held_out, n_vertices)


def ours(problem: Problem, held_out: np.ndarray) -> np.ndarray:
    """As `fit-heads` does it, from the store to predictions and weights."""
    solver = build_layered(problem)
    spool = problem.work / "heads"
    surfaces = [
        predict_surface(solver, problem.subject, s, lambda n: None, spool=spool)[0] for s in problem.subject.surfaces
    ]
    return np.concatenate(surfaces, 1)[held_out]


def problem_of(work: Path, sizes: Sizes) -> tuple[Problem, Data]:
    """A simulated subject, of whose images the last fifth is held out."""
    subject = write_subject(work, "subj01", sizes)
    n_held_out = sizes.images // 5
    folds = np.ones(sizes.images, dtype=np.int64)
    folds[-n_held_out:] = 0
    plan = FoldPlan(image_ids=subject.train.ids, folds=folds, held_out=(0,), backbone_trained=False)
    (features,) = feature_sets(subject, work)
    problem = Problem(subject=subject, features=features, plan=plan, config=FitConfig(loss="mse"), work=work)
    responses = np.concatenate([np.asarray(subject.responses(s)) for s in subject.surfaces], 1)
    rows = features.read("cpu", np.inf)[0]
    maps = {name: rows.read(name, 0, sizes.images) for name in rows.grids}  # (n_images, n_places, n_channels)
    quarter = np.add.outer(2 * (np.arange(SIDE) > SIDE // 2), np.arange(SIDE) > SIDE // 2).ravel()
    bands = {
        "layers": {name: values.flatten(1) for name, values in maps.items()},
        "layers x quarters": {
            f"{name} {k}": values[:, quarter == k].flatten(1) for name, values in maps.items() for k in range(4)
        },
    }
    return problem, Data(plan.outside(0), plan.inside(0), responses, bands)


def scaled(features: torch.Tensor, train: np.ndarray) -> torch.Tensor:
    """Features of zero mean over the training images, and of a variance of one over their number."""
    std, mean = torch.std_mean(features[train], 0)
    return (features - mean) / torch.where(std > 0, std, 1) / features.shape[1] ** 0.5


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

    def of_groups(groups: list[np.ndarray], params: dict[str, Any]) -> np.ndarray:
        model = GroupRidgeCV("input", solver_params=params, cv=_INNER_FOLDS, random_state=0)
        model.fit([x[train] for x in groups], target)
        return np.asarray(model.predict([x[held_out] for x in groups])) + level

    for name, bands in data.bands.items():
        features = [scaled(values, train) for values in bands.values()]
        kernels = torch.stack([x @ x.T * len(train) / float(x[train].square().sum()) for x in features])
        single = np.concatenate([np.full((1, len(bands)), 1 / len(bands)), np.eye(len(bands))]).astype(np.float32)
        shared = {"progress_bar": False, "alphas": alphas}
        searches = {f"{n} draws": n for n in draws} | {"each band and all alike": single}
        for words, n_iter in searches.items():
            for batch in _TARGETS:
                params = {**shared, "n_iter": n_iter, "n_targets_batch": batch}
                setting = f"{name}, {words}, {batch or 'all'} targets"
                yield "MultipleKernelRidgeCV", setting, lambda k=kernels, p=params: of_kernels(k, "random_search", p)
        params = {"progress_bar": False, "max_iter": gradient_steps, "n_targets_batch": _TARGETS[1]}
        setting = f"{name}, hyper-gradient, {gradient_steps} steps"
        yield "MultipleKernelRidgeCV", setting, lambda k=kernels, p=params: of_kernels(k, "hyper_gradient", p)
        if len(train) <= _GROUP_IMAGES:
            groups, some_of_all = [x.numpy() for x in features], np.maximum(single, 1e-6)  # it divides by them
            for words, n_iter in ((f"{draws[0]} draws", draws[0]), ("each band and all alike", some_of_all)):
                params = {**shared, "n_iter": n_iter, "warn": False}
                yield "GroupRidgeCV", f"{name}, {words}", lambda g=groups, p=params: of_groups(g, p)


def timed(run: Run, data: Data) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
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
        as_good = {setting: run for setting, run in tried.items() if run["r"] >= most - _EQUAL_R}
        best = min(as_good, key=lambda setting: as_good[setting]["seconds"])
        details = {
            **mine,
            "best": best,
            "peer_seconds": tried[best]["seconds"],
            "peer_r": tried[best]["r"],
            "tried": tried,
        }
        against = f"himalaya {peer}"
        figures += [
            Figure(
                f"{what}: times as fast", against, tried[best]["seconds"] / mine["seconds"], 10, False, details=details
            ),
            Figure(f"{what}: test r less the peer's", against, mine["r"] - most, -0.001, False),
        ]
    return figures


def main() -> None:
    sizes = options(__doc__, few=(200, 40), some=(1000, 0), many=(4000, 0), vertices=(2000, 30))
    keep_freed_memory()
    counts = [n for n in (sizes.few, sizes.some, sizes.many) if n]
    try:
        from himalaya.backend import set_backend

        set_backend("torch" if torch.cuda.is_available() else "numpy")
    except ImportError:
        note = "himalaya is not installed: pip install featcache[bench]"
        report([Figure(f"heads under priors, {n:,} images", "himalaya", None, 10, False, note) for n in counts])
        return
    # draws of the random search: as many as leave the whole run at some minutes
    draws = {sizes.few: (20, 100), sizes.some: (20, 50), sizes.many: (10,)}
    figures = []
    for n in counts:
        figures += compare(n, sizes.vertices, (2,) if sizes.quick else draws[n], 5 if sizes.quick else 20)
    report(figures)


if __name__ == "__main__":
    main()
