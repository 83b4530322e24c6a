"""Printing of tables, for a person or for a file."""

import os

from rich.console import Console, RenderableType

_ONE_LINE = 10_000  # characters


def print_table(table: RenderableType) -> None:
    """Print a table on stdout. In a file or a pipe every row is one line, however long."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _ONE_LINE
    console.print(table)
