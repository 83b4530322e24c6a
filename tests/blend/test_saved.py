"""A blend as a file: the regression of the responses on the blend, in whatever units models come."""

import numpy as np
import pytest

from featcache.dataset.rois import HEMISPHERES
from featcache.errors import StoreError
from heads.blend.learn import judge_of, learn, levels_of, nested_r
from heads.blend.products import gather
from heads.blend.saved import coefficients_of, load_blend, load_nested, nested_of, save_blend
from heads.config import BlendConfig
from heads.scores.metrics import pearson_r
from support.blends import (
    CASES,
    FOLDS,
    N_TEST,
    N_TRAIN,
    N_VERTICES,
    WIDTHS,
    case,
    made_up,
    mixed,
    slow_r,
    standardised,
    stores_of,
    subject_of,
)


def blended(folder, predictions, responses, method="nnls", per="vertex"):
    """Weights, and the blend of all rows from its coefficients."""
    subject, stores = subject_of(folder, responses), stores_of(folder, predictions)
    found = gather(subject, stores)
    weights = learn(found.products, judge_of(subject), levels_of(subject), BlendConfig(method=method, per=per)).weights
    names = [store.facts["model"] for store in stores]
    coefficients = coefficients_of(subject, names, found, weights)
    by_name = dict(zip(names, stores, strict=True))
    rows = [coefficients[h].apply(h, by_name, 0, N_TRAIN + N_TEST) for h in HEMISPHERES]
    return weights, np.concatenate(rows, axis=1), coefficients


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_blend_is_the_regression_of_the_responses_on_it(name, tmp_path):
    predictions, responses = case(name)
    weights, rows, _ = blended(tmp_path, predictions, responses)
    assert rows.dtype == np.float32 and np.isfinite(rows).all()
    if len(predictions) == 1:
        np.testing.assert_array_equal(rows, predictions[0])  # passed through
        return
    blend, own = mixed(weights, standardised(predictions)), responses[:N_TRAIN]
    r = slow_r(blend[:N_TRAIN], own)
    for vertex in np.flatnonzero(r > 0.01):
        x, y = blend[:, vertex], own[:, vertex].astype(np.float64)
        slope, intercept = np.polyfit(x[:N_TRAIN], y, 1)
        np.testing.assert_allclose(rows[:, vertex], slope * x + intercept, atol=2e-5 * np.abs(y).max(), rtol=1e-4)


def test_a_perfect_model_in_other_units_gives_the_responses(tmp_path):
    _, responses = made_up()
    predictions = np.stack([1e3 * responses - 5e3, np.random.default_rng(1).normal(size=responses.shape)])
    _, rows, _ = blended(tmp_path, predictions.astype(np.float32), responses)
    np.testing.assert_allclose(rows, responses, atol=0.05)
    assert pearson_r(rows, responses).min() > 0.9999


@pytest.mark.slow
def test_units_of_the_models_do_not_matter(tmp_path):
    predictions, responses = made_up()
    one = blended(tmp_path / "a", predictions, responses)
    moved = predictions * np.float32([[[1e-3]], [[50]], [[1]], [[7]]]) + np.float32(3)
    other = blended(tmp_path / "b", moved, responses)
    np.testing.assert_allclose(other[0], one[0], atol=1e-3)
    np.testing.assert_allclose(other[1], one[1], atol=2e-2)


@pytest.mark.slow
def test_a_blend_of_models_with_errors_of_their_own_beats_the_best_of_them_on_test_images(tmp_path):
    predictions, responses = made_up(noise=(1, 1, 1, 1))
    _, rows, _ = blended(tmp_path, predictions, responses)
    alone = [pearson_r(of_model[N_TRAIN:], responses[N_TRAIN:]).mean() for of_model in predictions]
    assert pearson_r(rows[N_TRAIN:], responses[N_TRAIN:]).mean() > max(alone) + 0.05


