"""Averages and noise ceilings: planted signal and noise are recovered; loops and published formulas agree."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featcache.dataset.importing.repeats import (
    ArrayRows,
    Trials,
    average_trials,
    ceiling_from_ncsnr,
    noise_ceilings,
)
from featcache.errors import DataError

CEILINGS = Path(__file__).resolve().parents[4] / "shared" / "real" / "noise_ceiling"
EQUAL = np.full(300, 3)
MIXED = np.repeat([1, 2, 3], [150, 150, 100])
MOSTLY_ONE = np.repeat([1, 2], [500, 60])
UNEVEN = np.repeat([1, 2, 40], [100, 100, 10])
REPEATS = {"three": EQUAL, "mixed": MIXED, "mostly one": MOSTLY_ONE, "uneven": UNEVEN}
N_DRAWS = 100  # vertices of one model, which are independent draws of it


def plant(repeats, signal, noise=1.0, n_vertices=N_DRAWS, seed=0):
    """Trials in random order: y = s + e, of variances `signal` and `noise` (one for all, or one a vertex)."""
    rng = np.random.default_rng(seed)
    image = rng.permutation(np.repeat(np.arange(len(repeats)), repeats))
    patterns = np.sqrt(signal) * rng.standard_normal((len(repeats), n_vertices))
    errors = np.sqrt(noise) * rng.standard_normal((len(image), n_vertices))
    return (patterns[image] + errors).astype(np.float32), image


def averaged(responses, image, zscore=False, session=None, **options):
    """(averages, moments) of trials in memory."""
    out = np.full((image.max() + 1, responses.shape[1]), np.nan, np.float32)
    trials = Trials(ArrayRows(responses), image, session)
    return out, average_trials(trials, len(out), zscore, out, **options)


def moments_of(*trials, **options):
    return averaged(*trials, **options)[1]


def ceilings_of(*trials, **options):
    moments = moments_of(*trials, **options)
    return noise_ceilings(moments, moments.repeats).ceiling


def true_ceiling(signal, noise, repeats):
    return signal / (signal + noise * np.mean([1 / n for n in repeats]))


def assert_unbiased(estimates, truth):
    """The mean of independent estimates lies within three standard errors of the truth."""
    estimates = np.asarray(estimates, dtype=np.float64)
    assert abs(estimates.mean() - truth) < 3 * estimates.std(ddof=1) / len(estimates) ** 0.5


@pytest.mark.parametrize("signal", [0.0, 0.05, 0.5, 4.0])
@pytest.mark.parametrize("repeats", REPEATS.values(), ids=REPEATS)
def test_planted_variances_are_recovered_without_bias(repeats, signal):
    moments = moments_of(*plant(repeats, signal, noise=2.0, n_vertices=400, seed=1))
    assert_unbiased(moments.noise_variance, 2.0)
    assert_unbiased(moments.signal_variance, signal)


@pytest.mark.parametrize("repeats", REPEATS.values(), ids=REPEATS)
def test_planted_ceilings_are_recovered_over_draws(repeats):
    repeats = np.tile(repeats, 5)  # a ratio of unbiased estimates is biased by a part of 1 / n_images
    ceiling = ceilings_of(*plant(repeats, 0.5, seed=2))
    assert_unbiased(ceiling, true_ceiling(0.5, 1, repeats))
    assert ceiling.dtype == np.float32 and ceiling.min() >= 0 and ceiling.max() <= 1


def test_ceilings_of_vertices_without_signal_are_zero_for_half_and_too_high_on_average():
    moments = moments_of(*plant(EQUAL, 0.0, n_vertices=400, seed=3))
    ceilings = noise_ceilings(moments, EQUAL)
    below = moments.signal_variance < 0
    assert 0.4 < below.mean() < 0.6
    assert (ceilings.ceiling[below] == 0).all() and (ceilings.ncsnr[below] == 0).all()
    assert 0 < ceilings.ceiling.mean() < 0.1


def test_an_imbalance_of_images_does_not_bias_the_signal_as_it_biases_the_variance_of_trials():
    responses, image = plant(np.r_[200, np.ones(40, dtype=int)], 1.0, n_vertices=400, seed=4)
    moments = moments_of(responses, image)
    assert_unbiased(moments.signal_variance, 1.0)
    assert (responses.var(axis=0, ddof=1) - moments.noise_variance).mean() < 0.5


def slow_moments(values, image):
    """Noise and signal variance of one vertex, by loops and in the textbook's words."""
    groups = [[float(v) for v, i in zip(values, image, strict=True) if i == wanted] for wanted in sorted(set(image))]
    n, k, mean = len(values), len(groups), sum(map(float, values)) / len(values)
    within = sum((v - sum(g) / len(g)) ** 2 for g in groups for v in g) / (n - k)
    between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups) / (k - 1)
    n0 = (n - sum(len(g) ** 2 for g in groups) / n) / (k - 1)
    return within, (between - within) / n0


