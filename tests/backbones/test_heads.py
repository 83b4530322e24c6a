"""Heads of each kind as a stage builds them, and what those of stage 2 start from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.backbone.keys import Split
from featcache.backbone.network import load_backbone
from featcache.cache.pixels import cache_pixels
from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError
from heads.backbones.batches import Images
from heads.backbones.heads import FirstWeights, build_heads, start_heads
from heads.config import StageConfig
from heads.config.training import HEAD_KINDS, HeadKind
from heads.modules.by_subject import AllSubjects, OneSubject, SpatialHeads
from heads.modules.saved import linear_map_of
from heads.solvers.estimator import RidgeHead
from support.training import BACKBONE, QUICK, train

SPATIAL = replace(QUICK, head="spatial", epochs=1)
SHAPES = {"pooled": (64,)}


@pytest.mark.parametrize(
    ("stage", "settings", "kind"),
    [
        ("pretrain", QUICK, AllSubjects),
        ("finetune", QUICK, OneSubject),
        ("pretrain", SPATIAL, SpatialHeads),
        ("finetune", SPATIAL, SpatialHeads),
    ],
)
def test_a_stage_builds_the_heads_that_are_asked_for(tiny, stage, settings, kind):
    subjects = open_challenge(tiny).subjects[: 2 if stage == "pretrain" else 1]
    heads = build_heads(SHAPES, subjects, StageConfig(stage=stage, train=settings))
    assert type(heads) is kind and heads.names == tuple(subject.name for subject in subjects)


def test_a_new_kind_of_heads_is_one_entry(tiny, monkeypatch):
    entry = HeadKind(build="support.training:no_heads", start="heads.backbones.heads:start_linear")
    monkeypatch.setitem(HEAD_KINDS, "none", entry)
    monkeypatch.setattr("support.training.no_heads", lambda *given: given, raising=False)
    config = StageConfig(stage="pretrain", train=replace(QUICK, head="none", head_start="default"))
    assert build_heads(SHAPES, (), config) == (SHAPES, (), config, 1.0)
    assert config.train.key() == QUICK.key() | {"head": "none", "head_start": "default"}


def test_pooled_heads_without_a_stage_1_start_from_the_closed_form(tiny, tmp_path):
    subjects = open_challenge(tiny).subjects[:1]
    (subject,), backbone = subjects, load_backbone(BACKBONE)
    (pixels,) = cache_pixels(subjects, backbone, tmp_path, 1, 1)
    images = Images(subjects, [pixels], Split(fold=0, n_folds=3, seed=0))
    config = StageConfig(stage="finetune", train=QUICK)
    heads = build_heads({"pooled": (backbone.model.num_features,)}, subjects, config)
    assert start_heads(heads, FirstWeights(None, backbone, images), config) == ""
    (rows,) = images.train_rows
    features = backbone.pooled(backbone.normalise(pixels.read(rows)))
    for surface in subject.surfaces:
        expected = RidgeHead().fit(features, torch.from_numpy(np.array(subject.responses(surface)[rows])))
        found = linear_map_of(heads.saved(), heads.names, subject.name, surface)
        torch.testing.assert_close(found.weights, expected.weights_, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.intercept, expected.intercept_, rtol=1e-3, atol=1e-4)


def test_pooled_heads_start_where_stage_1_ended_for_their_subject(tiny, tmp_path):
    """A rate of next to nothing leaves them there."""
    first = train(tiny, tmp_path, replace(QUICK, epochs=1), "all", stage="pretrain")
    still = replace(QUICK, epochs=1, learning_rate=1e-12, head_learning_rate=1e-12, weight_decay=0.0)
    second = train(tiny, tmp_path, still, "2", init="stage1")
    for surface in ("lh", "rh"):
        expected = linear_map_of(first.heads(), list(first.key.subjects), "subj02", surface)
        found = linear_map_of(second.heads(), ["subj02"], "subj02", surface)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.intercept, expected.intercept, rtol=1e-4, atol=1e-6)


def test_pooled_and_spatial_heads_start_from_each_others_stage_1(tiny, tmp_path, said):
    """What cannot be gone on from is said, and pooled heads are fitted in closed form instead."""
    pooled = replace(QUICK, epochs=1)
    train(tiny, tmp_path / "a", SPATIAL, "all", stage="pretrain")
    one = train(tiny, tmp_path / "a", pooled, init="stage1")
    train(tiny, tmp_path / "b", pooled, "all", stage="pretrain")
    other = train(tiny, tmp_path / "b", SPATIAL, init="stage1")
    assert one.finished and other.finished
    assert sum("heads start from small random maps" in line for line in said) == 1


def test_a_layer_that_the_network_lacks_is_one_line(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"--layers: expected auto, all, pooled, .*found 'layer9'"):
        train(tiny, tmp_path, replace(SPATIAL, layers="pooled,layer9"))
