"""Folds are a function of the image alone, and no image is scored by what was trained on it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.dataset.splits import _splitmix64, assign_folds, check_folds, refuse_leak
from featcache.errors import ConfigError, FeatcacheError, LeakError

N_IMAGES = 73_000  # ids in NSD
ids_lists = st.lists(st.integers(0, 2**40), max_size=40)
fold_counts = st.integers(2, 20)
seeds = st.integers(0, 2**63)


def slow_fold(image_id: int, n_folds: int, seed: int) -> int:
    """The same hash on Python's unbounded integers."""

    def splitmix64(key: int) -> int:
        mixed = (key + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        return mixed ^ (mixed >> 31)

    return splitmix64((splitmix64(seed % 2**64) + image_id) % 2**64) % n_folds


@pytest.mark.slow
@settings(deadline=None)
@given(ids_lists, fold_counts, seeds)
def test_folds_are_those_of_each_image_alone(image_ids, n_folds, seed):
    folds = assign_folds(image_ids, n_folds, seed)
    assert folds.dtype == np.int64
    assert folds.tolist() == [slow_fold(image_id, n_folds, seed) for image_id in image_ids]


def test_hash_is_the_published_one():
    # As a generator, splitmix64 adds one constant to its state for each number; these are the first three of a seed.
    states = [(1234567 + k * 0x9E3779B97F4A7C15) % 2**64 for k in range(3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _splitmix64(np.array(states, dtype=np.uint64)).tolist() == published


@pytest.mark.slow
@settings(deadline=None)
@given(ids_lists, fold_counts, seeds, st.randoms(use_true_random=False))
def test_order_and_company_do_not_matter(image_ids, n_folds, seed, random):
    fold_of = dict(zip(image_ids, assign_folds(image_ids, n_folds, seed).tolist(), strict=True))
    others = random.sample(image_ids, len(image_ids) // 2)
    assert assign_folds(others, n_folds, seed).tolist() == [fold_of[image_id] for image_id in others]


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.uint64])
def test_integer_type_of_the_ids_does_not_matter(dtype):
    image_ids = np.arange(500)
    np.testing.assert_array_equal(assign_folds(image_ids.astype(dtype), 5, 0), assign_folds(image_ids, 5, 0))


@pytest.mark.parametrize("n_folds", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", [0, 1, 2023, -1])
def test_folds_are_balanced(n_folds, seed):
    counts = np.bincount(assign_folds(np.arange(N_IMAGES), n_folds, seed), minlength=n_folds)
    assert len(counts) == n_folds
    expected = N_IMAGES / n_folds
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = n_folds - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("stride", [2, 5, 10, 64])
def test_folds_are_balanced_on_regular_ids(stride):
    counts = np.bincount(assign_folds(np.arange(0, 10_000 * stride, stride), 5, 0), minlength=5)
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(10_000 * 0.2 * 0.8)


def test_seeds_give_unrelated_folds():
    image_ids = np.arange(N_IMAGES)
    same = (assign_folds(image_ids, 5, 0) == assign_folds(image_ids, 5, 1)).mean()
    assert abs(same - 1 / 5) < 0.01


@pytest.mark.parametrize("n_folds", [1, 0, -3])
def test_fewer_than_two_folds_are_refused(n_folds):
    with pytest.raises(ConfigError, match=f"--folds: expected 2 or more; found {n_folds}; raise it"):
        assign_folds([1, 2, 3], n_folds, 0)


@pytest.mark.parametrize(
    ("image_ids", "problem"),
    [
        ([-1, 2], "expected integers >= 0; found -1"),
        ([0.5, 1.0], "expected integers >= 0; found values of type float64"),
        (["7"], "expected integers >= 0; found values of type <U1"),
        ([[1, 2]], r"expected one list, \(n_images,\); found the shape \(1, 2\)"),
    ],
)
def test_ids_that_are_no_list_of_naturals_are_refused(image_ids, problem):
    with pytest.raises(FeatcacheError, match=f"image ids: {problem}"):
        assign_folds(image_ids, 5, 0)


def test_empty_fold_is_refused():
    with pytest.raises(ConfigError, match="each of the 4 folds; found none of 4 images in fold 1, 3; ask for fewer"):
        check_folds([0, 2, 2, 0], 4)
    check_folds([0, 2, 1, 0], 3)


def test_leak_is_refused_in_one_line():
    with pytest.raises(LeakError) as raised:
        refuse_leak([9, 3, 5, 3], np.array([5, 8, 3]), "fold 2 of ridge")
    message = str(raised.value)
    assert message.startswith("fold 2 of ridge: expected images that it was not trained on; found 2 on both sides")
    assert "(id 3, 5)" in message and "\n" not in message


def test_leak_names_the_first_few():
    with pytest.raises(LeakError, match=r"found 100 on both sides of the split \(id 0, 1, 2, 3, 4, \.\.\.\)"):
        refuse_leak(range(100), range(200), "a head")


@pytest.mark.slow
@settings(deadline=None)
@given(ids_lists, ids_lists)
def test_guard_raises_exactly_when_an_image_is_shared(trained_ids, scored_ids):
    if set(trained_ids) & set(scored_ids):
        with pytest.raises(LeakError):
            refuse_leak(trained_ids, scored_ids, "a head")
    else:
        refuse_leak(trained_ids, scored_ids, "a head")


def test_folds_of_subjects_that_share_images_pass_the_guard():
    # Two subjects, in different orders, with a thousand images in common.
    first, second = np.arange(0, 3000), np.random.default_rng(0).permutation(np.arange(2000, 5000))
    for fold in range(5):
        trained = np.concatenate([ids[assign_folds(ids, 5, 7) != fold] for ids in (first, second)])
        scored = np.concatenate([ids[assign_folds(ids, 5, 7) == fold] for ids in (first, second)])
        refuse_leak(trained, scored, f"fold {fold}")
