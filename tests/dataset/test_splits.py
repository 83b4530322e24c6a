"""Folds are a function of the image alone, and no image is scored by what was trained on it."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featcache.dataset.splits import BY_ID, Split, SplitKey, _splitmix64, assign_folds, check_folds, refuse_leak
from featcache.errors import ConfigError, FeatcacheError, LeakError

N_IMAGES = 73_000  # ids in NSD
ids_lists = st.lists(st.integers(0, 2**40), max_size=40)
fold_counts = st.integers(2, 20)
seeds = st.integers(-(2**63), 2**65)


def slow_hash(image_id: int, seed: int) -> int:
    """The same hash on Python's unbounded integers."""

    def splitmix64(key: int) -> int:
        mixed = (key + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        return mixed ^ (mixed >> 31)

    return splitmix64((splitmix64(seed % 2**64) + image_id) % 2**64)


def slow_fold(image_id: int, n_folds: int, seed: int) -> int:
    return slow_hash(image_id, seed) % n_folds


def slow_group_folds(groups: dict[int, str], n_folds: int, seed: int) -> dict[str, int]:
    """{group: fold}: the largest into the emptiest fold, those between two powers of two in the order of their hash."""
    images = {group: sorted(i for i in groups if groups[i] == group) for group in groups.values()}
    powers = {group: max(power for power in range(10) if 2**power <= len(ids)) for group, ids in images.items()}
    filled, folds = [0] * n_folds, {}
    for group in sorted(images, key=lambda group: (-powers[group], slow_hash(images[group][0], seed))):
        folds[group] = filled.index(min(filled))
        filled[folds[group]] += len(images[group])
    return folds


@pytest.mark.slow
@settings(deadline=None)
@given(ids_lists, fold_counts, seeds)
@example(list(range(20)), 5, 2**63)
@example(list(range(20)), 5, 2**64 + 3)
@example(list(range(20)), 5, -1)
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


groupings = st.dictionaries(st.integers(0, 300), st.sampled_from("abcdefghij"), min_size=1, max_size=60)


@settings(deadline=None)
@given(ids_lists, fold_counts, seeds)
def test_the_split_by_id_has_the_folds_and_keys_of_earlier_versions(image_ids, n_folds, seed):
    expected = assign_folds(image_ids, n_folds, seed)
    for folds in (BY_ID.folds(image_ids, n_folds, seed), BY_ID.parts(image_ids, n_folds, seed)):
        assert folds.dtype == np.int64 and folds.tolist() == expected.tolist()
    assert BY_ID.key == SplitKey.from_json(None) and BY_ID.key.to_json() == {}


@settings(deadline=None)
@given(groupings, st.sets(st.integers(0, 300)), fold_counts, seeds, st.randoms(use_true_random=False))
def test_a_group_is_on_one_side_in_any_order_and_company(groups, others, n_folds, seed, random):
    """Images without a group among them have a fold of their own, and no image's depends on those asked for."""
    split = Split("column:a", groups)
    ids = sorted(groups.keys() | others)
    fold_of = dict(zip(ids, split.folds(ids, n_folds, seed).tolist(), strict=True))
    assert set(fold_of.values()) <= set(range(n_folds))
    for group in set(groups.values()):
        assert len({fold_of[i] for i in ids if groups.get(i) == group}) == 1
    asked = random.choices(ids, k=20)
    assert split.folds(asked, n_folds, seed).tolist() == [fold_of[i] for i in asked]
    reordered = dict(random.sample(list(groups.items()), len(groups)))
    assert Split("column:a", reordered).digest == split.digest
    assert Split("column:a", reordered).folds(ids, n_folds, seed).tolist() == list(fold_of.values())
    for fold in range(n_folds):
        sides = [[i for i in ids if (fold_of[i] == fold) == held_out] for held_out in (False, True)]
        refuse_leak(*sides, "a head", split)


@settings(deadline=None)
@given(groupings, st.integers(2, 6), seeds)
@example({i: "abcdef"[i % 6] for i in range(30)}, 3, 2**63)
@example({i: "abcdef"[i % 6] for i in range(30)}, 3, 2**64 + 3)
def test_groups_are_put_where_the_rule_puts_them(groups, n_folds, seed):
    expected = slow_group_folds(groups, n_folds, seed)
    found = Split("a", groups).folds(list(groups), n_folds, seed)
    assert found.dtype == np.int64 and found.tolist() == [expected[group] for group in groups.values()]


@given(groupings, st.integers(2, 6), seeds)
def test_folds_of_groups_differ_by_the_images_of_one_group_at_most(groups, n_folds, seed):
    ids = list(groups)
    sizes = np.bincount(Split("a", groups).folds(ids, n_folds, seed), minlength=n_folds)
    assert sizes.max() - sizes.min() <= max(list(groups.values()).count(group) for group in groups.values())


@given(groupings, fold_counts, seeds)
def test_names_of_groups_do_not_decide_their_folds(groups, n_folds, seed):
    renamed = {i: chr(ord("z") - ord(group) + ord("a")) for i, group in groups.items()}
    ids = list(groups)
    assert np.array_equal(Split("a", groups).folds(ids, n_folds, seed), Split("b", renamed).folds(ids, n_folds, seed))


def test_seeds_put_groups_of_like_size_into_other_folds():
    split = Split("session", {i: f"session {i // 20}" for i in range(800)})
    ids = np.arange(800)
    found = {tuple(split.folds(ids, 5, seed).tolist()) for seed in range(10)}
    assert len(found) == 10
    assert all(np.bincount(folds).tolist() == [160] * 5 for folds in found)


def test_the_largest_groups_come_first():
    """Small ones fill what large ones leave: in their own order, 8 and 8 would be beside each other."""
    sizes = [1] * 8 + [8, 8, 8]
    groups = dict(enumerate(np.repeat([f"g{k}" for k in range(11)], sizes).tolist()))
    assert np.bincount(Split("a", groups).folds(np.arange(32), 4, 0)).tolist() == [8] * 4


def test_folds_that_a_split_says_are_its_folds_and_become_fewer_where_fewer_are_asked_for():
    groups = {i: str(i % 3) for i in range(12)}
    split = Split("file:folds.csv", groups, {"0": 0, "1": 1, "2": 2})
    assert split.folds(np.arange(12), 3, 5).tolist() == [i % 3 for i in range(12)]
    few = split.folds(np.arange(12), 2, 5)
    assert set(few.tolist()) == {0, 1} and all(len(set(few[k::3].tolist())) == 1 for k in range(3))
    with pytest.raises(ConfigError, match="found none of 12 images in fold 3, 4; ask for fewer"):
        check_folds(split.folds(np.arange(12), 5, 0), 5)


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_a_group_alone_has_fold_0_and_nothing_else_has(n_folds):
    split = Split("file:ood.json", dict.fromkeys(range(0, 400, 7), "ood"), alone="ood")
    ids = np.arange(400)
    folds = split.folds(ids, n_folds, 3)
    np.testing.assert_array_equal(ids[folds == 0], split.images("ood"))
    others = ids[folds != 0]
    if n_folds > 2:
        np.testing.assert_array_equal(folds[folds != 0], 1 + assign_folds(others, n_folds - 1, 3))
    assert set(folds.tolist()) == set(range(n_folds))


def test_beside_a_group_alone_other_groups_share_the_other_folds():
    groups = {i: "ood" if i < 40 else str(i // 20) for i in range(400)}
    split, ids = Split("file:ood.json", groups, {"19": 2, "gone": 1}, "ood"), np.arange(400)
    folds = split.folds(ids, 4, 0)
    np.testing.assert_array_equal(np.flatnonzero(folds == 0), np.arange(40))
    assert np.bincount(folds).tolist() == [40, 120, 120, 120] and set(folds[380:].tolist()) == {2}
    np.testing.assert_array_equal(Split("none", {}, {}, "ood").folds(ids, 4, 0), assign_folds(ids, 4, 0))


def test_a_split_is_called_by_its_name_and_six_digits_and_cannot_be_edited():
    split = Split("session", {1: "a", 2: "b"})
    assert str(split.key) == f"session ({split.digest[:6]})" and str(BY_ID.key) == "id"
    assert split.key != BY_ID.key and len({split.key, SplitKey("session", split.digest)}) == 1
    for one in (split, split.key):
        with pytest.raises(AttributeError):
            one.name = "another"


@pytest.mark.parametrize(("n_groups", "whole"), [(7, False), (8, True)])
def test_parts_keep_groups_whole_from_twice_as_many_groups_as_parts_on(n_groups, whole):
    ids = np.arange(600)
    split = Split("a", {i: str(i % n_groups) for i in range(0, 560)})
    parts = split.parts(ids, 4, 2)
    together = [len(set(parts[k:560:n_groups].tolist())) == 1 for k in range(n_groups)]
    assert all(together) if whole else not any(together)
    by_id = assign_folds(ids, 4, 2)
    np.testing.assert_array_equal(parts[560:], by_id[560:])  # images without a group
    if whole:
        np.testing.assert_array_equal(parts[:560], by_id[np.arange(560) % n_groups])  # with the first of their group
    assert parts.dtype == np.int64


def test_parts_keep_groups_whole_where_there_are_enough_of_them():
    ids = np.arange(400)
    many, few = (Split("a", {i: str(i // size) for i in range(400)}) for size in (10, 100))
    parts = many.parts(ids, 4, 2)
    assert len(set(parts.tolist())) == 4 and all(len(set(parts[k : k + 10].tolist())) == 1 for k in range(0, 400, 10))
    np.testing.assert_array_equal(few.parts(ids, 4, 2), assign_folds(ids, 4, 2))


@given(groupings, st.sampled_from(["", "a"]))
def test_a_split_comes_back_from_its_json_and_what_was_changed_does_not(groups, alone):
    split = Split("session", groups, {"a": 0, "b": 1}, alone)
    again = Split.from_json(split.to_json())
    assert again == split and again.key == split.key == SplitKey("session", split.digest)
    changed = split.to_json() | {"groups": {"z": [7]}}
    with pytest.raises(ValueError, match="not those that were written"):
        Split.from_json(changed)


def test_one_image_of_another_group_is_another_digest():
    groups = {i: str(i % 3) for i in range(12)}
    digests = {Split("a", groups | {5: group}, {}, alone).digest for group in "0123" for alone in ("", "0")}
    assert len(digests) == 8


def test_a_group_on_both_sides_is_refused_though_no_image_is():
    split = Split("session", {i: f"ses-{i // 2}" for i in range(10)})
    refuse_leak([0, 1, 2, 3], [4, 5, 77], "fold 1 of ridge", split)
    with pytest.raises(LeakError) as raised:
        refuse_leak([0, 1, 2, 88], [3, 4, 5], "fold 1 of ridge", split)
    assert str(raised.value) == (
        "fold 1 of ridge: expected images of groups that it was not trained on (--split session); "
        "found 1 on both sides of the split (group ses-1); train it again with --split session"
    )
