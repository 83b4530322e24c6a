"""Batches mix subjects, hold every training image once an epoch, and none that anyone is scored on."""

import numpy as np
import pytest

from featcache.backbone.network import load_backbone
from featcache.cache.pixels import cache_pixels
from featcache.config import BackboneConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.splits import assign_folds
from heads.backbones.batches import Images

FOLD = {"fold": 1, "n_folds": 3, "seed": 4}


@pytest.fixture
def images(tiny, tmp_path):
    subjects = open_challenge(tiny).subjects
    backbone = load_backbone(BackboneConfig(name="test_resnet", weights="none", size=32))
    return Images(subjects, cache_pixels(subjects, backbone, tmp_path, 1, 1), FOLD)


def test_an_epoch_has_every_pair_once_and_batches_mix_subjects(images):
    batches = images.epoch(seed=0, number=0, step=4)
    pairs = [tuple(pair) for pair in np.concatenate(batches).tolist()]
    expected = {(number, row) for number, rows in enumerate(images.trained) for row in rows.tolist()}
    assert len(set(pairs)) == len(pairs) >= len(images) - 3 and set(pairs) <= expected
    assert sum(len(set(batch[:, 0])) == 2 for batch in batches) > len(batches) / 2


def test_epochs_differ_and_are_a_function_of_seed_and_number(images):
    first, again, next_one, other = (np.concatenate(images.epoch(*key, 4)) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert (first == again).all() and (first != next_one).any() and (first != other).any()


def test_no_image_of_the_held_out_fold_of_any_subject_is_trained_on(images):
    trained, held_out = images.trained_ids, images.held_out_ids
    assert not set(trained.tolist()) & set(held_out.tolist())
    assert (assign_folds(held_out, 3, 4) == 1).all() and (assign_folds(trained, 3, 4) != 1).all()
    shared = np.intersect1d(*(subject.train.ids for subject in images.subjects))
    assert np.isin(shared, held_out).any()  # shared images are what this is about


def test_what_one_subject_is_tested_on_no_other_is_trained_on(images):
    first, second = images.subjects
    stolen = first.train.ids[images.trained[0][:3]]
    second.test.ids[:3] = stolen
    again = Images(images.subjects, images._pixels, FOLD)
    assert not np.isin(stolen, again.trained_ids).any() and len(again.trained[0]) == len(images.trained[0]) - 3


def test_pixels_and_responses_belong_together(images):
    pairs = np.array([[1, 5], [0, 3], [1, 2], [0, 7]])
    pixels = images.read(pairs)
    for (number, row), image in zip(pairs, pixels, strict=True):
        assert (image.permute(1, 2, 0).numpy() == images._pixels[number].array[row]).all()
    seen = set()
    for target in images.targets(pairs):
        subject = next(one for one in images.subjects if one.name == target.subject)
        rows = pairs[target.rows.numpy(), 1]
        np.testing.assert_array_equal(target.responses.numpy(), subject.responses(target.hemisphere)[rows])
        seen.add((target.subject, target.hemisphere, *target.rows.tolist()))
    assert seen == {("subj01", "lh", 1, 3), ("subj01", "rh", 1, 3), ("subj02", "lh", 0, 2), ("subj02", "rh", 0, 2)}
