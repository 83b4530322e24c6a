"""Tables hold the scores of the metrics, in the order of the dataset."""

import numpy as np

from heads.page.tables import Cell, all_estimates, roi_order, tables
from heads.scores.by_roi import every_summary


def test_scores_are_those_of_the_metrics_and_lie_in_their_intervals(measured):
    names = list(measured.r)
    (table,) = tables(all_estimates([measured]), [measured], names)
    assert table.subject == measured.subject.name and table.rows[0].roi == "all"
    for column, name in enumerate(names):
        summaries = {one.roi: one for one in every_summary(measured.scores(name)) if one.subject != "all"}
        summaries = {roi: one for roi, one in summaries.items() if one.surface == "both"}
        assert {row.roi for row in table.rows} == set(summaries)
        for row in table.rows:
            cell, summary = row.cells[column], summaries[row.roi]
            assert row.n_vertices == summary.n_vertices and cell.r == f"{summary.mean_r:.3f}"
            assert cell.accuracy == ("" if summary.accuracy is None else f"{summary.accuracy:.1f}")
            low, high = map(float, cell.r_interval.split(" to "))
            assert low <= float(cell.r) <= high
            if cell.accuracy:
                low, high = map(float, cell.accuracy_interval.split(" to "))
                assert low - 0.05 <= float(cell.accuracy) <= high + 0.05


def test_the_ceiling_is_the_mean_over_the_vertices_of_a_row(measured):
    (table,) = tables(all_estimates([measured]), [measured], list(measured.r))
    subject = measured.subject
    for row in table.rows[1:]:
        masks = [subject.rois[surface].get(row.roi) for surface in subject.surfaces]
        known = [subject.noise_ceiling[s][mask] for s, mask in zip(subject.surfaces, masks, strict=True)]
        assert row.ceiling == f"{100 * np.concatenate(known).mean():.1f}"


def test_rois_that_the_first_subject_lacks_keep_their_place(measured):
    order = roi_order([measured])
    every = [roi for rois in measured.subject.rois.values() for roi in rois]
    assert order == ["all", *dict.fromkeys(every)]
    assert len(order) - 1 > len({row.roi for row in tables(all_estimates([measured]), [measured], [])[0].rows}) - 1


def test_a_model_that_a_subject_lacks_has_an_empty_cell(measured):
    (table,) = tables(all_estimates([measured]), [measured], ["nobody", "blend"])
    assert {row.cells[0] for row in table.rows} == {Cell()} and all(row.cells[1].r for row in table.rows)
