"""The long table: the same from CSV, Parquet and pandas, with a row for each vertex, model and fold."""

import csv

import numpy as np
import pandas
import pytest

from featcache.errors import ConfigError
from heads.statistics.table import COLUMNS, columns_of, explode_rois, frame_of, write_csv, write_parquet
from support.scored import WIDTHS, N, made, scored

assert N > 100


@pytest.fixture
def scores(tmp_path, monkeypatch):
    found = made(tmp_path, n_subjects=2)
    return scored(found, monkeypatch, permutations=20, against="bad", per_fold=True, intervals=False).vertices


def test_there_is_a_row_for_each_vertex_model_and_fold(scores):
    frame = frame_of(scores)
    assert len(frame) == 2 * 2 * sum(WIDTHS.values()) * 6
    assert list(frame.columns) == columns_of(scores) and tuple(frame.columns[: len(COLUMNS)]) == COLUMNS
    assert not frame.duplicated(["subject", "surface", "vertex", "model", "fold"]).any()
    assert set(frame.fold.unique()) == {"all", "0", "1", "2", "3", "4"}
    one = scores[0]
    rows = frame[
        (frame.subject == one.subject)
        & (frame.surface == one.surface)
        & (frame.model == one.model)
        & (frame.fold == "all")
    ]
    np.testing.assert_allclose(rows.r, one.r, atol=1e-6)
    np.testing.assert_allclose(rows.accuracy, one.accuracy(one.r), rtol=1e-5)
    np.testing.assert_allclose(rows.q, one.q, rtol=1e-5)
    assert rows.vertex.tolist() == list(range(30)) and rows.roi.tolist()[:16] == ["V1+early"] * 10 + ["early"] * 5 + [
        ""
    ]
    assert frame[frame.fold != "all"].p.isna().all() and frame[frame.model == "bad"].difference.isna().all()
    assert frame[frame.surface == "rh"].accuracy.isna().all()


def test_a_row_is_small_enough_for_the_size_of_the_challenge(scores):
    frame = frame_of(scores)
    assert isinstance(frame.dtypes["model"], pandas.CategoricalDtype) and frame.r.dtype == np.float32
    assert frame.memory_usage(index=False, deep=False).sum() / len(frame) < 64


def test_files_give_back_the_table(scores, tmp_path):
    frame = frame_of(scores)
    assert (
        write_csv(tmp_path / "scores.csv", scores) == write_parquet(tmp_path / "scores.parquet", scores) == len(frame)
    )
    from_csv = pandas.read_csv(tmp_path / "scores.csv", keep_default_na=False, na_values={"r": ""}, dtype={"fold": str})
    from_parquet = pandas.read_parquet(tmp_path / "scores.parquet")
    for name in frame.columns:
        if isinstance(frame.dtypes[name], pandas.CategoricalDtype):
            assert from_csv[name].tolist() == from_parquet[name].astype(str).tolist() == frame[name].tolist()
        else:
            numbers = pandas.to_numeric(from_csv[name], errors="coerce")
            np.testing.assert_allclose(numbers, frame[name], rtol=1e-5)
            np.testing.assert_array_equal(from_parquet[name].to_numpy(np.float32), frame[name].to_numpy(np.float32))


def test_a_table_without_p_values_has_no_columns_of_them(tmp_path, monkeypatch):
    found = made(tmp_path, ceilings=None)
    vertices = scored(found, monkeypatch, permutations=0, intervals=False).vertices
    write_csv(tmp_path / "scores.csv", vertices)
    with (tmp_path / "scores.csv").open() as file:
        header, first, *_ = csv.reader(file)
    assert tuple(header) == COLUMNS and first[-2:] == ["", ""]  # no ceiling and no accuracy


def test_a_vertex_has_a_row_for_each_of_its_rois(scores):
    frame = frame_of(scores)
    rows = explode_rois(frame)
    one = rows[(rows.subject == "subj01") & (rows.surface == "lh") & (rows.model == "good") & (rows.fold == "all")]
    assert one[one.vertex == 3].roi.tolist() == ["V1", "early"] and one[one.vertex == 20].roi.tolist() == [""]
    assert len(one) == 10 * 2 + 5 + 15
    means = one.groupby("roi", observed=True).r.mean()
    assert means["early"] == pytest.approx(scores[0].r[:15].mean(), rel=1e-5)


def test_without_pandas_one_line_says_what_to_install(scores, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pip install 'featcache\[tables\]'"):
        frame_of(scores)
