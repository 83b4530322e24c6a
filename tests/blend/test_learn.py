"""Levels of weights, how far each is shrunk to the one above it, and that no fold has a say in its own weights."""

import numpy as np
import pytest

import heads.blend.learn
from heads.blend.learn import SHRINKAGE, Level, judge_of, learn, levels_of, nested_r
from heads.blend.weights import Groups, Judge, learners
from heads.config import BLENDS, LEVELS, BlendConfig
from support.blends import (
    CASES,
    FOLDS,
    LABELS,
    N_TRAIN,
    N_VERTICES,
    case,
    groups,
    made_up,
    mixed,
    slow_products,
    slow_r,
    standardised,
    subject_of,
)

PLAIN = Judge(np.ones(N_VERTICES), np.full(N_VERTICES, True))
ALL_LEVELS = [Level(name, groups(name)) for name in LEVELS]


def learnt(predictions, responses, judge=PLAIN, parts=None, **settings):
    return learn(slow_products(predictions, responses), judge, ALL_LEVELS, BlendConfig(**settings), parts)


def test_levels_part_the_vertices(tmp_path):
    levels = levels_of(subject_of(tmp_path, made_up()[1]))
    assert [level.name for level in levels] == list(LEVELS)
    for level in levels:
        labels = np.array(LABELS[level.name])
        found = level.groups.labels
        assert ((found[:, None] == found) == (labels[:, None] == labels)).all()
    assert levels[2].groups.labels.tolist() == [0, 0, 2, 3, 5, 4, 5]  # the ROIs of each side in order, then none


def test_r_of_weights_that_differ_from_fold_to_fold():
    for name in CASES:
        predictions, responses = case(name)
        weights = np.random.default_rng(1).uniform(size=(5, N_VERTICES, len(predictions)))
        standard = standardised(predictions)[:, :N_TRAIN]
        blend = np.empty((N_TRAIN, N_VERTICES))
        for fold, w in enumerate(weights):
            blend[fold == FOLDS] = mixed(w, standard)[fold == FOLDS]
        r = nested_r(slow_products(predictions, responses), weights)
        np.testing.assert_allclose(r, slow_r(blend, responses[:N_TRAIN]), atol=1e-6, err_msg=name)


def slow_weights(predictions, responses, without, method, per):
    """The same with every blend written out: (n_vertices, n_models) and the shrinkage of each level."""
    products, standard = slow_products(predictions, responses), standardised(predictions)[:, :N_TRAIN]
    others = [fold for fold in range(5) if fold not in without]
    plain = np.full((N_VERTICES, len(predictions)), 1 / len(predictions))
    coarser, left_out, chosen = plain, dict.fromkeys(others, plain), []
    settings = learners(method, 0)

    def own(folds, level, setting):
        return level.groups.spread(settings[setting](products.total(folds), level.groups, PLAIN))

    def mix(one, other, s):
        return np.where(np.isnan(one), other, (1 - s) * one + s * other)

    for level in ALL_LEVELS[: LEVELS.index(per) + 1]:
        best = (-1.0, "", 1.0)
        for setting in settings:
            for s in SHRINKAGE:
                rows = np.isin(FOLDS, others)
                blend = np.zeros((N_TRAIN, N_VERTICES))
                for fold in others:
                    w = mix(own((*without, fold), level, setting), left_out[fold], s)
                    blend[fold == FOLDS] = mixed(w, standard)[fold == FOLDS]
                score = (np.maximum(slow_r(blend[rows], responses[:N_TRAIN][rows]), 0) ** 2).mean()
                if score > best[0] + 1e-9:
                    best = (score, setting, s)
        _, setting, s = best
        left_out = {fold: mix(own((*without, fold), level, setting), left_out[fold], s) for fold in others}
        coarser = mix(own(without, level, setting), coarser, s)
        chosen.append((level.name, setting, s))
    return coarser, chosen