def test_what_no_model_explains_is_predicted_by_the_mean(tmp_path):
    predictions, responses = made_up()
    predictions[:] = np.random.default_rng(5).normal(size=predictions.shape)
    predictions[:, :N_TRAIN] -= 2 * (responses[:N_TRAIN] - 1)  # against the responses, if anything
    _, rows, _ = blended(tmp_path, predictions, responses)
    mean, spread = responses[:N_TRAIN].mean(0), responses[:N_TRAIN].std(0)
    assert (np.abs(rows - mean) < 0.01 * spread).all()
    assert (rows.std(0) > 0).all()  # a trace of the blend, not a constant


def test_responses_that_never_change_are_predicted_as_they_are(tmp_path):
    _, rows, _ = blended(tmp_path, *case("responses that never change"))
    np.testing.assert_allclose(rows[:, 3], 1000.1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.3, 7.7, 1e4])
def test_models_that_never_change_add_no_noise(value, tmp_path):
    # Out of fold and test predictions are sums in another order: the last digit of a constant may differ.
    responses = made_up()[1]
    constant = np.full((2, N_TRAIN + N_TEST, N_VERTICES), value, dtype=np.float32)
    constant[:, N_TRAIN::2] = np.nextafter(np.float32(value), np.float32(np.inf))
    _, rows, _ = blended(tmp_path, constant, responses)
    mean, spread = responses[:N_TRAIN].mean(0), responses[:N_TRAIN].std(0)
    assert (np.abs(rows - mean) < 0.01 * spread).all()


def nested(folder, predictions, responses, config):
    """The blend out of fold from its coefficients, (n_images, n_vertices), the coefficients, and its r from sums."""
    subject, stores = subject_of(folder, responses), stores_of(folder, predictions)
    found = gather(subject, stores)
    learnt = learn(found.products, judge_of(subject), levels_of(subject), config)
    names = [store.facts["model"] for store in stores]
    coefficients = nested_of(subject, names, found, learnt.weights, learnt.nested["blend"])
    rows = []
    for hemisphere, own in coefficients.items():
        given = [(name, stores[names.index(name)].read(hemisphere, 0, N_TRAIN)) for name in own.needed]
        rows.append(own.apply(given, FOLDS))
    return np.concatenate(rows, axis=1), coefficients, nested_r(found.products, learnt.nested["blend"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_blend_out_of_fold_scores_as_the_blend_said(name, tmp_path):
    rows, _, r = nested(tmp_path, *case(name), BlendConfig(method="nnls", per="vertex"))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(pearson_r(rows, case(name)[1][:N_TRAIN]), r, atol=2e-4)


def test_a_blend_out_of_fold_is_in_the_unit_of_the_responses_at_some_of_the_vertices_too(tmp_path):
    predictions, responses = made_up(noise=(0.1, 0.1, 0.1, 0.1))
    rows, coefficients, _ = nested(tmp_path, predictions, responses, BlendConfig(method="uniform", per="all"))
    assert np.abs(rows - responses[:N_TRAIN]).mean() < 0.3 * responses.std()
    some = coefficients["lh"].at(slice(1, 3))
    given = [(name, predictions[int(name[-1]), :N_TRAIN, 1:3]) for name in some.needed]
    np.testing.assert_array_equal(some.apply(given, FOLDS), rows[:, 1:3])


@pytest.mark.slow
def test_a_file_gives_back_the_blend(tmp_path):
    coefficients, path = blended(tmp_path, *made_up())[2], tmp_path / "blend.safetensors"
    out_of_fold = nested(tmp_path / "nested", *made_up(), BlendConfig())[1]
    blend = {"subj01": coefficients, "subj02": coefficients}
    save_blend(path, blend, dict.fromkeys(blend, out_of_fold))
    for found, given, shape in ((load_blend(path), coefficients, (4,)), (load_nested(path), out_of_fold, (5, 4))):
        assert list(found) == ["subj01", "subj02"]
        for hemisphere, own in given.items():
            again = found["subj02"][hemisphere]
            assert again.models == own.models
            np.testing.assert_array_equal(again.of_models, own.of_models)
            np.testing.assert_array_equal(again.intercept, own.intercept)
            assert own.of_models.shape == (*shape, WIDTHS[hemisphere])


@pytest.mark.parametrize("content", [None, b"", b"no tensors", b"\x00" * 64])
def test_what_is_no_blend_is_refused(content, tmp_path):
    path = tmp_path / "blend.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match="expected a blend"):
        load_blend(path)
