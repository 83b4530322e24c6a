"""A work folder with models of several layers, a blend and the page of it."""

import shutil
from pathlib import Path

import pytest

import cli
from heads.blend.models import Model
from heads.page.measures import Measured, measure
from heads.statistics.sources import Scored, find_scored
from support.reported import Outline, Reported
from support.shared import build_once

pytest.importorskip("nilearn", reason="the extra 'report' is not installed")


@pytest.fixture(scope="session")
def reported(fitted: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """For reading."""

    def build(folder: Path) -> None:
        work = shutil.copytree(fitted, folder / "work")
        for command in ("blend", "report"):
            assert cli.run([command, "--data", str(tiny), "--work", str(work)]) == 0

    return Reported(build_once(tmp_path_factory, "reported", build) / "work", tiny)


@pytest.fixture(scope="session")
def scored(reported: Reported) -> list[Scored]:
    """The blend and the models of the first subject."""
    return next(iter(find_scored(reported.dataset.subjects, reported.work).values()))


@pytest.fixture(scope="session")
def measured(reported: Reported, scored: list[Scored]) -> Measured:
    return measure(reported.dataset.subjects[0], scored, n_draws=20)


@pytest.fixture(scope="session")
def models(measured: Measured) -> list[Model]:
    """Models of the first subject."""
    return list(measured.models)


@pytest.fixture
def outline(reported: Reported) -> Outline:
    return Outline(reported.html)