@pytest.mark.parametrize("repeats", [np.full(12, 3), np.array([1, 1, 2, 3, 5, 1, 2])], ids=["equal", "unequal"])
def test_moments_are_those_of_loops_over_trials(repeats):
    responses, image = plant(repeats, 0.7, n_vertices=6, seed=5)
    averages, moments = averaged(responses, image)
    slow = np.array([slow_moments(column, image) for column in responses.T])
    np.testing.assert_allclose(np.c_[moments.noise_variance, moments.signal_variance], slow, rtol=1e-5)
    np.testing.assert_allclose(averages[3], responses[image == 3].astype(float).mean(axis=0), rtol=2e-7)
    ceilings = noise_ceilings(moments, repeats)
    ratio = np.maximum(slow[:, 1], 0) / slow[:, 0]
    np.testing.assert_allclose(ceilings.ncsnr, ratio**0.5, rtol=1e-5)
    np.testing.assert_allclose(ceilings.ceiling, ratio / (ratio + np.mean(1 / repeats)), rtol=1e-5)


def nsd_variances(responses, image):
    """Noise variance, and total variance less that, as Allen et al. 2022 define them, from images with repeats."""
    of_images = [responses[image == i].astype(np.float64) for i in np.unique(image)]
    noise = np.mean([trials.var(axis=0, ddof=1) for trials in of_images if len(trials) > 1], axis=0)
    return noise, responses.astype(np.float64).var(axis=0, ddof=1) - noise


def z_scored(responses, n_sessions):
    """Trials z-scored within sessions, which follow each other and are of one size."""
    sessions = np.array_split(responses.astype(np.float64), n_sessions)
    return np.concatenate([(rows - rows.mean(axis=0)) / rows.std(axis=0) for rows in sessions])


def test_equal_repeats_give_the_published_variances_but_for_a_factor_that_many_images_bring_to_1():
    responses, image = plant(np.full(50, 3), 0.5, seed=6)
    moments = moments_of(responses, image)
    noise, signal = nsd_variances(responses, image)
    np.testing.assert_allclose(moments.noise_variance, noise, rtol=1e-6)
    np.testing.assert_allclose(moments.signal_variance * (150 - 3) / (150 - 1), signal, rtol=1e-5, atol=1e-7)


def nsd_ceilings(z, image):
    """Ceilings of z-scored trials as the data manual of NSD computes them, up to three repeats."""
    noise, _ = nsd_variances(z, image)
    ncsnr = np.sqrt(np.maximum(1 - noise, 0)) / np.sqrt(noise)  # the total variance is taken as 1
    n1, n2, n3 = (np.sum(np.bincount(image) == n) for n in (1, 2, 3))
    ceilings = ncsnr**2 / (ncsnr**2 + (n3 / 3 + n2 / 2 + n1) / (n1 + n2 + n3))
    np.testing.assert_allclose(ceiling_from_ncsnr(ncsnr, np.bincount(image)), ceilings, rtol=1e-6)
    return ceilings


