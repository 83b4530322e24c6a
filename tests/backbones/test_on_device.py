"""Training on a CUDA device: the CPU's numbers, few waits, and memory that runs out."""

import threading
from dataclasses import replace

import pytest
import torch

from featcache.backbone.checkpoint import list_checkpoints
from featcache.errors import FeatcacheError
from heads.backbones import loop, step
from heads.backbones.learner import Learner
from heads.backbones.step import Gradients
from support.training import QUICK, assert_close, train, weights

PLAIN = replace(QUICK, precision="float32", epochs=2)
STAGES = {
    "one layer for all subjects": ("pretrain", "all", replace(PLAIN, loss="smooth_l1+pearson")),
    "heads of ROIs": ("finetune", "1", replace(PLAIN, loss="smooth_l1+mnnpc", ema=0.9)),
    "gathered": ("finetune", "1", replace(PLAIN, loss="pearson", correlation_batch=8, freeze_norm=True)),
    "spatial": ("pretrain", "all", replace(PLAIN, head="spatial", smoothness=0.1, token_dropout=0.2)),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_training_on_a_device_has_the_cpus_numbers_and_waits_for_it_once_in_an_epoch(
    tiny, tmp_path, pretended_cuda, monkeypatch, name
):
    """Of as many steps as losses are read together; the first epoch also brings the images' mean and deviation."""
    stage, subject, settings = STAGES[name]
    expected = train(tiny, tmp_path / "cpu", settings, subject, stage=stage)
    epochs, honest = [], loop.EncoderTraining.run_epoch

    def watched(self, *arguments):
        pretended_cuda.forget()
        honest(self, *arguments)
        epochs.append((list(pretended_cuda.waits), list(pretended_cuda.copies)))

    monkeypatch.setattr(loop.EncoderTraining, "run_epoch", watched)
    trained = train(tiny, tmp_path / "cuda", settings, subject, stage=stage, device="cuda")
    assert trained.facts.scores == pytest.approx(expected.facts.scores, abs=1e-4)
    assert_close(weights(trained), weights(expected), atol=2e-4, rtol=1e-2)  # Adam divides by small gradients
    (first, _), (second, copies) = epochs
    assert [wait.place.partition(":")[0] for wait in second] == ["heads/backbones/loop.py"]
    assert len(first) <= len(second) + 2
    to_device = [copy for copy in copies if copy.way == "to device"]
    assert to_device and all(copy.pinned and not copy.blocking for copy in to_device)


@pytest.mark.parametrize("name", ["heads of ROIs", "gathered"])
def test_where_memory_is_full_a_step_takes_fewer_images_at_a_time_and_has_the_same_loss(
    tiny, tmp_path, pretended_cuda, monkeypatch, capfd, name
):
    """Running statistics are those of passes that succeeded: here they are trained, and only count smaller parts."""
    stage, subject, settings = STAGES[name]
    settings = replace(settings, freeze_norm=True, ema=0.0)
    expected = train(tiny, tmp_path / "whole", settings, subject, stage=stage, device="cuda")
    honest, calls = Gradients._backward_gathered if settings.correlation_batch else Gradients._backward, []

    def full(self, *arguments):
        """The second step has no memory for its gradient."""
        calls.append(1)
        values = honest(self, *arguments)
        if len(calls) == 2:
            pretended_cuda.refuse_memory(0)
            torch.empty(8, device="cuda")
        return values

    monkeypatch.setattr(Gradients, honest.__name__, full)
    halved = train(tiny, tmp_path / "halved", settings, subject, stage=stage, device="cuda")
    assert "the device's memory is full: goes on with 2 images at a time, for the same steps" in capfd.readouterr().err
    assert_close(weights(halved), weights(expected), atol=2e-4, rtol=1e-2)


def test_statistics_of_a_pass_that_failed_are_forgotten(tiny, tmp_path, pretended_cuda, monkeypatch):
    honest, seen = Gradients._compute, []

    def full(self, groups, number, at_a_time):
        seen.append([buffer.cpu().clone() for buffer in self._model.buffers()])
        honest(self, groups, number, at_a_time)
        if at_a_time == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append([buffer.cpu().clone() for buffer in self._model.buffers()])
        raise KeyboardInterrupt

    monkeypatch.setattr(Gradients, "_compute", full)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path, PLAIN, device="cuda")
    first, _, after = seen
    tracked = {int(b) - int(a) for a, b in zip(first, after, strict=True) if a.dtype == torch.int64 and a.ndim == 0}
    assert tracked == {4}  # two parts of one batch, each passed twice, and nothing of the pass that failed


