"""Gradients of a step: one loss over several batches, the same random numbers again, and seeds that stay."""

import random
import sys
from dataclasses import replace

import pytest
import torch

from heads.backbones.learner import Learner
from heads.backbones.step import Gradients, augmentation, step_seed
from support.training import QUICK, assert_close, train, weights


def test_gathering_over_passes_gives_the_gradient_of_one_large_batch(tiny, tmp_path):
    """Two passes of 4 under one correlation are one batch of 8: the same weights after two epochs."""
    common = replace(QUICK, loss="pearson+smooth_l1", freeze_norm=True)
    large = train(tiny, tmp_path / "a", replace(common, batch_size=8))
    gathered = train(tiny, tmp_path / "b", replace(common, batch_size=4, correlation_batch=8))
    alone = train(tiny, tmp_path / "c", replace(common, batch_size=4, accumulate=2))
    # Adam divides by the gradient's size: rounding of a gradient near 0 is a step of its own
    assert_close(weights(large), weights(gathered), atol=2e-4, rtol=1e-2)
    with pytest.raises(AssertionError):
        assert_close(weights(large), weights(alone), atol=2e-4, rtol=1e-2)


def test_a_gathered_step_repeats_dropout_and_counts_running_statistics_once(tiny, tmp_path, monkeypatch):
    outputs, inputs, learners, honest = [], [], [], Gradients.compute

    def with_dropout(self):
        self.model.train()
        backbone = self.model.backbone
        backbone.global_pool = torch.nn.Sequential(backbone.global_pool, torch.nn.Dropout(0.5))
        learners.append(self)

    def watched(self, groups, number):
        backbone = learners[0].model.backbone
        backbone.register_forward_hook(lambda m, i, o: outputs.append(o.detach().clone()))
        norm = next(m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
        expected = norm.running_mean.clone()
        norm.register_forward_pre_hook(lambda m, i: inputs.append(i[0].mean((0, 2, 3)).detach()))
        honest(self, groups, number)
        for mean in inputs[2:]:  # the second passes alone
            expected = expected + norm.momentum * (mean - expected)
        torch.testing.assert_close(norm.running_mean, expected)
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "train_mode", with_dropout)
    monkeypatch.setattr(Gradients, "compute", watched)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path, replace(QUICK, loss="pearson", correlation_batch=8))
    first, second = outputs[:2], outputs[2:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and (first[0] == 0).any()


def test_seeds_of_steps_stay_what_they_were():
    """Stored trainings depend on them: the numbers were written down when they were CPython's hashes of tuples."""
    expected = {
        (0, 0, 0): 3010437511937009226,
        (0, 1, 0): 7619408953831620358,
        (5, 123, 3): 1142229824611474114,
        (2**61, 7, 0): 2209024052662697908,
    }
    assert {numbers: step_seed(*numbers) for numbers in expected} == expected
    drawn = {step_seed(seed, number, process) for seed in range(4) for number in range(100) for process in range(4)}
    assert len(drawn) == 1600 and min(drawn) >= 0 and max(drawn) < 2**63


@pytest.mark.skipif(
    sys.implementation.name != "cpython" or sys.hash_info.width != 64, reason="another Python hashes tuples otherwise"
)
def test_a_seed_of_a_step_is_the_hash_of_its_numbers():
    rng = random.Random(0)
    for _ in range(1000):
        numbers = rng.choice([0, 2**61 - 1, 2**70, rng.randrange(10**6)]), rng.randrange(10**6), rng.randrange(64)
        assert step_seed(*numbers) == hash(numbers) % 2**63


def test_augmentation_moves_a_picture_by_little_and_never_turns_it_over():
    augment = augmentation()
    picture = torch.zeros(3, 100, 100, dtype=torch.uint8)
    picture[:, 20:30, 10:20] = 255  # a spot at the upper left
    torch.manual_seed(0)
    for _ in range(50):
        rows, columns = torch.nonzero(augment(picture).float().mean(0) > 100, as_tuple=True)
        assert abs(rows.float().mean() - 24.5) < 5 and abs(columns.float().mean() - 14.5) < 5
