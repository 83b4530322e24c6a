"""Every subject, surface and ROI has a row, over its own vertices."""

import numpy as np
import pytest

from heads.scores.by_roi import every_summary
from heads.scores.metrics import VertexScores


def scores():
    rng = np.random.default_rng(0)
    rois = {"V1": np.arange(6) < 2, "FFA": np.arange(6) == 5, "none": np.zeros(6, bool)}
    return [
        VertexScores(subject, surface, rng.uniform(-1, 1, 6), rng.uniform(0.1, 1, 6), rois)
        for subject in ("subj01", "subj02")
        for surface in ("lh", "rh")
    ]


def test_rows_are_means_over_the_vertices_that_they_name():
    made = scores()
    rows = {(row.subject, row.surface, row.roi): row for row in every_summary(made)}
    assert [row.roi for row in every_summary(made)][:3] == ["V1", "FFA", "all"]
    assert len(rows) == 3 * 3 * 3 and not any(roi == "none" for _, _, roi in rows)
    for (subject, surface, roi), row in rows.items():
        chosen = [s for s in made if subject in (s.subject, "all") and surface in (s.surface, "both")]
        r = np.concatenate([s.r if roi == "all" else s.r[s.rois[roi]] for s in chosen])
        assert row.n_vertices == len(r) and row.mean_r == pytest.approx(r.mean())
        assert row.mean_r2 == pytest.approx((np.maximum(r, 0) ** 2).mean())
