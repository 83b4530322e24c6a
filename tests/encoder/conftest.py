"""A work folder with models of every kind: frozen, stage 1 and stage 2; linear, spatial and core heads; a blend."""

import shutil
from pathlib import Path

import pytest

import cli
from support.shared import build_once

NETWORK = ("--backbone", "test_resnet", "--weights", "none", "--size", "48")
TRAINING = ("--folds", "2", "--epochs", "1", "--batch-size", "8", "--workers", "1", "--stop", "never")


@pytest.fixture(scope="session")
def every_kind(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model of each kind for two subjects, and the blend of all of them."""

    def build(work: Path) -> None:
        where = ("--data", str(tiny), "--work", str(work))
        quick = ("--epochs", "2", "--batch-size", "8")
        commands = [
            ("extract", *where, *NETWORK, "--layers", "pooled,layer2,layer4", "--checkpoint", "none"),
            ("fit-heads", *where, "--folds", "3"),
            ("fit-heads", *where, "--folds", "3", "--layers", "pooled"),
            ("fit-heads", *where, "--folds", "3", "--layers", "pooled", "--loss", "smooth_l1", "--head", "roi", *quick),
            ("fit-heads", *where, "--folds", "3", "--head", "spatial", "--loss", "pearson", *quick),
            ("fit-heads", *where, "--folds", "3", "--head", "spatial", "--space", "4", "--loss", "mse", *quick),
            ("fit-heads", *where, "--folds", "3", "--head", "core", "--hidden", "8", "--channels", "4", *quick),
            ("extract", *where, "--backbone", "test_vit", "--weights", "none", "--size", "32", "--layers", "pooled"),
            ("fit-heads", *where, "--folds", "3", "--features", "test_vit*"),
            ("pretrain", *where, *NETWORK, *TRAINING, "--embedding", "4"),
            ("finetune", *where, *NETWORK, *TRAINING),
            ("extract", *where, "--backbone", "test_resnet", "--layers", "pooled,layer4"),
            ("fit-heads", *where, "--features", "*pretrain*,*finetune*"),
            ("fit-heads", *where, "--features", "*pretrain*,*finetune*", "--solver", "trained"),
            ("blend", *where, "--method", "uniform"),
        ]
        for command in commands:
            assert cli.run([*command, "--quiet"]) == 0, command

    return build_once(tmp_path_factory, "every_kind", build)


@pytest.fixture
def work(every_kind: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which bare commands find."""
    copy = Path(shutil.copytree(every_kind, tmp_path / "work"))
    monkeypatch.setenv("FEATCACHE_DATA", str(tiny))
    monkeypatch.setenv("FEATCACHE_WORK", str(copy))
    return copy


@pytest.fixture(scope="session")
def exported(every_kind: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blend of it as a folder to hand on, for reading."""

    def build(folder: Path) -> None:
        where = ("--data", str(tiny), "--work", str(every_kind))
        assert cli.run(["export", str(folder / "encoder"), *where, "--quiet"]) == 0

    return build_once(tmp_path_factory, "exported", build) / "encoder"
