"""Steps of a recipe whose parts write a number into a file: quick, and with all that can go wrong."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heads.recipes.jobs import Job, Outcome, Part
from heads.recipes.steps import Ready, Step

Act = Callable[[str], None]  # what a part does besides, by its name


def nothing(_: str) -> None:
    """No more than to write its file."""


def parted(
    work: Path, number: int, command: str, names: Mapping[str, Sequence[str]], act: Act = nothing, options: Any = None
) -> Ready:
    """A step with parts. names : {part: its subjects}"""

    def call(name: str) -> Outcome:
        act(name)
        path = work / f"{command}-{name}.txt"
        path.write_text(f"{command} {name}")
        return Outcome(name, {"stores": [{"path": str(path)}], "counts": {name: 1}})

    def parts(without: Any) -> list[Part]:
        return [
            Part(name, tuple(subjects), {"part": name, "options": options}, lambda name=name: call(name))
            for name, subjects in names.items()
            if not set(subjects) & set(without)
        ]

    return _ready(number, command, Job(None, lambda: Outcome("", {}), work=work, parts=parts))


def whole(work: Path, number: int, command: str, act: Act = nothing, code: int = 0) -> Ready:
    """A step without parts."""

    def call() -> Outcome:
        act(command)
        path = work / f"{command}.txt"
        path.write_text(" ".join(sorted(one.name for one in work.glob("*-*.txt"))))
        return Outcome(f"{command} says", {"file": str(path)}, code)

    return _ready(number, command, Job(None, call, work=work))


def _ready(number: int, command: str, job: Job) -> Ready:
    return Ready(Step(Path("recipe.toml"), number, command), job, {"work": job.work})
