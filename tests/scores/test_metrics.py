"""Metrics equal scipy's and the plain formulas, on the awkward columns as well."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from featcache.errors import FeatcacheError
from heads.scores import metrics
from heads.scores.metrics import (
    Summary,
    VertexScores,
    accuracy_from_r,
    explained_share,
    noise_normalized_accuracy,
    pearson_r,
    r_from_sums,
    summarize,
)

shapes = st.tuples(st.integers(2, 30), st.integers(1, 20))
seeds = st.integers(0, 2**32)


def slow_r(predictions, responses):
    """scipy in float64, a vertex at a time; 0 for a constant column."""
    r = []
    for p, y in zip(np.asarray(predictions, np.float64).T, np.asarray(responses, np.float64).T, strict=True):
        r.append(0.0 if np.ptp(p) == 0 or np.ptp(y) == 0 else pearsonr(p, y).statistic)
    return np.array(r)


def slow_accuracy(r, noise_ceiling, zero_ceiling):
    accuracy = []
    for r_v, nc in zip(r, noise_ceiling, strict=True):
        if nc == 0 and zero_ceiling == "exclude":
            accuracy.append(float("nan"))
        else:
            accuracy.append(min(100.0, 100 * max(r_v, 0.0) ** 2 / (nc or 1e-14)))
    return np.array(accuracy)


def matrices(shape=(40, 9), seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    responses = rng.normal(size=shape)
    predictions = responses * rng.uniform(-1, 1, size=shape[1]) + rng.normal(size=shape)
    return predictions.astype(dtype), responses.astype(dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 3 vertices and 4 images, so that small matrices cross every edge."""
    monkeypatch.setattr(metrics, "_TILE_VERTICES", 3)
    monkeypatch.setattr(metrics, "_TILE_NUMBERS", 12)


# pearson_r


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_r_is_scipys(shape, seed, data):
    predictions, responses = matrices(shape, seed)
    vertex = st.integers(0, shape[1] - 1)
    predictions[:, data.draw(vertex)] = 0.1
    responses[:, data.draw(vertex)] = 7.7
    r = pearson_r(predictions, responses)
    assert r.shape == (shape[1],) and r.dtype == np.float64
    np.testing.assert_allclose(r, slow_r(predictions, responses), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 1), (4, 3), (5, 4), (17, 10), (40, 9)])
def test_tiles_join_without_a_seam(small_tiles, shape):
    predictions, responses = matrices(shape)
    predictions[:, -1] += 1e6  # one tile takes the way for large means, the others do not
    np.testing.assert_allclose(pearson_r(predictions, responses), slow_r(predictions, responses), rtol=0, atol=1e-9)


