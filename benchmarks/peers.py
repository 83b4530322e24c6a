"""Closed-form heads against the peers' ridge regressions with a penalty per target: same data, same penalties.

    PYTHONPATH=. python benchmarks/peers.py [--quick]

Fit and predictions of the test images are both in the time, and test scores must be no lower. himalaya (torch backend)
chooses penalties by five folds, with the fastest of some batch settings; scikit-learn by leave-one-out.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import Figure, options, report

from featcache.machine.memory import keep_freed_memory
from heads.scores.metrics import pearson_r
from heads.solvers.estimator import RidgeHead
from heads.solvers.ridge import eigenbasis

_N_PENALTIES = 20
_N_TEST = 1000
_SLOWEST = 60.0  # seconds for a peer; beyond, it is given a part of the vertices and the time is scaled up


def planted(n_images: int, n_features: int, n_vertices: int) -> tuple[torch.Tensor, ...]:
    """Features with a falling spectrum and responses whose signal is 0 to 50 % of their variance: train, then test."""
    generator = torch.Generator().manual_seed(0)
    n_all = n_images + _N_TEST
    scale = torch.arange(1, n_features + 1) ** -0.5
    features = torch.randn(n_all, n_features, generator=generator) * scale
    signal = features @ torch.randn(n_features, n_vertices, generator=generator)
    share = torch.linspace(0, 0.5, n_vertices)
    responses = signal / signal.std(0) * share.sqrt()
    responses += torch.randn(n_all, n_vertices, generator=generator) * (1 - share).sqrt()
    return features[:n_images], responses[:n_images], features[n_images:], responses[n_images:]


def timed(fit: Callable[[Any, Any], Any], data: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """(seconds to fit and to predict the test images, mean test r)"""
    x, y, new, truth = data
    began = time.perf_counter()
    predictions = torch.as_tensor(fit(x, y).predict(new))
    took = time.perf_counter() - began
    return took, float(pearson_r(predictions.numpy().astype(np.float32), truth.numpy()).mean())


def part_that_fits(fit: Callable[[Any, Any], Any], data: tuple[torch.Tensor, ...]) -> int:
    """Vertices that a slow peer can be given, from two short tries: what it does once for all of them, and for each."""
    n = data[1].shape[1]
    few, more = (max(n // k, 2) for k in (80, 20))
    first, second = (timed(fit, some_vertices(data, k))[0] for k in (few, more))
    each = max((second - first) / max(more - few, 1), 1e-9)
    return int(min(max((_SLOWEST - first) / each, more), n))


def some_vertices(data: tuple[torch.Tensor, ...], n: int) -> tuple[torch.Tensor, ...]:
    """Every so many, so that they are as hard as all."""
    step = data[1].shape[1] // n
    return data[0], data[1][:, ::step].contiguous(), data[2], data[3][:, ::step].contiguous()


def compare(
    what: str, against: str, data: tuple[torch.Tensor, ...], peers: dict[str, Callable[[Any, Any], Any]], target: float
) -> list[Figure]:
    """How many times as fast as the fastest of the peer's settings, and by how much the test score differs."""
    _, alphas = penalties(data[0])
    head = RidgeHead(alphas)
    timed(head.fit, data)
    tried = {}
    for name, fit in peers.items():
        share = some_vertices(data, part_that_fits(fit, data))
        took, r = timed(fit, share)
        n = share[1].shape[1]
        tried[name] = {"seconds": took, "r": r, "vertices": n, "scaled": took * data[1].shape[1] / n}
    best = min(tried, key=lambda name: tried[name]["scaled"])
    runs = [timed(head.fit, data) for _ in range(3)]
    ours, r = sorted(runs)[1]
    if tried[best]["vertices"] < data[1].shape[1]:
        r_there = timed(head.fit, some_vertices(data, tried[best]["vertices"]))[1]
    else:
        r_there = r
    details = {"seconds": ours, "r": r, "best": best, "tried": tried}
    return [
        Figure(f"{what}: times as fast", against, tried[best]["scaled"] / ours, target, False, details=details),
        Figure(f"{what}: test r less the peer's", against, r_there - tried[best]["r"], -0.001, False),
    ]


def penalties(features: torch.Tensor) -> tuple[list[float], list[float]]:
    """The same ones, in the units of the eigenvalues, and as multiples of their mean."""
    multiples = np.logspace(-3, 3, _N_PENALTIES)
    scale = float(eigenbasis(features).values.mean())
    return [float(m * scale) for m in multiples], [float(m) for m in multiples]


def himalaya_ridge(alphas: list[float], **batches: int | None) -> Callable[[Any, Any], Any]:
    from himalaya.ridge import RidgeCV

    return lambda x, y: RidgeCV(alphas, fit_intercept=True, cv=5, solver_params={"warn": False, **batches}).fit(x, y)


def himalaya_kernel(alphas: list[float], **batches: int | None) -> Callable[[Any, Any], Any]:
    from himalaya.kernel_ridge import KernelRidgeCV

    return lambda x, y: KernelRidgeCV(
        alphas, kernel="linear", fit_intercept=True, cv=5, solver_params=batches, warn=False
    ).fit(x, y)


def scikit_learn(alphas: list[float]) -> Callable[[Any, Any], Any]:
    from sklearn.linear_model import RidgeCV

    return lambda x, y: RidgeCV(alphas, alpha_per_target=True).fit(np.asarray(x), np.asarray(y))


def main() -> None:
    sizes = options(
        __doc__,
        images=(8000, 300),
        features=(1280, 50),
        vertices=(8000, 200),
        wide_images=(2000, 100),
        wide_features=(20000, 400),
    )
    keep_freed_memory()
    batches: list[dict[str, int | None]] = [{}, {"n_targets_batch": 2000, "n_alphas_batch": 5}]  # all at once, and some
    figures = []
    tall = planted(sizes.images, sizes.features, sizes.vertices)
    what = f"exact heads, {sizes.images:,} x {sizes.features:,} -> {sizes.vertices:,}, {_N_PENALTIES} penalties"
    alphas = penalties(tall[0])[0]
    try:
        from himalaya.backend import set_backend

        set_backend("torch")
        himalaya = True
    except ImportError:
        himalaya = False
        note = "himalaya is not installed: pip install featcache[bench]"
        figures += [Figure(what, "himalaya RidgeCV", None, 30, False, note)]
    if himalaya:
        peers = {str(batch): himalaya_ridge(alphas, **batch) for batch in batches}
        figures += compare(what, "himalaya RidgeCV, 5 folds", tall, peers, 30)
    figures += compare(what, "scikit-learn RidgeCV", tall, {"gcv": scikit_learn(alphas)}, 10)
    del tall
    wide = planted(sizes.wide_images, sizes.wide_features, sizes.vertices)
    what = f"exact heads, wide, {sizes.wide_images:,} x {sizes.wide_features:,} -> {sizes.vertices:,}"
    if himalaya:
        peers = {str(batch): himalaya_kernel(penalties(wide[0])[0], **batch) for batch in batches}
        figures += compare(what, "himalaya KernelRidgeCV, 5 folds", wide, peers, 5)
    report(figures)


if __name__ == "__main__":
    main()
