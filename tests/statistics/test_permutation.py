"""Permutations: what they keep together, a slow reference, uniform nulls, and planted effects."""

import numpy as np
import pytest
from scipy.stats import kstest

from featcache.dataset.splits import BY_ID, Split, assign_folds
from heads.scores.metrics import pearson_r
from heads.scores.resampling import standardised
from heads.statistics.permutation import Spectra, family_wise, permute, shared_by, shuffles_of
from support.statistics import out_of_fold

N = 120
IDS = np.random.default_rng(1).permutation(9_000)[:N]
FOLDS = assign_folds(IDS, 5, 0)


def shuffles(n=200, ids=IDS, folds=FOLDS, seen=None, by=BY_ID, seed=0):
    return shuffles_of(ids, folds, shared_by(seen or {"subj01": ids}), by, n, seed)


def test_permutations_stay_within_folds_and_use_every_image_once():
    orders = list(shuffles(50).orders())
    assert len(orders) == 50
    for order in orders:
        assert sorted(order) == list(range(N))
        np.testing.assert_array_equal(FOLDS[order], FOLDS)
    moved = np.mean([order != np.arange(N) for order in orders])
    assert moved == pytest.approx(1 - np.mean([np.mean(fold == FOLDS) ** -1 / N for fold in FOLDS]), abs=0.05)


def test_pictures_that_subjects_share_go_the_same_way_in_each():
    shared, one, two = np.split(np.random.default_rng(0).permutation(5_000)[:300], 3)
    ids = {"subj01": np.random.default_rng(1).permutation(np.r_[shared, one]), "subj02": np.r_[two, shared]}
    goes = {}
    for subject, of_subject in ids.items():
        folds = assign_folds(of_subject, 5, 0)
        for number, order in enumerate(shuffles(20, of_subject, folds, ids).orders()):
            goes[subject, number] = dict(zip(of_subject.tolist(), of_subject[order].tolist(), strict=True))
    for number in range(20):
        first, second = goes["subj01", number], goes["subj02", number]
        assert all(first[i] == second[i] for i in shared.tolist())
        assert {first[i] for i in shared.tolist()} == set(shared.tolist())


def test_pictures_that_few_share_are_still_permuted():
    others = {f"subj{k:02d}": IDS[[k]] for k in range(2, 40)}  # 38 ways of sharing, one picture each
    orders = list(shuffles(30, seen={"subj01": IDS, **others}).orders())
    assert np.mean([order[2:40] != np.arange(2, 40) for order in orders]) > 0.8


