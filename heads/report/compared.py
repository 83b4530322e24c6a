"""The table of a comparison of feature spaces."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # a table must not load what compares
    from heads.compare.results import Comparison, Estimate, Row

_EVERYTHING, _ALL_SURFACES = "all", "both"


def compared_table(found: "Comparison", per: str) -> Table:
    """Table of shares: for each ROI, surface or subject what all bands explain, each alone, uniquely, and together.

    per : 'roi', 'surface', 'all' or 'vertex', which is as 'all'
    """
    rows = _chosen(found.rows, per)
    explainable = all(row.explainable is not None for row in rows)
    measure = "explainable variance" if explainable else "variance"
    table = Table(title=f"Share of the {measure} of held-out images, mean over vertices", title_justify="left")
    table.add_column({"roi": "ROI", "surface": "surface"}.get(per, "subject"), overflow="fold")
    table.add_column("band", overflow="fold")
    for column in ("alone", "unique, 95 % interval", "product"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shares = row.explainable if explainable and row.explainable is not None else row.variance
        label = f"{_label(row, per)} ({row.n_vertices:,})"
        for band in found.bands:
            alone, product = (_number(getattr(shares, kind)[band].value) for kind in ("alone", "product"))
            table.add_row(label, band, alone, _with_interval(shares.unique[band]), product)
            label = ""
        table.add_row("", "shared", "", _with_interval(shares.shared), "")
        table.add_row("", "all bands", "", _with_interval(shares.full), "", end_section=True)
    table.caption = Text(
        "unique: lost without the band. shared: the rest. product: parts that sum to all bands.\n"
        "Intervals are over images; in brackets the number of vertices."
    )
    table.caption_justify = "left"
    return table


def _chosen(rows: "Sequence[Row]", per: str) -> "list[Row]":
    everyone = [row for row in rows if row.subject == _EVERYTHING]
    if per == "roi":
        return [row for row in everyone if row.surface == _ALL_SURFACES]
    whole = [row for row in rows if row.roi == _EVERYTHING]
    if per == "surface":
        return [row for row in whole if row.subject == _EVERYTHING]
    return [row for row in whole if row.surface == _ALL_SURFACES]


def _label(row: "Row", per: str) -> str:
    return str({"roi": row.roi, "surface": row.surface}.get(per, row.subject))


def _with_interval(one: "Estimate") -> str:
    value, low, high = (_number(number) for number in one if number is not None)
    return f"{value}, {low} to {high}"


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # never -0.000
