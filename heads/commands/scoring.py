"""scores: prediction stores -> scores of ROIs with intervals, and of every vertex with p values; tables and maps."""

from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.machine.progress import counted
from featcache.workdir import WORK
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, open_data, option_of, read
from heads.config import BlendConfig, ScoresConfig
from heads.recipes.jobs import Job, Outcome


@command(ScoresConfig)
def scores(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    models: Annotated[str, option_of(BlendConfig, "models")] = BlendConfig.models,
    exclude: Annotated[str, option_of(BlendConfig, "exclude")] = BlendConfig.exclude,
    csv: Annotated[
        Path | None, typer.Option(help="Write a row for each vertex and model as CSV.", rich_help_panel="Output")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Write the same table as Parquet.", rich_help_panel="Output")
    ] = None,
    maps_to: Annotated[
        Path | None,
        typer.Option(
            help="Folder for maps of the brain: GIFTI on fsaverage, NIfTI of imported volumes.",
            rich_help_panel="Output",
        ),
    ] = None,
    **options: Any,
) -> Job:
    """Score all models and the last blend: ROIs with intervals, vertices with p values and false discovery rate."""
    config = read(ScoresConfig, options, models=models, exclude=exclude)

    def call() -> Outcome:
        subjects = open_data(data, noise_ceiling, work).select(subject)
        from featcache.machine.extra import needed
        from heads.report.printing import print_table
        from heads.report.statistics import difference_table, interval_table, scores_as_json
        from heads.statistics.maps import write_maps
        from heads.statistics.run import score_models
        from heads.statistics.table import write_csv, write_parquet

        if parquet is not None:  # said before minutes of work, not after
            needed("pyarrow", "Parquet files")
        if maps_to is not None:
            needed("nibabel", "brain maps")
        done = score_models(subjects, config, work)
        print_table(interval_table(done))
        if done.against:
            print_table(difference_table(done))
        written = []
        for path, write in ((csv, write_csv), (parquet, write_parquet)):
            if path is not None:
                write(path, done.vertices)
                written.append(str(path))
        if maps_to is not None:
            n_maps = len(write_maps(maps_to, subjects, done.vertices))
            written.append(f"{n_maps} maps in {maps_to}")
        n_models = len({one.model for one in done.vertices})
        wrote = f"; wrote {', '.join(written)}" if written else ""
        return Outcome(f"{counted(n_models, 'model')} in {work}{wrote}", scores_as_json(done) | {"written": written})

    return Job(config, call)
