"""verify: whether the files of a work folder are as they were written."""

from collections import Counter
from typing import Annotated

import typer

from featcache.config import usual_workers
from featcache.errors import StoreError
from featcache.machine.progress import counted, say, size_of
from featcache.workdir import WORK
from heads.commands.options import Work, command
from heads.recipes.jobs import Job, Outcome

_MOST_SAID = 20  # damaged files that are named one by one


@command(writes=False)
def verify(
    work: Work = WORK,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Take away what is damaged, then run the commands of the journal that make it again. Nothing else is "
            "computed again.",
            rich_help_panel="Output",
        ),
    ] = False,
    workers: Annotated[
        int, typer.Option(help="Threads that read files.", rich_help_panel="Machine", min=1)
    ] = usual_workers(),
) -> Job:
    """Read every file of the work folder and hold it against its digest; exit code 1 where one is damaged."""

    def call() -> Outcome:
        if not work.is_dir():
            raise StoreError(work, expected="a work folder", found="no such folder", remedy="name one with --work")
        from heads.verify.findings import verify as look_through
        from heads.verify.repair import lines_for, run_again, take_away

        findings = look_through(work, workers)
        damaged = [finding for finding in findings if finding.fault]
        for finding in damaged[:_MOST_SAID]:
            say(f"{finding.kind}: {finding.path}: {finding.fault}")
        if len(damaged) > _MOST_SAID:
            say(f"and {len(damaged) - _MOST_SAID} more")
        n_bytes, unsealed = sum(finding.n_bytes for finding in findings), sum(not one.sealed for one in findings)
        result = {
            "files": len(findings),
            "bytes": n_bytes,
            "without_digest": unsealed,
            "kinds": dict(Counter(finding.kind for finding in findings)),
            "damaged": [{"kind": one.kind, "path": str(one.path), "fault": one.fault} for one in damaged],
        }
        partly = list(dict.fromkeys(str(one.owner) for one in findings if not one.complete))
        result["incomplete"] = partly
        for one in partly[:_MOST_SAID]:
            say(f"{one}: not complete; the command that makes it goes on with it")
        earlier = f"; {unsealed} of an earlier version have no digest" if unsealed else ""
        message = f"{work}: {counted(len(findings), 'file')}, {size_of(n_bytes)}, {len(damaged)} damaged{earlier}"
        message += f"; {len(partly)} not complete" if partly else ""
        if not damaged or not repair:
            hint = "; --repair makes them again" if damaged else ""
            return Outcome(message + hint, result, 1 if damaged else 0)
        lines = lines_for(findings, work)
        taken = take_away(findings)
        for line in taken:
            say(line)
        code = run_again(lines)
        again = [" ".join(line.words) for line in lines]
        ended = (
            f"repaired by {len(again)} command{'' if len(again) == 1 else 's'}"
            if code == 0
            else "not repaired, since a command failed"
        )
        return Outcome(f"{message}; {ended}", result | {"taken": taken, "again": again}, code)

    return Job(None, call)
