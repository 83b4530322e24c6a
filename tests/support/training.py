"""Short trainings on the tiny tree, through the function and through the commands, and what they left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cli
from featcache.backbone.checkpoint import Checkpoint
from featcache.config import BackboneConfig
from featcache.dataset.algonauts import open_challenge
from heads.backbones.stages import train_stage
from heads.config import StageConfig, TrainConfig

BACKBONE = BackboneConfig(name="test_resnet", weights="none", size=32)
QUICK = TrainConfig(freeze_norm=False, epochs=2, batch_size=4, stop="never", embedding=8)
QUICK_OPTIONS = ["--folds", "2", "--epochs", "1", "--batch-size", "4", "--workers", "1", "--embedding", "8"]


def train(tree: Path, work: Path, settings: TrainConfig = QUICK, subject: str = "1", **options: Any) -> Checkpoint:
    """The checkpoint of one fold, by default fold 0 of 3 in stage 2, from random weights."""
    defaults = {"stage": "finetune", "backbone": BACKBONE, "init": "none", "fold": 0, "n_folds": 3}
    config = StageConfig(train=settings, workers=1, **{"device": "cpu"} | defaults | options)
    (trained,) = train_stage(open_challenge(tree).select(subject), config, work)
    return trained.checkpoint


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of the epoch that is kept."""
    folder = checkpoint.path / str(checkpoint.facts.weights)
    return {
        f"{part}.{name}": tensor
        for part in ("backbone", "heads")
        for name, tensor in load_file(folder / f"{part}.safetensors").items()
    }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> None:
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    """What a command that succeeds says: its JSON, and its lines on stderr."""
    code = cli.run([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), err


def fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command fails with."""
    code = cli.run(list(arguments))
    _, err = capfd.readouterr()
    assert code == 1 and err.splitlines()[-1].startswith("error: "), err
    return err.splitlines()[-1]


def edit(checkpoint: Checkpoint, part: str, **values: Any) -> None:
    """Change what a checkpoint's description says, in its 'facts' or its 'recipe'."""
    path = checkpoint.path / "checkpoint.json"
    description = json.loads(path.read_text())
    description[part] |= values
    description.pop("digest", None)  # as of an earlier version
    path.write_text(json.dumps(description))
