"""Training on a CUDA device: the CPU's numbers, few waits, and memory that runs out."""

from dataclasses import replace

import pytest
from heads.backbones import loop
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
