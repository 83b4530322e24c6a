"""The loop of training: the same result after any interruption, the best epoch, and one line for what goes wrong."""

from dataclasses import replace

import pytest
import torch

from featcache.backbone import checkpoint as checkpoint_module
from featcache.dataset.digests import file_digest
from featcache.errors import CheckpointError, StoreError
from heads.backbones import loop, step
from heads.backbones.loop import EncoderTraining, is_enough
from heads.backbones.scoring import HeldOut
from heads.backbones.step import Gradients
from heads.config import TrainConfig
from support.training import QUICK, assert_equal, train, weights

HARD = replace(QUICK, loss="smooth_l1+pearson", ema=0.9, augment=True, warmup=0.5, layer_decay=0.7, accumulate=2)


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    return weights(train(tiny, tmp_path_factory.mktemp("whole"), HARD, save_every=1))


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_an_interrupted_run_ends_with_the_same_bits(tiny, tmp_path, monkeypatch, uninterrupted, stop_at):
    honest, calls = Gradients.compute, []

    def stopping(self, groups, number):
        calls.append(number)
        if len(calls) == stop_at + 1:
            raise KeyboardInterrupt
        return honest(self, groups, number)

    monkeypatch.setattr(Gradients, "compute", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path, HARD, save_every=1)
    monkeypatch.setattr(Gradients, "compute", lambda self, g, n: (calls.append(n), honest(self, g, n))[1])
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
        for name in ("write_tensors", "write_description", "write_document"):
            patch.setattr(checkpoint_module, name, stopping(getattr(checkpoint_module, name)))
        patch.setattr(checkpoint_module.torch, "save", stopping(torch.save))
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path, HARD, save_every=1)
    assert_equal(weights(train(tiny, tmp_path, HARD, save_every=1)), uninterrupted)


def test_an_interrupted_run_with_spatial_heads_ends_with_the_same_bits(tiny, tmp_path, monkeypatch):
    settings = replace(QUICK, head="spatial", loss="smooth_l1+pearson", correlation_batch=8, token_dropout=0.2)
    settings = replace(settings, ema=0.9, augment=True, smoothness=0.1)
    whole = train(tiny, tmp_path / "whole", settings, "all", stage="pretrain", save_every=1)
    honest = Gradients.compute

    def stopping(self, groups, number):
        if number == 2:
            raise KeyboardInterrupt
        return honest(self, groups, number)

    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "compute", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "parts", settings, "all", stage="pretrain", save_every=1)
    assert_equal(
        weights(train(tiny, tmp_path / "parts", settings, "all", stage="pretrain", save_every=1)), weights(whole)
    )


def test_a_second_run_trains_nothing(tiny, tmp_path, monkeypatch):
    first = train(tiny, tmp_path)
    monkeypatch.setattr(EncoderTraining, "train", lambda self: pytest.fail("trained again"))
    assert train(tiny, tmp_path).path == first.path


def test_a_run_knows_the_digests_of_the_files_it_keeps(tiny, tmp_path):
    checkpoint = train(tiny, tmp_path)
    folder = checkpoint.facts.weights
    files = (f"{folder}/backbone.safetensors", f"{folder}/heads.safetensors")
    assert checkpoint.facts.digests == {name: file_digest(checkpoint.path / name) for name in files}


def test_a_finished_run_leaves_no_state(tiny, tmp_path):
    checkpoint = train(tiny, tmp_path, save_every=1)
    assert sorted(path.name for path in checkpoint.path.glob("[!.]*")) == ["checkpoint.json", "epoch-002"]


def with_scores(monkeypatch, scores):
    left = iter(scores)
    monkeypatch.setattr(HeldOut, "score", lambda self, encoder: next(left))


def test_the_epoch_that_scores_best_is_kept_and_patience_ends_the_run(tiny, tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.1, 0.3, 0.2, 0.25, 0.9])
    settings = replace(QUICK, epochs=5, stop="fold", patience=2)
    checkpoint = train(tiny, tmp_path / "a", settings)
    assert (checkpoint.facts.epoch, checkpoint.facts.score) == (2, 0.3)
    assert checkpoint.facts.scores == (0.1, 0.3, 0.2, 0.25) and checkpoint.finished
    with_scores(monkeypatch, [0.1, 0.3])
    with monkeypatch.context() as patch:  # the same steps of the same cosine, and no further: what epoch 2 was
        patch.setattr(loop, "is_enough", lambda scores, config: len(scores) == 2)
        expected = train(tiny, tmp_path / "b", settings)
    assert_equal(weights(checkpoint), weights(expected))


@pytest.mark.parametrize(
    ("scores", "enough"),
    [([0.1], False), ([0.3, 0.2], False), ([0.3, 0.2, 0.3], True), ([0.1, 0.2, 0.3], False), ([0.1] * 5, True)],
)
def test_training_is_enough_after_epochs_without_a_better_score(scores, enough):
    assert is_enough(scores, TrainConfig(epochs=5, patience=2)) == enough
    assert is_enough(scores, TrainConfig(epochs=5, patience=2, stop="never")) == (len(scores) == 5)


def test_without_early_stop_the_last_epoch_is_kept(tiny, tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.9, 0.1])
    assert train(tiny, tmp_path).facts.epoch == 2


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_epoch(tiny, tmp_path, monkeypatch):
    honest, calls = step.encoder_loss, []

    def diverging(*arguments):
        calls.append(1)
        loss = honest(*arguments)
        return loss * torch.nan if len(calls) == 8 else loss

    monkeypatch.setattr(step, "encoder_loss", diverging)
    with pytest.raises(CheckpointError) as raised:
        train(tiny, tmp_path)
    checkpoint = checkpoint_module.list_checkpoints(tmp_path)[0]
    assert "found nan at epoch 2, step 4 of 4" in str(raised.value)  # four steps an epoch, and the eighth diverged
    assert "epoch 1 is kept" in str(raised.value) and "\n" not in str(raised.value)
    assert not checkpoint.finished and all(tensor.isfinite().all() for tensor in weights(checkpoint).values())
    monkeypatch.setattr(step, "encoder_loss", honest)
    assert_equal(weights(train(tiny, tmp_path)), weights(train(tiny, tmp_path / "whole")))


def test_an_infinite_gradient_never_reaches_the_weights(tiny, tmp_path, monkeypatch):
    """The loss may be finite where its gradient is not; clipping would make NaN of it, and a state of that."""
    honest, calls = step.encoder_loss, []

    def steep(*arguments):
        calls.append(1)
        loss = honest(*arguments)
        return loss + (0 * arguments[1].sum()).sqrt() if len(calls) == 6 else loss  # the slope of a root at 0

    monkeypatch.setattr(step, "encoder_loss", steep)
    with pytest.raises(CheckpointError, match=r"expected a finite gradient; found (nan|inf) at epoch 2, step 2 of 4"):
        train(tiny, tmp_path, save_every=1)
    monkeypatch.setattr(step, "encoder_loss", honest)
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
    honest = checkpoint_module.write_tensors
    monkeypatch.setattr(
        checkpoint_module, "write_tensors", lambda *a: (saves.append(1), full() if len(saves) == 4 else honest(*a))[1]
    )
    with pytest.raises(CheckpointError, match=r"expected to save epoch-002; found .*No space left"):
        train(tiny, tmp_path)
    monkeypatch.setattr(checkpoint_module, "write_tensors", honest)
    assert_equal(weights(train(tiny, tmp_path)), weights(train(tiny, tmp_path / "whole")))
