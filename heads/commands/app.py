"""Command line: options -> settings -> one call -> one result line. Heavy imports wait until a command runs.

A command reads its options, builds its settings and gives back a Job, which `run` does. So a recipe is checked
whole, by the same parsers and settings, before the first of its steps is done.
"""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
import typer.main

from featcache import __version__
from featcache.errors import FeatcacheError
from heads.commands import (
    blending,
    comparing,
    features,
    fitting,
    importing,
    predicting,
    reporting,
    running,
    scoring,
    training,
    trainings,
    trees,
    verifying,
)
from heads.commands.options import OneValueCommand
from heads.recipes.jobs import Job, usage_fault

app = typer.Typer(
    help="Predict responses of the visual cortex from cached image features: extract once, refit heads, blend. "
    "The three commands of the first group, in this order, work without any option.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_WRITABLE = "make the folder writable, or choose another --work"
_ROOM = "make room or choose another --work"
_NO_FOLDER = "a file is where a folder is needed, or the other way round: rename it, or choose another --work"
_REMEDIES = {  # of what the system says, by its number; anything else is a disk that fails
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
    errno.EFBIG: "allow larger files (ulimit -f), or choose another --work",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _WRITABLE),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), _NO_FOLDER),
}


def _show_version(wanted: bool) -> None:
    if wanted:
        parts = [f"featcache {__version__}", *(f"{name} {_version_of(name)}" for name in ("torch", "timm"))]
        typer.echo(", ".join(parts))
        raise typer.Exit


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@app.callback(help=app.info.help)
def options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show versions and exit.", is_eager=True, expose_value=False, callback=_show_version
        ),
    ] = False,
) -> None:
    """Options that stand before a command."""


# {group in --help: {command: the function that reads it}}
COMMANDS = {
    "From images to predictions": {
        "extract": features.extract,
        "fit-heads": fitting.fit_heads,
        "blend": blending.blend,
    },
    "From there to new images": {"predict": predicting.predict, "export": predicting.export},
    "Data": {
        "import": importing.import_files,
        "check": trees.check,
        "add-features": importing.add_features,
        "simulate": trees.simulate,
    },
    "Better backbones": {"pretrain": training.pretrain, "finetune": training.finetune},
    "A closer look": {
        "layers": features.layers,
        "models": blending.models,
        "scores": scoring.scores,
        "maps": fitting.maps,
        "compare": comparing.compare,
        "trainings": trainings.trainings,
        "report": reporting.report,
        "verify": verifying.verify,
    },
    "All at once": {"run": running.run, "units": running.units},
}
for group, commands in COMMANDS.items():
    for name, function in commands.items():
        app.command(name, cls=OneValueCommand, rich_help_panel=group, add_help_option=False)(function)


def _do(job: Job) -> int:
    """Run a command and print the one line that it ends with, from one of its processes; its exit code."""
    from featcache.machine.progress import silenced
    from heads.recipes.doing import do

    if job.engine is not None and (job.parts or job.steps):  # a plan has neither
        from heads.commands.working import shared

        job = shared(job, parser())
    began = time.perf_counter()
    with silenced(job.quiet):
        outcome = do(job)
    if os.environ.get("RANK", "0") == "0":
        seconds = round(time.perf_counter() - began, 2)
        typer.echo(f"{outcome.message} ({seconds:.1f} s)")
        if outcome.opens is not None:
            typer.echo(f"to look at it, open {outcome.opens}")
        if job.as_json:
            typer.echo(json.dumps(outcome.result | {"seconds": seconds}, allow_nan=False))
    return outcome.code


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _interrupted() -> int:
    return _fail("interrupted; what was committed is kept, and the same command goes on from there", 130)


@cache
def parser() -> Any:
    """The commands as typer reads them, made once: a program may call `run` many times."""
    return typer.main.get_command(app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code. A user's mistake is one line on stderr and code 1."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        asked = parser()(args=given, standalone_mode=False)
        code: int = _do(replace(asked, line=given)) if isinstance(asked, Job) else asked or 0
        return _interrupted() if code == 130 else code  # typer may turn the interruption into its exit code
    except FeatcacheError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except MemoryError as error:
        return _fail(f"expected enough memory; found none left ({error}); fit fewer subjects or vertices at a time")
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or "a file of this command"
        remedy = _REMEDIES.get(error.errno or 0, "see to its disk and run the command again")
        return _fail(
            f"{where}: expected to read and write there; found: {error.strerror or error}; "
            f"{remedy}; what was committed is intact"
        )
    except Exception as error:
        return _fail(_one_line(error))


def _one_line(error: Exception) -> str:
    """What to say of a command line that cannot be read, or of memory that is full. Raises any other error."""
    if (fault := usage_fault(error)) is not None:
        return f"{fault}; --help lists the options"
    # torch has no class of its own for it on a CPU
    if isinstance(error, RuntimeError) and re.search("allocate memory|out of memory", str(error)):
        first = str(error).splitlines()[0]
        return f"expected enough memory; found: {first}; lower --batch-size, or choose one --subject or --device cpu"
    raise error


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        code = run()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever reads has what they wanted, as `head` does: nothing went wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    os._exit(code) if code == 130 else sys.exit(code)  # threads that still decode must not hold up an interruption
