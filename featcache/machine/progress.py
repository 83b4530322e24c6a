"""Messages and progress bars of a running stage. They go to stderr, so that stdout holds nothing but results."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Of several processes that train together, only the first prints.
_stderr = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0", highlight=False, soft_wrap=True, markup=False)

_STATUS_SECONDS = 10
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


def counted(n: int, what: str) -> str:
    """A number of things, with the name of one: '1 store', '1,200 stores'."""
    return f"{n:,} {what}{'s' * (n != 1)}"


class _Rate(ProgressColumn):
    """Units a second, of bars that have a unit."""

    def render(self, task: Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        return Text("" if speed is None or not unit else f"{speed:.1f} {unit}/s")


class _Time(TimeRemainingColumn):
    """The time that is left; of a bar over several stages, which take very different times, the time that is gone."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["unit"] else TimeElapsedColumn().render(task)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(_BAR), MofNCompleteColumn(), _Rate(), _Time())
    # what is printed on stdout goes above the bars in a terminal, and stays on stdout where that is a file
    return Progress(*columns, console=_stderr, redirect_stdout=sys.stdout.isatty())


def shortened(text: str, room: int) -> str:
    """Text of at most so many letters, cut in its middle: the beginning and, more of it, the end are kept.

    Of 'subj01 tf_efficientnet_lite0@224' the end tells it from others: 'subj01 ...t_lite0@224'.
    """
    if len(text) <= room:
        return text
    first = (room - 1) // 3
    return f"{text[:first]}…{text[len(text) - (room - 1 - first) :]}"


_display: list[Progress] = []  # the one that is shown: bars of a stage inside another's are lines of it


@contextmanager
def _bar(description: str, total: int | None, unit: str, done: int = 0) -> Iterator[tuple[Progress, TaskID]]:
    """A line of the display, which is made where there is none; in a file or a pipe, a line at the end."""
    progress = _display[0] if _display else _progress()
    room = max(_stderr.width - _NUMBERS, 12)  # the numbers matter more than the middle of a name
    task = progress.add_task(shortened(description, room), total=total, completed=done, unit=unit)
    if _display:
        try:
            yield progress, task
        finally:
            progress.remove_task(task)
    elif _stderr.is_terminal:
        _display.append(progress)
        try:
            with progress:
                yield progress, task
        finally:
            _display.clear()
    else:
        try:
            yield progress, task
        finally:
            progress.stop_task(task)
            _stderr.print(progress)


@contextmanager
def bar(description: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with a rate; yields the function to call with the number of units just done."""
    with _bar(description, total, unit, done) as (progress, task):
        yield lambda n: progress.advance(task, n)


@contextmanager
def steps(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar for work that counts by itself; yields the function to call with (done, total)."""
    with _bar(description, None, unit) as (progress, task):
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Show one line that changes; yields the function to call with its text. In a file, a line when it has changed.

    There, no more than one in _STATUS_SECONDS seconds.
    """
    shown, at = "", float(-_STATUS_SECONDS)
    if _stderr.is_terminal and not _stderr.quiet:
        with _stderr.status("") as line:
            yield line.update
        return

    def show(text: str) -> None:
        nonlocal shown, at
        if text != shown and time.monotonic() - at >= _STATUS_SECONDS:
            shown, at = text, time.monotonic()
            say(text)

    yield show


@contextmanager
def overall(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show one bar over several stages, above the bars of each; yields the function to call when a stage is done.

    In a terminal alone: in a file, the lines of the stages say it.
    """
    if not _stderr.is_terminal:
        yield lambda: None
        return
    with _bar(description, total, "") as (progress, task):
        yield lambda: progress.advance(task)
