"""The table of what the steps of a recipe are expected to take."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from featcache.machine.progress import size_of

if TYPE_CHECKING:  # a table must not load what plans
    from heads.recipes.plan import Estimate

_COSTS = ("memory", "disk")
_DEVICE = "device"  # the memory of one, where there is a device


def plan_table(estimates: "Sequence[Estimate]") -> Table:
    """A row for each step, and one for all of them."""
    table = Table(title="Expected memory and disk, with an empty work folder", title_justify="left")
    table.caption_justify = "left"
    columns = ("memory of device" if name == _DEVICE else name for name in _names(estimates))
    for column in ("step", "command", *columns):
        table.add_column(column, justify="left" if column == "command" else "right", overflow="fold")
    for number, estimate in enumerate(estimates, 1):
        sizes = map(_size, _costs(estimate, _names(estimates)).values())
        table.add_row(str(estimate.step.number), estimate.step.described, *sizes, end_section=number == len(estimates))
    table.add_row("", "all", *map(_size, _total(estimates).values()))
    table.caption = "memory of all steps: that of the largest. disk of all steps: their sum. -: not estimated"
    return table


def plan_as_json(estimates: "Sequence[Estimate]") -> dict[str, Any]:
    """{plan: [{step, command, options, memory, disk}], total: {memory, disk}}, in bytes; null where not estimated.

    Where a step computes on a CUDA device, there is `device` as well, the memory of it.
    """
    steps = [
        {"step": one.step.number, "command": one.step.command, "options": dict(one.step.own)}
        | _costs(one, _names(estimates))
        for one in estimates
    ]
    return {"plan": steps, "total": _total(estimates)}


def _names(estimates: "Sequence[Estimate]") -> tuple[str, ...]:
    """What is estimated of these steps."""
    return (*_COSTS, _DEVICE) if any(one.device is not None for one in estimates) else _COSTS


def _costs(estimate: "Estimate", names: "Sequence[str]") -> dict[str, float | None]:
    return {name: getattr(estimate, name) for name in names}


def _total(estimates: "Sequence[Estimate]") -> dict[str, float]:
    """The memory of the largest step, and the disk of all of them."""
    costs = {name: [getattr(one, name) or 0.0 for one in estimates] for name in _names(estimates)}
    return {name: sum(values) if name == "disk" else max(values) for name, values in costs.items()}


def _size(n_bytes: float | None) -> str:
    return "-" if n_bytes is None else size_of(n_bytes)
