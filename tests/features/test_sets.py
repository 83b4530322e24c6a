"""Which stores make one model: the folds of one training together, everything else apart."""

import os
from dataclasses import replace

import numpy as np
import pytest

from featcache.cache.store import Row, create_store, list_stores
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.splits import assign_folds
from heads.features.sets import chosen_by, feature_sets, say_partial, subject_stores, without_digits
from heads.solvers.held_out import FoldPlan
from support.keys import feature_key, training_of


@pytest.fixture
def subject(tiny, monkeypatch):
    monkeypatch.setattr("heads.features.sets.image_digest", lambda *_: "these")
    return open_challenge(tiny).subjects[0]


def store(subject, work, fold=None, weights="w", training="t", images="these", age=0.0, **about):
    key = feature_key(subject.name, images=images, weights=weights)
    key["fold"] = None if fold is None else training_of(fold, training, seed=7)
    made = create_store(
        work / "features.zarr", "f", key | about, subject.image_ids, len(subject.train), {"pooled": 4}, {}
    )
    made.append({"pooled": np.full((len(subject.image_ids), 4), fold or 0, dtype=np.float32)})
    when = 1_000_000_000 - age
    os.utime(made.path / "committed.json", (when, when))
    return made


def test_folds_of_one_training_are_one_model_in_order(subject, tmp_path):
    for fold in (2, 0, 1):
        store(subject, tmp_path, fold, weights=f"w{fold}")
    (one,) = feature_sets(subject, tmp_path)
    assert one.held_out == (0, 1, 2) and one.key()["weights"] == ["w0", "w1", "w2"]
    assert [float(rows.dense()[0, 0]) for rows in one.read("cpu", 0)] == [0, 1, 2]
    plan = FoldPlan.of_features(subject, one, 5, 0)
    np.testing.assert_array_equal(plan.folds, assign_folds(subject.train.ids, 3, 7))
    assert plan.backbone_trained and plan.held_out == (0, 1, 2)


def test_trainings_layers_and_frozen_backbones_stay_apart(subject, tmp_path):
    for fold in (0, 1):
        store(subject, tmp_path, fold)
        store(subject, tmp_path, fold, training="other")
        store(subject, tmp_path, fold, layers=["deep"])
    store(subject, tmp_path)
    store(subject, tmp_path, weights="v")
    sets = feature_sets(subject, tmp_path)
    assert sorted(len(one.stores) for one in sets) == [1, 1, 2, 2, 2]
    assert sum(one.backbone_trained for one in sets) == 3