def test_tiles_join_at_their_real_size():
    n_vertices = metrics._TILE_VERTICES + 5
    predictions, responses = matrices((70, n_vertices), dtype=np.float32)
    some = np.r_[0:5, n_vertices - 10 : n_vertices]
    expected = slow_r(predictions[:, some], responses[:, some])
    np.testing.assert_allclose(pearson_r(predictions, responses)[some], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n_vertices", "cores", "n_tiles"),
    [
        (25_001, 1, 3),
        (10_000, 1, 1),
        (1_500, 4, 1),
        (2_048, 4, 2),
        (100, 4, 1),
        (9_000, 4, 4),
        (3_000, None, 1),
        (0, 4, 0),
    ],
)
def test_tiles_are_no_wider_than_a_cache_and_as_many_as_cores_where_they_are_wide_enough(
    monkeypatch, n_vertices, cores, n_tiles
):
    widths, block_r = [], metrics._block_r
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(metrics, "_block_r", lambda p, y: widths.append(p.shape[1]) or block_r(p, y))
    predictions, responses = matrices((4, n_vertices), dtype=np.float32)
    assert pearson_r(predictions, responses).shape == (n_vertices,)
    assert len(widths) == n_tiles and sum(widths) == n_vertices
    assert max(widths, default=0) <= 10_000 and max(widths, default=0) - min(widths, default=0) < max(n_tiles, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_every_dtype_is_summed_in_float64(dtype):
    predictions, responses = (100 * values for values in matrices((300, 5)))
    predictions, responses = predictions.astype(dtype), responses.astype(dtype)
    np.testing.assert_allclose(pearson_r(predictions, responses), slow_r(predictions, responses), rtol=0, atol=1e-12)


def test_layout_and_kind_do_not_matter(tmp_path):
    predictions, responses = matrices(dtype=np.float32)
    expected = pearson_r(predictions, responses)
    np.save(tmp_path / "predictions.npy", predictions)
    wide = np.zeros((40, 18), dtype=np.float32)
    wide[:, ::2] = predictions
    same = [
        np.asfortranarray(predictions),
        np.load(tmp_path / "predictions.npy", mmap_mode="r"),
        torch.from_numpy(predictions),
        wide[:, ::2],
        predictions[::-1][::-1],
    ]
    for version in same:
        np.testing.assert_allclose(pearson_r(version, responses), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("offset", [1e2, 1e6, -1e9])
def test_large_offsets_cost_no_digits(offset):
    predictions, responses = matrices((500, 6))
    moved = predictions + offset
    tolerance = 1e-15 * abs(offset) + 1e-12  # what adding the offset itself rounds away
    np.testing.assert_allclose(pearson_r(moved, responses), pearson_r(predictions, responses), rtol=0, atol=tolerance)
    np.testing.assert_allclose(pearson_r(responses, moved), pearson_r(responses, predictions), rtol=0, atol=tolerance)
    both = pearson_r(moved, responses + offset)  # of which no column is as it should be
    np.testing.assert_allclose(both, pearson_r(predictions, responses), rtol=0, atol=2 * tolerance)


def test_first_image_may_be_an_outlier():
    predictions, responses = matrices((500, 6))
    predictions += 1e3
    predictions[0] = -1e8
    np.testing.assert_allclose(pearson_r(predictions, responses), slow_r(predictions, responses), rtol=0, atol=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1 / 3, 1e6 + 0.1, 1e-9, 1e12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_column_has_r_of_exactly_0(constant, dtype):
    predictions, responses = matrices((1001, 5), dtype=dtype)
    predictions[:, 1] = constant
    responses[:, 2] = constant
    predictions[:, 3] = responses[:, 3] = constant
    r = pearson_r(predictions, responses)
    assert (r[[1, 2, 3]] == 0).all()
    assert (r[[0, 4]] != 0).all()


def test_rounding_of_a_constant_has_r_of_exactly_0():
    predictions, responses = matrices((200, 2))
    predictions[:, 0] = 0.3 + np.spacing(0.3) * (responses[:, 0] > 0)
    for r in (pearson_r(predictions, responses), pearson_r(responses, predictions)):
        assert r[0] == 0 and r[1] != 0


def test_small_signal_on_a_large_mean_is_no_constant():
    _, responses = matrices((200, 2))
    np.testing.assert_allclose(pearson_r(1 + 1e-9 * responses, responses), 1, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=seeds, scale=st.floats(1e-6, 1e6), offset=st.floats(-100, 100))
def test_r_ignores_order_scale_and_offset(shape, seed, scale, offset):
    predictions, responses = matrices(shape, seed)
    r = pearson_r(predictions, responses)
    order = np.random.default_rng(seed).permutation(shape[0])
    np.testing.assert_allclose(pearson_r(predictions[order], responses[order]), r, rtol=0, atol=1e-12)
    np.testing.assert_allclose(pearson_r(responses, predictions), r, rtol=0, atol=1e-12)
    np.testing.assert_allclose(pearson_r(-scale * predictions, responses), -r, rtol=0, atol=1e-12)
    tolerance = 1e-12 * (1 + abs(offset) / np.ptp(scale * predictions, axis=0).min()) ** 2
    np.testing.assert_allclose(pearson_r(scale * predictions + offset, responses), r, rtol=0, atol=tolerance)


def test_perfect_correlation_is_1_and_never_more():
    _, responses = matrices((500, 50))
    for sign in (1, -1):
        r = pearson_r(sign * 3.3 * responses + 0.7, responses)
        np.testing.assert_allclose(r, sign, atol=1e-12)
        assert (np.abs(r) <= 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 17])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_numbers_are_refused_without_a_warning(bad, row, side, small_tiles):
    pair = matrices()
    pair[side][row, 4] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FeatcacheError, match="expected finite numbers"):
            pearson_r(*pair)


def test_fewer_than_two_images_are_refused():
    for n_images in (0, 1):
        with pytest.raises(FeatcacheError, match=f"expected 2 images or more; found {n_images}"):
            pearson_r(np.ones((n_images, 3)), np.ones((n_images, 3)))


@pytest.mark.parametrize("shape", [(40, 1), (1, 9), (9,), (40, 8), (9, 40), (40, 9, 1)])
def test_wrong_shapes_are_refused(shape):
    predictions, _ = matrices()
    with pytest.raises(FeatcacheError, match=r"expected .* both; found"):
        pearson_r(predictions, np.ones(shape))


@pytest.mark.parametrize("dtype", [complex, object, str])
def test_numbers_that_are_not_real_are_refused(dtype):
    predictions, responses = matrices()
    with pytest.raises(FeatcacheError, match="responses: expected real numbers"):
        pearson_r(predictions, responses.astype(dtype))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds)
