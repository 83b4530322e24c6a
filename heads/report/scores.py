"""Tables of scores: subjects and ROIs down, models or methods across."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from heads.report.named import NamedTable, framed
from heads.scores.by_roi import every_summary
from heads.scores.metrics import Summary, VertexScores, summarize

CHOSEN_ON = "* chosen on: images of this score also chose the epoch of a backbone, so it is a little too high"
_ALL = "all vertices"
_MOST_COLUMNS = 4  # of methods side by side on 80 columns
_MOST_WITH_SQUARES = 3  # of them with mean r^2
_LONGEST_TITLE = 12  # of a column, in letters


def score_table(
    scores: Mapping[str, Sequence[VertexScores]],
    title: str,
    chosen_on: Collection[str] = (),
    each_surface: bool = False,
    notes: Sequence[str] = (),
) -> RenderableType:
    """Table of scores: a row for each subject, each ROI and all vertices, a column for each method.

    Of many methods, a row for each, without ROIs. Noise-normalised accuracy in percent where there are noise ceilings,
    else mean r, with mean r^2 behind it where there is room. A method that lacks a subject has no number over all
    subjects: it would be over other vertices than the numbers beside it.

    chosen_on : methods to mark, because images of their scores also chose something
    each_surface : whether subjects and ROIs have a row for each surface too
    notes : lines to put below
    """
    everyone = {(one.subject, one.surface): one for of_method in scores.values() for one in of_method}
    rows, partial = _summaries(list(everyone.values()), each_surface), _partial(scores)
    accuracy, squared = rows[_ALL].accuracy is not None, len(scores) <= _MOST_WITH_SQUARES
    measure = "noise-normalised accuracy, %" if accuracy else "no noise ceiling: mean r" + " (mean r^2)" * squared
    cells = {
        method: [
            "-" if method in partial and summary.subject == "all" else _cell(of_method.get(label), accuracy, squared)
            for label, summary in rows.items()
        ]
        for method, of_method in ((method, _summaries(of_method, each_surface)) for method, of_method in scores.items())
    }
    marks = [" *" if method in chosen_on else "" for method in scores]
    below = [f"- {method}: has {', '.join(names)} alone" for method, names in partial.items()]
    below += [*notes, *([CHOSEN_ON] if any(marks) else [])]
    title = f"{title}; {measure}"
    if len(scores) <= _MOST_COLUMNS:
        return _by_row(title, rows, cells, marks, below)
    below += ["- for scores of ROIs, add --json"] if any(one.roi != "all" for one in rows.values()) else []
    return _by_method(title, rows, cells, marks, below)


def _by_row(
    title: str,
    rows: Mapping[str, Summary],
    cells: Mapping[str, Sequence[str]],
    marks: Sequence[str],
    notes: Sequence[str],
) -> RenderableType:
    """A row for each subject and ROI, a column for each method; long names are below, and a column has their number."""
    names = list(cells)
    short = all(len(name) <= _LONGEST_TITLE for name in names)
    titles = names if short else [str(number) for number in range(1, len(names) + 1)] if len(names) > 1 else ["score"]
    key = [] if short else [f"{column}: {name}" for column, name in zip(titles, names, strict=True)]
    table = Table()
    table.add_column("subject or ROI")
    table.add_column("vertices", justify="right")
    for column, mark in zip(titles, marks, strict=True):
        table.add_column(f"{column}{mark}", justify="right", overflow="fold")
    for number, (label, summary) in enumerate(rows.items()):
        values = [of_method[number] for of_method in cells.values()]
        table.add_row(label, f"{summary.n_vertices:,}", *values, end_section=number == len(rows) - 2)
    return framed(title, table, [*key, *notes])


def _by_method(
    title: str,
    rows: Mapping[str, Summary],
    cells: Mapping[str, Sequence[str]],
    marks: Sequence[str],
    notes: Sequence[str],
) -> NamedTable:
    """A row for each method, a column for each subject and for all vertices."""
    shown = [number for number, summary in enumerate(rows.values()) if summary.roi == "all"]
    labels = [list(rows)[number] for number in shown]
    return NamedTable(
        title,
        ["all" if label == _ALL else label.removeprefix("subj") for label in labels],
        list(cells),
        [[of_method[number] for number in shown] for of_method in cells.values()],
        marks,
        notes,
    )


def _partial(scores: Mapping[str, Sequence[VertexScores]]) -> dict[str, list[str]]:
    """{method: its subjects} of the methods that lack a subject that another has."""
    subjects = {method: {one.subject for one in of_method} for method, of_method in scores.items()}
    everyone = set().union(*subjects.values())
    return {method: sorted(names) for method, names in subjects.items() if names != everyone}


def _summaries(scores: Sequence[VertexScores], each_surface: bool) -> dict[str, Summary]:
    """{row of the table: its summary}: subjects, then ROIs over all subjects, then all vertices."""
    rows = {_label(summary): summary for summary in summarize(scores) if summary.all_surfaces}
    if not each_surface:
        return rows
    every = [summary for summary in every_summary(scores) if not summary.all_surfaces]
    split: dict[str, Summary] = {}
    for label, whole in rows.items():
        parts = [one for one in every if (one.subject, one.roi) == (whole.subject, whole.roi)]
        split |= {f"{label} {one.surface}": one for one in parts} | {label: whole}
    return split


def _label(summary: Summary) -> str:
    if summary.roi != "all":
        return summary.roi
    return _ALL if summary.subject == "all" else summary.subject


def _cell(summary: Summary | None, accuracy: bool, squared: bool) -> str:
    if summary is None:
        return ""
    if not accuracy:
        return f"{summary.mean_r:.3f}" + f" ({summary.mean_r2:.3f})" * squared
    return "no ceiling" if summary.accuracy is None else f"{summary.accuracy:.2f}"


def scores_as_json(scores: Mapping[str, Sequence[VertexScores]]) -> dict[str, list[dict[str, Any]]]:
    """{method: [{subject, surface, roi, n_vertices, mean_r, mean_r2, accuracy}]}

    As in the table, a method that lacks a subject has no rows over all of them.
    """
    partial = _partial(scores)
    return {
        method: [one.to_json() for one in summarize(of_method) if one.subject != "all" or method not in partial]
        for method, of_method in scores.items()
    }
