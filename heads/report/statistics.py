"""Tables of scores with intervals and p values: ROIs down, and the models of each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from heads.report.scores import CHOSEN_ON

if TYPE_CHECKING:  # a table must not load what computes
    from heads.statistics.intervals import Estimate
    from heads.statistics.run import Scores

LEVEL = 0.05  # false discovery rate below which a vertex counts as significant
_MOST_ROWS = 100  # of ROIs and models; of more, each ROI has its best models alone
_BEST = 3


def interval_table(scores: "Scores") -> Table:
    """Table of scores over all subjects and surfaces: each ROI with its models, best first, and intervals."""
    rows, numbers = _of_everyone(scores, ""), _numbers(scores)
    shares = scores.significant(LEVEL)
    measure = "noise-normalised accuracy, %" if _accuracy(rows) else "mean r"
    table = _table(f"Out-of-fold scores; {measure}, with 95 % intervals over images")
    for column in ("vertices", "score", "interval", *([f"q < {LEVEL}"] if shares else [])):
        table.add_column(column, justify="right", no_wrap=True)
    shown = _shown(rows)
    for roi, of_roi in shown.items():
        for place, one in enumerate(of_roi):
            share = shares.get((roi, one.model))
            last = ["-" if share is None else f"{100 * share:.0f} %"] if shares else []
            interval = f"{_number(one, one.low)} to {_number(one, one.high)}"
            cells = [f"{one.n_vertices:,}", _number(one, one.mean), interval, *last]
            table.add_row("" if place else roi, numbers[one.model], *cells, end_section=place == len(of_roi) - 1)
    table.caption = Text("\n".join(_notes(scores, rows, shown)))
    return table


def difference_table(scores: "Scores") -> Table:
    """Table of differences from the reference: each ROI with its models, best first, with intervals and p values."""
    rows, numbers = _of_everyone(scores, scores.against), _numbers(scores)
    measure = "points of accuracy" if _accuracy(rows) else "mean r"
    table = _table(f"Difference from model {numbers[scores.against]}, {scores.against}; {measure}")
    for column in ("difference", "interval", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for roi, of_roi in _shown(rows).items():
        for place, one in enumerate(of_roi):
            interval = f"{_number(one, one.low, '+')} to {_number(one, one.high, '+')}"
            cells = [_number(one, one.mean, "+"), interval, f"{one.p:.3f}"]
            table.add_row("" if place else roi, numbers[one.model], *cells, end_section=place == len(of_roi) - 1)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("ROI", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    return table


def _of_everyone(scores: "Scores", against: str) -> "list[Estimate]":
    """Estimates over all subjects and surfaces, by accuracy where there are ceilings."""
    found = [one for one in scores.estimates if one.over_everyone and one.against == against]
    accuracy = [one for one in found if one.measure == "accuracy"]
    return accuracy or found


def _accuracy(rows: "Sequence[Estimate]") -> bool:
    return any(one.measure == "accuracy" for one in rows)


def _numbers(scores: "Scores") -> dict[str, str]:
    """{model: its number in the tables}"""
    return {model: str(number) for number, model in enumerate(dict.fromkeys(one.model for one in scores.vertices), 1)}


def _shown(rows: "Sequence[Estimate]") -> "dict[str, list[Estimate]]":
    """{ROI: its models, best first}; of many rows, the best models of each ROI, and all of them over all vertices."""
    by_roi: dict[str, list[Estimate]] = {}
    for one in sorted(rows, key=lambda one: one.roi == "all"):  # which comes last
        by_roi.setdefault(one.roi, []).append(one)
    many = len(rows) > _MOST_ROWS
    order = {roi: sorted(of_roi, key=lambda one: -one.mean) for roi, of_roi in by_roi.items()}
    return {roi: of_roi[:_BEST] if many and roi != "all" else of_roi for roi, of_roi in order.items()}


def _number(one: "Estimate", value: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" if one.measure == "accuracy" else f"{value:{sign}.4f}"


def _notes(scores: "Scores", rows: "Sequence[Estimate]", shown: "dict[str, list[Estimate]]") -> list[str]:
    """The names of the models by number, and how to read the table."""
    notes = [
        f"{number} {model}{'*' if model in scores.chosen_on else ''}" for model, number in _numbers(scores).items()
    ]
    if sum(map(len, shown.values())) < len(rows):
        notes.append(f"of each ROI the best {_BEST} models; --json and --csv have all")
    return notes + ([CHOSEN_ON] if scores.chosen_on else [])


def scores_as_json(scores: "Scores") -> dict[str, Any]:
    """Scores as JSON: models by number, estimates of every place, and shares of significant vertices."""
    shares = [
        {"roi": roi, "model": model, "significant": share} for (roi, model), share in scores.significant(LEVEL).items()
    ]
    return {
        "models": list(_numbers(scores)),
        "against": scores.against or None,
        "chosen_on": list(scores.chosen_on),
        "estimates": [one.to_json() for one in scores.estimates],
        "significant": shares,
        "level": LEVEL,
    }