def test_r_from_sums_is_r_of_the_matrices(shape, seed):
    p, y = matrices(shape, seed)
    p[:, 0] = 0.1
    p[:, -1] = 3 - 2 * y[:, -1]
    sums = (p.sum(0), (p**2).sum(0), (p * y).sum(0), y.sum(0), (y**2).sum(0))
    # The values of a few images can be nearly equal by chance: then rounded sums cannot tell them from a constant.
    clear = (np.ptp(p, axis=0) == 0) | (p.var(0) > 1e-5 * (p**2).mean(0)) & (y.var(0) > 1e-5 * (y**2).mean(0))
    r = r_from_sums(np.array(len(p)), *sums)
    np.testing.assert_allclose(r[clear], slow_r(p, y)[clear], rtol=0, atol=1e-6)


def test_r_from_sums_of_weighted_images_is_that_of_repeated_ones():
    p, y = matrices()
    weights = np.random.default_rng(0).integers(0, 4, len(p))
    n, sums = weights.sum(), [weights @ values for values in (p, p**2, p * y, y, y**2)]
    r = r_from_sums(n, *sums)
    np.testing.assert_allclose(r, pearson_r(np.repeat(p, weights, 0), np.repeat(y, weights, 0)), rtol=0, atol=1e-9)


def test_sums_over_no_images_or_one_have_no_r():
    assert r_from_sums(*np.zeros((6, 3))).tolist() == [0, 0, 0]
    p, y = np.array([3.0, -2.0]), np.array([0.5, 7.0])
    assert r_from_sums(np.array(1), p, p**2, p * y, y, y**2).tolist() == [0, 0]


def test_sums_of_a_side_that_is_0_everywhere_have_an_r_of_0():
    p, zeros = np.array([1.0, 2.0, 4.0]), np.zeros(1)
    sums = [np.array([p.sum()]), np.array([(p**2).sum()])]
    assert r_from_sums(np.array(3), *sums, zeros, zeros, zeros).tolist() == [0]
    assert r_from_sums(np.array(3), zeros, zeros, zeros, *sums).tolist() == [0]


@pytest.mark.parametrize("sign", [1, -1])
def test_r_from_sums_that_were_rounded_is_never_beyond_1(sign):
    p = np.random.default_rng(0).normal(size=(30, 400)).astype(np.float32)
    y = sign * 3 * p
    r = r_from_sums(np.array(30), *(values.sum(0, dtype=np.float32) for values in (p, p**2, p * y, y, y**2)))
    np.testing.assert_allclose(r, sign, atol=1e-5)
    assert np.abs(r).max() == 1


