"""report: everything that a work folder has, as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from featcache.machine.progress import size_of
from featcache.workdir import WORK
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, open_data
from heads.recipes.jobs import Job, Outcome


@command()
def report(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    out: Annotated[
        Path | None,
        typer.Option(help="File to write.", rich_help_panel="Output", show_default="report.html in the work folder"),
    ] = None,
    no_images: Annotated[
        bool,
        typer.Option(
            "--no-images",
            help="Leave out the small pictures of training images, which the terms of a dataset may forbid to hand on.",
            rich_help_panel="Output",
        ),
    ] = False,
) -> Job:
    """Write one HTML page of scores, maps, learning curves, images and what was run; it opens without a network."""

    def call() -> Outcome:
        dataset = open_data(data, noise_ceiling, work)
        from dataclasses import replace

        from heads.page.run import write_report

        page = write_report(replace(dataset, subjects=dataset.select(subject)), work, out, not no_images)
        absent = f", without {', '.join(page.missing)}" if page.missing else ""
        result = {
            "path": str(page.path),
            "bytes": page.n_bytes,
            "sections": list(page.sections),
            "missing": dict(page.missing),
        }
        return Outcome(f"wrote {page.path}, {size_of(page.n_bytes)}{absent}", result, opens=page.path)

    return Job(None, call)
