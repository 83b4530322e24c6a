"""import and add-features: files of any lab -> a dataset of the work folder, and features that were made elsewhere."""

from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.config import ExtractConfig, MadeConfig, usual_workers
from featcache.dataset.importing.config import ImportConfig
from featcache.machine.progress import counted
from featcache.workdir import WORK, Workdir
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, open_data, option_of, read
from heads.recipes.jobs import Job, Outcome


@command(ImportConfig)
def import_files(
    work: Work = WORK,
    workers: Annotated[int, option_of(ExtractConfig, "workers")] = usual_workers(),
    **options: Any,
) -> Job:
    """Bring images and responses of any kind into the work folder; the other commands then use them."""
    config = read(ImportConfig, options)

    def call() -> Outcome:
        from featcache.dataset.importing.run import import_files as run
        from featcache.machine.progress import say

        done = run(config, work, workers)
        for note in done.notes:
            say(note)
        result = {
            "subject": done.name,
            "folder": str(done.folder),
            "images": done.n_train,
            "test_images": done.n_test,
            "trials": done.n_trials,
            "vertices": dict(done.n_vertices),
            "notes": list(done.notes),
            "new": done.new,
        }
        test = f" and {done.n_test:,} test images" if done.n_test else ""
        surfaces = ", ".join(f"{n:,} vertices of {surface}" for surface, n in done.n_vertices.items())
        message = f"{done.name}: {done.n_train:,} training images{test}, {done.n_trials:,} trials, {surfaces}"
        return Outcome(f"{message}; {'wrote' if done.new else 'already in'} {done.folder}", result)

    return Job(config, call)


@command()
def add_features(
    features: Annotated[
        str, typer.Argument(help="File of the features, a row for each image; 'FILE:ARRAY' for one array of it.")
    ],
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    ids: Annotated[
        Path | None,
        typer.Option(
            help="File with the image of each row, by id or by file name: a table, or an array of ids.",
            rich_help_panel="Data",
            show_default="column 'id' of the features",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What to call them.", rich_help_panel="Data", show_default="the name of the file"),
    ] = None,
) -> Job:
    """Take features that were made elsewhere; heads are fitted to them as to those of a backbone."""

    config = MadeConfig(features=features, ids=ids, name=name or _stem(features))

    def call() -> Outcome:
        subjects = open_data(data, noise_ceiling, work).select(subject)
        from featcache.cache.elsewhere import add_features as run

        done = run(subjects, config, work)
        n_new = sum(store.n_new for store in done)
        stores = [
            {"subject": store.subject, "path": str(store.path), "images": store.n_images, "new": store.n_new}
            for store in done
        ]
        made = f"{counted(len(done), 'store')}, features of {counted(n_new, 'new image')}"
        return Outcome(f"{made} in {Workdir(work).features}", {"stores": stores})

    return Job(config, call)


def _stem(features: str) -> str:
    """Name of a file without its ending and without the array in it."""
    from featcache.formats.lazy import Place

    return Place.of(features).path.stem