def test_no_argument_is_edited():
    predictions, responses = matrices()
    predictions += 1e6
    before = predictions.copy(), responses.copy()
    pearson_r(predictions, responses)
    np.testing.assert_array_equal(predictions, before[0])
    np.testing.assert_array_equal(responses, before[1])


# noise-normalised accuracy


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(-1, 1), st.one_of(st.just(0.0), st.floats(0, 1))), max_size=30),
    zero_ceiling=st.sampled_from(["exclude", "epsilon"]),
)
def test_accuracy_is_the_formula(pairs, zero_ceiling):
    r, ceiling = np.array(pairs).reshape(-1, 2).T
    expected = slow_accuracy(r.tolist(), ceiling.tolist(), zero_ceiling)
    np.testing.assert_allclose(accuracy_from_r(r, ceiling, zero_ceiling), expected, rtol=1e-12)


def test_accuracy_by_hand():
    r = np.array([0.5, -0.5, 0.9, 0.5, 0.0])
    ceiling = np.array([0.5, 0.5, 0.25, 0.0, 0.0], dtype=np.float32)
    np.testing.assert_allclose(accuracy_from_r(r, ceiling), [50, 0, 100, np.nan, np.nan])
    np.testing.assert_allclose(accuracy_from_r(r, ceiling, "epsilon"), [50, 0, 100, 100, 0])


@pytest.mark.parametrize("zero_ceiling", ["exclude", "epsilon"])
def test_accuracy_of_matrices_is_that_of_their_r(zero_ceiling):
    predictions, responses = matrices()
    predictions[:, 2] = 0.1
    ceiling = np.linspace(0, 1, 9)
    accuracy = noise_normalized_accuracy(predictions, responses, ceiling, zero_ceiling)
    expected = slow_accuracy(slow_r(predictions, responses), ceiling, zero_ceiling)
    assert accuracy[2] == 0
    np.testing.assert_allclose(accuracy, expected, rtol=1e-9)


def test_the_explained_share_of_many_blends_is_the_accuracy_of_each():
    r, ceiling = np.random.default_rng(0).uniform(-1, 1, (2, 3, 9)), np.linspace(0.1, 1, 9)
    share = explained_share(r, ceiling)
    for part, of_part in zip(r.reshape(6, 9), share.reshape(6, 9), strict=True):
        np.testing.assert_allclose(100 * of_part, accuracy_from_r(part, ceiling), rtol=1e-12)


def test_an_r_of_1_is_all_of_the_variance_and_of_minus_1_none():
    np.testing.assert_allclose(accuracy_from_r([1, -1, 1, 1], [1, 1, 0.5, 1e-300]), [100, 0, 100, 100])


def test_ceiling_is_not_edited():
    ceiling = np.array([0.0, 0.5])
    for zero_ceiling in ("exclude", "epsilon"):
        accuracy_from_r(np.array([0.3, 0.3]), ceiling, zero_ceiling)
    assert ceiling.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("ceiling", [[0.5, 60.0], [0.5, 1.0001], [0.5, -0.1], [0.5, np.nan], [0.5], 0.5, [[0.5, 0.5]]])
def test_bad_ceilings_are_refused(ceiling):
    with pytest.raises(FeatcacheError, match=r"fractions of variance in \[0, 1\].*divide percent by 100"):
        accuracy_from_r([0.1, 0.2], ceiling)


@pytest.mark.parametrize(("ceiling", "found"), [([0.5, 60.0], r"\(2,\) from 0.5 to 60;"), ([], r"\(0,\);")])
def test_what_bad_ceilings_are_is_said(ceiling, found):
    with pytest.raises(FeatcacheError, match=f"found {found}"):
        accuracy_from_r([0.1, 0.2], ceiling)


@pytest.mark.parametrize("r", [[0.1, 1.1], [0.1, np.nan], [[0.1, 0.2]]])
def test_bad_r_is_refused(r):
    with pytest.raises(FeatcacheError, match=r"^r: expected"):
        accuracy_from_r(r, [0.5, 0.5])


