"""Bands are what the options name, and all of them have the same folds."""

import numpy as np
import pytest

from featcache.cache.store import Row, create_store
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.splits import BY_ID, assign_folds
from featcache.errors import ConfigError, LeakError
from heads.compare.bands import bands_of, distinct, on_folds, plan_of
from heads.config import CompareConfig
from heads.features.sets import feature_sets
from support.keys import feature_key, training_of

ARRAYS = {"early": Row((2, 2, 3), "float16"), "late": Row((4,)), "late.cls": Row((5,))}


@pytest.fixture
def subject(tiny, monkeypatch):
    monkeypatch.setattr("heads.features.sets.image_digest", lambda *_: "these")
    return open_challenge(tiny).subjects[0]


def store(subject, work, backbone="net", fold=None, **about):
    key = feature_key(subject.name, images="these", backbone=backbone, weights=f"w{fold}", layers=list(ARRAYS))
    key["fold"] = None if fold is None else training_of(fold, **about)
    made = create_store(work / "features.zarr", "f", key, subject.image_ids, len(subject.train), ARRAYS, {})
    made.append({name: np.zeros((len(subject.image_ids), *row.shape), row.dtype) for name, row in ARRAYS.items()})


def names(bands):
    return {band.name: [part.names for part in band.parts] for band in bands}


def test_layers_of_one_set_are_bands_with_their_class_tokens(subject, tmp_path):
    store(subject, tmp_path)
    bands = bands_of(feature_sets(subject, tmp_path), CompareConfig())
    assert names(bands) == {"early": [("early",)], "late": [("late", "late.cls")]}
    assert bands[1].titles[0].startswith("net@32 ") and bands[1].titles[0].endswith(": late")
    assert bands[0].key() != bands[1].key()


def test_layers_of_several_sets_need_one_to_be_chosen(subject, tmp_path):
    store(subject, tmp_path)
    store(subject, tmp_path, "other")
    with pytest.raises(ConfigError, match="--of: expected one set of features"):
        bands_of(feature_sets(subject, tmp_path), CompareConfig())


def test_backbones_are_bands_by_the_shortest_names_that_tell_them_apart(subject, tmp_path):
    store(subject, tmp_path)
    with pytest.raises(ConfigError, match="two bands or more"):
        bands_of(feature_sets(subject, tmp_path), CompareConfig(features=("backbones",)))
    store(subject, tmp_path, "other")
    bands = bands_of(feature_sets(subject, tmp_path), CompareConfig(features=("backbones",)))
    assert sorted(names(bands)) == ["net@32", "other@32"]
    assert distinct(["a@1 x1", "a@1 x2", "b x3"]) == ["a@1 x1", "a@1 x2", "b"]


def test_named_bands_have_the_layers_of_every_set_that_matches(subject, tmp_path):
    store(subject, tmp_path)
    store(subject, tmp_path, "other")
    sets = feature_sets(subject, tmp_path)
    bands = bands_of(sets, CompareConfig(features=("low=*:early", "net=net*", "token=other@32:late")))
    assert names(bands) == {
        "low": [("early",), ("early",)],
        "net": [("early", "late", "late.cls")],
        "token": [("late", "late.cls")],
    }
    for wrong, found in (("x=nothing*", "'nothing.*'"), ("x=net*:deep", "'deep'")):
        with pytest.raises(ConfigError, match=found):
            bands_of(sets, CompareConfig(features=("low=*:early", wrong)))


def test_frozen_and_trained_backbones_share_the_folds_of_the_training(subject, tmp_path):
    store(subject, tmp_path)
    for fold in (2, 0, 1):
        store(subject, tmp_path, fold=fold, seed=7)
    for fold in (1, 2):
        store(subject, tmp_path, fold=fold, training="u", seed=7)
    sets = feature_sets(subject, tmp_path)
    config = CompareConfig(features=("backbones",))
    bands = bands_of(sets, config)
    plan = plan_of(subject, bands, config, BY_ID)
    assert plan.backbone_trained and plan.held_out == (1, 2)
    np.testing.assert_array_equal(plan.folds, assign_folds(subject.train.ids, 3, 7))
    folds = [[key.fold.fold if key.fold else None for key in band.parts[0].keys] for band in on_folds(bands, plan)]
    assert sorted(folds, key=str) == [[1, 2], [1, 2], [None]]


def test_trainings_of_other_folds_are_refused(subject, tmp_path):
    for fold in range(3):
        store(subject, tmp_path, fold=fold, seed=7)
        store(subject, tmp_path, fold=fold, seed=8, training="u")
    config = CompareConfig(features=("backbones",))
    with pytest.raises(LeakError, match="with a held-out fold in common"):
        plan_of(subject, bands_of(feature_sets(subject, tmp_path), config), config, BY_ID)
