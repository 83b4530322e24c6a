"""Numbers of one pass are those of a slow reference that holds everything at once."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from heads.page import measures
from heads.page.measures import ceiling_of, explainable, measure
from heads.statistics import blocks


def reference_image_r(subject, model):
    """r over explainable vertices of each image's prediction with its response, image by image."""
    predicted, measured = (
        np.concatenate([read(surface) for surface in subject.surfaces], axis=1).astype(np.float64)
        for read in (lambda surface: model.store.read(surface, 0, model.store.n_train), subject.responses)
    )
    keep = (measured.std(0) > 0) & explainable(ceiling_of(subject))
    scale = measured[:, keep].std(0)
    predicted, measured = ((one[:, keep] - one[:, keep].mean(0)) / scale for one in (predicted, measured))
    return np.array([np.corrcoef(p, y)[0, 1] for p, y in zip(predicted, measured, strict=True)])


@pytest.mark.parametrize("n_bytes", [400e6, 30 * 4 * 7])  # all vertices at once, and 7 at a time
def test_r_of_vertices_and_of_images(reported, scored, models, n_bytes, monkeypatch):
    subject = reported.dataset.subjects[0]
    monkeypatch.setattr(measures, "blocks_of", lambda one: blocks.blocks_of(one, n_bytes))
    found = measure(subject, scored, n_draws=5)
    assert set(found.r) == {"blend", *(model.name for model in models)} and len(models) > 3
    for model in models:
        predicted = np.concatenate([model.store.read(s, 0, model.store.n_train) for s in subject.surfaces], axis=1)
        responses = np.concatenate([subject.responses(s) for s in subject.surfaces], axis=1)
        alive = (responses.std(0) > 0) & (predicted.std(0) > 0)
        r = [np.corrcoef(predicted[:, v], responses[:, v])[0, 1] for v in np.flatnonzero(alive)]
        np.testing.assert_allclose(found.r[model.name][alive], r, atol=1e-6)
        assert (found.r[model.name][~alive] == 0).all()
        np.testing.assert_allclose(found.spread[model.name], predicted.std(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.image_r[model.name], reference_image_r(subject, model), atol=1e-5)


def test_the_best_is_the_blend_or_has_the_highest_mean_r(measured):
    assert measured.blended and measured.best == "blend"
    single = replace(measured, r={name: r for name, r in measured.r.items() if name != "blend"})
    means = {name: r.mean() for name, r in single.r.items()}
    assert not single.blended and means[single.best] == max(means.values())
    scores = measured.scores(measured.best)
    np.testing.assert_array_equal(np.concatenate([one.r for one in scores]), measured.r[measured.best])


def test_the_blend_is_scored_out_of_fold(reported, measured):
    """As the blend itself scored it, with weights learnt on other folds."""
    with (reported.work / "submission" / "scores.csv").open() as file:
        (row,) = [
            row
            for row in csv.DictReader(file)
            if (row["method"], row["subject"], row["surface"], row["roi"]) == ("blend", "subj01", "both", "all")
        ]
    assert measured.r["blend"].mean() == pytest.approx(float(row["mean_r"]), abs=0.03)


def test_vertices_without_a_ceiling_are_explainable_and_those_with_none_to_reach_are_not(reported):
    ceiling = ceiling_of(reported.dataset.subjects[0])
    assert (ceiling == 0).any() and not explainable(ceiling)[ceiling == 0].any()
    assert explainable(np.array([np.nan, 0, 0.1])).tolist() == [True, False, True]


def test_subjects_without_ceilings_have_nan(reported, tmp_path: Path):
    from featcache.dataset.algonauts import open_challenge

    (folder := tmp_path / "ceilings" / "subj01").mkdir(parents=True)
    n = reported.dataset.subjects[0].n_vertices
    np.save(folder / "lh.npy", np.full(n["lh"], 50, np.float32))
    subject = open_challenge(reported.data, folder.parent).subjects[0]
    ceiling = ceiling_of(subject)
    assert (ceiling[: n["lh"]] == 0.5).all() and np.isnan(ceiling[n["lh"] :]).all()
