"""Command line: options -> config -> one call -> one result line. Heavy imports wait until a command runs.

A command reads its options, builds its settings and gives back a Job, which `run` does. So a recipe is checked
whole, by the same parsers and settings, before the first of its steps is done.
"""

import json
import os
import sys
import time
from collections.abc import Sequence

import typer

from featcache.errors import FeatcacheError
from heads.commands import blending, features, fitting, running, training, trees
from heads.recipes.steps import Job, UsageError

app = typer.Typer(
    help="Predict responses of the visual cortex from cached image features: extract once, refit heads, blend.",
    rich_markup_mode=None,  # plain help answers in half the time
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(trees.simulate)
app.command()(trees.check)
app.command("pretrain", help="Train a backbone on all subjects at once: stage 1.")(training.pretrain)
app.command("finetune", help="Train a backbone on each subject alone: stage 2.")(training.finetune)
app.command()(features.layers)
app.command()(features.extract)
app.command()(fitting.fit_heads)
app.command()(fitting.maps)
app.command()(blending.models)
app.command()(blending.blend)
app.command()(running.run)


def _do(job: Job) -> int:
    """The exit code of a command that is done, and the one line that it ends with, from one of its processes."""
    began = time.perf_counter()
    outcome = job.call()
    if os.environ.get("RANK", "0") == "0":
        seconds = round(time.perf_counter() - began, 2)
        typer.echo(f"{outcome.message} ({seconds:.1f} s)")
        if job.as_json:
            typer.echo(json.dumps(outcome.result | {"seconds": seconds}, allow_nan=False))
    return outcome.code


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _interrupted() -> int:
    return _fail("interrupted; what was committed is kept, and the same command goes on from there", 130)


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command; a user's mistake is one line on stderr and code 1."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        asked = app(args=given, standalone_mode=False)
        code = _do(asked) if isinstance(asked, Job) else asked or 0
        return _interrupted() if code == 130 else code  # typer may turn the interruption into its exit code
    except FeatcacheError as error:
        return _fail(str(error))
    except UsageError as error:
        return _fail(f"{getattr(error, 'format_message', error.__str__)()}; --help lists the options")
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except MemoryError as error:
        return _fail(f"expected enough memory; found none left ({error}); fit fewer subjects or vertices at a time")
    except RuntimeError as error:
        if "memory" not in str(error):  # torch has no class of its own for it on a CPU
            raise
        first = str(error).splitlines()[0]
        return _fail(
            f"expected enough memory; found: {first}; lower --batch-size, or choose one --subject or --device cpu"
        )
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or "a file"
        return _fail(
            f"{where}: expected to read and write there; found: {error.strerror or error}; "
            "make room or choose another --work; what was committed is intact"
        )


def main() -> None:
    try:
        code = run()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever reads has what they wanted, as `head` does: nothing went wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    os._exit(code) if code == 130 else sys.exit(code)  # threads that still decode must not hold up an interruption


if __name__ == "__main__":
    main()
