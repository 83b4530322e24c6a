"""What stores describe is read into fields and written back as it was, letter by letter."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featcache.cache.keys import FeatureFacts, FeatureKey, FoldKey, HeldOutFolds
from featcache.cache.store import create_store
from featcache.config import fingerprint
from featcache.errors import StoreError

TRANSFORM = (
    '"transform": {"input_size": [3, 32, 32], "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], '
    '"std": [0.5, 0.5, 0.5], "crop_pct": 0.95, "crop_mode": "center"}'
)
SUBJECT = (
    '"kind": "features", "subject": "subj01", "images": "51d9ca2965db9cc8278566ea46249cd7", '
    '"image_ids": "fd80a55a26ad", "backbone": "test_resnet", "weights": "6eb14fc19382e324721b848294d990f6", '
    f'"timm": "1.0.31", {TRANSFORM}, "dtype": "float32"'
)
LAYERS = '"layers": ["pooled", "layer2", "layer4"], "grids": {"layer2": [4, 4], "layer4": [1, 1]}, "pool": "avg"'
FOLD = '"stage": "pretrain", "training": "0123456789ab", "fold": 2, "n_folds": 5, "seed": 0'
SOUP = '"stage": "finetune", "training": "0123456789ab", "soup": 3, "fold": 0, "n_folds": 5, "seed": 1'
KEYS = {  # as stores have them; each with the fingerprint that was in the name of such a store
    "layers": (f'{{{LAYERS}, {SUBJECT}, "fold": null, "batch_norm": "folded"}}', "8062abd28288"),
    "pooled": (f'{{"layers": ["pooled"], {SUBJECT}, "fold": null}}', None),
    "trained": (f'{{{LAYERS}, {SUBJECT}, "fold": {{{FOLD}}}}}', None),
    "mean": (f'{{"layers": ["pooled"], {SUBJECT}, "fold": {{{SOUP}}}, "batch_norm": "folded"}}', None),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_written_back_as_it_was(name):
    written, digest = KEYS[name]
    key = FeatureKey.from_json(json.loads(written))
    assert json.dumps(key.to_json()) == written
    assert digest in (None, fingerprint(key.to_json()))


def test_the_fields_of_a_key_are_what_was_written():
    layers, pooled, trained, mean = (FeatureKey.from_json(json.loads(written)) for written, _ in KEYS.values())
    assert layers.layers == ("pooled", "layer2", "layer4") and layers.pool == "avg" and layers.fused
    assert layers.grids == {"layer2": (4, 4), "layer4": (1, 1)} and layers.transform["input_size"] == [3, 32, 32]
    assert pooled.grids == {} and pooled.pool is None and pooled.fold is None and not pooled.fused
    assert trained.fold == FoldKey(stage="pretrain", training="0123456789ab", fold=2, n_folds=5, seed=0)
    assert mean.fold is not None and mean.fold.soup == 3
    assert (trained.fold.label, mean.fold.label) == ("pretrain", "finetune-soup")


def test_folds_of_a_training_are_named_together_as_prediction_stores_have_them():
    for written, soup in ((FOLD, ""), (SOUP, '"soup": 3, ')):
        first = FoldKey.from_json(json.loads(f"{{{written}}}"))
        together = HeldOutFolds.of([first, replace(first, fold=4)])
        begin = f'{{"stage": "{first.stage}", "training": "0123456789ab", {soup}"n_folds": 5, "seed": {first.seed}'
        assert json.dumps(together.to_json()) == f'{begin}, "held_out": [{first.fold}, 4]}}'
        assert HeldOutFolds.from_json(together.to_json()) == together and together.label == first.label


def test_a_training_without_its_fold_is_refused():
    with pytest.raises(KeyError, match="n_folds"):
        FoldKey.from_json({"stage": "pretrain", "training": "0123456789ab", "fold": 2, "seed": 0})


def test_the_order_of_an_older_store_does_not_matter():
    written = json.loads(KEYS["pooled"][0])
    older = {name: written[name] for name in sorted(written, reverse=True)}
    assert FeatureKey.from_json(older) == FeatureKey.from_json(written)
    assert fingerprint(FeatureKey.from_json(older).to_json()) == fingerprint(written)


def test_any_field_of_a_key_changes_its_fingerprint():
    key = FeatureKey.from_json(json.loads(KEYS["trained"][0]))
    fold = replace(key.fold, fold=1)
    changes = {
        "layers": ("pooled", "layer2"),
        "grids": {"layer2": (4, 4), "layer4": (2, 1)},
        "pool": "max",
        "subject": "subj02",
        "images": "0",
        "image_ids": "0",
        "backbone": "test_vit",
        "weights": "0",
        "timm": "1.0.9",
        "transform": {},
        "dtype": "bfloat16",
        "fold": fold,
        "fused": True,
        "code": {"source": "0f"},
    }
    assert changes.keys() == key.__dataclass_fields__.keys()
    prints = {fingerprint(replace(key, **{name: value}).to_json()) for name, value in changes.items()}
    assert len(prints | {fingerprint(key.to_json())}) == len(changes) + 1


@pytest.mark.parametrize(
    "written",
    [
        '{"origin": "random weights", "torch": "2.14.1+cu130", "device": "cpu"}',
        '{"origin": "checkpoint a", "torch": "2.4.0", "device": "cpu", "checkpoint": "a", "seen_ids": [3, 1, 9]}',
        '{"origin": "checkpoint a", "torch": "2.4.0", "device": "cpu", "seen_ids": []}',  # older: no checkpoint named
        "{}",
    ],
)
def test_facts_are_written_back_as_they_were(written):
    assert json.dumps(FeatureFacts.from_json(json.loads(written)).to_json()) == written


def test_facts_that_were_not_written_down_are_none():
    facts = FeatureFacts.from_json({"origin": "random weights", "seen_ids": []})
    assert (facts.origin, facts.checkpoint, facts.seen_ids) == ("random weights", None, ())
    assert FeatureFacts.from_json({}).seen_ids is None


def test_the_key_of_an_open_store_is_read_from_it_and_another_kind_of_store_is_named(tmp_path: Path):
    written = json.loads(KEYS["layers"][0])
    ids = np.arange(4)
    features = create_store(tmp_path, "a", written, ids, 3, {"pooled": 2}, {})
    assert FeatureKey.of(features) == FeatureKey.from_json(written)
    predictions = create_store(tmp_path, "b", {"kind": "predictions", "subject": "subj01"}, ids, 3, {"lh": 2}, {})
    with pytest.raises(
        StoreError, match=rf"{predictions.name}: expected a feature store; found a key that cannot be read .*; move it"
    ):
        FeatureKey.of(predictions)
