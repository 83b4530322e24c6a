"""Precision and processes of a training."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cli
from featcache.backbone.checkpoint import list_checkpoints
from featcache.errors import ConfigError
from heads.backbones.accelerator import make_accelerator, resolve_precision
from heads.backbones.loop import EncoderTraining
from support.training import QUICK, assert_close, train, weights

ROOT = Path(__file__).resolve().parents[2]


def test_half_precision_needs_a_gpu_and_bfloat16_does_not(tiny, tmp_path):
    with pytest.raises(ConfigError, match="--precision float16: expected a CUDA device"):
        train(tiny, tmp_path, replace(QUICK, precision="float16"))
    low, exact = weights(train(tiny, tmp_path, replace(QUICK, precision="bfloat16"))), weights(train(tiny, tmp_path))
    assert all(tensor.dtype == exact[name].dtype for name, tensor in low.items())
    assert any(not torch.equal(low[name], exact[name]) for name in low)


def test_precision_by_itself_is_what_the_device_multiplies_fast(pretended_cuda, monkeypatch):
    assert resolve_precision("auto", "cpu") == "float32" and resolve_precision("auto", "cuda") == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert resolve_precision("auto", "cuda") == "float16" and resolve_precision("tf32", "cuda") == "tf32"
    with pytest.raises(ConfigError, match="--precision tf32: expected a CUDA device"):
        resolve_precision("tf32", "cpu")


@pytest.mark.parametrize(("precision", "products"), [("float32", "highest"), ("tf32", "high"), ("auto", "highest")])
def test_float32_is_rounded_to_tf32_only_where_that_was_asked_for(
    tiny, tmp_path, pretended_cuda, monkeypatch, precision, products
):
    found, honest = [], EncoderTraining.train

    def watched(self):
        found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return honest(self)

    monkeypatch.setattr(EncoderTraining, "train", watched)
    checkpoint = train(tiny, tmp_path, replace(QUICK, precision=precision, epochs=1), device="cuda")
    assert found == [(products, products == "high")]
    assert checkpoint.key.settings["precision"] == {"auto": "bfloat16"}.get(precision, precision)
    assert {tensor.dtype for tensor in weights(checkpoint).values() if tensor.is_floating_point()} == {torch.float32}


def test_a_training_on_a_cpu_does_not_keep_the_next_one_from_the_device(tiny, tmp_path, pretended_cuda):
    assert make_accelerator("float32", "cpu").device.type == "cpu"
    assert make_accelerator("float32", "cuda").device.type == "cuda"
    assert make_accelerator("float32", "cpu").device.type == "cpu"


def test_two_processes_train_as_one_with_twice_the_batch(tiny, tmp_path):
    """torchrun with two processes of 4 images against one process of 8, under a correlation over all 8."""
    options = ["--data", tiny, "--init", "none", "--backbone", "test_resnet", "--size", "32", "--subject", "1"]
    options += ["--fold", "0", "--folds", "3", "--epochs", "2", "--loss", "pearson+smooth_l1", "--freeze-norm"]
    options += ["--stop", "never", "--device", "cpu", "--workers", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "cli.py"]
    both = [*command, "finetune", *options, "--work", tmp_path / "two", "--batch-size", "4", "--correlation-batch", "8"]
    done = subprocess.run(list(map(str, both)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 checkpoint, 1 of them new") == 1  # one of them speaks
    assert cli.run(list(map(str, ["finetune", *options, "--work", tmp_path / "one", "--batch-size", "8"]))) == 0
    two, one = (list_checkpoints(tmp_path / name)[0] for name in ("two", "one"))
    assert two.facts.scores == pytest.approx(one.facts.scores, abs=1e-3)
    assert_close(weights(two), weights(one), atol=2e-4, rtol=1e-2)
