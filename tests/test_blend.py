"""Blends learnt from moments are those that explicit predictions give, and no fold has a say in its own weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache.store
import heads.blend
from featcache.challenge import Subject
from featcache.images import ImageFiles
from featcache.splits import assign_folds
from featcache.store import create_store
from heads.blend import (
    METHODS,
    Moments,
    blend_hemisphere,
    blend_r,
    by_score,
    challenge_quality,
    gather_moments,
    greedy,
    location_and_scale,
    nested_r,
    single,
    standardise,
    uniform,
)
from heads.metrics import accuracy_from_r, pearson_r

N_TRAIN, N_TEST, N_VERTICES, N_MODELS = 150, 40, 7, 4
IDS = np.random.default_rng(9).permutation(73_000)[: N_TRAIN + N_TEST]
FOLDS = assign_folds(IDS[:N_TRAIN], 5, 0)


def made_up(n_models=N_MODELS, seed=0, noise=(0.5, 1, 2, 4)):
    """Predictions (n_models, n_images, n_vertices) of models of several qualities, units and places, and responses."""
    rng = np.random.default_rng(seed)
    responses = rng.normal(size=(N_TRAIN + N_TEST, N_VERTICES)) * 3 + 1
    predictions = [
        scale * (responses + size * 3 * rng.normal(size=responses.shape)) + scale
        for size, scale in zip(np.resize(noise, n_models), np.resize([1, 0.1, 20, 2], n_models), strict=True)
    ]
    return np.stack(predictions).astype(np.float32), responses.astype(np.float32)


CASES = {
    "plain": lambda p, y: (p, y),
    "one model": lambda p, y: (p[:1], y),
    "the same model twice": lambda p, y: (p[[0, 0, 1]], y),
    "a constant model": lambda p, y: (np.stack([p[0], np.full_like(p[0], 0.3), p[1]]), y),
    "only a constant model": lambda p, y: (np.full_like(p[:1], 7.7), y),
    "a vertex where one model is constant": lambda p, y: (np.where(np.arange(N_VERTICES) == 2, p * [[[0]]] + 5, p), y),
    "large offsets": lambda p, y: (p + 1e4, y - 1e4),
    "a model the other way round": lambda p, y: (np.stack([p[0], -p[1], p[2]]), y),
    "responses that never change": lambda p, y: (p, np.where(np.arange(N_VERTICES) == 3, 1000.1, y)),
    "responses that are 0": lambda p, y: (p, np.where(np.arange(N_VERTICES) == 3, 0, y)),
}


def case(name):
    predictions, responses = CASES[name](*made_up())
    return predictions.astype(np.float32), responses.astype(np.float32)


@pytest.fixture(params=CASES)
def data(request):
    return case(request.param)


def slow_r(blend, responses):
    """(n_vertices,), 0 where either side is constant."""
    r = np.zeros(responses.shape[1])
    for vertex, (p, y) in enumerate(zip(blend.T.astype(np.float64), responses.T.astype(np.float64), strict=True)):
        if np.ptp(y) > 0 and np.std(p) > 1e-9 * np.abs(p).max():
            r[vertex] = np.corrcoef(p, y)[0, 1]
    return r


def slow_standard(predictions):
    """Standardised over the training images, per model and vertex; a constant model is 0."""
    trained = predictions[:, :N_TRAIN].astype(np.float64)
    mean, scale = trained.mean(1, keepdims=True), trained.std(1, keepdims=True)
    return (predictions - mean) / np.where(np.ptp(trained, axis=1, keepdims=True) == 0, 1, scale)


def mixed(weights, standard):
    """(n_images, n_vertices)"""
    return np.einsum("m,miv->iv", weights, standard)


def slow_moments(predictions, responses, folds=FOLDS):
    p, y = predictions[:, : len(folds)].astype(np.float64), responses[: len(folds)].astype(np.float64)
    parts = [(p[:, folds == fold], y[folds == fold]) for fold in range(5)]
    return Moments(
        np.array([float(len(y)) for _, y in parts]),
        np.array([np.einsum("miv->vm", p) for p, _ in parts]),
        np.array([np.einsum("miv,kiv->vmk", p, p) for p, _ in parts]),
        np.array([np.einsum("miv,iv->vm", p, y) for p, y in parts]),
        np.array([y.sum(0) for _, y in parts]),
        np.array([(y**2).sum(0) for _, y in parts]),
    )


def standard_moments(predictions, responses):
    raw = slow_moments(predictions, responses)
    return standardise(raw, *location_and_scale(raw.total()))


def subject_of(folder, responses, noise_ceiling=None):
    path = folder / "training_split" / "training_fmri" / "lh_training_fmri.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, responses[:N_TRAIN])
    train, test = (
        ImageFiles(tuple(Path(f"{image_id}.png") for image_id in ids), ids) for ids in (IDS[:N_TRAIN], IDS[N_TRAIN:])
    )
    nothing = {"lh": {}, "rh": {}}
    ceilings = {"lh": noise_ceiling, "rh": None}
    return Subject("subj01", folder, train, test, {"lh": N_VERTICES, "rh": N_VERTICES}, nothing, ceilings, ceilings)


def stores_of(folder, predictions):
    stores = []
    for model, of_model in enumerate(predictions):
        store = create_store(folder, f"model{model}", {"model": model}, IDS, N_TRAIN, {"lh": N_VERTICES}, {})
        store.append({"lh": of_model})
        stores.append(store)
    return stores


def blended(folder, predictions, responses, method="greedy", noise_ceiling=None):
    return blend_hemisphere(subject_of(folder, responses, noise_ceiling), "lh", stores_of(folder, predictions), method)


def assert_same_moments(one, other, rtol=1e-9):
    for name, values in vars(other).items():
        np.testing.assert_allclose(getattr(one, name), values, rtol=rtol, err_msg=name)


def assert_gathered(found, slow):
    """About the means and in units of the spreads, which is all that a blend sees; float32 has summed some rows."""
    where = location_and_scale(slow.total())
    one, other = standardise(found, *where), standardise(slow, *where)
    level = slow.total().response / slow.total().n
    spread = np.sqrt(np.maximum(slow.total().response_square / slow.total().n - level**2, 1e-6))
    np.testing.assert_array_equal(one.n, other.n)
    np.testing.assert_allclose(one.model, other.model, atol=1e-4)
    np.testing.assert_allclose(one.product, other.product, atol=1e-4)
    cross = [(m.cross - level[:, None] * m.model) / spread[:, None] for m in (one, other)]
    np.testing.assert_allclose(*cross, atol=1e-4)
    squares = [(m.response_square - 2 * level * m.response + m.n[:, None] * level**2) / spread**2 for m in (one, other)]
    np.testing.assert_allclose(*squares, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    n_train=st.integers(10, 80),
    n_vertices=st.integers(1, 9),
    n_models=st.integers(1, 6),
    offset=st.sampled_from([0, 1000]),
    constant=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_batches_of_any_shape_add_up_to_the_plain_sums(n_train, n_vertices, n_models, offset, constant, seed):
    rng = np.random.default_rng(seed)
    folds = rng.integers(0, 5, n_train)  # a fold may have no image, or one
    values = (rng.normal(size=(n_models + 1, n_train, n_vertices)) + offset).astype(np.float32)
    if constant:
        values[0, :, 0] = 0.3
    sums = torch.zeros(5, n_vertices, n_models + 2, n_models + 2)
    means = torch.from_numpy(values.mean(1, dtype=np.float64).T).float()
    for rows in np.array_split(np.arange(n_train), 3):
        rows = rows[np.argsort(folds[rows])]
        counts = np.bincount(folds[rows], minlength=5).tolist()
        heads.blend._add(sums, counts, torch.from_numpy(values[:, rows]), means)
    found = heads.blend._shifted_back(sums, np.bincount(folds, minlength=5), means)
    shift = means.double().numpy()
    p, y = values[:-1].astype(np.float64), values[-1].astype(np.float64)
    for fold in range(5):
        own, of = p[:, folds == fold], y[folds == fold]
        centred, level = own - shift[:, :-1].T[:, None], of - shift[:, -1]
        n = len(of)
        assert found.n[fold] == n
        np.testing.assert_allclose(found.model[fold], own.sum(1).T, rtol=1e-6, atol=1e-3)
        about = found.product[fold] - (
            shift[:, :-1][:, :, None] * own.sum(1).T[:, None] + own.sum(1).T[:, :, None] * shift[:, :-1][:, None]
        )
        about += n * shift[:, :-1][:, :, None] * shift[:, :-1][:, None]
        np.testing.assert_allclose(about, np.einsum("mnv,knv->vmk", centred, centred), atol=2e-3)
        cross = found.cross[fold] - shift[:, -1:] * own.sum(1).T - shift[:, :-1] * of.sum(0)[:, None]
        cross += n * shift[:, :-1] * shift[:, -1:]
        np.testing.assert_allclose(cross, np.einsum("mnv,nv->vm", centred, level), atol=2e-3)
        np.testing.assert_allclose(found.response[fold], of.sum(0), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("chunk_rows", [256, 16])
def test_moments_are_gathered_from_the_stores(chunk_rows, data, tmp_path, monkeypatch):
    monkeypatch.setattr(featcache.store, "_CHUNK_ROWS", chunk_rows)
    predictions, responses = data
    stores = stores_of(tmp_path, predictions)
    assert stores[0].chunk_rows("lh") == min(chunk_rows, N_TRAIN + N_TEST)
    moments = gather_moments(subject_of(tmp_path, responses), "lh", stores)
    assert_gathered(moments, slow_moments(predictions, responses))


def test_moments_are_of_the_training_images_alone(tmp_path):
    predictions, responses = made_up()
    other = predictions.copy()
    other[:, N_TRAIN:] += 100
    for folder, of_folder in (("a", predictions), ("b", other)):
        (tmp_path / folder).mkdir()
        moments = gather_moments(
            subject_of(tmp_path / folder, responses), "lh", stores_of(tmp_path / folder, of_folder)
        )
        assert_gathered(moments, slow_moments(predictions, responses))


def test_total_leaves_out_the_fold_that_it_should():
    predictions, responses = made_up()
    raw = slow_moments(predictions, responses)
    kept = FOLDS != 3
    part = slow_moments(predictions[:, :N_TRAIN][:, kept], responses[:N_TRAIN][kept], FOLDS[kept])
    assert_same_moments(raw.total(without=3), part.total())
    assert raw.total().n == N_TRAIN


def test_location_and_scale_are_those_of_the_predictions(data):
    predictions, responses = data
    mean, scale = location_and_scale(slow_moments(predictions, responses).total())
    trained = predictions[:, :N_TRAIN].astype(np.float64)
    constant = np.ptp(trained, axis=1) == 0
    np.testing.assert_allclose(mean, trained.mean(1).T, rtol=1e-9)
    np.testing.assert_allclose(scale, np.where(constant, 1, trained.std(1)).T, rtol=1e-6)


def test_standardised_moments_are_those_of_standardised_predictions(data):
    predictions, responses = data
    moments = standard_moments(predictions, responses)
    expected = slow_moments(slow_standard(predictions), responses)
    size = np.sqrt(expected.response_square.max())
    for name, values in vars(expected).items():
        tolerance = 1e-5 * (size if name == "cross" else 1)
        np.testing.assert_allclose(getattr(moments, name), values, rtol=1e-6, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
def test_r_from_moments_is_r_of_the_blend(data, seed):
    predictions, responses = data
    weights = np.random.default_rng(seed).uniform(size=(5, len(predictions)))
    weights[0, 1:] = 0
    r = blend_r(standard_moments(predictions, responses).total(), weights)
    standard = slow_standard(predictions)[:, :N_TRAIN]
    expected = [slow_r(mixed(w, standard), responses[:N_TRAIN]) for w in weights]
    np.testing.assert_allclose(r, expected, atol=1e-6)
    assert (np.abs(r) <= 1).all()


def test_one_blend_or_many():
    moments = standard_moments(*made_up()).total()
    weights = np.random.default_rng(0).uniform(size=(2, 3, N_MODELS))
    r = blend_r(moments, weights)
    assert r.shape == (2, 3, N_VERTICES)
    np.testing.assert_allclose(blend_r(moments, weights[1, 2]), r[1, 2], atol=1e-12)
    np.testing.assert_allclose(blend_r(moments, 17 * weights), r, atol=1e-9)


def test_r_of_weights_that_differ_from_fold_to_fold(data):
    predictions, responses = data
    weights = np.random.default_rng(1).uniform(size=(5, len(predictions)))
    standard = slow_standard(predictions)[:, :N_TRAIN]
    blend = np.empty((N_TRAIN, N_VERTICES))
    for fold, w in enumerate(weights):
        blend[fold == FOLDS] = mixed(w, standard)[fold == FOLDS]
    r = nested_r(standard_moments(predictions, responses), weights)
    np.testing.assert_allclose(r, slow_r(blend, responses[:N_TRAIN]), atol=1e-6)


def test_quality_is_the_challenge_metric_where_there_are_ceilings():
    rng = np.random.default_rng(0)
    r, ceiling = rng.uniform(-1, 1, size=(2, 3, 20)), rng.uniform(size=20).astype(np.float32)
    ceiling[[2, 5]] = 0
    quality = challenge_quality(ceiling)(r)
    counted = ceiling > 0
    expected = np.minimum(np.maximum(r, 0) ** 2 / np.where(counted, ceiling, 1), 1)[..., counted].mean(-1) * 100
    np.testing.assert_allclose(quality, expected, rtol=1e-6)
    assert challenge_quality(ceiling)(r[0, 0]).shape == ()


@pytest.mark.parametrize("ceiling", [None, np.zeros(20, dtype=np.float32)])
def test_quality_is_mean_r2_where_there_are_none(ceiling):
    r = np.random.default_rng(0).uniform(-1, 1, size=(4, 20))
    np.testing.assert_allclose(challenge_quality(ceiling)(r), (np.maximum(r, 0) ** 2).mean(-1))


CEILINGS = {"no ceiling": None, "ceilings": np.linspace(0, 1, N_VERTICES, dtype=np.float32)}
all_ceilings = pytest.mark.parametrize("ceiling", CEILINGS.values(), ids=CEILINGS)


def slow_quality(weights, standard, responses, ceiling):
    r = slow_r(mixed(np.asarray(weights, dtype=float), standard), responses)
    return (np.maximum(r, 0) ** 2).mean() if ceiling is None else np.nanmean(accuracy_from_r(r, ceiling))


def of_training(predictions, responses):
    return slow_standard(predictions)[:, :N_TRAIN], responses[:N_TRAIN]


@all_ceilings
@pytest.mark.parametrize("best", range(N_MODELS))
def test_single_is_the_best_model(best, ceiling):
    predictions, responses = made_up(noise=np.roll([0.5, 1, 2, 4], best))
    weights = single(standard_moments(predictions, responses).total(), challenge_quality(ceiling))
    assert weights.tolist() == np.eye(N_MODELS)[best].tolist()


@all_ceilings
def test_scores_are_the_weights(ceiling):
    predictions, responses = made_up()
    weights = by_score(standard_moments(predictions, responses).total(), challenge_quality(ceiling))
    scores = [slow_quality(w, *of_training(predictions, responses), ceiling) for w in np.eye(N_MODELS)]
    np.testing.assert_allclose(weights, np.array(scores) / sum(scores), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@all_ceilings
def test_weights_are_shares(method, ceiling, data):
    predictions, responses = data
    weights = METHODS[method](standard_moments(predictions, responses).total(), challenge_quality(ceiling))
    assert weights.shape == (len(predictions),)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)


def test_no_model_that_helps_gives_every_model_the_same():
    predictions, responses = made_up()
    moments = standard_moments(-predictions, responses).total()
    np.testing.assert_allclose(by_score(moments, challenge_quality(None)), 1 / N_MODELS)
    np.testing.assert_allclose(uniform(moments, challenge_quality(None)), 1 / N_MODELS)


def slow_greedy(standard, responses, ceiling, n_rounds):
    chosen, best = np.zeros(len(standard)), -np.inf
    for _ in range(n_rounds):
        scores = [slow_quality(chosen + model, standard, responses, ceiling) for model in np.eye(len(standard))]
        if max(scores) <= best:
            break
        best, chosen = max(scores), chosen + np.eye(len(standard))[np.argmax(scores)]
    return chosen / chosen.sum()


@all_ceilings
@pytest.mark.parametrize("n_rounds", [1, 2, 6])
@pytest.mark.parametrize("noise", [(1, 1.1, 2, 1.2), (0.5, 4, 4, 4)])
def test_greedy_picks_what_trying_everything_picks(n_rounds, noise, ceiling, monkeypatch):
    monkeypatch.setattr(heads.blend, "_GREEDY_ROUNDS", n_rounds)
    predictions, responses = made_up(noise=noise)
    weights = greedy(standard_moments(predictions, responses).total(), challenge_quality(ceiling))
    expected = slow_greedy(*of_training(predictions, responses), ceiling, n_rounds)
    np.testing.assert_allclose(weights, expected, atol=1e-12)


@all_ceilings
@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_never_below_the_best_model_where_it_learnt(seed, ceiling):
    predictions, responses = made_up(n_models=6, seed=seed, noise=(2, 2.5, 3, 3.5, 4, 10))
    moments, quality = standard_moments(predictions, responses).total(), challenge_quality(ceiling)
    score = {learn: quality(blend_r(moments, learn(moments, quality))) for learn in (greedy, single)}
    assert score[greedy] > score[single]  # models with errors of their own: an average is better


def test_greedy_takes_a_model_alone_where_the_others_only_harm():
    predictions, responses = made_up(n_models=3, noise=(0.01, 50, 50))
    weights = greedy(standard_moments(predictions, responses).total(), challenge_quality(None))
    assert weights.tolist() == [1, 0, 0]


@pytest.mark.parametrize("method", METHODS)
@all_ceilings
def test_the_whole_of_it(method, ceiling, data, tmp_path):
    predictions, responses = data
    result = blended(tmp_path, predictions, responses, method, ceiling)
    standard, of_images = slow_standard(predictions), responses[:N_TRAIN]
    moments, quality = standard_moments(predictions, responses), challenge_quality(ceiling)
    learners = {"best single": single, "uniform": uniform, method: METHODS[method]}
    assert set(result.r) == set(learners)
    for name, learn in learners.items():
        blend = np.empty((N_TRAIN, N_VERTICES))
        for fold in range(5):
            weights = learn(moments.total(without=fold), quality)
            blend[fold == FOLDS] = mixed(weights, standard[:, :N_TRAIN])[fold == FOLDS]
        np.testing.assert_allclose(result.r[name], slow_r(blend, of_images), atol=1e-6)
    np.testing.assert_allclose(result.weights, METHODS[method](moments.total(), quality), atol=1e-9)
    assert result.test.shape == (N_TEST, N_VERTICES)
    assert result.test.dtype == np.float32
    # The regression of the responses on the blend, where the blend goes the right way.
    r = slow_r(mixed(result.weights, standard[:, :N_TRAIN]), of_images)
    for vertex in np.flatnonzero(r > 0.01):
        x, y = mixed(result.weights, standard)[:, vertex], of_images[:, vertex].astype(np.float64)
        slope, intercept = np.polyfit(x[:N_TRAIN], y, 1)
        size = np.abs(y).max()
        np.testing.assert_allclose(result.test[:, vertex], slope * x[N_TRAIN:] + intercept, atol=1e-5 * size, rtol=1e-5)
    assert np.isfinite(result.test).all()


@pytest.mark.parametrize("method", ["score", "greedy"])
def test_responses_of_a_fold_do_not_reach_its_weights(method):
    predictions, responses = made_up(noise=(2, 2.5, 3, 3.5))
    shuffled = responses.copy()
    shuffled[:N_TRAIN][FOLDS == 2] = np.random.default_rng(4).normal(size=(np.sum(FOLDS == 2), N_VERTICES)) * 30
    quality = challenge_quality(None)
    before, after = (
        [METHODS[method](standard_moments(predictions, y).total(without=fold), quality) for fold in range(5)]
        for y in (responses, shuffled)
    )
    np.testing.assert_array_equal(after[2], before[2])
    assert not all(np.array_equal(after[fold], before[fold]) for fold in (0, 1, 3, 4))


def test_a_perfect_model_in_other_units_gives_the_responses(tmp_path):
    _, responses = made_up()
    predictions = np.stack([1e3 * responses - 5e3, np.random.default_rng(1).normal(size=responses.shape)])
    result = blended(tmp_path, predictions.astype(np.float32), responses)
    assert result.weights.tolist() == [1, 0]
    np.testing.assert_allclose(result.test, responses[N_TRAIN:], atol=1e-3)
    for name in ("best single", "greedy"):
        np.testing.assert_allclose(result.r[name], 1, atol=1e-6)


def test_units_of_the_models_do_not_matter(tmp_path):
    predictions, responses = made_up()
    one = blended(tmp_path / "a", predictions, responses)
    moved = predictions * np.float32([[[1e-3]], [[50]], [[1]], [[7]]]) + np.float32(3)
    other = blended(tmp_path / "b", moved, responses)
    np.testing.assert_allclose(other.weights, one.weights, atol=1e-9)
    np.testing.assert_allclose(other.test, one.test, atol=1e-2)
    np.testing.assert_allclose(other.r["greedy"], one.r["greedy"], atol=1e-4)


def test_a_blend_of_models_with_errors_of_their_own_beats_the_best_of_them(tmp_path):
    predictions, responses = made_up(n_models=4, noise=(1, 1, 1, 1))
    result = blended(tmp_path, predictions, responses)
    assert result.r["greedy"].mean() > result.r["best single"].mean() + 0.05
    r_test = pearson_r(result.test, responses[N_TRAIN:])
    alone = [pearson_r(of_model[N_TRAIN:], responses[N_TRAIN:]).mean() for of_model in predictions]
    assert r_test.mean() > max(alone) + 0.05


def test_what_no_model_explains_is_predicted_by_the_mean(tmp_path):
    predictions, responses = made_up()
    predictions[:] = np.random.default_rng(5).normal(size=predictions.shape)
    predictions[:, :N_TRAIN] -= 2 * (responses[:N_TRAIN] - 1)  # against the responses, if anything
    result = blended(tmp_path, predictions, responses)
    mean, spread = responses[:N_TRAIN].mean(0), responses[:N_TRAIN].std(0)
    assert (np.abs(result.test - mean) < 0.01 * spread).all()
    assert (result.test.std(0) > 0).all()  # a trace of the blend, not a constant


def test_responses_that_never_change_are_predicted_as_they_are(tmp_path):
    predictions, responses = case("responses that never change")
    result = blended(tmp_path, predictions, responses)
    np.testing.assert_allclose(result.test[:, 3], 1000.1, rtol=1e-5)
    assert all(r[3] == pytest.approx(0, abs=1e-6) for r in result.r.values())


@pytest.mark.parametrize("value", [0.3, 7.7, 1e4])
def test_a_model_that_never_changes_adds_no_noise(value, tmp_path):
    # Out of fold and test predictions are sums in another order: the last digit of a constant may differ.
    responses = made_up()[1]
    constant = np.full((1, N_TRAIN + N_TEST, N_VERTICES), value, dtype=np.float32)
    constant[:, N_TRAIN::2] = np.nextafter(np.float32(value), np.float32(np.inf))
    result = blended(tmp_path, constant, responses)
    mean, spread = responses[:N_TRAIN].mean(0), responses[:N_TRAIN].std(0)
    assert (np.abs(result.test - mean) < 0.01 * spread).all()


def test_all_zero_ceilings_are_no_ceilings(tmp_path):
    predictions, responses = made_up(noise=(2, 2.5, 3, 3.5))
    zero = blended(tmp_path / "a", predictions, responses, noise_ceiling=np.zeros(N_VERTICES, dtype=np.float32))
    none = blended(tmp_path / "b", predictions, responses)
    np.testing.assert_array_equal(zero.weights, none.weights)
    np.testing.assert_array_equal(zero.test, none.test)


def test_ceilings_decide_where_models_differ(tmp_path):
    # One model is good at vertices that count, the other at those that do not.
    predictions, responses = made_up(n_models=2, noise=(0.2, 0.2))
    rng, half = np.random.default_rng(0), np.arange(N_VERTICES) < 4
    predictions[0][:, ~half] = rng.normal(size=(N_TRAIN + N_TEST, N_VERTICES - 4))
    predictions[1][:, half] = rng.normal(size=(N_TRAIN + N_TEST, 4))
    for model, counted in enumerate((half, ~half)):
        result = blended(tmp_path / str(model), predictions, responses, noise_ceiling=counted.astype(np.float32))
        assert result.weights[model] == result.weights.max() > 0.9
