"""The table of a comparison fits 80 columns and has a section for each ROI, surface or subject."""

import io

import numpy as np
import pytest
from rich.console import Console

from heads.compare.measures import GroupSums, measures_of
from heads.compare.results import Comparison, rows_of
from heads.report.compared import compared_table

BANDS = ("tf_efficientnet_lite0@224 whole pretrain", "captions")


@pytest.fixture
def found(tmp_path):
    shares = np.linspace(-0.1, 0.5, 8 * 11 * 4).reshape(8, 11, 4)
    sums = GroupSums.empty([("lh", "V1v"), ("lh", "all"), ("rh", "all")], len(measures_of(2)), 11)
    sums = sums.plus("lh", shares, {"V1v": np.arange(4) < 2, "all": np.ones(4, bool)}, None)
    sums = sums.plus("rh", shares, {"all": np.ones(4, bool)}, None)
    rows = tuple(rows_of({"subj01": sums, "subj02": sums}, BANDS))
    return Comparison(BANDS, {}, rows, tmp_path, {}, ())


def shown(found, per, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(compared_table(found, per))
    return out.getvalue()


@pytest.mark.parametrize(
    ("per", "labels"),
    [
        ("roi", ["V1v (4)", "all (16)"]),
        ("surface", ["lh (8)", "rh (8)", "both (16)"]),
        ("all", ["subj01 (8)", "subj02 (8)", "all (16)"]),
        ("vertex", ["subj01 (8)", "subj02 (8)", "all (16)"]),
    ],
)
def test_rows_are_what_is_asked_for(found, per, labels):
    text = shown(found, per, 200)
    assert [label for label in labels if label in text] == labels
    assert text.count("captions") == text.count("shared  ") == len(labels)


def test_it_fits_80_columns_with_every_number(found):
    text = shown(found, "roi")
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    one = found.row("V1v").variance.shared
    assert f"{one.value:.3f}, {one.low:.3f} to {one.high:.3f}" in text


def test_a_share_that_rounds_to_nothing_has_no_sign(tmp_path):
    shares = np.full((8, 11, 2), -1e-5)
    sums = GroupSums.empty([("lh", "all")], 8, 11).plus("lh", shares, {"all": np.ones(2, bool)}, None)
    found = Comparison(BANDS, {}, tuple(rows_of({"subj01": sums}, BANDS)), tmp_path, {}, ())
    assert "0.000, 0.000 to 0.000" in shown(found, "roi") and "-0.000" not in shown(found, "roi")
