"""Scores of a blend in files: a table of means, and r of each vertex."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from featcache.errors import StoreError, first_line
from featcache.machine.files import replace_bytes
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


def write_vertices(path: Path, scores: Mapping[str, Sequence[VertexScores]]) -> None:
    """Write r of each vertex as safetensors: <subject>.<surface>.<method>, (n_vertices,) float32."""
    tensors = {
        f"{one.subject}.{one.surface}.{method}": np.asarray(one.r, dtype=np.float32)
        for method, of_method in scores.items()
        for one in of_method
    }
    replace_bytes(path, save(tensors))


def read_vertices(path: Path) -> dict[tuple[str, str, str], np.ndarray]:
    """{(subject, surface, method): r}, as `write_vertices` writes it; none where there is no file.

    Raises StoreError for a file that is damaged.
    """
    try:
        tensors = load(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(
            path, expected="r of each vertex", found=f"a damaged file ({first_line(error)})", remedy="run 'blend' again"
        ) from error
    found = {}
    for name, values in tensors.items():
        owner, _, method = name.rpartition(".")
        subject, _, surface = owner.rpartition(".")
        found[subject, surface, method] = values
    return found
