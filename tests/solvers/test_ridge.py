"""Closed-form heads equal the plain formula, and choose penalties by the errors that they say they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge

import heads.solvers.ridge
from featcache.errors import ConfigError
from heads.config import RidgeConfig
from heads.solvers.ridge import RidgeHead, eigenbasis, is_exact, penalty_errors, sum_of_squares
from support.linear import both_selections, planted

SHAPES = [(60, 10), (10, 60), (21, 20), (20, 20), (20, 21), (22, 20), (5, 1), (3, 4)]
MULTIPLES = (1e-3, 1e-2, 0.1, 1.0, 10.0)

all_shapes = pytest.mark.parametrize(("n_images", "n_features"), SHAPES)


def slow_ridge(features, responses, penalties):
    """Weights and intercepts, a vertex at a time: solve (X'X + p I) w = X'y in float64, X and y centred."""
    features, responses = features.astype(np.float64), responses.astype(np.float64)
    centred, weights = features - features.mean(0), []
    for y, penalty in zip(responses.T, penalties, strict=True):
        gram = centred.T @ centred + penalty * np.eye(centred.shape[1])
        weights.append(np.linalg.solve(gram, centred.T @ (y - y.mean())))
    weights = np.stack(weights, axis=1)
    return weights, responses.mean(0) - features.mean(0) @ weights


def assert_is_ridge(head, features, responses, atol=2e-4, weight_atol=1e-3):
    weights, intercept = slow_ridge(features, responses, head.penalties_)
    np.testing.assert_allclose(head.weights_, weights, rtol=1e-3, atol=weight_atol)
    predictions = features.astype(np.float64) @ weights + intercept
    np.testing.assert_allclose(head.predict(features), predictions, rtol=1e-5, atol=atol)


def slow_hat(features, penalty):
    """(n_images, n_images) H with H y the predictions of the training images, intercept and all."""
    centred = features.astype(np.float64) - features.astype(np.float64).mean(0)
    gram = centred.T @ centred + penalty * np.eye(centred.shape[1])
    return centred @ np.linalg.solve(gram, centred.T) + 1 / len(features)


def slow_gcv(features, responses, penalty):
    hat, n_images = slow_hat(features, penalty), len(features)
    residuals = responses - hat @ responses.astype(np.float64)
    return (residuals**2).mean(0) / (1 - np.trace(hat) / n_images) ** 2


def slow_loo(features, responses, penalty):
    """Refit without each image in turn."""
    errors = []
    for left_out in range(len(features)):
        kept = np.arange(len(features)) != left_out
        weights, intercept = slow_ridge(features[kept], responses[kept], [penalty] * responses.shape[1])
        errors.append((responses[left_out] - features[left_out].astype(np.float64) @ weights - intercept) ** 2)
    return np.mean(errors, axis=0)


def errors_of(features, responses, penalties, exact):
    """(n_penalties, n_vertices), as heads choose by them."""
    x, y = torch.from_numpy(features), torch.from_numpy(responses)
    basis, centred = eigenbasis(x), y - y.mean(0)
    scores, squares = basis.train_scores(x), sum_of_squares(centred)
    rows = (scores, centred) if exact else None
    return penalty_errors(basis.values, len(x), scores.T @ centred, squares, torch.tensor(penalties), rows)


@all_shapes
@both_selections
def test_weights_and_predictions_are_those_of_the_formula(n_images, n_features, selection):
    features, responses, _ = planted(n_images, n_features)
    assert_is_ridge(RidgeHead(selection=selection).fit(features, responses), features, responses)


@all_shapes
def test_weights_are_those_of_scikit_learn(n_images, n_features):
    features, responses, _ = planted(n_images, n_features)
    head = RidgeHead(penalties=MULTIPLES).fit(features, responses)
    reference = Ridge(alpha=head.penalties_.astype(np.float64)).fit(features.astype(np.float64), responses)
    np.testing.assert_allclose(head.weights_, reference.coef_.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(head.intercept_, reference.intercept_, rtol=1e-3, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    n_images=st.integers(3, 30),
    n_features=st.integers(1, 30),
    n_vertices=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    selection=st.sampled_from(["auto", "loo", "gcv"]),
)
def test_formula_holds_for_any_shape(n_images, n_features, n_vertices, seed, selection):
    features, responses, _ = planted(n_images, n_features, n_vertices, seed=seed)
    # float32 keeps four digits of the weights down to a hundredth of the mean eigenvalue, whatever is below it.
    head = RidgeHead(penalties=MULTIPLES[1:], selection=selection).fit(features, responses)
    assert head.weights_.shape == (n_features, n_vertices)
    assert head.intercept_.shape == head.penalties_.shape == (n_vertices,)
    assert_is_ridge(head, features, responses)


@both_selections
@pytest.mark.parametrize(("n_images", "n_features"), [(60, 10), (20, 40)])
def test_constant_features_have_no_weight(n_images, n_features, selection):
    features, responses, _ = planted(n_images, n_features)
    features[:, [0, 3]] = [0, 7.3]
    head = RidgeHead(selection=selection).fit(features, responses)
    assert np.abs(head.weights_[[0, 3]]).max() < 1e-4
    assert_is_ridge(head, features, responses)


@both_selections
@pytest.mark.parametrize("value", [0, 1000.1, -3e-5])
def test_features_that_are_all_constant_predict_the_mean(value, selection):
    _, responses, _ = planted(30, 4)
    features = np.full((30, 4), value, dtype=np.float32)
    predictions = RidgeHead(selection=selection).fit(features, responses).predict(features)
    np.testing.assert_allclose(predictions, np.broadcast_to(responses.mean(0), (30, 6)), atol=1e-5)


@both_selections
@pytest.mark.parametrize("value", [0, 0.1, 1000.1])
def test_constant_responses_are_predicted_as_they_are(value, selection):
    features, responses, _ = planted(40, 8)
    responses[:, 2] = value
    head = RidgeHead(selection=selection).fit(features, responses)
    new = 10 * planted(50, 8, seed=1)[0]
    np.testing.assert_allclose(head.predict(new)[:, 2], np.float32(value), rtol=1e-6, atol=1e-6)
    assert_is_ridge(head, features, responses)


@both_selections
def test_rows_that_repeat(selection):
    features, responses, _ = planted(12, 20)
    features, responses = np.tile(features, (3, 1)), np.tile(responses, (3, 1))
    assert_is_ridge(RidgeHead(selection=selection).fit(features, responses), features, responses)


@both_selections
@pytest.mark.parametrize(("n_images", "n_features"), [(80, 10), (20, 40)])
def test_large_offsets_change_nothing_but_the_intercept(n_images, n_features, selection):
    # Whole numbers over 64, so that float32 holds the sums exactly.
    features, responses, _ = (np.round(64 * part) / 64 for part in planted(n_images, n_features))
    plain = RidgeHead(penalties=MULTIPLES, selection=selection).fit(features, responses)
    moved = RidgeHead(penalties=MULTIPLES, selection=selection).fit(features + 1000, responses - 1000)
    np.testing.assert_allclose(moved.penalties_, plain.penalties_, rtol=1e-4)
    np.testing.assert_allclose(moved.weights_, plain.weights_, atol=1e-3)
    np.testing.assert_allclose(moved.predict(features + 1000) + 1000, plain.predict(features), atol=5e-3)


@pytest.mark.parametrize(("exact", "slow_error"), [(True, slow_loo), (False, slow_gcv)], ids=["loo", "gcv"])
@pytest.mark.parametrize(("n_images", "n_features"), [(30, 6), (12, 25), (16, 15), (15, 15)])
def test_errors_are_those_of_refits_and_of_the_hat_matrix(n_images, n_features, exact, slow_error):
    features, responses, _ = planted(n_images, n_features, n_vertices=3)
    penalties = [0.5, 5.0, 50.0]
    errors = errors_of(features, responses, penalties, exact)
    expected = [slow_error(features, responses, penalty) for penalty in penalties]
    np.testing.assert_allclose(errors, expected, rtol=1e-3)


@pytest.mark.parametrize(("selection", "slow_error"), [("loo", slow_loo), ("gcv", slow_gcv)])
@pytest.mark.parametrize(("n_images", "n_features"), [(30, 6), (20, 25)])
def test_each_vertex_has_the_penalty_of_least_error(selection, slow_error, n_images, n_features):
    features, responses, _ = planted(n_images, n_features, n_vertices=12, noise=1)
    head = RidgeHead(penalties=MULTIPLES, selection=selection).fit(features, responses)
    penalties = eigenbasis(torch.from_numpy(features)).penalties(MULTIPLES).numpy()
    best = np.argmin([slow_error(features, responses, penalty) for penalty in penalties], axis=0)
    assert len(set(best)) > 1  # else the table says nothing
    np.testing.assert_allclose(head.penalties_, penalties[best], rtol=1e-5)


@both_selections
def test_noise_is_penalised_more_than_signal(selection):
    features, responses, _ = planted(100, 20, n_vertices=2, noise=0.01)
    responses[:, 1] = np.random.default_rng(1).normal(size=100)
    clean, noisy = RidgeHead(selection=selection).fit(features, responses).penalties_
    assert noisy > 100 * clean


def test_penalties_are_multiples_of_the_mean_eigenvalue():
    features, responses, _ = planted(50, 8)
    head = RidgeHead(penalties=[0.3]).fit(features, responses)
    scatter = np.cov(features.astype(np.float64), rowvar=False, ddof=0) * len(features)
    np.testing.assert_allclose(head.penalties_, 0.3 * np.linalg.eigvalsh(scatter).mean(), rtol=1e-5)


@both_selections
@pytest.mark.parametrize("penalties", [(1e-12, 1e-11), (1e-11, 1e-12)])
def test_interpolation_is_never_taken_for_a_perfect_fit(penalties, selection):
    # More features than images and hardly any penalty: no error is left to choose by, so the largest penalty serves.
    features, responses, _ = planted(10, 30)
    head = RidgeHead(penalties=penalties, selection=selection).fit(features, responses)
    largest = eigenbasis(torch.from_numpy(features)).penalties([max(penalties)])
    np.testing.assert_allclose(head.penalties_, largest.expand(6), rtol=1e-5)


@both_selections
def test_order_of_the_penalties_does_not_matter(selection):
    features, responses, _ = planted(20, 25, noise=1)
    ascending = RidgeHead(penalties=MULTIPLES, selection=selection).fit(features, responses)
    descending = RidgeHead(penalties=MULTIPLES[::-1], selection=selection).fit(features, responses)
    np.testing.assert_array_equal(descending.penalties_, ascending.penalties_)


@all_shapes
def test_scores_are_the_features_on_orthogonal_axes(n_images, n_features):
    features, _, _ = planted(n_images, n_features)
    x = torch.from_numpy(features)
    basis = eigenbasis(x)
    axes = basis.weights(torch.eye(len(basis.values)))
    np.testing.assert_allclose(axes.T @ axes, np.eye(len(basis.values)), atol=1e-4)
    for scores in (basis.scores(x), basis.train_scores(x), (x - x.mean(0)) @ axes):
        np.testing.assert_allclose(scores.T @ scores, torch.diag(basis.values), atol=1e-4 * basis.values.max())


@all_shapes
def test_predictions_do_not_depend_on_whether_weights_were_formed(n_images, n_features):
    features, responses, _ = planted(n_images, n_features)
    new = planted(7, n_features, seed=1)[0]
    head = RidgeHead().fit(features, responses)
    before = head.predict(new)
    weights, intercept = head.weights_, head.intercept_
    np.testing.assert_allclose(before, new @ weights + intercept, atol=1e-4)
    np.testing.assert_allclose(head.predict(new), before, atol=1e-4)


@pytest.mark.parametrize("shape", [(400, 10), (400, 30)])
@both_selections
def test_a_planted_linear_model_is_recovered(shape, selection):
    features, responses, weights = planted(*shape, noise=0.01)
    head = RidgeHead(selection=selection).fit(features, responses)
    np.testing.assert_allclose(head.weights_, weights, atol=5e-3)


@pytest.mark.parametrize(("n_images", "exact"), [(1024, True), (1025, False)])
def test_auto_is_exact_as_long_as_it_is_cheap(n_images, exact):
    assert is_exact(RidgeConfig(), n_images) is exact
    assert is_exact(RidgeConfig(selection="loo"), n_images)
    assert not is_exact(RidgeConfig(selection="gcv"), n_images)


@pytest.mark.parametrize(("n_images", "meant"), [(25, "loo"), (1100, "gcv")])
def test_auto_gives_the_heads_of_the_selection_it_stands_for(n_images, meant):
    features, responses, _ = planted(n_images, 6, n_vertices=40, noise=3)
    # One image of large leverage is what the two selections see differently.
    features[0] *= 20
    auto, same, other = (
        RidgeHead(selection=selection).fit(features, responses).penalties_
        for selection in ("auto", meant, {"loo": "gcv", "gcv": "loo"}[meant])
    )
    np.testing.assert_array_equal(auto, same)
    assert not np.array_equal(auto, other)


@both_selections
@pytest.mark.parametrize(("n_images", "n_features"), [(60, 10), (20, 30)])
def test_vertices_do_not_depend_on_their_block(n_images, n_features, selection, monkeypatch):
    features, responses, _ = planted(n_images, n_features, n_vertices=11)
    whole = RidgeHead(selection=selection).fit(features, responses)
    monkeypatch.setattr(heads.solvers.ridge, "VERTEX_BLOCK", 3)
    blocks = RidgeHead(selection=selection).fit(features, responses)
    np.testing.assert_array_equal(blocks.penalties_, whole.penalties_)
    np.testing.assert_allclose(blocks.weights_, whole.weights_, atol=1e-6)
    np.testing.assert_allclose(blocks.intercept_, whole.intercept_, atol=1e-6)


def test_the_answer_is_of_the_kind_of_the_question():
    features, responses, _ = planted(30, 5)
    arrays = RidgeHead().fit(features, responses)
    tensors = RidgeHead().fit(torch.from_numpy(features), torch.from_numpy(responses))
    for name in ("weights_", "intercept_", "penalties_"):
        array, tensor = getattr(arrays, name), getattr(tensors, name)
        assert isinstance(array, np.ndarray) and array.dtype == np.float32
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
        np.testing.assert_array_equal(array, tensor)
    assert isinstance(arrays.predict(features), np.ndarray)
    assert isinstance(tensors.predict(torch.from_numpy(features)), torch.Tensor)
    assert isinstance(arrays.predict(torch.from_numpy(features)), torch.Tensor)
    assert isinstance(tensors.predict(features), np.ndarray)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64])
def test_other_number_types_serve(dtype):
    features, responses = (np.round(4 * part).astype(dtype) for part in planted(30, 5)[:2])
    head = RidgeHead().fit(features, responses)
    assert head.predict(features).dtype == np.float32
    assert_is_ridge(head, features, responses, atol=1e-3)


def test_arguments_are_left_as_they_are():
    features, responses, _ = planted(30, 5)
    before = features.copy(), responses.copy()
    RidgeHead().fit(features, responses).predict(features)
    np.testing.assert_array_equal(features, before[0])
    np.testing.assert_array_equal(responses, before[1])


def test_scikit_learn_can_clone_and_score_it():
    head = RidgeHead(penalties=[0.1, 1.0], selection="gcv")
    features, responses, _ = planted(60, 5, noise=0.01)
    copy = clone(head.fit(features, responses))
    assert copy.get_params() == {"penalties": [0.1, 1.0], "selection": "gcv"}
    assert not hasattr(copy, "weights_")
    assert RidgeHead().fit(features, responses).score(features, responses) > 0.99


def broken(which, change):
    features, responses, _ = planted(20, 5)
    parts = {"features": features, "responses": responses}
    parts[which] = change(parts[which])
    return parts["features"], parts["responses"]


def with_value(value):
    def change(matrix):
        matrix = matrix.copy()
        matrix[4, 2] = value
        return matrix

    return change


@pytest.mark.parametrize("which", ["features", "responses"])
@pytest.mark.parametrize(
    "change",
    [with_value(np.nan), with_value(np.inf), lambda m: m[:, 0], lambda m: m[None], lambda m: m[:-1], lambda m: m[:0]],
    ids=["nan", "inf", "1-d", "3-d", "a row less", "no rows"],
)
def test_matrices_that_cannot_be_fitted_are_refused(which, change):
    with pytest.raises(ConfigError, match="expected"):
        RidgeHead().fit(*broken(which, change))


def test_too_few_images_are_refused():
    features, responses, _ = planted(2, 5)
    with pytest.raises(ConfigError, match="3 or more"):
        RidgeHead().fit(features, responses)


def test_other_features_than_in_fit_are_refused():
    features, responses, _ = planted(20, 5)
    head = RidgeHead().fit(features, responses)
    with pytest.raises(ConfigError, match="features: expected 5 columns, as in fit; found 4"):
        head.predict(features[:, :4])


def test_nothing_is_predicted_before_the_fit():
    with pytest.raises(NotFittedError, match="RidgeHead instance is not fitted yet"):
        RidgeHead().predict(np.ones((3, 2)))


@pytest.mark.parametrize("settings", [{"selection": "best"}, {"penalties": []}, {"penalties": [-1.0]}])
def test_settings_that_mean_nothing_are_refused(settings):
    features, responses, _ = planted(20, 5)
    with pytest.raises(ConfigError):
        RidgeHead(**settings).fit(features, responses)
