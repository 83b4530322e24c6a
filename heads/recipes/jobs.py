"""What commands hand out: a job, which is a command line that was read and not yet run, and its outcome."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heads.config import EngineConfig


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
class Part:
    """A piece of a job, which shares nothing but files with its other pieces. All of them make what the job makes.

    name : what it is of, in words, the subject first: 'subj01 fold 2'
    subjects : whose results it makes
    inputs : what decides its results, as JSON has it
    call : does it
    words : {option: value} that have the command do this piece alone; {} where there are none
    """

    name: str
    subjects: tuple[str, ...]
    inputs: Mapping[str, Any]
    call: Callable[[], Outcome]
    words: Mapping[str, str] = field(default_factory=dict)


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
    parts : gives its pieces, but those of some subjects; None where it is one piece. What they read must be there
    engine : where its pieces are done; None: all of it here, as one
    steps : of a recipe, its steps, each `heads.recipes.steps.Ready`
    """

    config: Any
    call: Callable[[], Outcome]
    as_json: bool = False
    quiet: bool = False
    is_done: Callable[[], bool] = lambda: False
    work: Path | None = None
    line: Sequence[str] = ()
    parts: Callable[[Collection[str]], list[Part]] | None = None
    engine: EngineConfig | None = None
    steps: Sequence[Any] = ()


def usage_fault(error: Exception) -> str | None:
    """The message of an error that says that a command line cannot be read; None for any other error.

    typer raises exceptions of a copy of click that it carries inside itself, whose classes have no public name in every
    release. `format_message` is what they have in all of them, and no other exception has it.
    """
    message = getattr(error, "format_message", None)
    return None if message is None else str(message())
