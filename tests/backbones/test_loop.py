"""The loop of backbone and heads: the right gradient, the same result after any interruption, the best epoch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cli
from featcache.backbone import checkpoint as checkpoint_module
from featcache.backbone.taps import Taps
from featcache.config import BackboneConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.digests import file_digest
from featcache.errors import CheckpointError, ConfigError, StoreError
from heads.backbones import loop as encoder_training
from heads.backbones.batches import Targets, plan_steps
from heads.backbones.encoder import encoder_loss
from heads.backbones.loop import EncoderTraining, parameter_groups
from heads.backbones.stages import train_stage
from heads.config import StageConfig, TrainConfig
from heads.scores.losses import LOSSES

BACKBONE = BackboneConfig(name="test_resnet", weights="none", size=32)
QUICK = TrainConfig(freeze_norm=False, epochs=2, batch_size=4, stop="never", embedding=8)
ROOT = Path(__file__).resolve().parents[2]


def train(tree, work, settings=QUICK, stage="finetune", subject="1", **options):
    config = StageConfig(
        stage=stage,
        train=settings,
        backbone=BACKBONE,
        init="none",
        fold=0,
        n_folds=3,
        device="cpu",
        workers=1,
        **options,
    )
    (trained,) = train_stage(open_challenge(tree).select(subject), config, work)
    return trained.checkpoint


def weights(checkpoint):
    folder = checkpoint.path / checkpoint.facts["weights"]
    return {
        f"{part}.{k}": v for part in ("backbone", "heads") for k, v in load_file(folder / f"{part}.safetensors").items()
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one, other, **tolerance):
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def mixed_batch():
    """5 images of subject a and 3 of b, which lacks two of six outputs and has the rest in another order."""
    torch.manual_seed(0)
    outputs = torch.randn(8, 6, requires_grad=True)
    rows = {"a": torch.tensor([0, 2, 3, 5, 7]), "b": torch.tensor([1, 4, 6])}
    columns = {("a", "lh"): torch.arange(6), ("b", "lh"): torch.tensor([5, 0, 3, 2])}
    targets = [Targets(s, "lh", rows[s], torch.randn(len(rows[s]), len(columns[s, "lh"]))) for s in "ab"]
    ceilings = {("a", "lh"): torch.rand(6), ("b", "lh"): None}
    return outputs, targets, columns, ceilings


def test_smooth_l1_over_several_subjects_is_the_masked_mean():
    outputs, targets, columns, ceilings = mixed_batch()
    wanted, mask = torch.zeros(8, 6), torch.zeros(8, 6, dtype=torch.bool)
    for t in targets:
        for k, row in enumerate(t.rows):
            wanted[row, columns[t.subject, "lh"]], mask[row, columns[t.subject, "lh"]] = t.responses[k], True
    expected = torch.nn.functional.smooth_l1_loss(outputs[mask], wanted[mask])
    loss = encoder_loss([(1.0, "smooth_l1")], outputs, targets, columns, ceilings)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (outputs.grad[~mask] == 0).all() and (outputs.grad[mask] != 0).all()


@pytest.mark.parametrize("name", ["pearson", "mnnpc"])
def test_correlations_are_within_a_subject_under_its_own_ceiling(name):
    outputs, targets, columns, ceilings = mixed_batch()
    parts = [
        len(t.rows)
        * t.responses.shape[1]
        * LOSSES[name](outputs[t.rows][:, columns[t.subject, "lh"]], t.responses, ceilings[t.subject, "lh"])
        for t in targets
    ]
    expected = 0.5 * sum(parts) / (5 * 6 + 3 * 4)
    torch.testing.assert_close(encoder_loss([(0.5, name)], outputs, targets, columns, ceilings), expected)


def test_a_subject_with_one_image_has_no_correlation_and_keeps_its_other_losses():
    outputs, targets, columns, ceilings = mixed_batch()
    alone = replace(targets[1], rows=targets[1].rows[:1], responses=targets[1].responses[:1])
    both = encoder_loss([(1.0, "pearson")], outputs, [targets[0], alone], columns, ceilings)
    torch.testing.assert_close(both, encoder_loss([(1.0, "pearson")], outputs, targets[:1], columns, ceilings))
    assert encoder_loss([(1.0, "pearson")], outputs, [alone], columns, ceilings) == 0
    assert encoder_loss([(1.0, "smooth_l1")], outputs, [alone], columns, ceilings) > 0


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
    outputs = []
    honest = EncoderTraining._backward_gathered

    def watched(self, batches, *rest, **options):
        model = self._model
        model.backbone.register_forward_hook(lambda m, i, o: outputs.append(o.detach().clone()))
        norm = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
        before = norm.running_mean.clone()
        inputs = []
        hook = norm.register_forward_pre_hook(lambda m, i: inputs.append(i[0].mean((0, 2, 3)).detach()))
        honest(self, batches, *rest, **options)
        hook.remove()
        expected = before
        for mean in inputs[len(batches) :]:  # the second passes alone
            expected = expected + norm.momentum * (mean - expected)
        torch.testing.assert_close(norm.running_mean, expected)
        raise KeyboardInterrupt

    monkeypatch.setattr(EncoderTraining, "_backward_gathered", watched)
    monkeypatch.setattr(encoder_training, "_train_mode", lambda model, _: with_dropout(model))
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path, replace(QUICK, loss="pearson", correlation_batch=8))
    first, second = outputs[:2], outputs[2:4]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and (first[0] == 0).any()


def with_dropout(model):
    model.train()
    model.backbone.global_pool = torch.nn.Sequential(model.backbone.global_pool, torch.nn.Dropout(0.5))


HARD = replace(QUICK, loss="smooth_l1+pearson", ema=0.9, augment=True, warmup=0.5, layer_decay=0.7, accumulate=2)


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    return weights(train(tiny, tmp_path_factory.mktemp("whole"), HARD, save_every=1))


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_an_interrupted_run_ends_with_the_same_bits(tiny, tmp_path, monkeypatch, uninterrupted, stop_at):
    honest, calls = EncoderTraining._step, []

    def stopping(self, groups, number):
        calls.append(number)
        if len(calls) == stop_at + 1:
            raise KeyboardInterrupt
        honest(self, groups, number)

    monkeypatch.setattr(EncoderTraining, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path, HARD, save_every=1)
    monkeypatch.setattr(EncoderTraining, "_step", lambda self, g, n: (calls.append(n), honest(self, g, n))[1])
    assert_equal(weights(train(tiny, tmp_path, HARD, save_every=1)), uninterrupted)
    assert calls == [*range(stop_at + 1), *range(stop_at, len(calls) - 1)]  # no step was taken twice


@pytest.mark.parametrize("written", range(1, 12))
def test_interrupted_between_any_two_files_it_ends_with_the_same_bits(
    tiny, tmp_path, monkeypatch, uninterrupted, written
):
    """Stopped while the `written`-th thing is saved, weights, states and descriptions alike."""
    calls = []

    def stopping(honest):
        def save(*arguments):
            calls.append(1)
            if len(calls) == written:
                raise KeyboardInterrupt
            honest(*arguments)

        return save

    with monkeypatch.context() as patch:
        for name in ("save_file", "replace_json"):
            patch.setattr(checkpoint_module, name, stopping(getattr(checkpoint_module, name)))
        patch.setattr(checkpoint_module.torch, "save", stopping(torch.save))
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path, HARD, save_every=1)
    assert_equal(weights(train(tiny, tmp_path, HARD, save_every=1)), uninterrupted)


def test_a_second_run_trains_nothing(tiny, tmp_path, monkeypatch):
    first = train(tiny, tmp_path)
    monkeypatch.setattr(EncoderTraining, "train", lambda self: pytest.fail("trained again"))
    assert train(tiny, tmp_path).path == first.path


def test_a_run_knows_the_digests_of_the_files_it_keeps(tiny, tmp_path):
    checkpoint = train(tiny, tmp_path)
    folder = checkpoint.facts["weights"]
    files = (f"{folder}/backbone.safetensors", f"{folder}/heads.safetensors")
    assert checkpoint.facts["digests"] == {name: file_digest(checkpoint.path / name) for name in files}


def test_a_finished_run_leaves_no_state(tiny, tmp_path):
    checkpoint = train(tiny, tmp_path, save_every=1)
    assert sorted(path.name for path in checkpoint.path.glob("[!.]*")) == ["checkpoint.json", "epoch-002"]


def with_scores(monkeypatch, scores):
    left = iter(scores)
    monkeypatch.setattr(EncoderTraining, "_score", lambda self, encoder: next(left))


def test_the_epoch_that_scores_best_is_kept_and_patience_ends_the_run(tiny, tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.1, 0.3, 0.2, 0.25, 0.9])
    settings = replace(QUICK, epochs=5, stop="fold", patience=2)
    checkpoint = train(tiny, tmp_path / "a", settings)
    assert (checkpoint.facts["epoch"], checkpoint.facts["score"]) == (2, 0.3)
    assert checkpoint.facts["scores"] == [0.1, 0.3, 0.2, 0.25] and checkpoint.finished
    with_scores(monkeypatch, [0.1, 0.3])
    with monkeypatch.context() as patch:  # the same steps of the same cosine, and no further: what epoch 2 was
        patch.setattr(EncoderTraining, "_is_enough", lambda self, scores: len(scores) == 2)
        expected = train(tiny, tmp_path / "b", settings)
    assert_equal(weights(checkpoint), weights(expected))


def test_without_early_stop_the_last_epoch_is_kept(tiny, tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.9, 0.1])
    assert train(tiny, tmp_path).facts["epoch"] == 2


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_epoch(tiny, tmp_path, monkeypatch):
    honest, calls = encoder_training.encoder_loss, []

    def diverging(*arguments):
        calls.append(1)
        loss = honest(*arguments)
        return loss * torch.nan if len(calls) == 8 else loss

    monkeypatch.setattr(encoder_training, "encoder_loss", diverging)
    with pytest.raises(CheckpointError) as raised:
        train(tiny, tmp_path)
    checkpoint = checkpoint_module.list_checkpoints(tmp_path)[0]
    assert "found nan at epoch 2, step 4 of 4" in str(raised.value)  # four steps an epoch, and the eighth diverged
    assert "epoch 1 is kept" in str(raised.value) and "\n" not in str(raised.value)
    assert not checkpoint.finished and all(tensor.isfinite().all() for tensor in weights(checkpoint).values())
    monkeypatch.setattr(encoder_training, "encoder_loss", honest)
    assert_equal(weights(train(tiny, tmp_path)), weights(train(tiny, tmp_path / "whole")))


def test_an_infinite_gradient_never_reaches_the_weights(tiny, tmp_path, monkeypatch):
    """The loss may be finite where its gradient is not; clipping would make NaN of it, and a state of that."""
    honest, calls = encoder_training.encoder_loss, []

    def steep(*arguments):
        calls.append(1)
        loss = honest(*arguments)
        return loss + (0 * arguments[1].sum()).sqrt() if len(calls) == 6 else loss  # the slope of a root at 0

    monkeypatch.setattr(encoder_training, "encoder_loss", steep)
    with pytest.raises(CheckpointError, match=r"expected a finite gradient; found (nan|inf) at epoch 2, step 2 of 4"):
        train(tiny, tmp_path, save_every=1)
    monkeypatch.setattr(encoder_training, "encoder_loss", honest)
    assert_equal(weights(train(tiny, tmp_path, save_every=1)), weights(train(tiny, tmp_path / "whole")))


def test_two_runs_of_one_checkpoint_do_not_meet(tiny, tmp_path, monkeypatch):
    honest = EncoderTraining.run_epoch

    def meanwhile(self, *arguments):
        monkeypatch.setattr(EncoderTraining, "run_epoch", honest)
        with pytest.raises(StoreError, match="expected to be the only writer"):
            train(tiny, tmp_path)
        honest(self, *arguments)

    monkeypatch.setattr(EncoderTraining, "run_epoch", meanwhile)
    assert train(tiny, tmp_path).finished


def test_a_full_disk_is_one_line_and_costs_the_last_save_alone(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    saves = []
    honest = checkpoint_module.save_file
    monkeypatch.setattr(
        checkpoint_module, "save_file", lambda *a: (saves.append(1), full() if len(saves) == 4 else honest(*a))[1]
    )
    with pytest.raises(CheckpointError, match=r"expected to save epoch-002; found: .*No space left"):
        train(tiny, tmp_path)
    monkeypatch.setattr(checkpoint_module, "save_file", honest)
    assert_equal(weights(train(tiny, tmp_path)), weights(train(tiny, tmp_path / "whole")))


def test_rates_fall_to_zero_on_a_cosine_after_a_warm_up(tiny, tmp_path, monkeypatch):
    rates = []
    honest = EncoderTraining._step

    def watched(self, groups, number):
        honest(self, groups, number)
        rates.append([group["lr"] for group in self._optimiser.param_groups])

    monkeypatch.setattr(EncoderTraining, "_step", watched)
    train(tiny, tmp_path, replace(QUICK, epochs=4, warmup=1.0, learning_rate=1e-3, head_learning_rate=5e-3))
    backbone, heads = np.array(rates)[:, 0], np.array(rates)[:, -1]
    np.testing.assert_allclose(heads, 5 * backbone)
    steps = len(rates) // 4
    np.testing.assert_allclose(backbone[:steps], 1e-3 * np.arange(steps) / steps, atol=1e-12)
    cosine = 1e-3 * (1 + np.cos(np.pi * np.arange(len(rates)) / len(rates))) / 2
    np.testing.assert_allclose(backbone[steps:], cosine[steps:])


def test_a_single_step_is_at_the_full_rate_and_timm_has_nothing_to_warn_of(tiny, tmp_path, monkeypatch, caplog):
    rates, honest = [], EncoderTraining._step

    def step(self, groups, number):
        honest(self, groups, number)
        rates.append(max(group["lr"] for group in self._optimiser.param_groups))

    monkeypatch.setattr(EncoderTraining, "_step", step)
    settings = replace(QUICK, epochs=1, batch_size=16, learning_rate=1e-2, head_learning_rate=1e-2)
    train(tiny, tmp_path, settings)
    assert rates == [1e-2] and "Cosine annealing" not in caplog.text


def test_earlier_layers_have_smaller_rates_and_biases_no_decay():
    from featcache.backbone.network import load_backbone
    from heads.backbones.encoder import Encoder
    from heads.modules.by_subject import AllSubjects

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
    from featcache.backbone.network import load_backbone

    start = load_backbone(BACKBONE).model.state_dict()
    kept = weights(train(tiny, tmp_path / "a", replace(QUICK, freeze_norm=True)))
    moved = weights(train(tiny, tmp_path / "b"))
    for name in (name for name in start if name.endswith("running_var")):
        assert torch.equal(kept[f"backbone.{name}"], start[name])
        assert not torch.equal(moved[f"backbone.{name}"], start[name])


def test_augmentation_moves_a_picture_by_little_and_never_turns_it_over():
    augment = encoder_training._augmentation()
    picture = torch.zeros(3, 100, 100, dtype=torch.uint8)
    picture[:, 20:30, 10:20] = 255  # a spot at the upper left
    torch.manual_seed(0)
    for _ in range(50):
        rows, columns = torch.nonzero(augment(picture).float().mean(0) > 100, as_tuple=True)
        assert abs(rows.float().mean() - 24.5) < 5 and abs(columns.float().mean() - 14.5) < 5


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
        plan_steps(replace(QUICK, loss="pearson", **settings), 1, 20)


@pytest.mark.parametrize(("settings", "images"), [({}, 4), ({"correlation_batch": 16}, 16), ({"accumulate": 3}, 12)])
def test_a_step_has_the_images_that_were_asked_for(settings, images):
    steps = plan_steps(replace(QUICK, loss="pearson", **settings), 1, 20)
    pairs = np.arange(2 * images).reshape(images, 2)
    assert steps.images == images and (np.concatenate(steps.groups(pairs)).reshape(-1, 2) == pairs).all()


def test_half_precision_needs_a_gpu_and_bfloat16_does_not(tiny, tmp_path):
    with pytest.raises(ConfigError, match="--precision float16: expected a CUDA device"):
        train(tiny, tmp_path, replace(QUICK, precision="float16"))
    low, exact = weights(train(tiny, tmp_path, replace(QUICK, precision="bfloat16"))), weights(train(tiny, tmp_path))
    assert all(tensor.dtype == exact[name].dtype for name, tensor in low.items())
    assert any(not torch.equal(low[name], exact[name]) for name in low)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tiny, tmp_path):
    """torchrun with two processes of 4 images against one process of 8, under a correlation over all 8."""
    options = ["--data", tiny, "--init", "none", "--backbone", "test_resnet", "--size", "32", "--subject", "1"]
    options += ["--fold", "0", "--folds", "3", "--epochs", "2", "--loss", "pearson+smooth_l1", "--freeze-norm"]
    options += ["--stop", "never", "--device", "cpu", "--workers", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "cli.py"]
    both = [*command, "finetune", *options, "--work", tmp_path / "two", "--batch-size", "4", "--correlation-batch", "8"]
    done = subprocess.run(list(map(str, both)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 checkpoints, 1 of them new") == 1  # one of them speaks
    assert cli.run([str(option) for option in ("finetune", *options, "--work", tmp_path / "one", "--batch-size", 8)]) == 0
    two, one = (checkpoint_module.list_checkpoints(tmp_path / name)[0] for name in ("two", "one"))
    assert two.facts["scores"] == pytest.approx(one.facts["scores"], abs=1e-3)
    assert_close(weights(two), weights(one), atol=2e-4, rtol=1e-2)
