"""Scores of the held-out fold: they are those of the heads that are saved, on the features of the backbone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.cache.pixels import cache_pixels
from featcache.config import BackboneConfig
from featcache.dataset.algonauts import open_challenge
from heads.backbones.encoder import Encoder
from heads.modules.saved import linear_map_of, saved_shapes, spatial_head_of
from heads.scores.metrics import VertexScores, pearson_r, summarize
from support.training import QUICK, train

SPATIAL = replace(QUICK, head="spatial", token_dropout=0.2, smoothness=0.1, sparsity=0.01)


def head_of(tensors, names, subject, surface):
    """{array: rows} -> predictions, as a checkpoint's heads have it."""
    if saved_shapes(tensors):
        return spatial_head_of(tensors, names, subject, surface)
    linear_map = linear_map_of(tensors, names, subject, surface)
    return lambda rows: linear_map(rows["pooled"])


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("test_resnet", QUICK),
        ("test_resnet", SPATIAL),
        ("test_vit", replace(SPATIAL, space=4)),
        ("test_efficientnet", SPATIAL),
    ],
)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_saved_heads_on_features_score_what_training_scored(tiny, tmp_path, network, settings, stage):
    backbone = BackboneConfig(name=network, weights="none", size=64 if "vit" in network else 32)
    selected = "all" if stage == "pretrain" else "2"
    checkpoint = train(tiny, tmp_path, settings, selected, stage=stage, backbone=backbone)
    trained, names, scores = checkpoint.backbone(), list(checkpoint.key.subjects), []
    taps = trained.taps(settings.tapped)
    assert checkpoint.facts.taps == taps.key()
    for subject in open_challenge(tiny).select(selected):
        (pixels,) = cache_pixels([subject], trained, tmp_path, 1.0, 1)
        held_out = np.flatnonzero(np.isin(subject.train.ids, checkpoint.seen_ids, invert=True))
        with torch.inference_mode():
            rows = trained.read(trained.normalise(pixels.read(held_out)), taps)
        for surface in subject.surfaces:
            head = head_of(checkpoint.heads(), names, subject.name, surface)
            r = pearson_r(head(rows).numpy(), subject.responses(surface)[held_out])
            scores.append(VertexScores(subject.name, surface, r, subject.noise_ceiling[surface]))
    assert summarize(scores)[-1].accuracy == pytest.approx(100 * checkpoint.facts.score, abs=0.05)


def test_a_mean_of_the_weights_is_scored_in_the_precision_of_the_training(tiny, tmp_path, monkeypatch):
    found, honest = [], Encoder.forward

    def watched(self, images, subjects):
        outputs = honest(self, images, subjects)
        found.append((self.training, outputs.dtype))
        return outputs

    monkeypatch.setattr(Encoder, "forward", watched)
    train(tiny, tmp_path, replace(QUICK, ema=0.9, precision="bfloat16"))
    assert set(found) == {(True, torch.bfloat16), (False, torch.bfloat16)}
