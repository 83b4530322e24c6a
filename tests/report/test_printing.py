"""Tables in a file have a row a line, however long."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from featcache.machine import progress
from heads.report.printing import print_table


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_table_goes_above_the_bar_over_all_steps(monkeypatch: pytest.MonkeyPatch):
    """On a terminal, where both streams are one screen."""
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr(progress, "_stderr", Console(file=screen, width=40, force_terminal=True))
    table = Table("name")
    table.add_row("a model")
    with progress.overall("all steps", 1):
        print_table(table)
    lines = [line.rpartition("\x1b[2K")[2] for line in screen.getvalue().splitlines()]  # what is left of each line
    (row,) = [line for line in lines if "a model" in line]
    (top,) = [line for line in lines if "┏━" in line]
    assert "all steps" not in row + top


def test_a_row_in_a_file_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table()
    table.add_column("name", overflow="fold")
    table.add_row("x" * 3000)
    print_table(table)
    assert any("x" * 3000 in line for line in capfd.readouterr().out.splitlines())
