"""What a person looks at: tables of scores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from featcache.machine.progress import size_of
from heads.scores.metrics import Summary, VertexScores, summarize

if TYPE_CHECKING:  # a table of scores must not load what trains or blends
    from heads.blend.overview import Model
    from heads.blend.run import Ensemble
    from heads.recipes.plan import Estimate

_ALL = "all vertices"
_ONE_LINE = 10_000  # characters
_MOST_COLUMNS = 4  # of methods side by side: more would leave none of them room for its name


def score_table(scores: Mapping[str, Sequence[VertexScores]], title: str) -> Table:
    """A row for each subject and ROI and for all vertices, a column for each method; of many methods, a row for each.

    Noise-normalised accuracy in percent where there are ceilings, else mean r with mean r^2 behind it. A method that
    lacks a subject has no number over all of them, which would be over other vertices than its neighbours'.
    """
    everyone = {(one.subject, one.hemisphere): one for of_method in scores.values() for one in of_method}
    rows, partial = _subjects_and_rois(list(everyone.values())), _partial(scores)
    accuracy = rows[_ALL].accuracy is not None
    measure = "noise-normalised accuracy, %" if accuracy else "no noise ceiling: mean r (mean r^2)"
    cells = {
        method: [
            "-" if method in partial and summary.subject == "all" else _cell(of_method.get(label), accuracy)
            for label, summary in rows.items()
        ]
        for method, of_method in ((method, _subjects_and_rois(found)) for method, found in scores.items())
    }
    table = Table(title=f"{title}; {measure}", title_justify="left", caption_justify="left")
    notes = [f"- {method}: of {', '.join(names)} alone" for method, names in partial.items()]
    if len(scores) <= _MOST_COLUMNS:
        _by_row(table, rows, cells)
    else:
        notes += _by_method(table, rows, cells)
    table.caption = Text("\n".join(notes))
    return table


def _by_row(table: Table, rows: Mapping[str, Summary], cells: Mapping[str, Sequence[str]]) -> None:
    table.add_column("subject or ROI")
    table.add_column("vertices", justify="right")
    for method in cells:
        table.add_column(method, justify="right", overflow="fold")
    for number, (label, summary) in enumerate(rows.items()):
        of_row = [of_method[number] for of_method in cells.values()]
        table.add_row(label, f"{summary.n_vertices:,}", *of_row, end_section=number == len(rows) - 2)


def _by_method(table: Table, rows: Mapping[str, Summary], cells: Mapping[str, Sequence[str]]) -> list[str]:
    """Of subjects and all vertices alone, which it says."""
    shown = [number for number, summary in enumerate(rows.values()) if summary.roi == "all"]
    table.add_column("model", overflow="fold")
    for label in (list(rows)[number] for number in shown):
        table.add_column("all" if label == _ALL else label.removeprefix("subj"), justify="right", no_wrap=True)
    for method, of_method in cells.items():
        table.add_row(method, *(of_method[number].split(" (")[0] for number in shown))
    return ["- by ROI: --json"] if len(shown) < len(rows) else []


def _partial(scores: Mapping[str, Sequence[VertexScores]]) -> dict[str, list[str]]:
    """{method: its subjects} of those that lack a subject that another has."""
    subjects = {method: {one.subject for one in of_method} for method, of_method in scores.items()}
    everyone = set().union(*subjects.values())
    return {method: sorted(names) for method, names in subjects.items() if names != everyone}


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


def gain_lines(done: "Ensemble") -> list[str]:
    """What a blend is worth, in words: its gains with their intervals, the null, and who has no weight."""
    unit = " points" if done.accuracy else " of mean r"
    digits = 2 if done.accuracy else 4
    lines = []
    for one in done.gains:
        share = f" ({100 * one.gain / one.score:+.1f} %)" if one.score > 0 else ""
        lines.append(
            f"blend over {one.over}: {one.gain:+.{digits}f}{unit}{share}, 95 % interval over images "
            f"{one.low:+.{digits}f} to {one.high:+.{digits}f}; optimistic, on the images its weights were learnt on: "
            f"{one.optimistic:+.{digits}f}"
        )
    lines.append(
        f"blends of shuffled responses: mean r {done.null.mean:.4f}, at most {done.null.largest:.4f}; "
        f"optimistic {done.null.optimistic:.4f}"
    )
    if done.unused:
        lines.append(f"no weight anywhere: {', '.join(done.unused)}")
    return lines


def blend_as_json(done: "Ensemble") -> dict[str, Any]:
    """weights, unused, scores as `as_json`, gains and shuffled, named as in `Ensemble`."""
    return {
        "weights": done.weights,
        "unused": done.unused,
        "scores": as_json(done.scores),
        "gains": [vars(gain) for gain in done.gains],
        "shuffled": vars(done.null),
    }


def model_table(models: "Sequence[Model]", accuracy: bool) -> Table:
    """A row for each model, best first, numbered; scores of all images and of each fold, and what it is most like."""
    measure = "noise-normalised accuracy, %" if accuracy else "no noise ceiling: mean r"
    table = Table(title=f"out-of-fold; {measure}", title_justify="left", caption_justify="left")
    if accuracy:
        table.caption = "few images make squares of r larger: a fold's scores may all be above the score of all images"
    numbers = {one.name: str(number) for number, one in enumerate(models, 1)}
    table.add_column("")
    table.add_column("model", overflow="fold")
    for column in ("score", "by fold", "most like"):
        table.add_column(column, justify="right", no_wrap=True)
    digits = 1 if accuracy else 2
    for one in models:
        closest = one.closest()
        table.add_row(
            numbers[one.name],
            one.name,
            f"{one.score:.{digits + 1}f}",
            " ".join(f"{score:.{digits}f}" for score in one.folds),
            f"{numbers[closest[0]]} ({closest[1]:.2f})" if closest else "-",
            end_section=True,
        )
    return table


def plan_table(estimates: "Sequence[Estimate]") -> Table:
    """A row for each step, and one for all of them: times and disk add up, and memory is that of the largest."""
    table = Table(title="estimates, as if nothing were done yet", title_justify="left", caption_justify="left")
    for column in ("step", "command", "time", "memory", "disk"):
        table.add_column(column, justify="left" if column == "command" else "right", overflow="fold")
    for number, one in enumerate(estimates, 1):
        end = number == len(estimates)
        table.add_row(str(one.step.number), one.step.described, *_costs(one), end_section=end)
    table.add_row("", "all", *_costs(_whole(estimates)))
    table.caption = "- is not estimated, and not in the last row"
    return table


def _whole(estimates: "Sequence[Estimate]") -> "Estimate":
    seconds, memory, disk = ([getattr(one, name) or 0.0 for one in estimates] for name in ("seconds", "memory", "disk"))
    return replace(estimates[0], seconds=sum(seconds), memory=max(memory), disk=sum(disk))


def _costs(one: "Estimate") -> list[str]:
    sizes = ["-" if n_bytes is None else size_of(n_bytes) for n_bytes in (one.memory, one.disk)]
    return ["-" if one.seconds is None else duration_of(one.seconds), *sizes]


def duration_of(seconds: float) -> str:
    """5_400 -> '1.5 h'"""
    for unit, size in (("days", 172_800), ("h", 7_200), ("min", 120)):
        if seconds >= size:
            return f"{seconds / (size / 2):.2g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def plan_as_json(estimates: "Sequence[Estimate]") -> dict[str, Any]:
    """{plan: [{step, command, options, seconds, memory, disk}], total: {...}}, bytes; null where not estimated."""
    costs = [
        {name: getattr(one, name) for name in ("seconds", "memory", "disk")} for one in (*estimates, _whole(estimates))
    ]
    steps = [{"step": e.step.number, "command": e.step.command, "options": dict(e.step.own)} for e in estimates]
    return {"plan": [step | cost for step, cost in zip(steps, costs, strict=False)], "total": costs[-1]}


def print_table(table: Table) -> None:
    """On stdout; in a file or a pipe every row is one line, however long."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _ONE_LINE
    console.print(table)


def as_json(scores: Mapping[str, Sequence[VertexScores]]) -> dict[str, list[dict[str, Any]]]:
    """{method: [{subject, hemisphere, roi, n_vertices, mean_r, mean_r2, accuracy}]}

    As in the table, a method that lacks a subject has no rows over all of them.
    """
    partial = _partial(scores)
    return {
        method: [dict(vars(one)) for one in summarize(of_method) if one.subject != "all" or method not in partial]
        for method, of_method in scores.items()
    }
