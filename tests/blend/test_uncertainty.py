"""Intervals over images and shuffled responses: what they are of, and what they find."""

import numpy as np
import pytest

import heads.blend.uncertainty
from heads.blend.learn import judge_of, learn, levels_of, nested_r
from heads.blend.products import gather
from heads.blend.uncertainty import (
    N_PERMUTATIONS,
    Scorer,
    bootstrap,
    gains,
    null,
    resample,
    scorer_of,
    shuffled_products,
)
from heads.blend.weights import Judge, r_of
from heads.config import BlendConfig
from heads.scores.metrics import accuracy_from_r
from heads.scores.resampling import image_weights
from support.blends import FOLDS, IDS, N_TRAIN, N_VERTICES, made_up, mixed, standardised, stores_of, subject_of

IDS_TRAINED = IDS[:N_TRAIN]


def weighted_r(p, y, w):
    def centred(x):
        return x - np.average(x, weights=w)

    p, y = centred(p), centred(y)
    return (w * p * y).sum() / np.sqrt((w * p**2).sum() * (w * y**2).sum())


def gathered(folder, predictions, responses, ceiling=None):
    subject = subject_of(folder, responses, ceiling)
    return subject, gather(subject, stores_of(folder, predictions))


def test_bootstrap_is_r_with_weighted_images(tmp_path):
    predictions, responses = made_up()
    _, found = gathered(tmp_path, predictions, responses)
    nested = np.random.default_rng(0).uniform(size=(5, N_VERTICES, len(predictions)))
    drawn = image_weights(IDS_TRAINED, 3, 7)
    r = bootstrap(found.sample, FOLDS, {"blend": nested}, drawn)["blend"]
    standard, y = standardised(predictions)[:, :N_TRAIN], responses[:N_TRAIN].astype(np.float64)
    blend = sum(np.where((fold == FOLDS)[:, None], mixed(w, standard), 0) for fold, w in enumerate(nested))
    for number, w in enumerate([np.ones(N_TRAIN), *drawn]):
        expected = [weighted_r(blend[:, v], y[:, v], w) for v in range(N_VERTICES)]
        np.testing.assert_allclose(r[number], expected, atol=1e-4)
    np.testing.assert_allclose(r[0], nested_r(found.products, nested), atol=1e-4)


def test_shuffled_products_are_those_of_shuffled_responses(tmp_path):
    predictions, responses = made_up()
    _, found = gathered(tmp_path / "a", predictions, responses)
    order = np.random.default_rng(0).permutation(N_TRAIN)
    shuffled = responses.copy()
    shuffled[:N_TRAIN] = responses[:N_TRAIN][order]
    _, expected = gathered(tmp_path / "b", predictions, shuffled)
    products = shuffled_products(found.products, found.sample, FOLDS, order)
    np.testing.assert_allclose(products.sums, expected.products.sums, atol=2e-3)


def test_the_score_is_that_of_the_report(tmp_path):
    ceiling = np.linspace(0, 1, N_VERTICES, dtype=np.float32)
    subject = subject_of(tmp_path, made_up()[1], ceiling)
    r = np.random.default_rng(0).uniform(-1, 1, N_VERTICES)
    scorer = scorer_of(subject, judge_of(subject), accuracy=True)
    assert scorer.mean(r) == pytest.approx(np.nanmean(accuracy_from_r(r, ceiling))) and scorer.n_vertices == 6
    assert scorer_of(subject, judge_of(subject), accuracy=False).mean(r) == pytest.approx(r.mean())
    assert Scorer(Judge.of([ceiling], [N_VERTICES]), 6).at(np.array([0, 2])).mean(r[[0, 2]]) == pytest.approx(
        accuracy_from_r(r, ceiling)[2]
    )


def resampled(folder, predictions, responses, seed=0, n_vertices=None):
    subject, found = gathered(folder, predictions, responses)
    judge, levels, config = judge_of(subject), levels_of(subject), BlendConfig(method="nnls", per="vertex")
    learnt = learn(found.products, judge, levels, config)
    r = {name: nested_r(found.products, weights) for name, weights in learnt.nested.items()}
    r["optimistic"] = r_of(found.products.total().sums, learnt.weights)
    scorer = Scorer(None, n_vertices or N_VERTICES)
    return resample(found, IDS_TRAINED, r, learnt, lambda m, _: learn(m, judge, levels, config), scorer, seed)


@pytest.mark.slow
def test_a_blend_that_helps_is_sure_of_it_and_one_that_cannot_is_not(tmp_path):
    predictions, responses = made_up(noise=(2, 2, 2, 2))
    one = resampled(tmp_path / "a", predictions, responses)
    over_single, over_uniform = gains([one])
    assert over_single.over == "best single" and over_single.low > 0.05
    assert over_single.low < over_single.gain < over_single.high
    assert over_single.gain == pytest.approx(one.whole["blend"] - one.whole["best single"])
    assert over_uniform.low < 0.01 and abs(over_uniform.gain) < 0.03  # equal models: uniform is the best blend
    assert over_uniform.optimistic >= over_uniform.gain
    same = np.repeat(predictions[:1], 3, axis=0)
    nothing = gains([resampled(tmp_path / "b", same, responses)])[0]
    assert nothing.low == pytest.approx(0, abs=1e-3) and nothing.high == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
def test_shuffled_responses_give_nothing_but_optimism(tmp_path, monkeypatch):
    monkeypatch.setattr(heads.blend.uncertainty, "N_PERMUTATIONS", N_PERMUTATIONS)
    found = null([resampled(tmp_path, *made_up(noise=(2, 2, 2, 2)))])
    assert abs(found.mean) < 0.05 and found.mean <= found.largest < 0.15
    assert found.optimistic > found.mean + 0.02


@pytest.mark.slow
def test_the_null_is_of_some_vertices_where_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(heads.blend.uncertainty, "NULL_VERTICES", 3)
    asked = []
    subject, found = gathered(tmp_path, *made_up(noise=(2, 2, 2, 2)))
    judge, levels, config = judge_of(subject), levels_of(subject), BlendConfig(method="nnls", per="vertex")

    def again(products, vertices):
        asked.append(vertices.tolist())
        assert products.n_vertices == 3
        return learn(products, judge.at(vertices), [level.at(vertices) for level in levels], config)

    learnt = learn(found.products, judge, levels, config)
    r = {name: nested_r(found.products, weights) for name, weights in learnt.nested.items()}
    one = resample(found, IDS_TRAINED, r, learnt, again, Scorer(None, N_VERTICES), 0)
    assert asked == [[0, 2, 4]] * heads.blend.uncertainty.N_PERMUTATIONS
    assert abs(one.shuffled["blend"].mean()) < 0.1
    assert len(one.bootstraps["blend"]) == heads.blend.uncertainty.N_BOOTSTRAPS


@pytest.mark.slow
def test_subjects_count_by_their_vertices(tmp_path):
    good, bad = made_up(noise=(2, 2, 2, 2)), made_up(noise=(9, 9, 9, 9), seed=1)
    one = resampled(tmp_path / "a", *good, n_vertices=30)
    two = resampled(tmp_path / "b", *bad, n_vertices=10)
    gain = gains([one, two])[0]
    parts = [part.whole["blend"] - part.whole["best single"] for part in (one, two)]
    assert gain.gain == pytest.approx(0.75 * parts[0] + 0.25 * parts[1])
    away = [p.bootstraps["blend"] - p.bootstraps["best single"] for p in (one, two)]
    spread = np.std(0.75 * away[0] + 0.25 * away[1])
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * spread, rel=0.2)
