"""Batches mix subjects, hold every training image once an epoch, and none that anyone is scored on."""

from dataclasses import replace

import numpy as np
import pytest

from featcache.backbone.keys import Split
from featcache.backbone.network import load_backbone
from featcache.cache.pixels import cache_pixels
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.splits import assign_folds
from featcache.errors import ConfigError
from heads.backbones.batches import Images, plan_steps
from support.training import BACKBONE, QUICK

SPLIT = Split(fold=1, n_folds=3, seed=4)


@pytest.fixture
def subjects(tiny):
    return open_challenge(tiny).subjects


@pytest.fixture
def pixels(subjects, tmp_path):
    return cache_pixels(subjects, load_backbone(BACKBONE), tmp_path, 1, 1)


@pytest.fixture
def images(subjects, pixels):
    return Images(subjects, pixels, SPLIT)


def test_an_epoch_has_every_pair_once_and_batches_mix_subjects(images):
    batches = images.epoch(seed=0, number=0, n_images=4)
    pairs = [tuple(pair) for pair in np.concatenate(batches).tolist()]
    expected = {(number, row) for number, rows in enumerate(images.train_rows) for row in rows.tolist()}
    assert len(set(pairs)) == len(pairs) >= len(images) - 3 and set(pairs) <= expected
    assert sum(len(set(batch[:, 0])) == 2 for batch in batches) > len(batches) / 2


def test_epochs_differ_and_are_a_function_of_seed_and_number(images):
    first, again, next_one, other = (np.concatenate(images.epoch(*key, 4)) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert (first == again).all() and (first != next_one).any() and (first != other).any()


def test_batches_of_one_subject_have_every_pair_once_in_an_order_that_mixes_subjects(images):
    batches = images.epoch(seed=0, number=0, n_images=4, by_subject=True)
    assert len(batches) == images.n_steps(4, by_subject=True) and {len(batch) for batch in batches} == {4}
    assert all(len(set(batch[:, 0])) == 1 for batch in batches)
    pairs = [tuple(pair) for pair in np.concatenate(batches).tolist()]
    assert len(set(pairs)) == len(pairs) >= len(images) - 3 * len(images.subjects)
    order = [batch[0, 0] for batch in batches]
    assert order not in (sorted(order), sorted(order, reverse=True))


def test_a_subject_that_fills_no_batch_is_refused_and_not_left_out():
    config = replace(QUICK, batch_size=8, batches="subject")
    assert plan_steps(config, 1, [8, 20]).images == 8
    with pytest.raises(ConfigError, match="at least 8 training images of each subject for one step; found 7"):
        plan_steps(config, 1, [7, 20])


def test_no_image_of_the_held_out_fold_of_any_subject_is_trained_on(images):
    trained, held_out = images.trained_ids, images.held_out_ids
    assert not set(trained.tolist()) & set(held_out.tolist())
    assert (assign_folds(held_out, 3, 4) == 1).all() and (assign_folds(trained, 3, 4) != 1).all()
    shared = np.intersect1d(*(subject.train.ids for subject in images.subjects))
    assert np.isin(shared, held_out).any()  # shared images are what this is about


def test_what_one_subject_is_tested_on_no_other_is_trained_on(images, pixels):
    first, second = images.subjects
    stolen = first.train.ids[images.train_rows[0][:3]]
    second.test.ids[:3] = stolen
    again = Images(images.subjects, pixels, SPLIT)
    assert not np.isin(stolen, again.trained_ids).any() and len(again.train_rows[0]) == len(images.train_rows[0]) - 3


def test_pixels_and_responses_belong_together(images, pixels):
    pairs = np.array([[1, 5], [0, 3], [1, 2], [0, 7]])
    for (number, row), image in zip(pairs, images.read(pairs), strict=True):
        assert (image.permute(1, 2, 0).numpy() == pixels[number].array[row]).all()
    seen = set()
    for target in images.responses(pairs).targets():
        subject = next(one for one in images.subjects if one.name == target.subject)
        rows = pairs[target.rows.numpy(), 1]
        np.testing.assert_array_equal(target.responses.numpy(), subject.responses(target.surface)[rows])
        seen.add((target.subject, target.surface, *target.rows.tolist()))
    assert seen == {("subj01", "lh", 1, 3), ("subj01", "rh", 1, 3), ("subj02", "lh", 0, 2), ("subj02", "rh", 0, 2)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correlation_batch": 6}, "--correlation-batch: expected a multiple of 4"),
        ({"correlation_batch": 8, "accumulate": 3}, "--accumulate 3 to be a multiple of the passes in it; found 8"),
        ({"batch_size": 64}, "--batch-size: expected at least 64 training images for one step; found 20"),
    ],
)
def test_batches_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        plan_steps(replace(QUICK, loss="pearson", **settings), 1, [12, 8])


@pytest.mark.parametrize(("settings", "images"), [({}, 4), ({"correlation_batch": 16}, 16), ({"accumulate": 3}, 12)])
def test_a_step_has_the_images_that_were_asked_for(settings, images):
    steps = plan_steps(replace(QUICK, loss="pearson", **settings), 1, [12, 8])
    pairs = np.arange(2 * images).reshape(images, 2)
    assert steps.images == images and (np.concatenate(steps.groups(pairs)).reshape(-1, 2) == pairs).all()
