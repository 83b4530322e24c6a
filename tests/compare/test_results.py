"""Rows are means over vertices of subjects and surfaces, of the explainable variance where there are ceilings."""

import csv

import numpy as np
import pytest

from heads.compare.measures import GroupSums, measures_of
from heads.compare.results import Comparison, interval, rows_of, write_table

BANDS = ("a", "b")


def sums_of(seed, ceiling):
    """Sums of 5 vertices of lh, 2 of them in V1, and of 3 of rh; and the draws behind them."""
    rng, n_measures = np.random.default_rng(seed), len(measures_of(2))
    shares = {"lh": rng.normal(size=(n_measures, 41, 5)), "rh": rng.normal(size=(n_measures, 41, 3))}
    sums = GroupSums.empty([("lh", "V1"), ("lh", "all"), ("rh", "all")], n_measures, 41)
    masks = {"V1": np.arange(5) < 2, "all": np.ones(5, bool)}
    sums = sums.plus("lh", shares["lh"], masks, np.full(5, 0.4) if ceiling else None)
    return sums.plus("rh", shares["rh"], {"all": np.ones(3, bool)}, None), shares


@pytest.fixture
def comparison(tmp_path):
    sums = {"subj01": sums_of(0, True)[0], "subj02": sums_of(1, False)[0]}
    made_of = {band: [f"{band} title"] for band in BANDS}
    return Comparison(BANDS, made_of, tuple(rows_of(sums, BANDS)), tmp_path, {}, ())


def test_rows_are_means_over_vertices_with_quantiles_of_the_same_means(comparison):
    (_, first), (_, second) = sums_of(0, True), sums_of(1, False)
    v1 = np.concatenate([first["lh"][..., :2], second["lh"][..., :2]], -1).mean(-1)
    row = comparison.row("V1")
    assert row.n_vertices == 4 and row.variance.full.value == pytest.approx(v1[0, 0])
    low, high = np.quantile(v1[3, 1:], [0.025, 0.975])
    assert row.variance.unique["b"] == pytest.approx((v1[3, 0], low, high))
    everything = comparison.row()
    assert everything.n_vertices == 16 and comparison.row(subject="subj02", surface="rh").n_vertices == 3
    assert everything.variance.product["a"].low is None
    with pytest.raises(KeyError):
        comparison.row("V1", surface="rh")


def test_the_explainable_share_is_of_the_sum_of_the_ceilings_that_there_are(comparison):
    (_, first) = sums_of(0, True)
    of_all = comparison.row(subject="subj01")
    assert of_all.explainable.shared.value == pytest.approx(first["lh"][1, 0].sum() / (5 * 0.4))
    assert comparison.row(subject="subj02").explainable is None
    assert comparison.row().explainable.full.value == pytest.approx(first["lh"][0, 0].sum() / (5 * 0.4))


def test_the_table_has_every_measure_of_every_row(comparison, tmp_path):
    records = comparison.table()
    assert len(records) == len(comparison.rows) * len(measures_of(2))
    write_table(tmp_path / "t.csv", records)
    with (tmp_path / "t.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["band"] for row in read[:4]] == ["", "", "a", "b"]
    (full,) = [
        row
        for row in read
        if (row["subject"], row["surface"], row["roi"], row["measure"]) == ("all", "both", "V1", "full")
    ]
    assert float(full["value"]) == pytest.approx(comparison.row("V1").variance.full.value, abs=1e-6)
    assert {row["low"] == "" for row in read if row["measure"] == "product"} == {True}
    assert comparison.rows[0].to_json()["variance"]["unique"]["a"].keys() == {"value", "low", "high"}


def test_the_first_draw_is_no_part_of_an_interval():
    draws = np.concatenate([[[100.0]], np.linspace(0, 1, 101)[:, None]])
    assert interval(draws) == (pytest.approx(0.025), pytest.approx(0.975))
