"""Tables of scores with intervals: what they have, and that they fit a terminal."""

import numpy as np
from rich.console import Console

from heads.report.statistics import difference_table, interval_table, scores_as_json
from heads.statistics.intervals import Estimate
from heads.statistics.run import Scores, VertexScore
from support.scored import made, scored


def text(table, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    return console.export_text()


def test_each_roi_has_its_models_best_first_with_intervals_and_significant_vertices(tmp_path, monkeypatch):
    scores = scored(made(tmp_path, ceilings=None), monkeypatch, permutations=99, against="bad")
    shown = text(interval_table(scores))
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in cells] == [["V1", "1"], ["", "2"], ["early", "1"], ["", "2"], ["all", "1"], ["", "2"]]
    best = next(one for one in scores.estimates if one.over_everyone and one.roi == "V1" and one.model == "good")
    assert cells[0][2:5] == ["15", f"{best.mean:.4f}", f"{best.low:.4f} to {best.high:.4f}"]
    assert cells[1][5] == "0 %" and "mean r" in shown and "1 good" in shown and "2 bad*" in shown
    differences = text(difference_table(scores))
    assert "Difference from model 2, bad; mean r" in differences and "0.002" in differences
    found = scores_as_json(scores)
    assert found["against"] == "bad" and len(found["estimates"]) == len(scores.estimates)
    assert {one["roi"] for one in found["significant"]} == {"V1", "early", "all"}


def test_thirty_models_fit_80_columns():
    models = [f"tf_efficientnet_lite{k}@224 finetune 6 layers 7x7/3x3 bfloat16 linear ridge {k:06d}" for k in range(30)]
    estimates = [
        Estimate("all", "both", roi, model, against, "accuracy", 39_548, 51.2345, 50.0, 100.0, 0.5)
        for roi in ("midparietal", "V1", "V2", "all")
        for model in models
        for against in ("", models[0])
    ]
    nothing = (np.zeros(1, dtype=int), [""])
    vertices = [VertexScore("s", "lh", model, np.zeros(1), {}, None, nothing, q=np.ones(1)) for model in models]
    scores = Scores(vertices, estimates, models[0], ())
    for table in (interval_table(scores), difference_table(scores)):
        shown = text(table)
        assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    lines = [line for line in text(interval_table(scores)).splitlines() if line.startswith("│")]
    assert len(lines) >= 30 + 3 * 3  # of the many rows, all models over all vertices, and three of each ROI
    assert "of each ROI the best 3 models" in text(interval_table(scores))
