"""What a comparison found: shares of variance of each ROI, surface and subject, with intervals over images."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heads.compare.measures import KINDS, WITHOUT_INTERVAL, GroupSums, Measure, measures_of
from heads.scores.metrics import ALL_SURFACES

LEVEL = 0.95  # of the intervals
EVERYTHING = "all"  # the name of every subject together, and of all vertices


class Estimate(NamedTuple):
    """A mean over vertices, and the ends of its 95 % interval over images; None for measures that have none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Shares:
    """Estimates of every measure: of the variance, or of the explainable variance.

    full, shared : of all bands
    unique, alone, product : {band: estimate}
    """

    full: Estimate
    shared: Estimate
    unique: dict[str, Estimate]
    alone: dict[str, Estimate]
    product: dict[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """The estimates as `--json` has them."""
        return {
            kind: {band: one._asdict() for band, one in of_kind.items()}
            if isinstance(of_kind, dict)
            else of_kind._asdict()
            for kind, of_kind in vars(self).items()
        }

    def items(self) -> Iterator[tuple[str, str, Estimate]]:
        """(measure, band or '', estimate)"""
        for kind in KINDS:
            of_kind = getattr(self, kind)
            for band, one in of_kind.items() if isinstance(of_kind, dict) else [("", of_kind)]:
                yield kind, band, one


@dataclass(frozen=True)
class Row:
    """The shares of a set of vertices.

    subject, surface, roi : as in tables of scores: 'all', 'both' and 'all' for all of them
    variance : means over vertices, of the variance of responses
    explainable : of the variance that a perfect model could explain: the sum over the vertices that have a noise
        ceiling above 0, divided by the sum of these ceilings; None where there is none
    """

    subject: str
    surface: str
    roi: str
    n_vertices: int
    variance: Shares
    explainable: Shares | None

    def to_json(self) -> dict[str, Any]:
        """The row as `--json` has it."""
        shares = {name: getattr(self, name) for name in ("variance", "explainable")}
        row = {name: value for name, value in vars(self).items() if name not in shares}
        return row | {name: None if one is None else one.to_json() for name, one in shares.items()}


@dataclass(frozen=True)
class Comparison:
    """What `compare` gives back.

    bands : names, in order
    made_of : {band: titles of its features, with their layers}
    rows : for each subject, surface and ROI, and for all of each together
    folder : of the files
    subjects : {subject: its file of vertices}
    new : subjects that were computed now
    """

    bands: tuple[str, ...]
    made_of: dict[str, list[str]]
    rows: tuple[Row, ...]
    folder: Path
    subjects: dict[str, Path]
    new: tuple[str, ...]

    def row(self, roi: str = EVERYTHING, subject: str = EVERYTHING, surface: str = ALL_SURFACES) -> Row:
        """The row of these vertices. Raises KeyError where there is none."""
        for row in self.rows:
            if (row.subject, row.surface, row.roi) == (subject, surface, roi):
                return row
        raise KeyError((subject, surface, roi))

    def table(self) -> list[dict[str, Any]]:
        """A record for each row, measure and band, as the file of tables has them."""
        records = []
        for row in self.rows:
            explainable = {} if row.explainable is None else {key[:2]: key[2] for key in row.explainable.items()}
            for kind, band, one in row.variance.items():
                record = {"subject": row.subject, "surface": row.surface, "roi": row.roi, "n_vertices": row.n_vertices}
                record |= {"measure": kind, "band": band} | one._asdict()
                of_explainable = explainable.get((kind, band))
                record |= {f"explainable_{name}": getattr(of_explainable, name, None) for name in Estimate._fields}
                records.append(record)
        return records

    def to_frame(self) -> Any:
        """`table` as a pandas DataFrame. Raises ImportError where pandas is not installed."""
        import pandas

        return pandas.DataFrame(self.table())


def rows_of(sums: dict[str, GroupSums], bands: Sequence[str]) -> Iterator[Row]:
    """A row for each subject, surface and ROI that has vertices, in the order of `every_summary`.

    sums : {subject: sums of its groups}, over the same draws of weights
    """
    surfaces = sorted({surface for one in sums.values() for surface, _ in one.groups})
    rois = [roi for roi in dict.fromkeys(roi for one in sums.values() for _, roi in one.groups) if roi != EVERYTHING]
    for subject in [*sorted(sums), EVERYTHING]:
        some = [one for name, one in sums.items() if subject in (name, EVERYTHING)]
        for surface in [*surfaces, ALL_SURFACES]:
            of_surface = surfaces if surface == ALL_SURFACES else [surface]
            for roi in [*rois, EVERYTHING]:
                groups = [one.over(of_surface, roi) for one in some]
                n_vertices = sum(int(group.counts[0]) for group in groups)
                if n_vertices:
                    variance = _shares(sum(group.sums[0] for group in groups) / n_vertices, bands)
                    ceiling = sum(float(group.ceilings[0]) for group in groups)
                    explained = sum(group.ceiling_sums[0] for group in groups)
                    explainable = _shares(explained / ceiling, bands) if ceiling > 0 else None
                    yield Row(subject, surface, roi, n_vertices, variance, explainable)


def interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval, (...,), of (n_draws, ...) draws, the first of which is of the images as they are."""
    low, high = np.quantile(draws[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _shares(means: np.ndarray, bands: Sequence[str]) -> Shares:
    """means : (n_measures, n_draws)"""
    low, high = interval(means.T)
    found = {
        measure: Estimate(
            float(means[number, 0]),
            *((None, None) if measure.kind in WITHOUT_INTERVAL else (float(low[number]), float(high[number]))),
        )
        for number, measure in enumerate(measures_of(len(bands)))
    }

    def by_band(kind: str) -> dict[str, Estimate]:
        return {band: found[Measure(kind, number)] for number, band in enumerate(bands)}

    return Shares(
        found[Measure("full")], found[Measure("shared")], by_band("unique"), by_band("alone"), by_band("product")
    )


def write_table(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records of the same fields as CSV; numbers with 6 digits, nothing for what is not known."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        table.writeheader()
        for record in records:
            table.writerow({name: _written(value) for name, value in record.items()})


def _written(value: Any) -> Any:
    return "" if value is None else f"{value:.6f}" if isinstance(value, float) else value
