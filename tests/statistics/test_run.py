"""Scores of every vertex: those of the metrics, planted effects found, and nothing that depends on blocks."""

import numpy as np
import pytest

import heads.statistics.run
from heads.scores.metrics import accuracy_from_r, pearson_r
from heads.statistics.discovery import q_values
from heads.statistics.run import joined_rois
from support.scored import CEILINGS, FOLDING, WIDTHS, N, made, scored
from support.statistics import subject_with


def of(scores, model="good", surface="lh", subject="subj01"):
    (one,) = [s for s in scores.vertices if (s.model, s.surface, s.subject) == (model, surface, subject)]
    return one


def test_r_is_that_of_the_metrics_over_all_images_and_of_each_fold(tmp_path, monkeypatch):
    found = made(tmp_path)
    scores = scored(found, monkeypatch, permutations=0, per_fold=True, intervals=False)
    (subject,) = found
    folds, y = FOLDING.folds(subject.train.ids), subject.responses("lh")
    p, one = found[subject][0].source.predictions["lh"], of(scores)
    np.testing.assert_allclose(one.r, pearson_r(p, y), atol=1e-12)
    assert list(one.of_folds) == [0, 1, 2, 3, 4] and one.p is None and one.difference is None
    for fold, r in one.of_folds.items():
        np.testing.assert_allclose(r, pearson_r(p[folds == fold], y[folds == fold]), atol=1e-12)
    np.testing.assert_array_equal(one.accuracy(one.r), accuracy_from_r(one.r, CEILINGS["lh"]))
    assert np.isnan(of(scores, surface="rh").accuracy(one.r)).all()
    assert scores.estimates == [] and scores.chosen_on == ["bad"] and scores.significant(0.05) == {}


def test_planted_effects_are_significant_and_a_constant_vertex_never_is(tmp_path, monkeypatch):
    scores = scored(made(tmp_path), monkeypatch, permutations=400, against="bad")
    assert scores.against == "bad"
    good, bad = of(scores), of(scores, "bad")
    assert (good.q[:15] < 0.05).all() and (good.q[15:] < 0.05).sum() <= 2 and (good.p_family[:15] < 0.05).all()
    assert (bad.q > 0.05).all() and good.p[20] == bad.p[20] == good.p_family[20] == 1 and good.r[20] == 0
    assert (good.difference_q[:15] < 0.05).all() and (good.difference_p[15:] < 0.05).mean() < 0.2
    np.testing.assert_allclose(good.difference, good.r - bad.r, atol=1e-5)
    assert bad.difference is None and good.difference_p[20] == 1
    shares = scores.significant(0.05)
    assert shares["V1", "bad"] == 0 and shares["V1", "good"] == pytest.approx(10 / 15, abs=0.1)
    assert shares["all", "good"] == pytest.approx(25 / 50, abs=0.05) and ("none", "good") not in shares
    assert {(one.model, one.against) for one in scores.estimates} == {("good", ""), ("bad", ""), ("good", "bad")}


def test_q_is_over_all_vertices_of_a_subject_and_of_it_alone(tmp_path, monkeypatch):
    scores = scored(made(tmp_path, n_subjects=2), monkeypatch, permutations=50, fdr="by", intervals=False)
    for subject in ("subj01", "subj02"):
        parts = [of(scores, surface=surface, subject=subject) for surface in WIDTHS]
        every = q_values(np.concatenate([part.p for part in parts]), "by")
        np.testing.assert_array_equal(np.concatenate([part.q for part in parts]), every)


def test_nothing_depends_on_the_blocks(tmp_path, monkeypatch):
    found, blocks = made(tmp_path), heads.statistics.run.blocks_of
    settings = {"permutations": 60, "against": "bad", "per_fold": True}
    whole = scored(found, monkeypatch, **settings)
    monkeypatch.setattr(heads.statistics.run, "blocks_of", lambda subject: blocks(subject, 7 * 4 * N))
    widths = [one.responses.shape[1] for one in heads.statistics.run.blocks_of(next(iter(found)))]
    assert max(widths) == 7 and sum(widths) == sum(WIDTHS.values())
    parts = scored(found, monkeypatch, **settings)
    for one, other in zip(whole.vertices, parts.vertices, strict=True):
        for name in ("r", "p", "q", "p_family", "difference", "difference_p"):
            first, second = getattr(one, name), getattr(other, name)
            assert (first is None) == (second is None)
            if first is not None:
                np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_surface_without_vertices_is_left_out(tmp_path, monkeypatch):
    found = made(tmp_path)
    ((subject, models),) = found.items()
    y = {"lh": np.array(subject.responses("lh")), "rh": np.empty((N, 0), np.float32)}
    (tmp_path / "one").mkdir()
    one_sided = subject_with(tmp_path / "one", y, "subj01", rois={"lh": {}, "rh": {}}, ceilings=CEILINGS)
    scores = scored({one_sided: models}, monkeypatch, permutations=20, against="bad")
    assert {one.surface for one in scores.vertices} == {"lh"}
    np.testing.assert_array_equal(of(scores).r, of(scored(found, monkeypatch, permutations=0)).r)


def test_vertices_of_several_rois_have_all_their_names(tmp_path):
    (subject,) = made(tmp_path)
    numbers, names = joined_rois(subject, "lh")
    labels = [names[number] for number in numbers]
    assert labels == ["V1+early"] * 10 + ["early"] * 5 + [""] * 15
