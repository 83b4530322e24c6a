"""A work folder after both stages of training and extraction."""

import shutil
from pathlib import Path

import pytest

import cli
from support.shared import build_once
from support.training import QUICK_OPTIONS

SETTINGS = {"FEATCACHE_BACKBONE": "test_resnet", "FEATCACHE_WEIGHTS": "none", "FEATCACHE_SIZE": "32"}


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, for reading: two folds of stage 1, of stage 2 for each subject, and their features."""

    def build(work: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (SETTINGS | {"FEATCACHE_DATA": str(tiny), "FEATCACHE_WORK": str(work)}).items():
                patch.setenv(name, value)
            for command in (["pretrain", *QUICK_OPTIONS], ["finetune", *QUICK_OPTIONS], ["extract"]):
                assert cli.run(command) == 0

    return build_once(tmp_path_factory, "trained", build)


@pytest.fixture
def work(trained: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which commands find."""
    for name, value in (SETTINGS | {"FEATCACHE_DATA": str(tiny), "FEATCACHE_WORK": str(tmp_path / "work")}).items():
        monkeypatch.setenv(name, value)
    return Path(shutil.copytree(trained, tmp_path / "work"))
