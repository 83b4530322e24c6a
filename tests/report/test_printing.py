"""Tables in a file have a row a line, however long."""

import pytest
from rich.table import Table

from heads.report.printing import print_table


def test_a_row_in_a_file_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table()
    table.add_column("name", overflow="fold")
    table.add_row("x" * 3000)
    print_table(table)
    assert any("x" * 3000 in line for line in capfd.readouterr().out.splitlines())
