"""A work folder with a page of it, and what a page has."""

from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from featcache.dataset.open import open_dataset
from featcache.dataset.subject import Dataset


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