def test_digits_of_a_title_tell_trainings_layers_and_weights_apart_and_are_of_no_subject_or_fold(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr("heads.features.sets.image_digest", lambda *_: "these")
    titles = []
    for number, one in enumerate(open_challenge(tiny).subjects):
        for fold in range(number + 1):  # the first subject has the first fold alone
            store(one, tmp_path, fold, weights=f"{one.name} {fold}")
            store(one, tmp_path, fold, training="other")
            store(one, tmp_path, fold, layers=["deep"])
        store(one, tmp_path)
        store(one, tmp_path, weights="v")
        titles.append({each.title for each in feature_sets(one, tmp_path)})
    assert titles[0] == titles[1] and len(titles[0]) == 5
    assert {title.rpartition(" ")[0] for title in titles[0]} == {"b@32", "b@32 pretrain"}


def test_features_are_chosen_with_or_without_digits():
    title = "b@32 whole pretrain 0a1b2c"
    for pattern in (title, "b@32 whole pretrain", "*pretrain", "0a1b2c", "b@64, 0a1b2c", "b@?? whole*"):
        assert chosen_by(title, pattern), pattern
        assert chosen_by("b@32 whole pretrain 999999", without_digits(pattern)), pattern  # planned: digits not known
    for pattern in ("b@32", "whole", "0a1b2", "b@32 whole pretrain 0a1b2d", "*finetune"):
        assert not chosen_by(title, pattern), pattern
    assert without_digits("a b 0a1b2c,*pretrain, ffffff") == "a b,*pretrain,*"


def test_of_two_stores_of_one_fold_the_later_counts_and_the_other_is_named(subject, tmp_path, said):
    old = store(subject, tmp_path, 0, weights="unfinished", age=50)
    store(subject, tmp_path, 0, weights="finished")
    (one,) = feature_sets(subject, tmp_path)
    assert one.key()["weights"] == ["finished"]
    assert any(old.name in line and "newer" in line for line in said)
    say_partial([one, one])
    (line,) = [line for line in said if "only their images are predicted" in line]
    assert line == f"{one.title} has fold 0 of 3; only their images are predicted"


def test_features_of_other_images_are_left_out(subject, tmp_path, said):
    gone = store(subject, tmp_path, images="those")
    assert feature_sets(subject, tmp_path) == []
    assert any(gone.name in line and "made from other images" in line for line in said)


@pytest.mark.parametrize(
    ("train", "test", "why"),
    [
        (slice(None), slice(-1), "1 test image was added since; run 'extract' again"),
        (slice(3, None), slice(None), "3 training images were added since; run 'extract' again"),
        (slice(3, None), slice(2, None), "3 training images were added since and 2 test images were added since; run"),
        (slice(None, None, -1), slice(None), "its training images have other ids now; run 'extract' again"),
    ],
)
def test_what_happened_to_images_since_is_said_and_nobody_is_told_to_train(subject, tmp_path, said, train, test, why):
    ids = np.concatenate([subject.train.ids[train], subject.test.ids[test]])
    n_train = len(subject.train.ids[train])
    made = create_store(tmp_path / "features.zarr", "f", feature_key(subject.name), ids, n_train, {"pooled": 4}, {})
    made.append({"pooled": np.zeros((len(ids), 4), dtype=np.float32)})
    assert subject_stores(subject, list_stores(tmp_path / "features.zarr"), "extract") == []
    (line,) = said
    assert line.startswith(f"{subject.name}: left out {made.name}: {why}") and "all folds" not in line


def test_predictions_of_some_folds_need_the_other_folds(subject, tmp_path, said):
    ids = np.concatenate([subject.train.ids[:9], subject.test.ids])
    training = {name: value for name, value in training_of(0).items() if name != "fold"} | {"held_out": [0]}
    key = {"kind": "predictions", "subject": subject.name, "features": {"fold": training}}
    made = create_store(tmp_path / "predictions.zarr", "p", key, ids, 9, {"lh": 4}, {})
    made.append({"lh": np.zeros((len(ids), 4), dtype=np.float32)})
    assert subject_stores(subject, list_stores(tmp_path / "predictions.zarr"), "fit-heads") == []
    assert said[-1].endswith("it predicts the images of fold 0 of 3 alone, 21 are missing; train and extract all folds")
    assert subject_stores(subject, list_stores(tmp_path / "predictions.zarr"), "fit-heads", some_folds=True) != []
    more = replace(subject, test=replace(subject.test, ids=np.append(subject.test.ids, 72_999)))
    assert subject_stores(more, list_stores(tmp_path / "predictions.zarr"), "fit-heads") == []
    assert said[-1].endswith(f"{made.name}: 1 test image was added since; run 'fit-heads' again")


LAYERED = {"pooled": Row((4,)), "a.cls": Row((3,)), "a": Row((2, 2, 3), "float16"), "b": Row((1, 2, 3), "float16")}


@pytest.fixture
def layered(subject, tmp_path):
    key = feature_key(subject.name, layers=["pooled", "a", "b"])
    n = len(subject.image_ids)
    made = create_store(tmp_path / "features.zarr", "f", key, subject.image_ids, len(subject.train), LAYERED, {})
    made.append({name: np.full((n, *row.shape), k) for k, (name, row) in enumerate(LAYERED.items())})
    (one,) = feature_sets(subject, tmp_path)
    return one


@pytest.mark.parametrize("layers", ["all", "joint"])
def test_all_is_one_model_of_all_layers_with_the_key_of_the_store(layered, layers):
    """Earlier versions called it joint."""
    (one,) = layered.reading(layers)
    assert one.names == tuple(LAYERED) and one.is_layered and "read" not in one.key()
    assert one.key() == layered.key()


def test_each_is_every_layer_alone_with_its_class_token(layered):
    sets = layered.reading("each")
    assert [one.names for one in sets] == [("pooled",), ("a.cls", "a"), ("b",)]
    assert [one.is_layered for one in sets] == [False, True, True]
    assert [one.key()["read"] for one in sets] == [["pooled"], ["a.cls", "a"], ["b"]]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("a", ("a.cls", "a")),
        ("b,pooled", ("pooled", "b")),
        ("b, a", ("a.cls", "a", "b")),
        ("b,b", ("b",)),
        ("pooled,a,b", tuple(LAYERED)),
    ],
)
def test_named_layers_are_read_in_the_order_of_the_network(layered, layers, names):
    (one,) = layered.reading(layers)
    assert one.names == names
    ((rows,),) = (one.read("cpu", 0),)
    assert list(rows.grids) == list(names)
    expected = [k for k, (name, row) in enumerate(LAYERED.items()) if name in names for _ in range(np.prod(row.shape))]
    assert rows.dense()[0].tolist() == expected


def test_naming_every_layer_is_all(layered):
    assert layered.reading("b,a,pooled")[0].key() == layered.key()


@pytest.mark.parametrize("layers", ["c", "a,c", "", "Joint", "a.b"])
def test_layers_that_features_lack_leave_nothing_to_read(layered, layers):
    assert layered.reading(layers) == []


def test_each_of_features_with_one_layer_is_those_features(subject, tmp_path):
    store(subject, tmp_path)
    (one,) = feature_sets(subject, tmp_path)
    assert [other.key() for other in one.reading("each")] == [one.key()] and not one.is_layered
