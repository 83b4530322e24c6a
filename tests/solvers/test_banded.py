"""Banded ridge is ridge on scaled features, chooses as a slow search does, and finds the bands that were planted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, KFold

import heads.solvers.banded
from featcache.errors import ConfigError
from heads.scores.metrics import pearson_r
from heads.solvers.banded import candidates, contributions, fit_bands

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
UNITS = (1.0, 30.0, 0.02)  # of the features of each band


def banded_case(n_images=60, n_new=20, sizes=(6, 40, 15), n_vertices=9, noise=0.5, seed=0):
    """Three bands in different units; vertex v reads band v % 3 alone."""
    rng = np.random.default_rng(seed)
    bands = [
        unit * rng.normal(1, 1, (n_images + n_new, size)) for unit, size in zip(UNITS[: len(sizes)], sizes, strict=True)
    ]
    signals = []
    for vertex in range(n_vertices):
        band = bands[vertex % len(sizes)]
        signal = band @ rng.normal(size=band.shape[1])
        signals.append((signal - signal.mean()) / signal.std())
    responses = np.stack(signals, 1) + noise * rng.normal(size=(n_images + n_new, n_vertices)) + 3
    return SimpleNamespace(
        bands=[band[:n_images] for band in bands],
        new_bands=[band[n_images:] for band in bands],
        responses=responses[:n_images],
        new_responses=responses[n_images:],
        folds=list(KFold(4).split(np.empty(n_images))),
    )


def kernels_of(bands, others):
    return torch.from_numpy(np.stack([one @ other.T for one, other in zip(bands, others, strict=True)]))


def fitted(case, weights, penalties=PENALTIES, dtype=torch.float64):
    kernels = kernels_of(case.bands, case.bands).to(dtype)
    responses = torch.from_numpy(case.responses).to(dtype)
    return fit_bands(kernels, responses, weights=weights, penalties=penalties, inner_folds=case.folds)


def scaled_columns(bands, train_bands, weights):
    """Features side by side, each band with a variance of `weights` on the training images."""
    parts = []
    for band, train, weight in zip(bands, train_bands, weights, strict=True):
        variance = np.square(train - train.mean(0)).sum() / len(train)
        parts.append(band * np.sqrt(weight / variance))
    return np.concatenate(parts, 1)


def test_candidates_are_equal_weights_then_each_band_then_random_ones():
    weights = candidates(3, 50, seed=1)
    assert weights.shape == (54, 3) and weights.dtype == torch.float64
    np.testing.assert_allclose(weights[:4], [[1 / 3] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(weights.sum(1), 1)
    assert weights.min() >= 0 and len(np.unique(weights, axis=0)) == 54
    concentrated, even = weights[4::2].max(1).values, weights[5::2].max(1).values
    assert concentrated.mean() > even.mean() + 0.1
    assert torch.equal(weights, candidates(3, 50, seed=1)) and not torch.equal(weights, candidates(3, 50, seed=2))
    assert torch.equal(candidates(3, 10, seed=1), weights[:14])


def test_one_band_has_one_candidate():
    assert candidates(1, 20, seed=0).tolist() == [[1.0]]


@pytest.mark.parametrize("counts", [(0, 5), (2, -1)])
def test_no_bands_have_no_candidates(counts):
    with pytest.raises(ConfigError, match="one band or more"):
        candidates(*counts, seed=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-3)])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.2, 0.5, 0.3), (0.0, 0.9, 0.1)])
def test_predictions_are_those_of_ridge_on_scaled_features(weights, dtype, tolerance):
    case = banded_case()
    fit = fitted(case, torch.tensor([weights], dtype=torch.float64), penalties=[2.0], dtype=dtype)
    parts = contributions(fit, kernels_of(case.new_bands, case.bands).to(dtype))
    slow = Ridge(alpha=2.0).fit(scaled_columns(case.bands, case.bands, weights), case.responses)
    expected = slow.predict(scaled_columns(case.new_bands, case.bands, weights))
    assert parts.shape == (3, 20, 9) and parts.dtype == dtype
    np.testing.assert_allclose(parts.sum(0) + fit.mean, expected, atol=tolerance)
    np.testing.assert_allclose(fit.weights, np.tile(weights, (9, 1)).T, atol=1e-7)


def test_each_band_adds_its_part_of_the_slow_fit():
    case, weights = banded_case(), (0.2, 0.5, 0.3)
    fit = fitted(case, torch.tensor([weights], dtype=torch.float64), penalties=[2.0])
    parts = contributions(fit, kernels_of(case.new_bands, case.bands))
    columns = scaled_columns(case.bands, case.bands, weights)
    slow = Ridge(alpha=2.0).fit(columns, case.responses)
    new = scaled_columns(case.new_bands, case.bands, weights) - columns.mean(0)
    first = 0
    for part, band in zip(parts, case.bands, strict=True):
        own = slice(first, first + band.shape[1])
        np.testing.assert_allclose(part, new[:, own] @ slow.coef_[:, own].T, atol=1e-7)
        first = own.stop
    over_training = contributions(fit, kernels_of(case.bands, case.bands))
    np.testing.assert_allclose(over_training.mean(1), 0, atol=1e-9)


@pytest.mark.parametrize("groups", [None, np.arange(60) // 5])
def test_weights_and_penalties_are_those_of_a_slow_search(groups):
    case, weights = banded_case(noise=2), candidates(3, 6, seed=0)
    if groups is not None:
        case.folds = list(GroupKFold(4).split(case.responses, groups=groups))
    fit = fitted(case, weights)
    errors = np.zeros((len(weights), len(PENALTIES), 9))
    for number, of_bands in enumerate(weights.numpy()):
        columns = scaled_columns(case.bands, case.bands, of_bands)
        for train, held_out in case.folds:
            for k, penalty in enumerate(PENALTIES):
                slow = Ridge(alpha=penalty).fit(columns[train], case.responses[train])
                errors[number, k] += np.square(case.responses[held_out] - slow.predict(columns[held_out])).sum(0) / 60
    best = errors.reshape(-1, 9).argmin(0)
    assert len(set(best)) > 3  # else the table says nothing
    np.testing.assert_allclose(fit.error, errors.reshape(-1, 9).min(0), rtol=1e-7)
    np.testing.assert_allclose(fit.weights, weights.numpy()[best // len(PENALTIES)].T, atol=1e-9)
    np.testing.assert_allclose(fit.penalty, np.array(PENALTIES)[best % len(PENALTIES)])


def test_the_band_that_made_a_response_has_its_weight():
    case = banded_case(n_images=120, noise=0.7)
    fit = fitted(case, candidates(3, 30, seed=0))
    assert fit.weights.argmax(0).tolist() == [0, 1, 2] * 3
    # bands of 6 and 15 features can be told from the others; the one of 40 needs more images
    assert fit.weights.max(0).values.min() > 0.6
    predictions = contributions(fit, kernels_of(case.new_bands, case.bands)).sum(0) + fit.mean
    assert pearson_r(predictions.numpy(), case.new_responses).mean() > 0.7


def test_banded_ridge_predicts_better_than_one_penalty_for_all():
    case = banded_case(n_images=80, n_new=200, sizes=(5, 300), noise=0.5, n_vertices=20)
    across = kernels_of(case.new_bands, case.bands)
    scores = []
    one_penalty = torch.tensor([[5.0, 300.0]]) / 305  # on features of one variance
    for weights in (candidates(2, 20, seed=0), one_penalty):
        fit = fitted(case, weights)
        predictions = (contributions(fit, across).sum(0) + fit.mean).numpy()
        scores.append(pearson_r(predictions, case.new_responses)[::2].mean())  # of those that read the small band
    assert scores[0] > scores[1] + 0.05


def test_units_of_bands_change_nothing():
    case, weights = banded_case(), candidates(3, 5, seed=0)
    plain = fitted(case, weights)
    units = 1e3, 1e-4, 7.0
    case.bands = [unit * band for unit, band in zip(units, case.bands, strict=True)]
    other = fitted(case, weights)
    for name in ("weights", "penalty", "coefficients", "error"):
        np.testing.assert_allclose(getattr(other, name), getattr(plain, name), rtol=1e-6, atol=1e-9)


def test_a_held_out_image_has_no_part_in_its_prediction():
    # the fits do not follow a wild response that they must predict
    case = banded_case(n_vertices=1)
    rows = np.arange(60)
    case.folds = [(rows[:50], rows[50:])]
    before = fitted(case, candidates(3, 3, seed=0))
    case.responses[55] += 1e4
    after = fitted(case, candidates(3, 3, seed=0), penalties=[float(before.penalty[0])])
    wild = 1e8 + 2e4 * float(case.responses[55, 0] - 1e4)
    assert float(after.error[0]) * 10 == pytest.approx(wild, rel=1e-3)


def test_vertices_do_not_depend_on_their_block(monkeypatch):
    case, weights = banded_case(), candidates(3, 4, seed=0)
    whole = fitted(case, weights)
    monkeypatch.setattr(heads.solvers.banded, "VERTEX_BLOCK", 2)
    blocks = fitted(case, weights)
    for name in ("weights", "penalty", "coefficients", "error"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name), rtol=1e-9, atol=1e-12)


def test_constant_bands_and_constant_responses_predict_the_mean():
    case = banded_case()
    case.bands[1] = np.zeros_like(case.bands[1])
    case.responses[:, 4] = 2.5
    fit = fitted(case, candidates(3, 4, seed=0))
    parts = contributions(fit, kernels_of(case.new_bands, [case.bands[0], case.bands[1], case.bands[2]]))
    assert torch.isfinite(parts).all() and fit.scales[1] == 1
    np.testing.assert_allclose(parts[1], 0, atol=1e-12)
    np.testing.assert_allclose(parts[:, :, 4], 0, atol=1e-12)


def test_arguments_are_left_as_they_are():
    case = banded_case()
    kernels, responses = kernels_of(case.bands, case.bands), torch.from_numpy(case.responses)
    before = kernels.clone(), responses.clone()
    weights = candidates(3, 2, seed=0)
    fit = fit_bands(kernels, responses, weights=weights, penalties=[1.0], inner_folds=case.folds)
    contributions(fit, kernels)
    assert torch.equal(kernels, before[0]) and torch.equal(responses, before[1])


ROWS = np.arange(60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": torch.zeros(3, 60, 59)}, "shapes"),
        ({"responses": torch.zeros(60)}, "shapes"),
        ({"weights": torch.ones(4, 2)}, "shapes"),
        ({"weights": torch.ones(0, 3)}, "shapes"),
        ({"penalties": []}, "penalties"),
        ({"penalties": [0.0]}, "above 0"),
        ({"inner_folds": []}, "inner folds"),
        ({"inner_folds": [(ROWS[:1], ROWS[1:])]}, "fewer folds"),
        ({"inner_folds": [(ROWS, ROWS[:0])]}, "fewer folds"),
    ],
)
def test_what_cannot_be_fitted_is_refused(changes, message):
    case = banded_case()
    arguments = {
        "kernels": kernels_of(case.bands, case.bands),
        "responses": torch.from_numpy(case.responses),
        "weights": candidates(3, 2, seed=0),
        "penalties": [1.0],
        "inner_folds": case.folds,
    } | changes
    kernels, responses = arguments.pop("kernels"), arguments.pop("responses")
    with pytest.raises(ConfigError, match=message):
        fit_bands(kernels, responses, **arguments)


@pytest.mark.filterwarnings("ignore")  # of himalaya and what it imports
def test_r_is_that_of_himalaya():
    pytest.importorskip("himalaya")
    from himalaya.kernel_ridge import MultipleKernelRidgeCV

    case, weights = banded_case(n_images=120, n_new=80, noise=1), candidates(3, 20, seed=0)
    fit = fitted(case, weights)
    ours = (contributions(fit, kernels_of(case.new_bands, case.bands)).sum(0) + fit.mean).numpy()
    train = fit.centred(kernels_of(case.bands, case.bands)).numpy()
    new = fit.centred(kernels_of(case.new_bands, case.bands)).numpy()
    search = {"n_iter": weights.clamp_min(1e-30).numpy(), "alphas": np.array(PENALTIES), "progress_bar": False}
    theirs = MultipleKernelRidgeCV(kernels="precomputed", solver="random_search", solver_params=search, cv=KFold(4))
    theirs.fit(train, case.responses - case.responses.mean(0))
    r, their_r = pearson_r(ours, case.new_responses), pearson_r(theirs.predict(new), case.new_responses)
    np.testing.assert_allclose(r.mean(), their_r.mean(), atol=0.01)
    np.testing.assert_allclose(r, their_r, atol=0.05)