def test_unknown_zero_ceiling_is_refused():
    with pytest.raises(FeatcacheError, match="expected 'exclude' or 'epsilon'; found 'drop'"):
        accuracy_from_r([0.1], [0.5], "drop")  # type: ignore[arg-type]


# summaries


def two_subjects():
    """Sizes differ on purpose, so that a mean of means is another number than the mean over vertices."""
    return [
        VertexScores(
            "subj02",
            "lh",
            r=np.array([0.5, -0.5, 0.4]),
            noise_ceiling=np.array([0.5, 0.5, 0.0]),
            rois={"V1v": np.array([True, True, False]), "RSC": np.zeros(3, dtype=bool)},
        ),
        VertexScores("subj01", "rh", r=np.array([0.8, 0.7]), noise_ceiling=np.array([0.8, 0.6])),
        VertexScores(
            "subj01",
            "lh",
            r=np.array([0.1, 0.3]),
            noise_ceiling=np.array([0.1, 0.9]),
            rois={"V1v": np.array([False, True]), "EBA": np.array([True, True])},
        ),
    ]


def rows_of(summaries):
    return {(row.subject, row.surface, row.roi): row for row in summaries}


def test_summary_has_a_row_for_each_set_of_vertices():
    keys = [(row.subject, row.surface, row.roi) for row in summarize(two_subjects())]
    assert keys == [
        ("subj01", "lh", "all"),
        ("subj01", "rh", "all"),
        ("subj02", "lh", "all"),
        ("subj01", "both", "all"),
        ("subj02", "both", "all"),
        ("all", "both", "V1v"),
        ("all", "both", "EBA"),
        ("all", "both", "all"),
    ]


@pytest.mark.parametrize(
    ("key", "r", "ceiling"),
    [
        (("subj01", "lh", "all"), [0.1, 0.3], [0.1, 0.9]),
        (("subj01", "both", "all"), [0.1, 0.3, 0.8, 0.7], [0.1, 0.9, 0.8, 0.6]),
        (("subj02", "both", "all"), [0.5, -0.5, 0.4], [0.5, 0.5, 0.0]),
        (("all", "both", "V1v"), [0.3, 0.5, -0.5], [0.9, 0.5, 0.5]),
        (("all", "both", "EBA"), [0.1, 0.3], [0.1, 0.9]),
        (("all", "both", "all"), [0.1, 0.3, 0.8, 0.7, 0.5, -0.5, 0.4], [0.1, 0.9, 0.8, 0.6, 0.5, 0.5, 0.0]),
    ],
)
@pytest.mark.parametrize("zero_ceiling", ["exclude", "epsilon"])
def test_means_are_over_vertices(key, r, ceiling, zero_ceiling):
    row = rows_of(summarize(two_subjects(), zero_ceiling))[key]
    assert row.n_vertices == len(r)
    assert row.mean_r == pytest.approx(sum(r) / len(r))
    assert row.mean_r2 == pytest.approx(sum(max(value, 0) ** 2 for value in r) / len(r))
    assert row.accuracy == pytest.approx(np.nanmean(slow_accuracy(r, ceiling, zero_ceiling)))


def test_rows_of_a_report_call_a_surface_a_hemisphere():
    row = rows_of(summarize(two_subjects()))["all", "both", "EBA"]
    assert row.all_surfaces is True and rows_of(summarize(two_subjects()))["subj01", "lh", "all"].all_surfaces is False
    assert list(row.to_json()) == ["subject", "surface", "roi", "n_vertices", "mean_r", "mean_r2", "accuracy"]
    assert row.to_json()["surface"] == "both" and row.to_json()["mean_r"] == row.mean_r


def test_surfaces_have_any_name():
    scores = [VertexScores("monkey", surface, r=np.array([0.1, 0.2])) for surface in ("V4", "IT")]
    assert {surface for _, surface, _ in rows_of(summarize(scores))} == {"V4", "IT", "both"}