@pytest.mark.slow
@pytest.mark.parametrize("per", LEVELS)
@pytest.mark.parametrize("method", ["nnls", "score"])
@pytest.mark.parametrize("noise", [(1, 1.5, 2), (2, 6, 6)])
def test_shrinkage_is_what_scores_best_on_images_that_were_left_out(noise, method, per):
    predictions, responses = made_up(n_models=3, noise=noise)
    found = learnt(predictions, responses, method=method, per=per)
    weights, chosen = slow_weights(predictions, responses, (), method, per)
    assert [(c.level, c.setting, c.shrinkage) for c in found.choices] == chosen
    np.testing.assert_allclose(found.weights, weights, atol=1e-6)
    for fold in (0, 3):
        expected = slow_weights(predictions, responses, (fold,), method, per)[0]
        np.testing.assert_allclose(found.nested["blend"][fold], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("per", LEVELS)
@pytest.mark.parametrize("method", [method for method in BLENDS if method != "uniform"])
def test_nothing_of_a_fold_reaches_the_weights_it_is_scored_with(method, per):
    predictions, responses = made_up(noise=(2, 2.5, 3, 3.5))
    products = slow_products(predictions, responses)
    changed = products.sums.copy()
    rng = np.random.default_rng(4)
    noise = rng.normal(size=changed[2].shape)
    changed[2] = 100 * noise @ noise.transpose(0, 2, 1)
    config = BlendConfig(method=method, per=per)
    one = learn(type(products)(products.sums, cross_fitted=False), PLAIN, ALL_LEVELS, config)
    other = learn(type(products)(changed, cross_fitted=False), PLAIN, ALL_LEVELS, config)
    for name in ("blend", "best single"):
        np.testing.assert_array_equal(other.nested[name][2], one.nested[name][2])
    assert not all(np.array_equal(other.nested["blend"][f], one.nested["blend"][f]) for f in (0, 1, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("method", BLENDS)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_shares_everywhere(name, method):
    """At the finest level, which takes its weights from all levels above."""
    predictions, responses = case(name)
    found = learnt(predictions, responses, method=method, per="vertex")
    for weights in (found.weights, *(one for nested in found.nested.values() for one in nested)):
        assert weights.shape == (N_VERTICES, len(predictions))
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(1), 1)
    if name == "a constant model":
        assert (found.weights[:, 1] == 0).all()


def kernel_models(n_models, n_images, n_vertices, signal, seed=0):
    """Columns (n_models + 2, n_images, n_vertices) of ridge regressions on features of their own, and folds.

    Responses are linear in the first model's features, plus noise.
    """
    rng = np.random.default_rng(seed)
    folds = np.arange(n_images) % 5
    features = rng.normal(size=(n_models, n_images, 40))
    y = signal * features[0] @ rng.normal(size=(40, n_vertices)) / np.sqrt(40) + rng.normal(size=(n_images, n_vertices))
    columns = []
    for x in features:
        out = np.empty_like(y)
        for fold in range(5):
            own, left = x[fold != folds], x[fold == folds]
            out[fold == folds] = left @ np.linalg.solve(own.T @ own + 100 * np.eye(40), own.T @ y[fold != folds])
        columns.append(out)
    z = np.stack([*columns, y])
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    return np.concatenate([z, np.ones_like(z[:1])]), folds


def scored(columns, folds, cross_fitted, **settings):
    sums = np.stack([np.einsum("civ,div->vcd", *(columns[:, fold == folds],) * 2) for fold in range(5)])
    n_vertices = columns.shape[2]
    judge, one = Judge(np.ones(n_vertices), np.full(n_vertices, True)), np.zeros(n_vertices, dtype=np.int64)
    levels = [Level(name, Groups(one, 1)) for name in LEVELS[:3]]
    levels.append(Level("vertex", Groups(np.arange(n_vertices), n_vertices)))
    products = heads.blend.learn.Products(sums, cross_fitted)
    found = learn(products, judge, levels, BlendConfig(**settings))
    return nested_r(products, found.nested["blend"]).mean(), found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nnls", "score", "greedy"])
def test_models_of_noise_score_nothing_although_all_of_them_knew_the_fold_that_is_scored(method):
    columns, folds = kernel_models(n_models=8, n_images=100, n_vertices=150, signal=0)
    plain, _ = scored(columns, folds, False, method=method, per="vertex")
    free, _ = scored(columns, folds, True, method=method, per="vertex")
    nothing_learnt, _ = scored(columns, folds, True, method="uniform")
    assert plain > nothing_learnt + 0.1  # what nesting alone takes for a blend of some worth
    assert abs(free - nothing_learnt) < 0.015


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nnls", "score", "greedy"])
def test_a_model_that_knows_something_is_found_all_the_same(method):
    columns, folds = kernel_models(n_models=8, n_images=400, n_vertices=60, signal=1)
    r, found = scored(columns, folds, True, method=method, per="vertex")
    assert found.weights[:, 0].mean() > 0.8
    assert r > 0.97 * slow_r(columns[0], columns[-2]).mean()


def many(n_images_a_fold, alike, seed=0):
    """Products of 60 vertices and 6 models with errors of their own; vertices share their best weights or not."""
    rng = np.random.default_rng(seed)
    n_vertices, n_models = 60, 6
    noise = np.full((n_vertices, n_models), 2.0)
    if not alike:
        noise[np.arange(n_vertices), rng.integers(n_models, size=n_vertices)] = 0.5
    columns = []
    for _ in range(5):
        y = rng.normal(size=(n_images_a_fold, n_vertices))
        p = y[:, :, None] + noise * rng.normal(size=(*y.shape, n_models))
        p /= np.sqrt(1 + noise**2)
        columns.append(np.concatenate([p, y[..., None], np.ones_like(y)[..., None]], axis=2))
    products = heads.blend.learn.Products(np.stack([np.einsum("ivc,ivd->vcd", one, one) for one in columns]))
    halves = np.arange(n_vertices) // (n_vertices // 2)
    labels = {"all": 0 * halves, "surface": halves, "roi": halves, "vertex": np.arange(n_vertices)}
    levels = [Level(name, type(ALL_LEVELS[0].groups)(own, own.max() + 1)) for name, own in labels.items()]
    return products, Judge(np.ones(n_vertices), np.full(n_vertices, True)), levels


@pytest.mark.slow
def test_vertices_that_are_alike_share_weights_and_others_have_their_own():
    for alike in (True, False):
        products, judge, levels = many(12 if alike else 60, alike)
        found = {per: learn(products, judge, levels, BlendConfig(method="nnls", per=per)) for per in ("all", "vertex")}
        score = {per: judge.mean(nested_r(products, one.nested["blend"])) for per, one in found.items()}
        single = judge.mean(nested_r(products, found["all"].nested["best single"]))
        shrinkage = found["vertex"].choices[-1].shrinkage
        assert shrinkage >= 0.75 if alike else shrinkage <= 0.5
        assert score["all"] > single
        assert score["vertex"] > (score["all"] - 0.01 if alike else score["all"] + 0.05)


@pytest.mark.slow
def test_shrinkage_is_learnt_from_some_vertices_where_there_are_many(monkeypatch):
    products, judge, levels = many(60, alike=False)
    whole = learn(products, judge, levels, BlendConfig(method="nnls", per="vertex"))
    monkeypatch.setattr(heads.blend.learn, "MOST_VERTICES", 20)
    few = learn(products, judge, levels, BlendConfig(method="nnls", per="vertex"))
    assert few.weights.shape == whole.weights.shape
    assert few.choices[-1].shrinkage == whole.choices[-1].shrinkage
    # own weights are of every vertex; what they are shrunk to is learnt from fewer
    assert np.abs(few.weights - whole.weights).max() < 0.1


@pytest.mark.slow
def test_vertices_that_do_not_count_have_the_weights_of_their_group():
    predictions, responses = made_up(noise=(1, 1.5, 2, 3))
    counts = np.array([True, True, False, True, True, False, True])
    judge = Judge(np.ones(N_VERTICES), counts)
    coarse, fine = (learnt(predictions, responses, judge, method="nnls", per=per) for per in ("surface", "vertex"))
    np.testing.assert_array_equal(fine.weights[~counts], coarse.weights[~counts])
    changed = predictions.copy()
    changed[:, :, ~counts] = np.random.default_rng(0).normal(size=changed[:, :, ~counts].shape)
    other = learnt(changed, responses, judge, method="nnls", per="vertex")
    np.testing.assert_allclose(other.weights, fine.weights, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["score", "nnls", "greedy"])
def test_models_of_one_backbone_are_one_model_of_their_average(method):
    predictions, responses = made_up(noise=(1, 1.5, 2, 3))
    parts = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    found = learnt(predictions, responses, parts=parts, method=method, per="surface")
    standard = standardised(predictions)
    # The average of two standardised models is not of unit spread, so it is put in as a moment and not as a model.
    z = np.einsum("gm,miv->giv", parts, standard)[:, :N_TRAIN]
    y = standardised(responses[None])[:, :N_TRAIN]
    columns = np.concatenate([z, y, np.ones_like(y)])
    sums = np.stack([np.einsum("civ,div->vcd", *(columns[:, fold == FOLDS],) * 2) for fold in range(5)])
    expected = learn(heads.blend.learn.Products(sums), PLAIN, ALL_LEVELS, BlendConfig(method=method, per="surface"))
    np.testing.assert_allclose(found.weights, expected.weights @ parts, atol=1e-9)
    np.testing.assert_allclose(found.weights[:, 0], found.weights[:, 1])


def test_the_judge_of_a_subject_has_both_hemispheres(tmp_path):
    ceiling = np.linspace(0, 1, N_VERTICES, dtype=np.float32)
    judge = judge_of(subject_of(tmp_path, made_up()[1], ceiling))
    assert judge.counts.tolist() == [False] + [True] * 6
    np.testing.assert_allclose(judge.ceiling[1:], ceiling[1:])
