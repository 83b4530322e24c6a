"""Tables hold the scores of the metrics, in the order of the dataset."""

import csv

import numpy as np
import pytest

from heads.page.tables import Cell, all_estimates, blend_cells, roi_order, tables
from heads.scores.by_roi import every_summary


def test_scores_are_those_of_the_metrics_and_lie_in_their_intervals(measured):
    names = list(measured.r)
    (table,) = tables(all_estimates([measured]), [measured], names, {})
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
    (table,) = tables(all_estimates([measured]), [measured], list(measured.r), {})
    subject = measured.subject
    for row in table.rows[1:]:
        masks = [subject.rois[surface].get(row.roi) for surface in subject.surfaces]
        known = [subject.noise_ceiling[s][mask] for s, mask in zip(subject.surfaces, masks, strict=True)]
        assert row.ceiling == f"{100 * np.concatenate(known).mean():.1f}"


def test_rois_that_the_first_subject_lacks_keep_their_place(measured):
    order = roi_order([measured])
    every = [roi for rois in measured.subject.rois.values() for roi in rois]
    assert order == ["all", *dict.fromkeys(every)]
    assert len(order) - 1 > len({row.roi for row in tables(all_estimates([measured]), [measured], [], {})[0].rows}) - 1


def test_the_blend_has_a_column_of_its_own_where_there_is_one(reported, measured):
    path = reported.work / "submission" / "scores.csv"
    cells = blend_cells(path)
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "blend" and row["surface"] == "both"]
    assert len(cells) == len(rows) > 5
    for row in rows:
        assert cells[row["subject"], row["roi"]].r == f"{float(row['mean_r']):.3f}"
    (table,) = tables(all_estimates([measured]), [measured], list(measured.r), cells)
    assert table.rows[0].cells[0] == cells[measured.subject.name, "all"]
    assert len(table.rows[0].cells) == 1 + len(measured.r)


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "method,subject,surface,roi,mean_r,accuracy\nblend,a,both,all,x,\n"]
)
def test_a_table_of_another_form_is_none(tmp_path, text):
    (path := tmp_path / "scores.csv").write_text(text)
    assert blend_cells(path) == {} == blend_cells(tmp_path / "missing.csv")
    assert Cell().r == ""
