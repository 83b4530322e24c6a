"""simulate and check: a dataset that is made up, and one that is looked through."""

from pathlib import Path
from typing import Annotated

import typer

from featcache.config import ExtractConfig, usual_workers
from featcache.errors import ConfigError
from featcache.machine.progress import counted
from featcache.workdir import CHALLENGE, WORK, data_folder
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, existing, option_of
from heads.recipes.jobs import Job, Outcome

_SHARED = 50  # images, by default, that all simulated subjects saw
_SIMULATED = {  # {setting: the option that it is called}
    "n_subjects": "--subjects",
    "n_train": "--images",
    "n_test": "--test-images",
    "n_shared": "--shared",
    "n_vertices": "--vertices, of one hemisphere",
    "n_image_ids": "--subjects, --images and --test-images together",
    "image_size": "--image-size",
}


@command(old={"size": "image_size"})
def simulate(
    data: Annotated[
        Path,
        typer.Option("--data", envvar="FEATCACHE_DATA", help="Folder to write to.", rich_help_panel="Data"),
    ] = CHALLENGE,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="The size of the challenge: 73,000 images, 39,548 vertices. Other counts are ignored.",
            rich_help_panel="Data",
        ),
    ] = False,
    subjects: Annotated[int, typer.Option(help="Number of subjects.", rich_help_panel="Data")] = 8,
    images: Annotated[int, typer.Option(help="Training images of each subject.", rich_help_panel="Data")] = 200,
    test_images: Annotated[int, typer.Option(help="Test images of each subject.", rich_help_panel="Data")] = 40,
    shared: Annotated[
        int | None,
        typer.Option(
            help="Training images that all subjects saw.",
            rich_help_panel="Data",
            show_default=f"{_SHARED}, or all of fewer",
        ),
    ] = None,
    vertices: Annotated[
        int, typer.Option(help="Vertices of each subject, in both hemispheres.", rich_help_panel="Data")
    ] = 989,
    image_size: Annotated[int, typer.Option(help="Pixels on a side of an image.", rich_help_panel="Data")] = 128,
    seed: Annotated[
        int, typer.Option(help="Seed of everything random; the same seed gives the same bytes.", rich_help_panel="Data")
    ] = 0,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that draw images.", rich_help_panel="Machine", show_default="one a core"),
    ] = None,
) -> Job:
    """Write a small dataset with known true responses, to try all commands on."""
    from featcache.machine.progress import steps
    from featcache.simulate import SimulateConfig
    from featcache.simulate import simulate as run

    left = round(vertices * 19_004 / 39_548)
    try:
        config = (
            SimulateConfig.full(seed=seed, workers=workers)
            if full
            else SimulateConfig(
                n_subjects=subjects,
                n_train=images,
                n_test=test_images,
                n_shared=min(_SHARED, images) if shared is None else shared,
                n_vertices=(left, vertices - left),
                image_size=image_size,
                seed=seed,
                workers=workers,
            )
        )
    except ConfigError as error:
        where = _SIMULATED.get(error.where, f"--{error.where}")
        remedy = "change it, or the counts that bound it"
        raise ConfigError(where, expected=error.expected, found=error.found, remedy=remedy) from error

    def call() -> Outcome:
        with steps("simulate", "steps") as update:
            run(config, data, update)
        return Outcome(f"wrote {data}", {"data": str(data)})

    return Job(config, call, is_done=data.is_dir)


@command(writes=False)
def check(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    workers: Annotated[int, option_of(ExtractConfig, "workers")] = usual_workers(),
) -> Job:
    """List everything that is wrong with a dataset."""

    def call() -> Outcome:
        from featcache.dataset.open import deep_faults, deep_notes, of_subjects, scan_dataset
        from featcache.machine.progress import bar, say

        folder = existing(data_folder(data, work))
        dataset, faults = of_subjects(subject, *scan_dataset(folder, noise_ceiling))
        total = sum(len(subject.image_sources) for subject in dataset.subjects)
        with bar("check", total, "images") as advance:
            faults += deep_faults(dataset, work, workers, advance)
        notes = [*dataset.notes, *deep_notes(dataset, work)]
        for note in notes:
            say(note)
        for fault in faults:
            typer.echo(str(fault))
        result = {"data": str(folder), "faults": [str(fault) for fault in faults], "notes": notes}
        counts = (("subject", len(dataset.subjects)), ("image", total), ("fault", len(faults)))
        message = f"{folder}: " + ", ".join(counted(n, what) for what, n in counts)
        return Outcome(message, result, code=1 if faults else 0)

    return Job(None, call)
