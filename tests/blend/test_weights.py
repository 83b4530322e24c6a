"""Learners of weights against trying everything, image by image, and what there is where nothing can be learnt."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.optimize import nnls as one_by_one

import heads.blend.weights
from heads.blend.weights import Groups, Judge, by_score, greedy, learners, r_of, single, stacked, uniform
from heads.config import BLENDS, LEVELS
from heads.scores.metrics import accuracy_from_r
from support.blends import (
    CASES,
    FOLDS,
    LABELS,
    N_MODELS,
    N_TRAIN,
    N_VERTICES,
    case,
    groups,
    made_up,
    mixed,
    slow_products,
    slow_r,
    standardised,
)

CEILINGS = {"no ceiling": None, "ceilings": np.linspace(0, 1, N_VERTICES, dtype=np.float32)}
all_ceilings = pytest.mark.parametrize("ceiling", CEILINGS.values(), ids=CEILINGS)
all_levels = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture(params=CASES)
def data(request):
    return case(request.param)


def judge_of(ceiling):
    return Judge.of([ceiling], [N_VERTICES])


def of_training(predictions, responses):
    return standardised(predictions)[:, :N_TRAIN], responses[:N_TRAIN]


def slow_values(r, ceiling):
    """(n_vertices,) NaN where the vertex does not count."""
    return np.maximum(r, 0) ** 2 if ceiling is None else accuracy_from_r(r, ceiling) / 100


def slow_scores(weights, standard, responses, ceiling, level):
    """(n_groups,) of weights (n_vertices, n_models); -1 where no vertex counts."""
    values = slow_values(slow_r(mixed(weights, standard), responses), ceiling)
    labels = np.array(LABELS[level])
    own = [values[labels == group] for group in range(labels.max() + 1)]
    return np.array([np.nanmean(of) if np.isfinite(of).any() else -1 for of in own])


@pytest.mark.parametrize("seed", range(3))
def test_r_from_products_is_r_of_the_blend(data, seed):
    predictions, responses = data
    weights = np.random.default_rng(seed).uniform(size=(N_VERTICES, len(predictions)))
    weights[:2, 1:] = 0
    standard, own = of_training(predictions, responses)
    total = slow_products(predictions, responses).total()
    np.testing.assert_allclose(r_of(total.sums, weights), slow_r(mixed(weights, standard), own), atol=1e-6)
    np.testing.assert_allclose(r_of(total.sums, 17 * weights), r_of(total.sums, weights), atol=1e-9)
    expected = [slow_r(of_model, own) for of_model in standard]
    np.testing.assert_allclose(total.r_of_each, expected, atol=1e-6)


def test_judge_is_the_challenge_metric():
    rng = np.random.default_rng(0)
    r, ceiling = rng.uniform(-1, 1, size=(2, 3, 20)), rng.uniform(size=20).astype(np.float32)
    ceiling[[2, 5]] = 0
    judge = Judge.of([ceiling[:8], ceiling[8:]], [8, 12])
    expected = [[np.nanmean(accuracy_from_r(one, ceiling)) for one in part] for part in r]
    np.testing.assert_allclose(100 * judge.mean(r), expected, rtol=1e-6)
    assert judge.at(np.array([2, 3])).counts.tolist() == [False, True]


def test_ceilings_that_are_0_everywhere_are_none():
    r = np.random.default_rng(0).uniform(-1, 1, size=(4, 20))
    for ceiling in (None, np.zeros(20, np.float32)):
        np.testing.assert_allclose(Judge.of([ceiling], [20]).mean(r), (np.maximum(r, 0) ** 2).mean(-1))
    one_side = Judge.of([np.zeros(5, np.float32), None], [5, 15])
    np.testing.assert_allclose(one_side.mean(r), (np.maximum(r[:, 5:], 0) ** 2).mean(-1))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [2, 0, 2, 2], [0, 0, 0, 0], [3, 3, 1, 0]])
def test_groups_sum_and_spread(labels):
    values = np.random.default_rng(0).normal(size=(4, 3, 2))
    of = Groups(np.array(labels), 4)
    expected = np.stack([values[np.array(labels) == group].sum(0) for group in range(4)])
    np.testing.assert_allclose(of.sum(values), expected, atol=1e-12)
    np.testing.assert_array_equal(of.spread(expected), expected[labels])


@all_levels
@all_ceilings
@pytest.mark.parametrize("best", range(N_MODELS))
def test_single_is_the_best_model(best, ceiling, level):
    predictions, responses = made_up(noise=np.roll([0.5, 1, 2, 4], best))
    weights = single(slow_products(predictions, responses).total(), groups(level), judge_of(ceiling))
    standard, own = of_training(predictions, responses)
    scores = [slow_scores(np.tile(one, (N_VERTICES, 1)), standard, own, ceiling, level) for one in np.eye(N_MODELS)]
    for found, of_group in zip(weights, np.transpose(scores), strict=True):
        if of_group.max() < 0:
            assert np.isnan(found).all()
        else:  # of models that all reach the ceiling the first
            assert found.tolist() == np.eye(N_MODELS)[np.argmax(of_group > of_group.max() - 1e-9)].tolist()
            assert found[best] == 1 or ceiling is not None


@all_levels
@all_ceilings
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_score_is_a_softmax_of_mean_r(temperature, ceiling, level):
    predictions, responses = made_up(noise=(1.5, 2, 3, 4))
    standard, own = of_training(predictions, responses)
    weights = by_score(slow_products(predictions, responses).total(), groups(level), judge_of(ceiling), temperature)
    r = np.stack([np.maximum(slow_r(of_model, own), 0) for of_model in standard], axis=1)
    for group, found in enumerate(weights):
        counted = (np.array(LABELS[level]) == group) & (True if ceiling is None else ceiling > 0)
        if not counted.any():
            assert np.isnan(found).all()
            continue
        powers = np.exp(r[counted].mean(0) / temperature)
        np.testing.assert_allclose(found, powers / powers.sum(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", BLENDS)
@all_levels
@all_ceilings
def test_weights_are_shares_or_nothing(method, level, ceiling, data):
    predictions, responses = data
    total = slow_products(predictions, responses).total()
    for learn in learners(method, seed=0).values():
        weights = learn(total, groups(level), judge_of(ceiling))
        assert weights.shape == (groups(level).n, len(predictions))
        there = ~np.isnan(weights).any(axis=1)
        assert (weights[there] >= 0).all() and np.isnan(weights[~there]).all()
        np.testing.assert_allclose(weights[there].sum(1), 1)
        if method == "uniform":
            np.testing.assert_allclose(weights, 1 / len(predictions))


def test_stacking_a_vertex_is_non_negative_least_squares_of_its_images():
    predictions, responses = made_up(noise=(1, 2, 2.5, 3))
    predictions[1] = 2 - predictions[1]  # the wrong way round: no weight
    standard, own = of_training(predictions, responses)
    weights = stacked(slow_products(predictions, responses).total(), groups("vertex"), judge_of(None))
    for vertex in range(N_VERTICES):
        y = own[:, vertex].astype(np.float64)
        expected = one_by_one(standard[:, :, vertex].T, y - y.mean())[0]
        np.testing.assert_allclose(weights[vertex], expected / expected.sum(), atol=1e-6)
    assert (weights[:, 1] == 0).all()


@pytest.mark.parametrize("level", ["all", "surface"])
@pytest.mark.parametrize("ceiling", [None, np.array([0, 0.5, 0.6, 0.7, 0.8, 0.9, 1], np.float32)])
def test_stacking_a_group_comes_close_to_the_best_weights_for_the_metric(level, ceiling):
    predictions, responses = made_up(n_models=4, noise=(2, 2.5, 3, 3.5), seed=3)
    rng = np.random.default_rng(1)
    predictions[:, :, ::2] += 30 * rng.normal(size=predictions[:, :, ::2].shape).astype(np.float32)  # little signal
    standard, own = of_training(predictions, responses)
    weights = stacked(slow_products(predictions, responses).total(), groups(level), judge_of(ceiling))
    labels = np.array(LABELS[level])
    for group, found in enumerate(weights):

        def loss(w, group=group):
            rows = np.where((labels == group)[:, None], w, 1)
            return -slow_scores(rows, standard, own, ceiling, level)[group]

        best = minimize(loss, np.full(4, 0.25), method="SLSQP", bounds=[(0, 1)] * 4).fun
        assert -loss(found) > 0.99 * -best > -loss(np.full(4, 0.25))


def slow_greedy(standard, responses, ceiling, level, n_rounds):
    """(n_groups, n_models) from the best k, then one by one."""
    n_models, labels = len(standard), np.array(LABELS[level])
    n_groups = labels.max() + 1

    def scores(chosen):
        return slow_scores(chosen[labels], standard, responses, ceiling, level)

    alone = np.stack([scores(np.tile(model, (n_groups, 1))) for model in np.eye(n_models)], axis=1)
    rank = np.argsort(np.argsort(-alone, axis=1, kind="stable"), axis=1)
    starts = [(rank < k).astype(float) for k in range(1, n_models // 2 + 2)]
    chosen = np.stack(
        [
            max((s[g] for s in starts), key=lambda row, g=g: scores(np.tile(row, (n_groups, 1)))[g])
            for g in range(n_groups)
        ]
    )
    for _ in range(n_rounds):
        before = scores(chosen)
        tried = np.stack([scores(chosen + model) for model in np.eye(n_models)], axis=1)
        better = tried.max(1) > before * (1 + 1e-6)
        chosen[better, np.argmax(tried, axis=1)[better]] += 1
    return np.where((alone.max(1) >= 0)[:, None], chosen / chosen.sum(1, keepdims=True), np.nan)


@pytest.mark.slow
@all_levels
@all_ceilings
@pytest.mark.parametrize("n_rounds", [1, 2, 6])
@pytest.mark.parametrize("noise", [(1, 1.1, 2), (0.5, 4, 4), (3, 3.1, 3.2)])
def test_greedy_picks_what_trying_everything_picks(n_rounds, noise, ceiling, level, monkeypatch):
    monkeypatch.setattr(heads.blend.weights, "_ROUNDS", n_rounds)
    predictions, responses = made_up(n_models=3, noise=noise)
    weights = greedy(slow_products(predictions, responses).total(), groups(level), judge_of(ceiling))
    expected = slow_greedy(*of_training(predictions, responses), ceiling, level, n_rounds)
    np.testing.assert_allclose(weights, expected, atol=1e-12)


def test_bags_of_a_greedy_blend_follow_from_the_seed_and_lack_models():
    predictions, responses = made_up(n_models=6, noise=(2, 2, 2, 2, 2, 2))
    total = slow_products(predictions, responses).total()
    one, again, other = (greedy(total, groups("all"), judge_of(None), seed, n_bags=5) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(one.sum(1), 1)


@all_ceilings
@pytest.mark.parametrize("seed", range(5))
def test_blends_of_models_with_errors_of_their_own_beat_the_best_where_they_learnt(seed, ceiling):
    predictions, responses = made_up(n_models=6, seed=seed, noise=(2, 2.5, 3, 3.5, 4, 10))
    total, judge, every = slow_products(predictions, responses).total(), judge_of(ceiling), groups("all")
    score = {
        learn: judge.mean(r_of(total.sums, every.spread(learn(total, every, judge))))
        for learn in (greedy, stacked, single, uniform)
    }
    assert min(score[greedy], score[stacked]) > score[single]
    assert score[stacked] > score[uniform]


def test_greedy_takes_a_model_alone_where_the_others_only_harm():
    predictions, responses = made_up(n_models=3, noise=(0.01, 50, 50))
    weights = greedy(slow_products(predictions, responses).total(), groups("all"), judge_of(None))
    assert weights.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("method", ["score", "greedy", "nnls"])
def test_ceilings_decide_where_models_differ(method):
    # One model is good at vertices that count, the other at those that do not.
    predictions, responses = made_up(n_models=2, noise=(0.2, 0.2))
    rng, half = np.random.default_rng(0), np.arange(N_VERTICES) < 4
    predictions[0][:, ~half] = rng.normal(size=(len(responses), N_VERTICES - 4))
    predictions[1][:, half] = rng.normal(size=(len(responses), 4))
    total = slow_products(predictions, responses).total()
    for model, counted in enumerate((half, ~half)):
        weights = next(iter(learners(method, 0).values()))(total, groups("all"), judge_of(counted.astype(np.float32)))
        assert weights[0, model] > 0.9


def test_equal_models_have_the_weight_of_one():
    predictions, responses = made_up(n_models=3, noise=(1, 2, 3))
    alone, twice = (
        stacked(slow_products(of, responses).total(), groups("vertex"), judge_of(None))
        for of in (predictions, predictions[[0, 0, 1, 2]])
    )
    np.testing.assert_allclose(twice[:, 0], twice[:, 1], atol=1e-5)
    np.testing.assert_allclose(twice[:, :2].sum(1), alone[:, 0], atol=1e-5)


def test_a_fold_without_images_is_no_fault():
    predictions, responses = made_up()
    products = slow_products(predictions, responses, np.where(FOLDS == 4, 3, FOLDS))
    assert (products.fold(4).r_of_each == 0).all()
