"""Intervals over images: against a slow reference, of planted differences, and how often they hold the truth."""

import numpy as np
import pytest

import heads.statistics.intervals
from heads.scores.metrics import accuracy_from_r, pearson_r
from heads.scores.resampling import image_weights
from heads.statistics.blocks import Block, blocks_of
from heads.statistics.intervals import Drawer, combined, estimates, score_intervals, select, with_totals
from support.statistics import Given, out_of_fold, subject_with

N, WIDTHS = 80, {"lh": 6, "rh": 4}
ROIS = {"lh": {"V1": np.arange(6) < 2, "none": np.zeros(6, bool)}, "rh": {"V1": np.arange(4) > 1}}
CEILINGS = {"lh": np.array([0, 0.5, 0.9, 0.3, 0.2, 1], np.float32), "rh": np.full(4, 0.6, np.float32)}


def made(tmp_path, seed=0, noise=(1, 1.2), n=N, ceilings=CEILINGS, **more):
    rng = np.random.default_rng(seed)
    responses = {surface: rng.normal(size=(n, width)).astype(np.float32) for surface, width in WIDTHS.items()}
    models = [
        Given(name, {s: (y + size * rng.normal(size=y.shape)).astype(np.float32) * 3 + 1 for s, y in responses.items()})
        for name, size in zip("ab", noise, strict=True)
    ]
    return subject_with(tmp_path, responses, rois=ROIS, ceilings=ceilings, **more), models


def slow_r(p, y, weights):
    p, y = p - np.average(p, weights=weights), y - np.average(y, weights=weights)
    return (weights * p * y).sum() / np.sqrt((weights * p**2).sum() * (weights * y**2).sum())


def only(found, **which):
    chosen = [one for one in found if all(getattr(one, name) == value for name, value in which.items())]
    assert len(chosen) == 1
    return chosen[0]


def test_intervals_are_those_of_a_loop_over_draws_and_vertices(tmp_path):
    subject, models = made(tmp_path)
    found = score_intervals({subject: models}, "b", n_draws=40, seed=5)
    weights = image_weights(subject.train.ids, 5, 40)

    def slow(model, measure):
        means = []
        for w in [np.ones(N), *weights]:
            values = []
            for surface, masks in ROIS.items():
                y, p = np.load(subject.response_paths[surface]).astype(float), model.predictions[surface].astype(float)
                r = np.array([slow_r(p[:, v], y[:, v], w) for v in np.flatnonzero(masks["V1"])])
                accuracy = accuracy_from_r(r, CEILINGS[surface][masks["V1"]])
                values += [r if measure == "r" else accuracy[~np.isnan(accuracy)]]
            means.append(np.concatenate(values).mean())
        return np.array(means)

    for measure, n in (("r", 4), ("accuracy", 3)):
        of_a, of_b = (slow(model, measure) for model in models)
        for expected, against, model in ((of_a, "", "a"), (of_b, "", "b"), (of_a - of_b, "b", "a")):
            one = only(found, subject="all", surface="both", roi="V1", measure=measure, against=against, model=model)
            deviations = np.sqrt(2) * (expected[1:] - expected[1:].mean())
            ends = expected[0] + np.quantile(deviations, [0.025, 0.975])
            if not against:  # a score has a range, a difference of scores is left as it is
                ends = np.clip(ends, *((-1, 1) if measure == "r" else (0, 100)))
            np.testing.assert_allclose([one.mean, one.low, one.high], [expected[0], *ends], rtol=1e-3, atol=1e-4)
            assert one.n_vertices == n
            if against:
                share = np.mean([*(np.abs(deviations) >= abs(expected[0])), True])
                assert one.p == pytest.approx(share, abs=0.03)


def test_an_interval_does_not_depend_on_the_blocks(tmp_path, monkeypatch):
    subject, models = made(tmp_path)
    whole = score_intervals({subject: models}, "a", n_draws=20)
    blocks = heads.statistics.intervals.blocks_of
    monkeypatch.setattr(heads.statistics.intervals, "blocks_of", lambda subject: blocks(subject, 4 * N))
    for one, other in zip(whole, score_intervals({subject: models}, "a", n_draws=20), strict=True):
        numbers = [(each.mean, each.low, each.high, each.p or 0) for each in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-4) and one.n_vertices == other.n_vertices


def test_there_are_rows_for_every_place_and_what_is_nowhere_has_none(tmp_path):
    subject, models = made(tmp_path)
    found = score_intervals({subject: models}, n_draws=5)
    places = {(one.subject, one.surface, one.roi) for one in found}
    assert places == {(s, h, r) for s in ("subj01", "all") for h in ("lh", "rh", "both") for r in ("V1", "all")}
    assert {one.measure for one in found} == {"r", "accuracy"} and not any(one.against for one in found)
    assert len(select(found, rois=["V1"])) == 2 and len(select(found, measure="accuracy")) == 4
    without = score_intervals({made(tmp_path, ceilings=None)[0]: models}, n_draws=5)
    assert {one.measure for one in without} == {"r"}


