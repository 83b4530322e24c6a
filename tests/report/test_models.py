"""The table of models: numbered from the best, each with the one that it is most like."""

import io
from dataclasses import replace

from rich.console import Console

from heads.blend.overview import ModelScores
from heads.report.models import model_table


def model(name, score, agreement):
    return ModelScores(
        name=name,
        backbone="net",
        checkpoint="frozen",
        layers=("pooled",),
        head="linear",
        objective="ridge",
        subjects=("subj01",),
        predictions={"subj01": "store"},
        score=score,
        folds=(score, score / 2),
        agreement=agreement,
    )


def test_models_are_numbered_and_point_at_the_most_similar_one():
    models = [model("a", 40.0, {"b": 0.5, "c": 0.9}), model("b", 30.0, {"a": 0.5, "c": 0.1}), model("c", 20.0, {})]
    out = io.StringIO()
    Console(file=out, width=120).print(model_table(models, accuracy=True))
    lines = out.getvalue().splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["1", "a", "40.00", "40.0 20.0", "3 (0.90)"],
        ["2", "b", "30.00", "30.0 15.0", "1 (0.50)"],
        ["3", "c", "20.00", "20.0 10.0", "-"],
    ]


def test_a_score_that_chose_something_is_marked():
    models = [replace(model("a", 40.0, {}), chosen_on=True), model("b", 30.0, {})]
    out = io.StringIO()
    Console(file=out, width=120).print(model_table(models, accuracy=True))
    assert "40.00*" in out.getvalue() and "30.00*" not in out.getvalue() and "* chosen on:" in out.getvalue()
