"""The table of models: numbered, with scores of all images and of every fold, and the model that is most alike."""

import pytest

from heads.blend.overview import ModelScores
from heads.report.models import model_table


def scores_of(name, score, agreement):
    words = {"backbone": "b", "checkpoint": "frozen", "layers": ("pooled",), "head": "linear", "objective": "ridge"}
    folds = (score - 0.01, score + 0.012)
    return ModelScores(name=name, subjects=("subj01",), score=score, folds=folds, agreement=agreement, **words)


MODELS = [
    scores_of("first", 0.5, {"second": 0.25, "third": 0.75}),
    scores_of("second", 0.4, {"first": 0.25, "third": 0.5}),
    scores_of("third", 0.3, {"first": 0.75, "second": 0.5}),
]


def rows_of(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_a_model_names_the_number_of_the_one_that_is_most_alike():
    assert [row[0] for row in rows_of(model_table(MODELS, False))] == ["1", "2", "3"]
    assert [row[-1] for row in rows_of(model_table(MODELS, False))] == ["3 (0.75)", "3 (0.50)", "1 (0.75)"]


@pytest.mark.parametrize(
    ("accuracy", "row", "measure"),
    [
        (False, ("1", "first", "0.500", "0.49 0.51", "3 (0.75)"), "no noise ceiling: mean r"),
        (True, ("1", "first", "0.50", "0.5 0.5", "3 (0.75)"), "noise-normalised accuracy, %"),
    ],
    ids=["r", "accuracy"],
)
def test_digits_are_those_of_the_measure(accuracy, row, measure):
    table = model_table(MODELS, accuracy)
    assert rows_of(table)[0] == row and table.title.endswith(measure)
    assert (table.caption is not None) == accuracy


def test_a_model_alone_is_like_none():
    (row,) = rows_of(model_table([scores_of("only", 0.5, {})], False))
    assert row[-1] == "-"
