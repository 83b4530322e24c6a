"""Planted shares are recovered, their parts add up, and intervals have them inside as often as they say."""

import numpy as np
import pytest

from heads.compare.measures import KINDS, GroupSums, Measure, measures_of
from heads.compare.results import interval
from support.bands import planted_bands, shares_of


def by_measure(shares, n_bands):
    return dict(zip(measures_of(n_bands), shares, strict=True))


def test_planted_shares_are_recovered_and_add_up():
    unique, shared, n = (0.25, 0.1), 0.3, 1000
    features, responses = planted_bands(np.random.default_rng(0), n, unique, shared, n_vertices=12)
    found = by_measure(shares_of(features, responses, np.arange(n)), 2)
    means = {measure: float(of_measure[0].mean()) for measure, of_measure in found.items()}
    assert means[Measure("full")] == pytest.approx(0.65, abs=0.03)
    assert means[Measure("shared")] == pytest.approx(0.3, abs=0.03)
    for band, share in enumerate(unique):
        assert means[Measure("unique", band)] == pytest.approx(share, abs=0.02)
        assert means[Measure("alone", band)] == pytest.approx(share + shared, abs=0.04)
    a, b = (found[Measure("alone", band)] for band in range(2))
    np.testing.assert_allclose(found[Measure("shared")], a + b - found[Measure("full")], atol=1e-12)
    products = [found[Measure("product", band)] for band in range(2)]
    np.testing.assert_allclose(sum(products)[0], found[Measure("full")][0], atol=1e-4)
    assert all((product == product[0]).all() for product in products)


def test_a_band_of_noise_has_nothing_of_its_own():
    rng, n = np.random.default_rng(2), 400
    features, responses = planted_bands(rng, n, (0.3, 0.0), 0.3)
    found = by_measure(shares_of([*features, rng.normal(size=(n, 5))], responses, np.arange(n)), 3)
    for band in (1, 2):
        assert abs(found[Measure("unique", band)][0].mean()) < 0.01
    assert abs(found[Measure("alone", 2)][0].mean()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("unique", [(0.2, 0.1), (0.3, 0.0)])
def test_intervals_have_the_planted_shares_inside_about_as_often_as_they_say(unique):
    """With one feature of a band's own and 240 images, heads are nearly as good as any: the bias is small."""
    shared, n, n_runs = 0.3, 240, 60
    truth = {Measure("full"): sum(unique) + shared, Measure("shared"): shared}
    truth |= {Measure("unique", band): share for band, share in enumerate(unique)}
    truth |= {Measure("alone", band): share + shared for band, share in enumerate(unique)}
    inside: dict[Measure, list[bool]] = {measure: [] for measure in truth}
    for run in range(n_runs):
        features, responses = planted_bands(np.random.default_rng([7, run]), n, unique, shared)
        ids = np.random.default_rng(run).permutation(10_000)[:n]
        found = by_measure(shares_of(features, responses, ids, run, n_random=1), 2)
        for measure, value in truth.items():
            low, high = interval(found[measure].mean(1))
            inside[measure].append(bool(low <= value <= high))
    covered = {measure: float(np.mean(hits)) for measure, hits in inside.items()}
    assert all(share >= 0.8 for share in covered.values()), covered  # binomial with 0.95: 0.87 and more in 99 % of runs
    assert 0.88 <= np.mean(list(covered.values())) <= 0.995, covered


def test_groups_sum_over_vertices_surfaces_and_ceilings():
    groups = [("lh", "V1"), ("lh", "all"), ("rh", "all")]
    shares = np.arange(2 * 3 * 4, dtype=np.float64).reshape(2, 3, 4)
    masks = {"V1": np.array([True, False, True, False]), "all": np.ones(4, dtype=bool)}
    ceiling = np.array([0.5, 0.2, 0.0, 0.1])
    sums = GroupSums.empty(groups, 2, 3).plus("lh", shares, masks, ceiling)
    sums = sums.plus("rh", 2 * shares, {"all": masks["all"]}, None)
    assert sums.counts.tolist() == [2, 4, 4] and sums.ceiling_counts.tolist() == [1, 3, 0]
    np.testing.assert_allclose(sums.sums[0], shares[..., 0] + shares[..., 2])
    np.testing.assert_allclose(sums.ceiling_sums[1], shares[..., [0, 1, 3]].sum(-1))
    assert sums.ceilings == pytest.approx([0.5, 0.8, 0])
    both = sums.over(["lh", "rh"], "all")
    assert both.counts.tolist() == [8]
    np.testing.assert_allclose(both.sums[0], 3 * shares.sum(-1))


def test_measures_are_of_every_kind():
    assert list(dict.fromkeys(measure.kind for measure in measures_of(3))) == list(KINDS)
    assert len(measures_of(3)) == 2 + 3 * 3