def test_overall_is_no_mean_of_means():
    rows = rows_of(summarize(two_subjects()))
    subjects = [rows[subject, "both", "all"].mean_r for subject in ("subj01", "subj02")]
    assert rows["all", "both", "all"].mean_r != pytest.approx(np.mean(subjects), abs=1e-3)


def test_order_of_the_scores_does_not_change_the_means():
    assert set(summarize(two_subjects())) == set(summarize(two_subjects()[::-1]))


def test_accuracy_covers_only_vertices_with_a_ceiling():
    without = VertexScores("subj03", "lh", r=np.full(4, 0.2))
    all_zero = VertexScores("subj04", "lh", r=np.array([0.2]), noise_ceiling=np.zeros(1))
    rows = rows_of(summarize([*two_subjects(), without, all_zero]))
    assert rows["subj03", "lh", "all"].accuracy is None
    assert rows["subj04", "both", "all"].accuracy is None
    assert rows["subj04", "both", "all"].mean_r == pytest.approx(0.2)
    overall = rows["all", "both", "all"]
    assert overall.n_vertices == 12
    assert overall.accuracy == pytest.approx(rows_of(summarize(two_subjects()))["all", "both", "all"].accuracy)
    assert isinstance(overall, Summary)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=seeds)
def test_counts_add_up(sizes, seed):
    rng = np.random.default_rng(seed)
    scores = [
        VertexScores(
            f"subj{k // 2 + 1:02}",
            ("lh", "rh")[k % 2],
            r=rng.uniform(-1, 1, size),
            rois={"V1v": rng.random(size) < 0.4},
        )
        for k, size in enumerate(sizes)
    ]
    rows = rows_of(summarize(scores))
    pooled = np.concatenate([score.r for score in scores])
    assert rows["all", "both", "all"].mean_r == pytest.approx(pooled.mean())
    by_hemisphere = sum(row.n_vertices for (_, hemisphere, _), row in rows.items() if hemisphere != "both")
    assert by_hemisphere == rows["all", "both", "all"].n_vertices == sum(sizes)
    n_v1v = sum(int(score.rois["V1v"].sum()) for score in scores)
    assert sum(row.n_vertices for (_, _, roi), row in rows.items() if roi == "V1v") == n_v1v
    assert (("all", "both", "V1v") in rows) == (n_v1v > 0)


def test_summary_needs_scores_and_each_of_them_once():
    with pytest.raises(FeatcacheError, match="expected scores of a surface or more, each once; found none"):
        summarize([])
    with pytest.raises(FeatcacheError, match="found subj02 lh twice"):
        summarize([*two_subjects(), two_subjects()[0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surface": "both"}, "expected the name of one; found 'both'"),
        ({"r": np.array([0.1, 2.0])}, r"^r: expected"),
        ({"noise_ceiling": np.array([50.0, 60.0])}, "divide percent by 100"),
        ({"noise_ceiling": np.array([0.5])}, "one value per vertex"),
        ({"rois": {"V1v": np.array([0, 4])}}, "mask of ROI V1v"),
        ({"rois": {"V1v": np.array([True])}}, "mask of ROI V1v"),
    ],
)
def test_scores_are_checked_when_built(changes, message):
    fields = {"subject": "subj01", "surface": "lh", "r": np.array([0.1, 0.2])}
    with pytest.raises(FeatcacheError, match=message):
        VertexScores(**(fields | changes))


def test_scores_and_summaries_cannot_be_edited():
    (scores, *_), row = two_subjects(), summarize(two_subjects())[0]
    for one, name in ((scores, "r"), (row, "mean_r")):
        with pytest.raises(AttributeError):
            setattr(one, name, 0)


def test_accuracy_falls_as_the_ceiling_rises():
    accuracy = accuracy_from_r(np.full(5, 0.5), np.linspace(0.3, 1, 5))
    assert all(lower < higher for higher, lower in pairwise(accuracy))
