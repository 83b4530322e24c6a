"""Printing of tables, for a person or for a file."""

import os
import sys

from rich.console import Console, RenderableType

_ONE_LINE = 10_000  # characters


def print_table(table: RenderableType) -> None:
    """Print a table on stdout. In a file or a pipe every row is one line, however long."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _ONE_LINE
    with console.capture() as shown:
        console.print(table)
    sys.stdout.write(shown.get())  # rich itself would write past what keeps results above the progress bars
