"""What a step changes: learning rates, groups of parameters, statistics that are kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.backbone.network import load_backbone
from featcache.backbone.taps import Taps
from heads.backbones.encoder import Encoder
from heads.backbones.learner import Learner, parameter_groups
from heads.config import TrainConfig
from heads.modules.by_subject import AllSubjects
from support.training import BACKBONE, QUICK, train, weights


@pytest.fixture
def rates(monkeypatch):
    """Learning rates of each group of parameters, step by step."""
    taken, honest = [], Learner.update

    def watched(self, number):
        honest(self, number)
        taken.append([group["lr"] for group in self.optimiser.param_groups])

    monkeypatch.setattr(Learner, "update", watched)
    return taken


def test_rates_fall_to_zero_on_a_cosine_after_a_warm_up(tiny, tmp_path, rates):
    train(tiny, tmp_path, replace(QUICK, epochs=4, warmup=1.0, learning_rate=1e-3, head_learning_rate=5e-3))
    backbone, heads = np.array(rates)[:, 0], np.array(rates)[:, -1]
    np.testing.assert_allclose(heads, 5 * backbone)
    steps = len(rates) // 4
    np.testing.assert_allclose(backbone[:steps], 1e-3 * np.arange(steps) / steps, atol=1e-12)
    cosine = 1e-3 * (1 + np.cos(np.pi * np.arange(len(rates)) / len(rates))) / 2
    np.testing.assert_allclose(backbone[steps:], cosine[steps:])


def test_a_single_step_is_at_the_full_rate_and_timm_has_nothing_to_warn_of(tiny, tmp_path, rates, caplog):
    settings = replace(QUICK, epochs=1, batch_size=16, learning_rate=1e-2, head_learning_rate=1e-2)
    train(tiny, tmp_path, settings)
    assert [max(step) for step in rates] == [1e-2] and "Cosine annealing" not in caplog.text


def test_earlier_layers_have_smaller_rates_and_biases_no_decay():
    network = load_backbone(BACKBONE).model.requires_grad_(True)
    heads = AllSubjects(network.num_features, ["a"], {("a", "lh"): torch.arange(3)}, 4, 1.0)
    groups = parameter_groups(
        Encoder(network, heads, Taps(("pooled",), {}, "avg")), TrainConfig(layer_decay=0.5, weight_decay=0.1)
    )
    scale = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    first, last = scale[id(next(network.parameters()))], scale[id(next(iter(network.layer4.parameters())))]
    assert 0 < first[0] < last[0] <= 1
    assert all(decay == (0.1 if p.ndim > 1 else 0) for p in network.parameters() for _, decay in [scale[id(p)]])
    assert len(scale) == len([*network.parameters(), *heads.parameters()])


def test_frozen_norms_keep_their_statistics(tiny, tmp_path):
    start = load_backbone(BACKBONE).model.state_dict()
    kept = weights(train(tiny, tmp_path / "a", replace(QUICK, freeze_norm=True)))
    moved = weights(train(tiny, tmp_path / "b"))
    for name in (name for name in start if name.endswith("running_var")):
        assert torch.equal(kept[f"backbone.{name}"], start[name])
        assert not torch.equal(moved[f"backbone.{name}"], start[name])
