"""Numbers beside each other in a score table are over the same vertices."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from heads.report.scores import score_table, scores_as_json
from heads.scores.metrics import VertexScores, summarize

N_VERTICES = {"subj01": 4, "subj02": 6}


def scores_of(subjects, r, ceiling: float | None = 1.0):
    """The same r everywhere; every other vertex is in V1."""
    return [
        VertexScores(
            name,
            hemisphere,
            np.full(N_VERTICES[name], r),
            None if ceiling is None else np.full(N_VERTICES[name], ceiling),
            {"V1": np.arange(N_VERTICES[name]) % 2 == 0},
        )
        for name in subjects
        for hemisphere in ("lh", "rh")
    ]


def cells(scores):
    """{row: [vertices, a cell for each method]} and the lines below the table."""
    out = io.StringIO()
    Console(file=out, width=200).print(score_table(scores, "title"))
    lines = out.getvalue().splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    below = lines[next(k for k, line in enumerate(lines) if line.startswith("└")) + 1 :]
    return {label: rest for label, *rest in rows}, [line.strip() for line in below if line.strip()]


BOTH, ONE, OTHER = ("subj01", "subj02"), ("subj01",), ("subj02",)


def test_every_number_is_there_where_every_method_has_every_subject():
    found, notes = cells({"a": scores_of(BOTH, 0.5), "b": scores_of(BOTH, 0.4)})
    numbers = ["25.00", "16.00"]
    assert found == {
        "subj01": ["8", *numbers],
        "subj02": ["12", *numbers],
        "V1": ["10", *numbers],
        "all vertices": ["20", *numbers],
    }
    assert notes == []


def test_a_method_without_a_subject_has_no_number_over_all_and_a_note_says_which_it_has():
    found, notes = cells({"part": scores_of(ONE, 0.5), "whole": scores_of(BOTH, 0.4)})
    assert found["subj01"] == ["8", "25.00", "16.00"] and found["subj02"] == ["12", "", "16.00"]
    assert found["V1"] == ["10", "-", "16.00"] and found["all vertices"] == ["20", "-", "16.00"]
    assert notes == ["- part: has subj01 alone"]


def test_methods_of_different_subjects_are_not_compared_at_all():
    found, notes = cells({"a": scores_of(ONE, 0.5), "b": scores_of(OTHER, 0.4)})
    assert found["all vertices"] == ["20", "-", "-"] and len(notes) == 2
    assert found["subj01"] == ["8", "25.00", ""] and found["subj02"] == ["12", "", "16.00"]


def test_one_subject_alone_is_everyone_where_nobody_has_more():
    found, notes = cells({"a": scores_of(ONE, 0.5), "b": scores_of(ONE, 0.4)})
    assert found["all vertices"] == ["8", "25.00", "16.00"] and notes == []


def test_many_methods_have_a_row_each_with_the_same_numbers():
    r = [0.1, 0.2, 0.3, 0.4, 0.5]
    found, notes = cells({f"model {n}": scores_of(BOTH if n else ONE, value) for n, value in enumerate(r)})
    expected = {str(n + 1): [f"model {n}", *[f"{100 * value**2:.2f}"] * 3] for n, value in enumerate(r)}
    assert found == expected | {"1": ["model 0", "1.00", "", "-"]}
    assert notes == ["- model 0: has subj01 alone", "- for scores of ROIs, add --json"]


def test_long_names_are_below_and_columns_have_their_numbers():
    names = [f"tf_efficientnet_lite{n}@224 5 layers 7x7 linear ridge" for n in range(2)]
    scores = {name: scores_of(BOTH, 0.5, ceiling=None) for name in names}
    out = io.StringIO()
    Console(file=out, width=80).print(score_table(scores, "title", names[1:], notes=["so it is"]))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0] == "title; no noise ceiling: mean r (mean r^2)" and "│" not in lines[-4]
    assert "┃             1 ┃           2 * ┃" in lines[2] and "0.500 (0.250)" in lines[4]
    assert lines[-5:-2] == [f"1: {names[0]}", f"2: {names[1]}", "so it is"] and lines[-2].startswith("* chosen on")
    out = io.StringIO()
    Console(file=out, width=80).print(score_table({names[0]: scores[names[0]]}, "title"))
    assert f"score: {names[0]}" in out.getvalue()


def test_four_methods_without_ceilings_fit_on_80_columns():
    out = io.StringIO()
    Console(file=out, width=80).print(score_table({f"m{n}": scores_of(BOTH, 0.5, None) for n in range(4)}, "title"))
    lines = out.getvalue().splitlines()
    assert (
        lines[0].rstrip() == "title; no noise ceiling: mean r" and sum("0.500 │ 0.500" in line for line in lines) == 4
    )


@pytest.mark.parametrize("subjects", [ONE, BOTH])
def test_json_has_the_rows_that_the_table_has_numbers_for(subjects):
    scores = {"a": scores_of(subjects, 0.5), "b": scores_of(BOTH, 0.4)}
    found = scores_as_json(scores)
    whole = [one.to_json() for one in summarize(scores["b"])]
    assert found["b"] == whole
    expected = [one.to_json() for one in summarize(scores["a"])]
    assert found["a"] == (expected if subjects == BOTH else [row for row in expected if row["subject"] == "subj01"])
    assert any(row["subject"] == "all" for row in found["a"]) == (subjects == BOTH)
