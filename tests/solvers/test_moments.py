"""Losses from moments equal the ordinary losses over all images, and so do the steps that they take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError
from heads.config import FitConfig, MomentsConfig, RidgeConfig, parse_loss
from heads.scores.losses import LOSSES, weighted_sum
from heads.scores.metrics import pearson_r
from heads.solvers.base import Shared
from heads.solvers.fold_axes import FoldAxes, Target
from heads.solvers.memory import Sizes
from heads.solvers.moments import (
    MomentSolver,
    build,
    descend,
    left_out_error,
    loss_at,
    moments_of,
    refuse_unknown,
    spread_of,
    start_at,
)
from heads.solvers.ridge import eigenbasis, is_exact, sum_of_squares
from heads.solvers.ridge_folds import RidgeFolds
from support.linear import planted
from support.plans import block_of, out_of_fold, plan_of
from support.problems import VECTOR, features_of, planted_responses, problem_of, responding

CONFIG = MomentsConfig()
SUMS = ["mse", "pearson", "mnnpc", "mse+0.5*pearson", "0.2*mse+pearson+2*mnnpc"]


def double_precision(n_images, n_features, n_vertices, seed, constant, ceilings):
    """(features, responses, ceiling, basis, moments) in float64."""
    features, responses, _ = planted(n_images, n_features, n_vertices, noise=1, seed=seed)
    x, y = torch.from_numpy(features).double(), torch.from_numpy(responses).double()
    if constant:
        x[:, 0], y[:, 0] = 2.5, -3.0
    ceiling = None
    if ceilings:
        ceiling = torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 1, n_vertices))
        ceiling[-1] = 0
    basis = eigenbasis(x)
    scores, mean = basis.scores(x), y.mean(0)
    target = Target(mean, sum_of_squares(y - mean), scores.T @ (y - mean), None)
    return x, y, ceiling, basis, moments_of(target, basis, ceiling)


shapes = given(
    n_images=st.integers(3, 40),
    n_features=st.integers(1, 50),
    n_vertices=st.integers(1, 5),
    loss=st.sampled_from(SUMS),
    constant=st.booleans(),
    ceilings=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=100, deadline=None)
@shapes
def test_loss_and_gradient_are_those_over_all_images(n_images, n_features, n_vertices, loss, constant, ceilings, seed):
    x, y, ceiling, basis, moments = double_precision(n_images, n_features, n_vertices, seed, constant, ceilings)
    assume(len(basis.values))
    torch.manual_seed(seed % 2**31)
    on_axes = torch.randn(len(basis.values), n_vertices, dtype=torch.float64)
    weights = basis.weights(on_axes).requires_grad_()
    intercept = (y.mean(0) - basis.mean @ weights.detach()).requires_grad_()
    terms = parse_loss(loss)
    whole = weighted_sum(terms)(x @ weights + intercept, y, ceiling)
    whole.backward()
    now = loss_at(terms, moments, spread_of(on_axes.T, on_axes.T * moments.variances, moments))
    torch.testing.assert_close(now.value.mean(), whole.detach(), rtol=1e-7, atol=1e-9)
    gradient = moments.covariances * now.of_covariances[:, None]
    gradient += moments.variances * on_axes.T * now.of_weights[:, None]
    expected = basis.weights(torch.eye(len(basis.values), dtype=torch.float64)).T @ weights.grad * n_vertices
    torch.testing.assert_close(gradient.T, expected, rtol=1e-6, atol=1e-7)
    # of the intercept alone: with that of the weights, features that are not centred have a share in theirs
    level = intercept.grad if loss == "mse" else torch.zeros_like(intercept)
    torch.testing.assert_close(level, torch.zeros_like(level), rtol=0, atol=1e-7)


@settings(max_examples=30, deadline=None)
@shapes
def test_steps_are_those_of_an_optimiser_that_sees_every_image(
    n_images, n_features, n_vertices, loss, constant, ceilings, seed
):
    x, y, ceiling, basis, moments = double_precision(n_images, n_features, n_vertices, seed, constant, ceilings)
    assume(len(basis.values))
    config, terms = MomentsConfig(steps=6, learning_rate=0.7), parse_loss(loss)
    seen = []
    descend(terms, moments, config, lambda w, _: seen.append(w.clone()) or torch.full((n_vertices,), -len(seen)))
    first = start_at(moments)
    curvature = loss_at(terms, moments, spread_of(first, first * moments.variances, moments)).of_weights
    curvature = curvature * moments.variances.max()
    rate = torch.where(curvature > 0, 0.7 / curvature, 0)
    weights = basis.weights(first.T).requires_grad_()
    optimiser = torch.optim.SGD([weights], lr=1.0, momentum=0.9, nesterov=True)
    for _ in range(6):
        optimiser.zero_grad()
        predictions = (x - basis.mean) @ weights + y.mean(0)
        for vertex in range(n_vertices):  # each vertex at its own rate
            one = slice(vertex, vertex + 1)
            value = weighted_sum(terms)(predictions[:, one], y[:, one], None if ceiling is None else ceiling[one])
            (rate[vertex] * value).backward(retain_graph=True)
        optimiser.step()
    found, expected = basis.weights(seen[-1].T), weights.detach()
    scale = ((x - basis.mean) @ expected).var(0, correction=0)  # what is looked at is at the scale that predicts best
    fits = (((x - basis.mean) @ expected) * (y - y.mean(0))).mean(0) / torch.where(scale > 0, scale, 1)
    torch.testing.assert_close(found, expected * fits.clamp_min(0), rtol=1e-5, atol=1e-7)


def test_every_least_squares_loss_is_served():
    assert {name for loss in SUMS for _, name in parse_loss(loss)} == set(LOSSES) - {"smooth_l1"}


def axes_of(x, plan):
    return FoldAxes(x, plan.folds, lambda n_images: is_exact(RidgeConfig(), n_images))


def solver_of(x, plan, loss, config=CONFIG, axes=None, **options):
    """x : (n_train + n_test, n_features)"""
    sizes = Sizes.of_matrix(plan, x.shape, 6)
    return MomentSolver(axes or axes_of(x, plan), parse_loss(loss), config, sizes=sizes, **options)


def fitted(features, responses, plan, loss="mnnpc", ceiling=None):
    """With all training images once more as test images."""
    x = torch.from_numpy(np.concatenate([features, features]))
    return solver_of(x, plan, loss).fit(block_of(responses, noise_ceiling=ceiling))


@pytest.mark.parametrize("loss", SUMS)
@pytest.mark.parametrize(("n_images", "n_features"), [(400, 40), (200, 300)])
def test_planted_weights_are_found_as_well_as_by_closed_form(loss, n_images, n_features):
    features, responses, _ = planted(n_images, n_features, 20, noise=1)
    plan = plan_of(n_images, 4)
    ceiling = np.random.default_rng(0).uniform(0, 1, 20)
    r = pearson_r(out_of_fold(fitted(features, responses, plan, loss, ceiling), n_images), responses).mean()
    exact = RidgeFolds(torch.from_numpy(features), plan, RidgeConfig()).fit(block_of(responses))
    assert r > pearson_r(out_of_fold(exact, n_images), responses).mean() - 0.03
    assert r > 0.2


def test_noise_scores_nothing():
    features, responses, _ = planted(500, 30, 40, noise=1)
    responses = np.random.default_rng(1).normal(size=responses.shape).astype(np.float32)
    found = out_of_fold(fitted(features, responses, plan_of(500, 4)), 500)
    assert abs(float(np.nanmean(pearson_r(found, responses)))) < 0.05


@pytest.mark.parametrize(("n_images", "n_features"), [(240, 20), (120, 200)])
def test_held_out_responses_do_not_reach_their_fold(n_images, n_features):
    features, responses, _ = planted(n_images, n_features, noise=1)
    plan = plan_of(n_images, 4)
    before = fitted(features, responses, plan)
    other = responses.copy()
    other[plan.inside(2)] = 1e6 * np.random.default_rng(5).normal(size=other[plan.inside(2)].shape)
    after = fitted(features, other, plan)
    torch.testing.assert_close(after.folds[2].test, before.folds[2].test, rtol=0, atol=0)
    assert (after.folds[1].test - before.folds[1].test).abs().max() > 0.01


def test_vertices_do_not_depend_on_which_others_are_fitted_with_them():
    features, responses, _ = planted(200, 20, 6, noise=1)
    plan, ceiling = plan_of(200, 4), np.linspace(0, 1, 6)
    whole = fitted(features, responses, plan, ceiling=ceiling)
    some = fitted(features, responses[:, 4:], plan, ceiling=ceiling[4:])
    torch.testing.assert_close(some.folds[0].test, whole.folds[0].test[:, 4:], rtol=1e-3, atol=1e-4)


@pytest.fixture
def turned(monkeypatch):
    """The axes that responses are turned to, once for each fold."""
    seen, honest = [], FoldAxes.targets

    def counted(self, responses):
        for target in honest(self, responses):
            seen.append(self)
            yield target

    monkeypatch.setattr(FoldAxes, "targets", counted)
    return seen


def test_losses_share_what_they_learn_from_and_nothing_else(turned):
    features, responses, _ = planted(200, 20, 6, noise=1)
    x, plan, config = torch.from_numpy(features), plan_of(200, 4), MomentsConfig(steps=4)
    axes, targets, found = axes_of(x, plan), {}, {}
    for loss in ("mse", "pearson", "mse"):
        for surface, values in (("lh", responses), ("rh", responses[:, ::-1].copy())):
            solver = solver_of(x, plan, loss, config, axes, targets=targets)
            found[loss, surface] = solver.fit(block_of(values, surface)).saved["", "weights"]
    assert len(turned) == 2 * len(plan)  # once for each surface
    alone = solver_of(x, plan, "pearson", config).fit(block_of(responses)).saved["", "weights"]
    torch.testing.assert_close(found["pearson", "lh"], alone, rtol=0, atol=0)
    torch.testing.assert_close(found["pearson", "rh"], alone.flip(1), rtol=1e-3, atol=1e-5)
    assert (found["mse", "lh"] - alone).abs().max() > 1e-4


@pytest.mark.parametrize(("n_fits", "n_turned"), [(1, 6), (2, 3)])
def test_losses_of_one_run_share_axes_and_what_they_learn_from(tiny, tmp_path, said, turned, n_fits, n_turned):
    """The builder makes axes once; what is learnt from is kept where there are several losses."""
    (subject,) = open_challenge(tiny).subjects[:1]
    own = responding(subject, planted_responses(len(subject.train), VECTOR), tmp_path)
    features, shared = features_of(own, tmp_path), Shared(n_fits)
    for loss in ("mse", "pearson"):
        config = FitConfig(loss=loss, solver="moments", n_folds=3)
        solver = build(problem_of(own, features, config, tmp_path, shared=shared))
        solver.fit(block_of(np.array(own.responses("lh"))))
    assert len({id(axes) for axes in turned}) == 1 and len(turned) == n_turned
    assert sum("vertices at a time" in line for line in said) == 1


def test_a_loss_that_moments_do_not_give_is_refused():
    """Also where a table says that its optimum is that of least squares."""
    refuse_unknown(parse_loss("mse+pearson+mnnpc"))
    for terms in (((1.0, "smooth_l1"),), ((1.0, "mse"), (0.5, "cosine"))):
        with pytest.raises(
            ConfigError, match=f"--solver moments: expected a loss of mse, .*; found {terms[-1][1]}; use"
        ):
            refuse_unknown(terms)
        x, plan = torch.randn(20, 3), plan_of(20, 2)
        with pytest.raises(ConfigError, match="--solver moments"):
            MomentSolver(axes_of(x, plan), terms, CONFIG, sizes=Sizes.of_matrix(plan, x.shape, 2))


def test_dead_vertices_and_constant_features_have_a_flat_head():
    features, responses, _ = planted(100, 5, 4, noise=1)
    features[:, 1], responses[:, 2] = 7.0, 3.0
    fits = fitted(features, responses, plan_of(100, 4), ceiling=np.array([0, 0.5, 0, 1.0]))
    for fold in fits.folds:
        assert torch.isfinite(fold.test).all()
        torch.testing.assert_close(fold.test[:, 2], torch.full((100,), 3.0))


@pytest.mark.parametrize(("n_images", "n_features"), [(30, 5), (20, 40)])
def test_left_out_error_is_that_of_heads_fitted_without_each_image(n_images, n_features):
    """For ridge weights, whose parts of least squares do not depend on the responses."""
    x, y, _, basis, moments = double_precision(n_images, n_features, 3, 0, False, False)
    scores = basis.scores(x)
    moments = moments._replace(rows=(scores, y - y.mean(0)))
    penalty = 0.7
    weights = moments.covariances / (moments.variances + penalty / n_images)
    expected = torch.zeros(3, dtype=torch.float64)
    for image in range(n_images):
        others = np.delete(np.arange(n_images), image)
        mean, level = x[others].mean(0), y[others].mean(0)
        gram = (x[others] - mean).T @ (x[others] - mean) + penalty * torch.eye(x.shape[1], dtype=torch.float64)
        head = torch.linalg.solve(gram, (x[others] - mean).T @ (y[others] - level))
        expected += (y[image] - level - (x[image] - mean) @ head).square() / n_images
    torch.testing.assert_close(left_out_error(weights, moments), expected, rtol=1e-6, atol=0)
    h = scores @ torch.diag(1 / (basis.values + penalty)) @ scores.T
    generalised = ((y - y.mean(0) - h @ (y - y.mean(0))).square().mean(0)) / (1 - (h.trace() + 1) / n_images) ** 2
    torch.testing.assert_close(left_out_error(weights, moments._replace(rows=None)), generalised)
