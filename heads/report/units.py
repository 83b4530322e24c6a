"""The table of the units of a recipe."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from featcache.machine.progress import size_of

if TYPE_CHECKING:
    from heads.units.listing import Listed

_MOST_ROWS = 200  # of a table that a person reads; --json has all


def unit_table(listed: "Sequence[Listed]") -> Table:
    """A row for each unit; of very many, those that are not done come first, and the others are counted."""
    table = Table(title="Units", title_justify="left", caption_justify="left")
    table.add_column("step", justify="right")
    for column in ("command", "unit", "state"):
        table.add_column(column, overflow="fold")
    for column in ("memory", "disk"):
        table.add_column(column, justify="right")
    shown = list(listed) if len(listed) <= _MOST_ROWS else [one for one in listed if not one.done][:_MOST_ROWS]
    for one in shown:
        sizes = (
            "-" if one.needs[name] is None else size_of(float(one.needs[name] or 0)) for name in ("memory", "disk")
        )
        state = f"{one.state}, {one.note}" if one.note else one.state
        table.add_row(str(one.step), one.command, one.unit, state, *sizes)
    if len(shown) < len(listed):
        table.caption = f"{len(listed) - len(shown)} more, which --json has"
    return table


def counted_states(listed: "Sequence[Listed]") -> str:
    """How many units are in which state: '12 done, 2 running'."""
    return ", ".join(f"{n} {state}" for state, n in Counter(one.state for one in listed).items())
