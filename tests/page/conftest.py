"""A work folder with models of several layers, a blend and the page of it."""

import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

import cli
from featcache.dataset.open import open_dataset
from featcache.dataset.subject import Dataset
from heads.blend.models import Model, find_models
from heads.page.measures import Measured, measure
from support.shared import build_once

pytest.importorskip("nilearn", reason="the extra 'report' is not installed")


class Reported(NamedTuple):
    """A work folder with a page, and where its dataset is."""

    work: Path
    data: Path

    @property
    def html(self) -> str:
        return (self.work / "report.html").read_text()

    @property
    def dataset(self) -> Dataset:
        return open_dataset(self.data)


@pytest.fixture(scope="session")
def reported(fitted: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """For reading."""

    def build(folder: Path) -> None:
        work = shutil.copytree(fitted, folder / "work")
        for command in ("blend", "report"):
            assert cli.run([command, "--data", str(tiny), "--work", str(work)]) == 0

    return Reported(build_once(tmp_path_factory, "reported", build) / "work", tiny)


@pytest.fixture(scope="session")
def models(reported: Reported) -> list[Model]:
    """Models of the first subject."""
    return next(iter(find_models(reported.dataset.subjects, reported.work).values()))


@pytest.fixture(scope="session")
def measured(reported: Reported, models: list[Model]) -> Measured:
    return measure(reported.dataset.subjects[0], models, n_draws=20)


class Outline(HTMLParser):
    """What a page has: its tags with their attributes, cells of tables row by row, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._within: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self._within = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._within = None

    def handle_data(self, data: str) -> None:
        if self._within is None:
            self.text += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def outline(reported: Reported) -> Outline:
    return Outline(reported.html)
