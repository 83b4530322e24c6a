"""Tables of models, whose names are long: readable on 80 columns, however many models and scores there are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from heads.fit.short_names import split_names

_UNBOUNDED = 100_000  # columns of a terminal on which every table has its full width
_GAP = 2  # columns between two scores


def framed(title: str, table: RenderableType, notes: Sequence[str]) -> Group:
    """A table between its title and its notes, which are as wide as the terminal and not as the table."""
    lines = [Text(note, style="dim italic", overflow="fold") for note in notes]
    return Group(Text(title, style="italic"), table, *lines)


@dataclass(frozen=True)
class NamedTable:
    """A numbered row of cells for each name.

    In a row as wide as it takes, where there is room for that. Else words that all names have are said once, below.
    Where there is still too little room, each name has a line of its own above its cells, which stand in columns.

    columns : their titles
    cells : (n_names, n_columns)
    marks : of each name, put behind it; () for none
    notes : lines below
    """

    title: str
    columns: Sequence[str]
    names: Sequence[str]
    cells: Sequence[Sequence[str]]
    marks: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """What rich prints."""
        shared, rests = split_names(self.names)
        notes = [f"all models: {shared}", *self.notes] if shared else list(self.notes)
        for names, below in ((self.names, self.notes), (rests, notes)):
            table = self._table(self._marked(names))
            if Measurement.get(console, options.update(max_width=_UNBOUNDED), table).maximum <= options.max_width:
                yield framed(self.title, table, below)
                return
        yield framed(self.title, Group(*self._stacked(self._marked(rests), options.max_width)), notes)

    def _marked(self, names: Sequence[str]) -> list[str]:
        return [f"{name}{mark}" for name, mark in zip(names, self.marks or [""] * len(names), strict=True)]

    def _table(self, names: Sequence[str]) -> Table:
        table = Table()
        table.add_column("", justify="right")
        table.add_column("model")
        for column in self.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for number, (name, cells) in enumerate(zip(names, self.cells, strict=True), 1):
            table.add_row(str(number), name, *cells)
        return table

    def _stacked(self, names: Sequence[str], width: int) -> Iterator[RenderableType]:
        """Each name on a line of its own, above the lines of its cells."""
        indent = len(str(len(names))) + 1
        widths = [max(map(len, column)) for column in zip(self.columns, *self.cells, strict=True)]
        lines = _lines(widths, width - indent)
        yield from (Padding(_aligned(self.columns, widths, line), (0, 0, 0, indent)) for line in lines)
        for number, (name, cells) in enumerate(zip(names, self.cells, strict=True), 1):
            yield Padding(Text(f"{number:>{indent - 1}} {name}", overflow="fold"), 0)
            yield from (Padding(_aligned(cells, widths, line), (0, 0, 0, indent)) for line in lines)


def _lines(widths: Sequence[int], room: int) -> list[range]:
    """Which columns stand on which line: as many on each as there is room for."""
    lines, first = [], 0
    while first < len(widths):
        stop = first + 1
        while stop < len(widths) and sum(widths[first : stop + 1]) + _GAP * (stop - first) <= room:
            stop += 1
        lines.append(range(first, stop))
        first = stop
    return lines


def _aligned(cells: Sequence[str], widths: Sequence[int], line: range) -> Text:
    gap = " " * _GAP
    return Text(gap.join(cells[column].rjust(widths[column]) for column in line), no_wrap=True, overflow="ignore")
