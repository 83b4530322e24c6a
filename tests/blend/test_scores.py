"""The file of scores has a row for each method, subject, surface and ROI."""

import csv

import numpy as np
import pytest

from featcache.errors import StoreError
from heads.blend.scores import read_vertices, write_scores, write_vertices
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


def test_r_of_vertices_comes_back(tmp_path):
    path = tmp_path / "vertices.safetensors"
    assert read_vertices(path) == {}
    scores = [VertexScores("subj.01", surface, np.array([0.5, -0.25])) for surface in ("lh", "V4.1")]
    write_vertices(path, {"blend": scores[:1], "best single": scores[1:]})
    found = read_vertices(path)
    assert found["subj.01", "lh", "blend"].tolist() == [0.5, -0.25] and len(found) == 2
    path.write_bytes(b"no tensors")
    with pytest.raises(StoreError, match="run 'blend' again"):
        read_vertices(path)
