"""The search takes the candidate and penalty of least error, for every model, as a search one by one does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from heads.compare.folds import PENALTIES, candidates_of, fit_fold, models_of
from heads.solvers.layers.priors import Prior
from support.bands import planted_bands, spaces_of_features
from support.plans import plan_of

N = 80


@pytest.fixture
def planted():
    features, responses = planted_bands(np.random.default_rng(1), N, (0.3, 0.2, 0.0), 0.2, n_own=2, n_vertices=5)
    return features, torch.from_numpy(responses.astype(np.float32))


def test_models_are_all_bands_without_each_and_each_alone_and_none_twice():
    assert models_of(2) == [{0, 1}, {1}, {0}]
    assert models_of(3) == [{0, 1, 2}, {1, 2}, {0, 2}, {0, 1}, {0}, {1}, {2}]


def test_every_candidate_is_offered_without_each_of_its_bands():
    candidates = candidates_of(3, 4, [Prior()], 0)
    weights = np.array([one.weights for one in candidates])
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    distances = np.abs(weights[:, None] - weights).max(-1) + np.eye(len(weights))
    assert distances.min() > 1e-7  # none twice
    for one in [one for one in candidates if len(one.support) == 3]:
        for band in range(3):
            rest = np.array(one.weights) * (np.arange(3) != band)
            assert np.abs(weights - rest / rest.sum()).max(1).min() < 1e-4
    assert {one.support for one in candidates} >= set(models_of(3))


def slow_errors(kernel, y, rows, held):
    """Leave-one-out error and errors of held-out images, (n_penalties, n_vertices), image by image in float64."""

    def predicted(fit, images, penalty):
        k = kernel[np.ix_(fit, fit)]
        centre = np.eye(len(fit)) - 1 / len(fit)
        across = (kernel[np.ix_(images, fit)] - k.mean(0)) @ centre
        return y[fit].mean(0) + across @ np.linalg.solve(
            centre @ k @ centre + penalty * np.eye(len(fit)), y[fit] - y[fit].mean(0)
        )

    k = kernel[np.ix_(rows, rows)]
    centred = k - k.mean(0) - k.mean(1)[:, None] + k.mean()
    values = np.linalg.eigvalsh(centred)
    scale = values[values > 5e-7 * values.max()].mean()
    left_out, errors = [], []
    for multiple in PENALTIES:
        fits = [(y[i] - predicted(np.setdiff1d(rows, i), [i], multiple * scale)[0]) ** 2 for i in rows]
        left_out.append(np.mean(fits, axis=0))
        errors.append((y[held] - predicted(rows, held, multiple * scale)) ** 2)
    return np.array(left_out), np.array(errors)


@pytest.mark.slow
def test_every_model_takes_what_leaves_the_least_error_on_the_images_it_is_fitted_to(planted):
    features, responses = planted
    plan, spaces = plan_of(N, 3), spaces_of_features(features)
    candidates = candidates_of(3, 1, [Prior()], 0)
    held = fit_fold(spaces, plan, 0, responses, candidates)
    rows, y = plan.outside(0), responses.double().numpy()
    kernels = np.stack([kernel.double().numpy() for kernel in spaces.columns[Prior()]])
    found = [slow_errors(np.tensordot(one.weights, kernels, 1), y, rows, held.rows) for one in candidates]
    for model, errors in held.errors.items():
        allowed = [pair for one, pair in zip(candidates, found, strict=True) if one.support <= model]
        left_out = np.concatenate([pair[0] for pair in allowed])
        squared = np.concatenate([pair[1] for pair in allowed])
        for vertex, best in enumerate(left_out.argmin(0)):
            np.testing.assert_allclose(errors.values[:, vertex], squared[best, :, vertex], atol=5e-3)
    whole = held.squares.values - held.errors[frozenset({0, 1, 2})].values
    np.testing.assert_allclose(held.products.sum(0), whole, atol=5e-3)


def test_landmarks_that_span_the_features_change_nothing(planted):
    features, responses = planted
    plan, candidates = plan_of(N, 3), candidates_of(3, 2, [Prior()], 0)
    whole = fit_fold(spaces_of_features(features), plan, 1, responses, candidates)
    landmarks = plan.outside(1)[::2]
    sampled = fit_fold(spaces_of_features(features, landmarks), plan, 1, responses, candidates)
    for model, errors in whole.errors.items():
        np.testing.assert_allclose(sampled.errors[model].values, errors.values, atol=2e-3)
    np.testing.assert_allclose(sampled.products, whole.products, atol=5e-3)


@pytest.mark.parametrize("trained", [False, True])
def test_responses_of_an_image_do_not_move_its_own_prediction(planted, trained):
    features, responses = planted
    plan, spaces, candidates = (
        plan_of(N, 3, trained=trained),
        spaces_of_features(features),
        candidates_of(3, 1, [Prior()], 0),
    )
    part = plan.parts(0)[0]
    changed = responses.clone()
    changed[part] += 10
    before, after = (fit_fold(spaces, plan, 0, y, candidates) for y in (responses, changed))
    place = np.isin(before.rows, part)
    mean = responses[plan.outside(0)].mean(0)
    for model in before.errors:
        errors = [one.errors[model].values[place] for one in (before, after)]
        y = [one[before.rows[place]] - mean for one in (responses, changed)]
        # (y - f)^2 of the same f: f = (y2^2 - y1^2 - (e2 - e1)) / (2 (y2 - y1))
        f = (y[1] ** 2 - y[0] ** 2 - (errors[1] - errors[0])) / (2 * (y[1] - y[0]))
        np.testing.assert_allclose((y[0] - f) ** 2, errors[0], atol=2e-2)


def test_a_trained_backbone_is_chosen_for_on_the_held_out_fold(planted):
    features, responses = planted
    plan, candidates = plan_of(N, 3, trained=True), candidates_of(3, 1, [Prior()], 0)
    spaces = spaces_of_features(features)
    trained = fit_fold(spaces, plan, 0, responses, candidates)
    frozen = fit_fold(spaces, replace(plan, backbone_trained=False), 0, responses, candidates)
    assert sorted(trained.rows) == sorted(frozen.rows)
    everything = frozenset({0, 1, 2})
    assert trained.errors[everything].values.sum() != frozen.errors[everything].values.sum()
