"""What a person looks at: tables of scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from heads.metrics import Summary, VertexScores, summarize

_ALL = "all vertices"


def score_table(scores: Mapping[str, Sequence[VertexScores]], title: str) -> Table:
    """A row for each subject and ROI and for all vertices, a column for each method.

    Noise-normalised accuracy in percent where there are ceilings, else mean r with mean r^2 behind it.
    """
    columns = {method: _subjects_and_rois(of_method) for method, of_method in scores.items()}
    rows = {label: summary for summaries in columns.values() for label, summary in summaries.items() if label != _ALL}
    rows |= {_ALL: max((summaries[_ALL] for summaries in columns.values()), key=lambda summary: summary.n_vertices)}
    accuracy = rows[_ALL].accuracy is not None
    measure = "noise-normalised accuracy, %" if accuracy else "no noise ceiling: mean r (mean r^2)"
    table = Table(title=f"{title}; {measure}", title_justify="left")
    table.add_column("subject or ROI")
    table.add_column("vertices", justify="right")
    for method in columns:
        table.add_column(method, justify="right", overflow="fold")
    for row, (label, summary) in enumerate(rows.items()):
        cells = (_cell(of_method.get(label), accuracy) for of_method in columns.values())
        table.add_row(label, f"{summary.n_vertices:,}", *cells, end_section=row == len(rows) - 2)
    return table


def _subjects_and_rois(scores: Sequence[VertexScores]) -> dict[str, Summary]:
    """Subjects, then ROIs over all subjects, then everything."""
    return {_label(summary): summary for summary in summarize(scores) if summary.hemisphere == "both"}


def _label(summary: Summary) -> str:
    if summary.roi != "all":
        return summary.roi
    return _ALL if summary.subject == "all" else summary.subject


def _cell(summary: Summary | None, accuracy: bool) -> str:
    if summary is None:
        return ""
    if not accuracy:
        return f"{summary.mean_r:.3f} ({summary.mean_r2:.3f})"
    return "no ceiling" if summary.accuracy is None else f"{summary.accuracy:.2f}"


def layer_table(maps: Mapping[str, tuple[int, int, int]]) -> Table:
    """A row for each layer of a backbone, {layer: (n_channels, height, width)}."""
    table = Table()
    for column in ("number", "layer", "channels", "map"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for number, (name, (n_channels, height, width)) in enumerate(maps.items()):
        table.add_row(str(number), name, f"{n_channels:,}", f"{height} x {width}")
    return table


def print_table(table: Table) -> None:
    """On stdout."""
    Console(highlight=False).print(table)


def as_json(scores: Mapping[str, Sequence[VertexScores]]) -> dict[str, list[dict[str, Any]]]:
    """{method: [{subject, hemisphere, roi, n_vertices, mean_r, mean_r2, accuracy}]}"""
    return {method: [dict(vars(summary)) for summary in summarize(of_method)] for method, of_method in scores.items()}
