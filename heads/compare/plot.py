"""The picture of a comparison: what each band explains uniquely, and what they share, ROI by ROI."""

from pathlib import Path

import numpy as np

from heads.blend.plot import new_figure
from heads.compare.results import EVERYTHING, Comparison, Estimate, Row
from heads.scores.metrics import ALL_SURFACES

_SHARED = "0.75"  # grey


def plot_shares(path: Path, found: Comparison) -> None:
    """Draw a stack of bars for each ROI, over all subjects, with a 95 % interval on each bar.

    Of the explainable variance where there are noise ceilings. Shares below 0 hang under the axis.
    """
    from matplotlib import colormaps

    rows = [row for row in found.rows if (row.subject, row.surface) == (EVERYTHING, ALL_SURFACES)]
    explainable = all(row.explainable is not None for row in rows)
    figure = new_figure(2.5 + 0.45 * len(rows), 3.8 + 0.16 * len(found.bands))
    axis, places = figure.subplots(), np.arange(len(rows))
    tops, bottoms = np.zeros(len(rows)), np.zeros(len(rows))
    series = [(band, colormaps["tab20"](number % 20)) for number, band in enumerate(found.bands)]
    for band, colour in [*series, (None, _SHARED)]:
        estimates = [_estimate(row, band, explainable) for row in rows]
        values = np.array([one.value for one in estimates])
        base = np.where(values >= 0, tops, bottoms)
        axis.bar(places, values, 0.7, bottom=base, color=colour, label="shared" if band is None else f"only {band}")
        ends = np.array([[one.low, one.high] for one in estimates], dtype=np.float64)
        spread = np.array([values - ends[:, 0], ends[:, 1] - values]).clip(0)
        axis.errorbar(places, base + values, spread, fmt="none", ecolor="0.2", elinewidth=0.7, capsize=1.5)
        tops, bottoms = tops + values.clip(0), bottoms + values.clip(None, 0)
    axis.axhline(0, color="0.5", linewidth=0.5)
    axis.set_xticks(places, [row.roi for row in rows], rotation=90, fontsize=7)
    axis.set_ylabel(f"share of the {'explainable ' if explainable else ''}variance", fontsize=8)
    figure.legend(loc="outside lower center", fontsize=6, ncols=2)
    figure.savefig(path)


def _estimate(row: Row, band: str | None, explainable: bool) -> Estimate:
    """Unique share of a band; None: what they share."""
    shares = row.explainable if explainable and row.explainable is not None else row.variance
    return shares.shared if band is None else shares.unique[band]
