"""Messages and progress bars of a running stage. They go to stderr, so that stdout holds nothing but results."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# Of several processes that train together, only the first prints.
_stderr = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0", highlight=False, soft_wrap=True, markup=False)

_BAR = 16  # columns of the bar itself
_NUMBERS = _BAR + 40  # columns of the bar with counts, rate and time


def say(message: str) -> None:
    """Print one line on stderr."""
    _stderr.print(message)


@contextmanager
def silenced(quiet: bool) -> Iterator[None]:
    """Print no messages and no bars while the block runs, if `quiet`."""
    before = _stderr.quiet
    _stderr.quiet = before or quiet
    try:
        yield
    finally:
        _stderr.quiet = before


def size_of(n_bytes: float) -> str:
    """Number of bytes in the unit that suits it, powers of 1000: '1.2 MB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")


def _progress(unit: str) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=_stderr)


def _short(description: str) -> str:
    """Description cut to leave room for the numbers, which matter more than the end of a name."""
    room = max(_stderr.width - _NUMBERS, 12)
    return description if len(description) <= room else f"{description[: room - 1]}…"


@contextmanager
def bar(description: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with a rate; yields the function to call with the number of units just done."""
    with _progress(unit) as progress:
        task = progress.add_task(_short(description), total=total, completed=done)
        yield lambda n: progress.advance(task, n)


@contextmanager
def steps(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar for work that counts by itself; yields the function to call with (done, total)."""
    with _progress(unit) as progress:
        task = progress.add_task(_short(description), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
