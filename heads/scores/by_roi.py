"""Scores of every ROI in every surface of every subject, as the challenge's report lists them."""

from collections.abc import Sequence

from heads.scores.metrics import ALL_SURFACES, Summary, VertexScores, ZeroCeiling, summary_of


def every_summary(scores: Sequence[VertexScores], zero_ceiling: ZeroCeiling = "exclude") -> list[Summary]:
    """Means for each subject, surface and ROI, and for all of each together; those without vertices have no row.

    Subjects and surfaces are in alphabetical order, ROIs in the order of `scores`, which is that of the challenge's
    report; "all" and "both" come last. Means are over vertices, as in `summarize`.

    scores : one for each subject and surface
    """
    subjects, surfaces = (sorted({getattr(one, part) for one in scores}) for part in ("subject", "surface"))
    rois = [*dict.fromkeys(roi for one in scores for roi in one.rois), "all"]
    rows = []
    for subject in [*subjects, "all"]:
        for surface in [*surfaces, ALL_SURFACES]:
            chosen = [
                one for one in scores if subject in (one.subject, "all") and surface in (one.surface, ALL_SURFACES)
            ]
            rows += [summary_of(subject, surface, roi, chosen, zero_ceiling) for roi in rois if chosen]
    return [row for row in rows if row is not None]