def test_many_vertices_are_sampled_and_the_score_is_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(heads.statistics.intervals, "MOST_VERTICES", 3)
    subject, models = made(tmp_path)
    one = only(
        score_intervals({subject: models[:1]}, n_draws=30), subject="subj01", surface="lh", roi="all", measure="r"
    )
    assert one.mean == pytest.approx(pearson_r(models[0].predictions["lh"], subject.responses("lh")).mean())
    assert one.n_vertices == 6 and one.low < one.mean < one.high


def test_a_planted_difference_is_found_and_none_is_not(tmp_path):
    subject, models = made(tmp_path, noise=(1, 3), n=300)
    one = only(
        score_intervals({subject: models}, "b"), subject="all", surface="both", roi="all", measure="r", against="b"
    )
    assert one.low > 0.1 and one.p == pytest.approx(1 / 401)
    same = [models[0], Given("c", models[0].predictions)]
    none = only(
        score_intervals({subject: same}, "c"), subject="all", surface="both", roi="all", measure="r", against="c"
    )
    assert (none.mean, none.low, none.high, none.p) == (0, 0, 0, 1)


def test_subjects_that_saw_the_same_pictures_vary_together(tmp_path):
    """Two subjects with the same responses are no more certain than one; with other pictures they are."""
    subject, models = made(tmp_path, n=200)
    twin, _ = made(tmp_path, n=200, name="subj02")
    other, _ = made(tmp_path, n=200, name="subj03", ids=np.arange(200) + 5000)

    def width(*subjects):
        found = score_intervals({one: models[:1] for one in subjects})
        one = only(found, subject="all", surface="both", roi="all", measure="r")
        return one.high - one.low

    assert width(subject, twin) == pytest.approx(width(subject), rel=1e-3)
    assert width(subject, other) == pytest.approx(width(subject) / np.sqrt(2), rel=0.2)


def test_totals_are_over_vertices_and_leave_out_a_model_that_a_place_lacks(tmp_path):
    drawers = []
    for number, names in enumerate(("ab", "a")):
        subject, models = made(tmp_path, seed=number, name=f"subj0{number}")
        drawer = Drawer(subject, n_draws=10)
        for surface in WIDTHS:
            block = Block(surface, slice(0, WIDTHS[surface]), subject.responses(surface))
            drawer.start(block)
            for model in models[: len(names)]:
                drawer.add(model.name, model.predictions[surface])
        drawers.append(drawer.draws())
    totals = with_totals(drawers[0] | drawers[1])
    assert list(totals[("all", "both", "V1"), "r"]) == ["a"] and list(totals[("subj00", "both", "V1"), "r"]) == [
        "a",
        "b",
    ]
    parts = [draws[(f"subj0{n}", surface, "V1"), "r"]["a"] for n, draws in enumerate(drawers) for surface in WIDTHS]
    total = combined(parts)
    assert total.n_vertices == 8 and total.whole == pytest.approx(np.mean([part.whole for part in parts]))
    assert len(estimates(totals)) == sum(map(len, totals.values()))


@pytest.mark.slow
def test_intervals_of_heads_out_of_fold_hold_the_truth_and_those_without_spread_do_not(tmp_path):
    """The truth is the mean over many samples of images, each with heads of its own."""
    rng, n, n_features, n_samples = np.random.default_rng(0), 200, 100, 100
    effect = 0.3 * rng.normal(size=(n_features, 10)) / np.sqrt(n_features)
    found = {True: [], False: []}
    for number in range(n_samples):
        features = rng.normal(size=(n, n_features))
        responses = features @ effect + rng.normal(size=(n, 10))
        folds = rng.integers(0, 5, n)
        subject = subject_with(tmp_path, {"lh": responses}, ids=rng.permutation(100_000)[:n])
        drawer = Drawer(subject, n_draws=100, seed=number)
        drawer.start(next(blocks_of(subject)))
        drawer.add("a", out_of_fold(features, responses, folds, 50))
        for cross_fitted, kept in found.items():
            kept.append(select(estimates(drawer.draws(), cross_fitted=cross_fitted), subject="subj01", surface="lh")[0])
    truth = np.mean([one.mean for one in found[True]])
    covered = {key: np.mean([one.low <= truth <= one.high for one in kept]) for key, kept in found.items()}
    assert covered[True] >= 0.9 and covered[False] < 0.88
