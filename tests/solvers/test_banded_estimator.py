"""BandedRidge finds the bands that made responses, and predicts by each of them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold

from heads.scores.metrics import pearson_r
from heads.solvers.banded_estimator import BandedRidge


def two_bands(n_images=120, noise=0.5):
    """Features of two bands in different units; even vertices read the first, odd ones the second."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(n_images, 8)), 50 * rng.normal(size=(n_images, 30)) + 100
    signals = [(band - band.mean(0)) @ rng.normal(size=band.shape[1]) for band in (first, second) * 3]
    signal = np.stack([one / one.std() for one in signals], 1)
    return np.concatenate([first, second], 1), signal + noise * rng.normal(size=signal.shape) + 2


BANDS = {"early": slice(0, 8), "late": slice(8, None)}


def test_bands_that_made_responses_are_found():
    features, responses = two_bands()
    head = BandedRidge(BANDS).fit(features[:90], responses[:90])
    assert head.band_weights_.shape == (2, 6) and head.penalties_.shape == (2, 6)
    np.testing.assert_allclose(head.band_weights_.sum(0), 1)
    assert head.band_weights_.argmax(0).tolist() == [0, 1] * 3
    shares = head.score_bands(features[90:], responses[90:])
    assert np.all(shares["early"][::2] > 0.7) and np.all(np.abs(shares["early"][1::2]) < 0.1)
    whole = head.predict(features[90:])
    np.testing.assert_allclose(sum(shares.values()), pearson_r(whole, responses[90:]), atol=1e-12)
    explained = sum(head.score_bands(features[90:], responses[90:], "r2").values())
    residuals = responses[90:] - whole
    np.testing.assert_allclose(explained, 1 - residuals.var(0) / responses[90:].var(0), atol=1e-12)


def test_parts_of_the_bands_make_the_prediction():
    features, responses = two_bands()
    head = BandedRidge(BANDS).fit(features[:90], responses[:90])
    parts, new = head.predict_bands(features[90:]), features[90:]
    mean = responses[:90].mean(0)
    np.testing.assert_allclose(sum(parts.values()) + mean, head.predict(new), atol=1e-9)
    np.testing.assert_allclose(head.predict(new, bands="late"), parts["late"] + mean, atol=1e-9)
    np.testing.assert_allclose(head.predict(new, bands=["late", "early"]), head.predict(new), atol=1e-9)
    np.testing.assert_allclose(head.predict(new, bands=[]), np.tile(mean, (30, 1)), atol=1e-9)
    np.testing.assert_allclose(new @ head.weights_ + head.intercept_, head.predict(new), atol=1e-8)
    with pytest.raises(ValueError, match=r"bands: expected early \| late; found middle"):
        head.predict(new, bands=["early", "middle"])
    with pytest.raises(ValueError, match=r"measure: expected r \| r2"):
        head.score_bands(new, responses[90:], "accuracy")


def test_banded_ridge_is_ridge_with_a_penalty_for_each_feature():
    features, responses = two_bands()
    head = BandedRidge(BANDS).fit(features, responses)
    centred, y = features - features.mean(0), responses - responses.mean(0)
    for vertex in range(6):
        penalties = np.repeat(head.penalties_[:, vertex], [8, 30])
        kept = np.isfinite(penalties)
        x = centred[:, kept]
        weights = np.linalg.solve(x.T @ x + np.diag(penalties[kept]), x.T @ y[:, vertex])
        np.testing.assert_allclose(head.weights_[kept, vertex], weights, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(head.weights_[~kept, vertex], 0)


def test_groups_stay_together_in_inner_folds():
    features, responses = two_bands()
    rng = np.random.default_rng(1)
    # each picture twice, with the same noise: only groups keep a fit from knowing what it is to predict
    features, noise = np.tile(features, (2, 1)), np.tile(rng.normal(size=responses.shape), (2, 1))
    pictures = np.tile(np.arange(120), 2)
    order = rng.permutation(240)
    features, noise, pictures = features[order], noise[order], pictures[order]
    apart = BandedRidge(BANDS, n_random=0).fit(features, noise, groups=pictures)
    mixed = BandedRidge(BANDS, n_random=0).fit(features, noise)
    assert mixed.errors_.mean() < 0.95 * apart.errors_.mean()
    assert apart.errors_.min() > 0.9 * noise.var(0).min()
    splitter = BandedRidge(BANDS, n_random=0, cv=GroupKFold(5)).fit(features, noise, groups=pictures)
    np.testing.assert_array_equal(splitter.errors_, apart.errors_)


def test_bands_of_columns_of_a_data_frame():
    pd = pytest.importorskip("pandas")
    features, responses = two_bands()
    names = [f"early {k}" for k in range(8)] + [f"late {k}" for k in range(30)]
    table = pd.DataFrame(features, columns=names)
    named = BandedRidge({"early": names[:8], "late": table.columns[8:]}).fit(table, responses)
    np.testing.assert_array_equal(named.predict(table), BandedRidge(BANDS).fit(features, responses).predict(features))
    assert {band: len(columns) for band, columns in named.bands_.items()} == {"early": 8, "late": 30}
    parts = BandedRidge(BANDS).fit(table, pd.DataFrame(responses)).predict_bands(table)
    assert parts["late"].shape == (120, 6) and isinstance(parts["late"], pd.DataFrame)


def test_bands_in_units_at_both_ends_of_the_range_serve():
    features, responses = two_bands()
    expected = BandedRidge(BANDS).fit(features, responses).predict(features)
    units = np.repeat([1e-24, 1e18], [8, 30])
    x = (features * units).astype(np.float32)
    np.testing.assert_allclose(BandedRidge(BANDS).fit(x, responses).predict(x), expected, atol=5e-3)


def test_random_weights_are_those_of_the_seed():
    features, responses = two_bands(noise=3)
    first, again, other = (
        BandedRidge(BANDS, random_state=seed).fit(features, responses).band_weights_ for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_constant_bands_have_no_part():
    features, responses = two_bands()
    features[:, 8:] = 7.3
    head = BandedRidge(BANDS).fit(features.astype(np.float32), responses)
    moved = features.astype(np.float32)
    moved[:, 8:] = 7.4
    np.testing.assert_array_equal(head.predict(moved), head.predict(features))


@pytest.mark.parametrize(
    "settings",
    [
        {"bands": {"a": slice(90, None)}},
        {"bands": {}},
        {"penalties": [0.0]},
        {"n_random": -1},
        {"cv": 200},
        {"cv": "five"},
    ],
)
def test_banded_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=r"expected|Expected|greater"):
        BandedRidge(**{"bands": BANDS} | settings).fit(*two_bands())
