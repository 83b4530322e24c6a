"""What a checkpoint describes: one training over folds and subjects, and JSON that stays what it was."""

from pathlib import Path

import pytest

from featcache.backbone.keys import CheckpointFacts, CheckpointKey
from featcache.config import fingerprint
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.subject import Subject
from support.checkpoints import key_of, write_checkpoint


@pytest.fixture
def subjects(tiny: Path) -> tuple[Subject, ...]:
    return open_challenge(tiny).subjects


@pytest.mark.parametrize(
    "about",
    [
        {"settings": {"epochs": 3, "loss": "mse"}},
        {"size": 64},
        {"fit": "whole"},
        {"name": "test_convnext"},
        {"stage": "finetune"},
    ],
)
def test_another_training_has_another_fingerprint(subjects, tmp_path, about):
    assert key_of(subjects, tmp_path).training != key_of(subjects, tmp_path, **about).training


def test_a_second_stage_is_one_training_over_folds_and_subjects(subjects, tmp_path):
    """Weights differ from fold to fold where it starts; the training that they came from does not."""
    starts = [write_checkpoint(subjects, tmp_path, fold=fold) for fold in range(2)]
    keys = [
        key_of([subject], tmp_path, fold=fold, stage="finetune", start=start)
        for fold, start in enumerate(starts)
        for subject in subjects
    ]
    assert len({key.start.weights for key in keys}) == 2
    assert len({key.training for key in keys}) == 1
    directly = key_of(subjects[:1], tmp_path, stage="finetune")
    other = write_checkpoint(subjects, tmp_path, settings={"epochs": 3})
    elsewhere = key_of(subjects[:1], tmp_path, stage="finetune", start=other)
    assert len({key.training for key in (keys[0], directly, elsewhere)}) == 3


def test_a_first_stage_on_other_subjects_is_another_training(subjects, tmp_path):
    both, first = key_of(subjects, tmp_path), key_of(subjects[:1], tmp_path)
    assert both.training != first.training


KEY = {
    "kind": "checkpoint",
    "stage": "finetune",
    "subjects": {"subj03": {"images": "0a", "rois": {"lh": {"V1": "1b"}}}},
    "backbone": {"name": "convnext_xlarge", "weights": "hub", "size": 224},
    "transform": {"input_size": [3, 224, 224], "crop_pct": 0.95},
    "timm": "1.0.9",
    "start": {"weights": "2c", "training": "3d"},
    "fold": {"fold": 2, "n_folds": 5, "seed": 7},
    "settings": {"loss": "mse", "epochs": 5},
    "devices": 1,
}
FACTS = {
    "label": "finetune-subj03-convnext_xlarge-fold2",
    "origin": "timm's pretrained weights",
    "versions": {"torch": "2.4"},
    "scores": [0.1, 0.25],
    "finished": False,
    "seen_ids": [4, 9],
    "taps": {"layers": ["pooled"]},
    "digests": {"epoch-002/heads.safetensors": "4e"},
    "weights": "epoch-002",
    "epoch": 2,
    "score": 0.25,
    "state": "state-002-000000",
}


@pytest.mark.parametrize("left_out", [(), ("devices",)])
@pytest.mark.parametrize("more", [{}, {"later": {"than": "this"}}])
def test_a_key_is_on_the_disk_what_it_was_and_so_is_its_fingerprint(left_out, more):
    """With their order; keys of the first checkpoints lack the number of devices, and others may know more."""
    json_key = {name: value for name, value in KEY.items() if name not in left_out} | more
    key = CheckpointKey.from_json(json_key)
    assert list(key.to_json().items()) == list(json_key.items())
    shared = {name: value for name, value in json_key.items() if name not in ("fold", "start", "subjects")}
    assert key.training == fingerprint(shared | {"start": "3d"})
    assert (key.label, key.backbone.size, key.split.n_folds) == ("finetune-subj03-convnext_xlarge-fold2", 224, 5)


@pytest.mark.parametrize("fit", ["whole", "pad"])
def test_a_fit_is_on_the_disk_where_it_does_not_crop(fit):
    json_key = KEY | {"backbone": KEY["backbone"] | {"fit": fit}}
    key = CheckpointKey.from_json(json_key)
    assert key.backbone.fit == fit and key.to_json() == json_key
    assert CheckpointKey.from_json(KEY).backbone.fit == "crop"


@pytest.mark.parametrize("left_out", [(), ("taps", "digests"), ("digests", "weights", "epoch", "score")])
@pytest.mark.parametrize("more", [{}, {"later": {"than": "this"}}])
def test_facts_are_on_the_disk_what_they_were(left_out, more):
    json_facts = {name: value for name, value in FACTS.items() if name not in left_out} | more
    facts = CheckpointFacts.from_json(json_facts)
    assert list(facts.to_json().items()) == list(json_facts.items())
    assert facts.scores == (0.1, 0.25) and facts.seen_ids == (4, 9)