def test_a_network_that_is_too_large_for_two_images_is_one_line(tiny, tmp_path, pretended_cuda, monkeypatch):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Gradients, "_compute", full)
    with pytest.raises(FeatcacheError, match=r"expected enough memory for 2 images at a time.*smaller --batch-size"):
        train(tiny, tmp_path, PLAIN, device="cuda")


def test_memory_that_is_full_where_no_smaller_batch_helps_is_one_line_and_costs_nothing(
    tiny, tmp_path, pretended_cuda, monkeypatch
):
    honest = Learner.update

    def full(self, number):
        if number == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it.")
        honest(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", full)
        with pytest.raises(
            FeatcacheError, match=r"enough memory for the weights.*Tried to allocate 2 GiB\.; "
        ) as raised:
            train(tiny, tmp_path, PLAIN, device="cuda")
    assert "\n" not in str(raised.value)
    again, whole = (train(tiny, tmp_path / name, PLAIN, device="cuda") for name in ("", "whole"))
    assert_close(weights(again), weights(whole), atol=0, rtol=0)


def test_a_step_that_diverges_on_a_device_is_named_before_anything_is_saved(
    tiny, tmp_path, pretended_cuda, monkeypatch
):
    """The device may take the rest of the epoch before it is noticed."""
    honest, calls = step.encoder_loss, []

    def diverging(*arguments):
        calls.append(1)
        loss = honest(*arguments)
        return loss * torch.nan if len(calls) == 6 else loss

    monkeypatch.setattr(step, "encoder_loss", diverging)
    with pytest.raises(FeatcacheError, match=r"found nan at epoch 2, step 2 of 4; epoch 1 is kept"):
        train(tiny, tmp_path, PLAIN, device="cuda")
    (checkpoint,) = list_checkpoints(tmp_path)
    assert len(checkpoint.facts.scores) == 1 and checkpoint.facts.state == "state-001-000000"
    assert all(tensor.isfinite().all() for tensor in weights(checkpoint).values())
    assert checkpoint.backbone().digest  # the files are what was written
    monkeypatch.setattr(step, "encoder_loss", honest)
    again, whole = (train(tiny, tmp_path / name, PLAIN, device="cuda") for name in ("", "whole"))
    assert_close(weights(again), weights(whole), atol=0, rtol=0)


def test_files_are_of_the_step_at_which_they_were_saved_though_training_goes_on(
    tiny, tmp_path, pretended_cuda, monkeypatch
):
    """A writer that is slow has copies of its own."""
    settings, epoch_begins = replace(PLAIN, stop="never", epochs=2), threading.Event()
    honest_write, honest_epoch = loop.save_state, loop.EncoderTraining.run_epoch

    def late(folder, state):
        assert epoch_begins.wait(60)
        honest_write(folder, state)

    def begun(self, epoch, first=0):
        if epoch:
            honest_step = self._step
            self._step = lambda *arguments: (honest_step(*arguments), epoch_begins.set())
        honest_epoch(self, epoch, first)
        raise_at_end(epoch)

    def raise_at_end(epoch):
        if epoch:
            raise KeyboardInterrupt

    expected = train(tiny, tmp_path / "whole", settings, device="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", late)
        patch.setattr(loop.EncoderTraining, "run_epoch", begun)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "parts", settings, device="cuda")
    (checkpoint,) = list_checkpoints(tmp_path / "parts")
    assert checkpoint.facts.state == "state-001-000000" and not checkpoint.finished
    assert_close(weights(train(tiny, tmp_path / "parts", settings, device="cuda")), weights(expected), atol=0, rtol=0)
