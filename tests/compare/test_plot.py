"""The picture has a stack of bars for each ROI: a part for each band, and one that they share."""

import numpy as np
import pytest

from heads.compare import plot
from heads.compare.measures import GroupSums, measures_of
from heads.compare.plot import plot_shares
from heads.compare.results import Comparison, rows_of


def test_bars_are_unique_shares_and_the_shared_one_with_intervals(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    make = plot.new_figure
    monkeypatch.setattr(plot, "new_figure", lambda *size: figures.append(make(*size)) or figures[0])
    shares = np.full((len(measures_of(2)), 11, 4), 0.1)
    shares[measures_of(2).index(("unique", 1))] = -0.05
    sums = GroupSums.empty([("lh", "V1"), ("lh", "all")], len(shares), 11)
    sums = sums.plus("lh", shares, {"V1": np.arange(4) < 2, "all": np.ones(4, bool)}, None)
    rows = tuple(rows_of({"subj01": sums}, ("a", "b")))
    plot_shares(tmp_path / "p.png", Comparison(("a", "b"), {}, rows, tmp_path, {}, ()))
    (axis,) = figures[0].axes
    heights = [
        [bar.get_height() for bar in container] for container in axis.containers if hasattr(container, "patches")
    ]
    assert heights == pytest.approx(np.array([[0.1, 0.1], [-0.05, -0.05], [0.1, 0.1]]))
    stacked = [bar.get_y() for bar in axis.patches]
    assert stacked == pytest.approx([0, 0, 0, 0, 0.1, 0.1])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["V1", "all"]
    assert (tmp_path / "p.png").stat().st_size > 1000
