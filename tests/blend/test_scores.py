"""The file of scores has a row for each method, subject, surface and ROI."""

import csv

import numpy as np
import pytest

from heads.blend.scores import write_scores
from heads.scores.metrics import VertexScores


def test_rows_say_what_was_scored(tmp_path):
    rois = {"V1": np.array([True, False, False])}
    scores = [VertexScores("subj01", surface, np.array([0.5, 0.1, -0.2]), None, rois) for surface in ("lh", "rh")]
    write_scores(tmp_path / "scores.csv", {"blend": scores, "uniform": scores})
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * 2  # methods, one subject and all, two surfaces and both, V1 and all
    first = rows[0]
    assert (first["method"], first["subject"], first["surface"], first["roi"]) == ("blend", "subj01", "lh", "V1")
    assert float(first["mean_r"]) == pytest.approx(0.5) and float(first["mean_r2"]) == pytest.approx(0.25)
    assert first["accuracy"] == "" and first["n_vertices"] == "1"