def test_z_scored_trials_of_equal_repeats_have_the_published_ceilings():
    responses, image = plant(EQUAL, np.linspace(0, 3, 60), n_vertices=60, seed=7)
    published = nsd_ceilings(z_scored(responses, 4), image)
    ceilings = ceilings_of(responses, image, zscore=True, session=np.arange(900) // 225)
    np.testing.assert_allclose(ceilings, published, atol=3 / 900)  # 1 is off by a part of 1 / n_trials


def test_of_unequal_repeats_the_published_ceilings_are_the_same_but_vary_more():
    responses, image = plant(np.repeat([1, 2, 3], [50, 300, 100]), 0.2, n_vertices=1000, seed=7)
    published = nsd_ceilings(z_scored(responses, 2), image)
    ceilings = ceilings_of(responses, image, zscore=True, session=np.arange(950) // 475)
    assert_unbiased(ceilings - published, 0)
    assert np.abs(ceilings - published).max() < 0.2  # a standard error is about 0.1
    assert ceilings.std() < 0.98 * published.std()


def test_an_image_with_one_repeat_says_nothing_on_noise_but_counts_among_the_averages():
    responses, image = plant(np.full(40, 3), 1.0, seed=8)
    more, more_image = np.r_[responses, responses[:40] + 1], np.r_[image, 40 + np.arange(40)]
    few, many = moments_of(responses, image), moments_of(more, more_image)
    np.testing.assert_allclose(many.noise_variance, few.noise_variance, rtol=1e-12)
    assert many.noise_freedom == few.noise_freedom == 80
    fewer_repeats = noise_ceilings(few, np.r_[few.repeats, np.ones(40, dtype=int)])
    assert (fewer_repeats.ceiling < noise_ceilings(few, few.repeats).ceiling).all()


def test_splits_have_the_ceilings_of_their_own_repeats():
    moments = moments_of(*plant(MIXED, 1.0, seed=9))
    train, test = noise_ceilings(moments, [1, 2, 3]), noise_ceilings(moments, [3, 3])
    np.testing.assert_array_equal(train.ncsnr, test.ncsnr)
    assert_unbiased(train.ceiling, 1 / (1 + 11 / 18))
    assert_unbiased(test.ceiling, 0.75)


# 8 sessions of 150 trials with levels and gains of their own; an image recurs in other sessions, or in the same one.
SESSION = np.repeat(np.arange(8), 150)


def in_sessions(spread, signal=1.0, offset=1.5):
    """(responses without levels and gains of sessions, responses with them, images)."""
    rng = np.random.default_rng(10)
    order = np.arange(1200) % 400 if spread else np.arange(1200) // 3
    patterns = signal**0.5 * rng.standard_normal((400, N_DRAWS))
    clean = patterns[order] + rng.standard_normal((1200, N_DRAWS))
    levels, gains = offset * rng.standard_normal((8, N_DRAWS)), rng.uniform(0.5, 2, (8, N_DRAWS))
    drifting = clean * gains[SESSION] + levels[SESSION]
    return clean.astype(np.float32), drifting.astype(np.float32), order


@pytest.mark.parametrize("spread", [True, False], ids=["across sessions", "within a session"])
def test_z_scoring_within_session_recovers_the_ceilings_of_trials_without_levels_and_gains(spread):
    clean, drifting, image = in_sessions(spread)
    recovered = ceilings_of(drifting, image, zscore=True, session=SESSION)
    np.testing.assert_allclose(recovered, ceilings_of(clean, image), atol=0.04)
    assert abs(recovered.mean() - 0.75) < (0.005 if spread else 0.015)  # of the signal, a part of 1 / 50 is level


def test_without_z_scoring_levels_of_sessions_pass_for_noise_or_for_signal():
    clean, drifting, image = in_sessions(spread=True)
    assert ceilings_of(drifting, image).mean() < ceilings_of(clean, image).mean() - 0.15
    clean, drifting, image = in_sessions(spread=False)
    assert ceilings_of(drifting, image).mean() > ceilings_of(clean, image).mean() + 0.05


def test_z_scored_averages_are_those_of_the_whole_array_at_once():
    _, drifting, image = in_sessions(spread=True)
    averages, moments = averaged(drifting, image, zscore=True, session=SESSION * 7 - 3)  # any numbers, in any order
    z = z_scored(drifting, 8)
    np.testing.assert_allclose(averages, z.reshape(3, 400, -1).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(moments.within + moments.between, 1200, rtol=1e-9)  # z-scored: N in all


def test_a_vertex_that_is_constant_in_a_session_is_0_there():
    _, drifting, image = in_sessions(spread=False)
    drifting[SESSION == 2, 5] = 0.1
    drifting[:, 6] = 1e4 + SESSION * 0.3
    averages, moments = averaged(drifting, image, zscore=True, session=SESSION)
    assert (averages[100:150, 5] == 0).all() and averages[:100, 5].any()
    assert np.flatnonzero(moments.constant_in_session).tolist() == [5, 6]
    assert np.flatnonzero(moments.constant).tolist() == [6]
    assert noise_ceilings(moments, moments.repeats).ceiling[6] == 0


class Counted(ArrayRows):
    """Rows that note what is read of them."""

    @property
    def reads(self) -> list[slice]:
        return self.__dict__.setdefault("_reads", [])

    def read(self, rows):
        self.reads.append(rows)
        return super().read(rows)


@pytest.mark.parametrize("zscore", [False, True])
def test_blocks_of_any_size_give_the_same_bits(zscore):
    _, drifting, image = in_sessions(spread=True)
    whole = averaged(drifting, image, zscore, SESSION, block_rows=1200)
    for block_rows in (1, 7, 1199, 5000, None):
        averages, moments = averaged(drifting, image, zscore, SESSION, block_rows=block_rows)
        np.testing.assert_array_equal(averages, whole[0])
        np.testing.assert_array_equal(moments.within, whole[1].within)
        np.testing.assert_array_equal(moments.between, whole[1].between)


@pytest.mark.parametrize(("zscore", "passes"), [(False, 1), (True, 2)])
def test_rows_are_read_in_order_once_a_pass_and_counted(zscore, passes):
    _, drifting, image = in_sessions(spread=True)
    rows, seen = Counted(drifting), []
    out = np.empty((400, N_DRAWS), np.float32)
    average_trials(Trials(rows, image, SESSION), 400, zscore, out, block_rows=500, advance=seen.append)
    assert [(r.start, r.stop) for r in rows.reads] == [(0, 500), (500, 1000), (1000, 1200)] * passes
    assert sum(seen) == passes * 1200


@pytest.mark.parametrize(("chunk_rows", "block_rows"), [(1, 16_000), (750, 15_750), (20_000, 20_000), (10**6, 128_000)])
def test_blocks_are_whole_chunks_of_the_file_unless_a_chunk_exceeds_memory(chunk_rows, block_rows):
    class FirstBlock(Counted):
        def read(self, rows):
            self.reads.append(rows)
            raise EOFError

    shape = (200_000, 1000)
    rows, nothing = FirstBlock(np.broadcast_to(np.float32(0), shape)), np.broadcast_to(np.float32(0), shape)
    with pytest.raises(EOFError):
        average_trials(Trials(rows, np.arange(200_000), chunk_rows=chunk_rows), 200_000, False, nothing)
    assert rows.reads == [slice(0, block_rows)]


@pytest.mark.parametrize("zscore", [False, True])
def test_memory_is_a_block_and_rows_and_not_the_trials(zscore):
    responses, image = plant(np.full(1000, 3), 1.0, n_vertices=1000, seed=11)
    out, session = np.empty((1000, 1000), np.float32), np.arange(3000) % 10
    trials = Trials(ArrayRows(responses), image, session)
    tracemalloc.start()
    try:
        average_trials(trials, 1000, zscore, out, block_rows=50)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    a_row, sessions = 8 * 1000, 10 * zscore
    assert peak < 50 * a_row + (4 * sessions + 30) * a_row + 200_000 < responses.nbytes / 8


@pytest.mark.parametrize("n_repeats", [3, 100])
def test_averages_far_from_zero_are_exact_to_the_bound_and_so_is_their_noise(n_repeats):
    rng = np.random.default_rng(12)
    image = rng.permutation(np.repeat(np.arange(60), n_repeats))
    responses = (1e4 + rng.standard_normal((len(image), 50))).astype(np.float32)
    averages, moments = averaged(responses, image)
    exact = np.stack([responses[image == i].astype(np.float64).mean(axis=0) for i in range(60)])
    assert np.abs(averages / exact - 1).max() <= (n_repeats + 1) / 2 * 2**-24 * 1.001
    np.testing.assert_allclose(moments.noise_variance, nsd_variances(responses, image)[0], rtol=5e-4)


def test_repeats_that_are_all_the_same_have_a_ceiling_of_1_and_constants_of_0():
    patterns = np.random.default_rng(13).standard_normal((20, 2)).astype(np.float32)
    image = np.arange(60) % 20
    responses = np.c_[patterns, np.full(20, 0.1, np.float32)][image]
    moments = moments_of(responses, image)
    ceilings = noise_ceilings(moments, moments.repeats)
    assert ceilings.ncsnr.tolist() == [np.inf, np.inf, 0] and ceilings.ceiling.tolist() == [1, 1, 0]
    assert moments.constant.tolist() == [False, False, True]


def test_notes_say_what_ceilings_are_from():
    responses, image = plant(np.repeat([1, 3], [10, 512]), 1.0, n_vertices=3)
    moments = moments_of(responses, image)
    note = "from 512 images with 2 or more repeats, 3.0 on average; not z-scored"
    assert noise_ceilings(moments, [1]).note == note
    assert noise_ceilings(replace(moments, zscored=True), [1]).note.endswith("; z-scored within session")
    few = moments_of(*plant(np.array([1, 1, 3]), 1.0))
    assert noise_ceilings(few, [1]).note == (
        "from 1 image with 2 or more repeats, 3.0 on average; so few that a noise variance is known within 100 %; "
        "not z-scored"
    )


@pytest.mark.parametrize(
    ("planted", "repeats", "reason"),
    [
        (np.ones(9, dtype=int), [1], "each of 9 images has one repeat"),
        (np.array([4]), [4], "one image does not tell the signal"),
        (EQUAL, [], "the split has no images"),
    ],
)
def test_no_ceilings_where_repeats_do_not_tell_and_the_note_says_why(planted, repeats, reason):
    ceilings = noise_ceilings(moments_of(*plant(planted, 1.0)), repeats)
    assert ceilings.ncsnr is None and ceilings.ceiling is None and reason in ceilings.note


def test_the_published_formula_at_its_ends():
    assert ceiling_from_ncsnr([0, 1, 1e200, np.inf], [2, 2]).tolist() == [0, np.float32(2 / 3), 1, 1]
    with pytest.raises(DataError, match="found nan at vertex 1"):
        ceiling_from_ncsnr([1, np.nan, -1], [3])
    for repeats, found in ([], "no images"), ([3, 0], "0"), ([1.5], "1.5"):
        with pytest.raises(DataError, match=f"repeats of images: .* found {found};"):
            ceiling_from_ncsnr([1], repeats)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300], ids=str)
@pytest.mark.parametrize("zscore", [False, True])
def test_responses_that_are_not_finite_are_named_before_they_are_used(value, zscore):
    responses, image = plant(np.full(4, 3), 1.0, n_vertices=5)
    responses = responses.astype(np.float64)
    responses[4, 3] = responses[5, 0] = value
    out = np.zeros((4, 5), np.float32)
    trials = Trials(ArrayRows(responses), image, np.zeros(12, dtype=int), where="betas.npy")
    with pytest.raises(DataError, match=r"betas\.npy: .* in trial 4, vertex 3 \(and 1 more nearby\); leave out"):
        average_trials(trials, 4, zscore, out, block_rows=4)
    assert np.isfinite(out).all()


def test_trials_that_do_not_fit_are_refused():
    responses, image = plant(np.full(4, 3), 1.0, n_vertices=5)
    with pytest.raises(DataError, match="expected the image of each of 12 trials"):
        Trials(ArrayRows(responses), image[1:])
    with pytest.raises(DataError, match="expected the session of each of 12 trials, as an integer; found float64"):
        Trials(ArrayRows(responses), image, image / 2)
    with pytest.raises(DataError, match="one row a trial"):
        Trials(ArrayRows(responses[0]), image)
    with pytest.raises(DataError, match="expected trials of images 0 to 3; found image 4 in trial"):
        average_trials(Trials(ArrayRows(responses), image + 1), 4, False, np.empty((4, 5), np.float32))
    with pytest.raises(DataError, match="found none of 2 images: 4, 5"):
        average_trials(Trials(ArrayRows(responses), image), 6, False, np.empty((6, 5), np.float32))
    with pytest.raises(ValueError, match="averages need"):
        average_trials(Trials(ArrayRows(responses), image), 4, False, np.empty((4, 5)))


def test_z_scoring_needs_sessions_of_two_trials():
    responses, image = plant(np.full(4, 3), 1.0, n_vertices=5)
    with pytest.raises(DataError, match="found none; give it, or do not z-score"):
        averaged(responses, image, zscore=True)
    with pytest.raises(DataError, match="found one in session 9;"):
        averaged(responses, image, zscore=True, session=np.r_[np.zeros(11, dtype=int), 9])


def test_images_and_sessions_may_be_any_integers():
    responses, image = plant(np.full(4, 3), 1.0, n_vertices=5)
    expected = averaged(responses, image, zscore=True, session=np.arange(12) % 2)
    unsigned = averaged(responses, image.astype(np.uint64), zscore=True, session=(np.arange(12) % 2).astype(np.uint8))
    np.testing.assert_array_equal(unsigned[0], expected[0])
    np.testing.assert_array_equal(unsigned[1].within, expected[1].within)


def test_responses_that_never_differ_are_refused():
    with pytest.raises(DataError, match="found the same in all 12 trials of each of 5 vertices"):
        averaged(np.ones((12, 5), np.float32), np.arange(12) % 4)


def test_a_file_that_ends_early_is_refused():
    class Short(ArrayRows):
        def read(self, rows):
            return super().read(rows)[:5]

    with pytest.raises(DataError, match="expected trials 0 to 11 of 5 vertices"):
        average_trials(Trials(Short(np.ones((12, 5))), np.arange(12) % 4), 4, False, np.empty((4, 5), dtype=np.float32))


def test_published_ceilings_are_recovered_from_trials_that_have_them():
    path = CEILINGS / "subj01" / "lh.npy"
    if not path.exists():
        pytest.skip(f"no published noise ceilings: {path} is not on this machine")
    published = np.load(path)[::60].astype(np.float64) / 100
    repeats = np.repeat([2, 3], [300, 700])
    ncsnr_squared = np.mean(1 / repeats) * published / (1 - published)
    noise = 1 / (1 + ncsnr_squared)  # of trials with a variance of 1
    responses, image = plant(repeats, 1 - noise, noise, n_vertices=len(published), seed=14)
    moments = moments_of(responses, image)
    estimated = noise_ceilings(moments, repeats).ceiling
    strong = published > 0.1
    assert np.corrcoef(estimated, published)[0, 1] > 0.97
    assert abs((estimated - published)[strong].mean()) < 0.005 and np.abs(estimated - published).max() < 0.15
    assert_unbiased(moments.signal_variance - (1 - noise), 0)
