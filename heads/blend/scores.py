"""Scores of a blend as a table in a file."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from heads.scores.by_roi import every_summary
from heads.scores.metrics import VertexScores


def write_scores(path: Path, scores: Mapping[str, Sequence[VertexScores]]) -> None:
    """Write a row for each method, subject, surface and ROI; no accuracy where there is no ceiling.

    scores : {method: scores of each subject and surface}
    """
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "subject", "surface", "roi", "n_vertices", "mean_r", "mean_r2", "accuracy"])
        for method, of_method in scores.items():
            for row in every_summary(of_method):
                accuracy = "" if row.accuracy is None else f"{row.accuracy:.3f}"
                numbers = [row.n_vertices, f"{row.mean_r:.5f}", f"{row.mean_r2:.5f}", accuracy]
                table.writerow([method, row.subject, row.surface, row.roi, *numbers])
