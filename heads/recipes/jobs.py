"""What commands hand out: a job, which is a command line that was read and not yet run, and its outcome."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command leaves: one line for a person, a JSON object for a program, and an exit code.

    opens : the file that a person would open now, such as a report
    """

    message: str
    result: dict[str, Any]
    code: int = 0
    opens: Path | None = None


@dataclass(frozen=True)
class Job:
    """A command line whose options are read and whose settings are checked. Nothing is run before `call`.

    config : the settings that the command runs with; None where it has none
    call : runs the command
    as_json : whether the last line on stdout is to be the outcome as JSON
    quiet : whether progress on stderr is to be left out
    is_done : whether there is nothing to do, for a command that would not find out by itself
    work : the work folder whose journal gets a record of the command; None: none is kept of it
    line : the command line, as its words
    """

    config: Any
    call: Callable[[], Outcome]
    as_json: bool = False
    quiet: bool = False
    is_done: Callable[[], bool] = lambda: False
    work: Path | None = None
    line: Sequence[str] = ()


def usage_fault(error: Exception) -> str | None:
    """The message of an error that says that a command line cannot be read; None for any other error.

    typer raises exceptions of a copy of click that it carries inside itself, whose classes have no public name in every
    release. `format_message` is what they have in all of them, and no other exception has it.
    """
    message = getattr(error, "format_message", None)
    return None if message is None else str(message())