def test_large_groups_of_the_split_stay_together_and_small_ones_do_not_hinder():
    session = np.arange(N) // 30
    large = Split("session", {int(i): str(s) for i, s in zip(IDS, session, strict=True)})
    folds = large.folds(IDS, 2, 0)
    for order in shuffles(10, folds=folds, by=large).orders():
        np.testing.assert_array_equal(session[order], session)
    pairs = Split("cluster", {int(i): str(n // 2) for n, i in enumerate(IDS)})
    orders = list(shuffles(10, folds=pairs.folds(IDS, 5, 0), by=pairs).orders())
    assert np.mean([order != np.arange(N) for order in orders]) > 0.9


@pytest.mark.parametrize("cross_fitted", [True, False])
def test_p_values_are_those_of_a_loop_over_permutations(cross_fitted):
    rng = np.random.default_rng(3)
    y = rng.normal(size=(N, 6)).astype(np.float32)
    p = (0.15 * y + rng.normal(size=y.shape) + FOLDS[:, None]).astype(np.float32) * 20 - 4
    y[:, 4], p[:, 5] = 1.5, 0.1
    drawn = shuffles(99)
    found = permute(Spectra(drawn, standardised(y)), standardised(p), cross_fitted)

    def within(values):
        z = values.astype(float) - values.mean(0, dtype=float)
        z /= np.where(np.ptp(values, axis=0) == 0, np.inf, z.std(0))
        return z - np.stack([z[FOLDS[i] == FOLDS].mean(0) for i in range(N)])

    sums = np.array([(within(p) * within(y)[order]).mean(0) for order in drawn.orders()])
    observed, spread = (within(p) * within(y)).mean(0), np.sqrt(2) if cross_fitted else 1
    expected = (1 + (spread * sums >= observed).sum(0)) / 100
    expected[4:] = 1
    np.testing.assert_allclose(found.p, expected)
    np.testing.assert_allclose(found.r, observed, atol=1e-5)
    np.testing.assert_allclose(found.largest, spread * sums.max(1), atol=1e-5)
    worst = np.array([(1 + (found.largest >= r).sum()) / 100 if r else 1 for r in found.r])
    np.testing.assert_allclose(family_wise(found.r, found.largest), worst)


def test_r_is_pearson_r_where_strata_have_one_level():
    rng = np.random.default_rng(0)
    y, p = rng.normal(size=(2, N, 3))
    for fold in np.unique(FOLDS):
        y[fold == FOLDS] -= y[fold == FOLDS].mean(0)
    np.testing.assert_allclose(
        permute(Spectra(shuffles(5), standardised(y)), standardised(p)).r, pearson_r(p, y), atol=1e-5
    )


def uniform(p, n):
    """p value of the test that p values are uniform on 1 / (1 + n), ..., 1; spread out to be continuous."""
    return kstest(p - np.random.default_rng(0).uniform(size=p.shape) / (1 + n), "uniform").pvalue


@pytest.mark.slow
def test_nulls_of_predictions_that_know_nothing_are_uniform():
    ps = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        y, p = rng.normal(size=(2, N, 200)).astype(np.float32)
        ps.append(
            permute(
                Spectra(shuffles(199, seed=seed), standardised(y)), standardised(p + FOLDS[:, None]), cross_fitted=False
            ).p
        )
    assert uniform(np.concatenate(ps), 199) > 0.01


@pytest.mark.slow
def test_nulls_of_heads_out_of_fold_are_uniform_and_without_spread_they_are_not():
    """Heads are fitted to noise that has nothing to do with the images: every seed has other images."""
    found = {True: [], False: []}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ids = rng.permutation(50_000)[:600]
        folds = assign_folds(ids, 5, 0)
        y = rng.normal(size=(600, 60)).astype(np.float32)
        p = out_of_fold(rng.normal(size=(600, 150)), y, folds, 300)
        spectra = Spectra(shuffles(199, ids, folds, seed=seed), standardised(y))
        for cross_fitted, kept in found.items():
            kept.append(permute(spectra, standardised(p), cross_fitted).p)
    ps = {key: np.concatenate(kept) for key, kept in found.items()}
    assert uniform(ps[True], 199) > 0.01
    assert uniform(ps[False], 199) < 1e-6 and np.mean(ps[False] <= 0.05) > 0.08
    assert np.mean(ps[True] <= 0.05) == pytest.approx(0.05, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize(("n_features", "penalty"), [(2, 1), (300, 1)])
def test_heads_of_few_features_or_of_more_than_images_find_nothing_in_noise(n_features, penalty):
    ps = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y = rng.normal(size=(N, 50)).astype(np.float32)
        p = out_of_fold(rng.normal(size=(N, n_features)), y, FOLDS, penalty)
        ps.append(permute(Spectra(shuffles(199, seed=seed), standardised(y)), standardised(p)).p)
    assert np.mean(np.concatenate(ps) <= 0.05) < 0.05


def test_planted_effects_are_found_and_the_largest_r_controls_the_whole_family():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(N, 300)).astype(np.float32)
    p = rng.normal(size=y.shape).astype(np.float32)
    p[:, :30] += 1.5 * y[:, :30]
    found = permute(Spectra(shuffles(499), standardised(y)), standardised(p))
    corrected = family_wise(found.r, found.largest)
    assert (found.p[:30] == 1 / 500).all() and (corrected[:30] < 0.05).all()
    assert (corrected[30:] < 0.05).sum() <= 1 and (corrected >= found.p).all()
