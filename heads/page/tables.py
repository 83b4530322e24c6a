"""Tables of scores by subject, ROI and model, with ceilings and intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heads.page.measures import Measured, ceiling_of
from heads.scores.metrics import ALL_SURFACES
from heads.statistics.intervals import ALL, Estimate, estimates, with_totals


@dataclass(frozen=True)
class Cell:
    """A score as the page says it: r and its interval, and accuracy in percent with its interval; '' where none is."""

    r: str = ""
    r_interval: str = ""
    accuracy: str = ""
    accuracy_interval: str = ""


@dataclass(frozen=True)
class Row:
    """An ROI of a subject.

    ceiling : mean noise ceiling of its vertices in percent of variance, '' where there is none
    cells : of each model
    """

    roi: str
    n_vertices: int
    ceiling: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """The rows of one subject, or of all."""

    subject: str
    rows: Sequence[Row]


def all_estimates(measured: Sequence[Measured]) -> list[Estimate]:
    """Scores with intervals of every subject, surface, ROI and model, and of all of each together."""
    draws = {key: value for one in measured for key, value in one.draws.items()}
    return estimates(with_totals(draws))


def tables(found: Sequence[Estimate], measured: Sequence[Measured], models: Sequence[str]) -> list[Table]:
    """A table of all subjects together and one of each: all vertices first, then ROIs in the order of the dataset."""
    by_place: dict[tuple[str, str], dict[tuple[str, str], Estimate]] = {}
    for one in found:
        if one.surface == ALL_SURFACES:
            by_place.setdefault((one.subject, one.roi), {})[one.model, one.measure] = one
    rois = roi_order(measured)
    subjects = [one.subject.name for one in measured]
    shown = [ALL, *subjects] if len(subjects) > 1 else subjects
    ceilings = _ceilings(measured)
    return [
        Table(
            subject,
            [
                _row(roi, by_place[subject, roi], models, ceilings.get((subject, roi)))
                for roi in rois
                if (subject, roi) in by_place
            ],
        )
        for subject in shown
    ]


def roi_order(measured: Sequence[Measured]) -> list[str]:
    """All vertices, then ROIs in the order of the dataset, those too that the first subject lacks."""
    return list(dict.fromkeys([ALL, *(roi for one in measured for rois in one.subject.rois.values() for roi in rois)]))


def _row(
    roi: str,
    of_place: Mapping[tuple[str, str], Estimate],
    models: Sequence[str],
    ceiling: float | None,
) -> Row:
    n_vertices = max(one.n_vertices for one in of_place.values())
    cells = [_cell(of_place.get((model, "r")), of_place.get((model, "accuracy"))) for model in models]
    return Row(roi, n_vertices, "" if ceiling is None else f"{100 * ceiling:.1f}", cells)


def _cell(r: Estimate | None, accuracy: Estimate | None) -> Cell:
    return Cell(
        "" if r is None else f"{r.mean:.3f}",
        "" if r is None else f"{r.low:.3f} to {r.high:.3f}",
        "" if accuracy is None else f"{accuracy.mean:.1f}",
        "" if accuracy is None else f"{accuracy.low:.1f} to {accuracy.high:.1f}",
    )


def _ceilings(measured: Sequence[Measured]) -> dict[tuple[str, str], float]:
    """{(subject or 'all', ROI or 'all'): mean noise ceiling over its vertices that have one}."""
    values: dict[tuple[str, str], list[np.ndarray]] = {}
    for one in measured:
        ceiling = ceiling_of(one.subject)
        rois = {roi for of_surface in one.subject.rois.values() for roi in of_surface}
        masks = {roi: _mask(one, roi) for roi in rois} | {ALL: np.full(len(ceiling), True)}
        for roi, mask in masks.items():
            known = ceiling[mask & ~np.isnan(ceiling)]
            values.setdefault((one.subject.name, roi), []).append(known)
            values.setdefault((ALL, roi), []).append(known)
    joined = {place: np.concatenate(parts) for place, parts in values.items()}
    return {place: float(known.mean()) for place, known in joined.items() if known.size}


def _mask(measured: Measured, roi: str) -> np.ndarray:
    subject = measured.subject
    return np.concatenate(
        [subject.rois[surface].get(roi, np.full(n, False)) for surface, n in subject.n_vertices.items()]
    )
