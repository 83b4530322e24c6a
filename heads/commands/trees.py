"""simulate and check: a challenge tree made, and one looked through."""

from typing import Annotated

import typer

from featcache.config import ExtractConfig
from heads.commands.options import DATA, AsJson, Ceiling, Data, existing
from heads.recipes.steps import Job, Outcome


def simulate(
    data: Data = DATA,
    full: Annotated[
        bool, typer.Option("--full", help="The real challenge's counts: 73,000 images, 39,548 vertices.")
    ] = False,
    subjects: Annotated[int, typer.Option(help="Number of subjects.")] = 8,
    images: Annotated[int, typer.Option(help="Training images of a subject.")] = 200,
    test_images: Annotated[int, typer.Option(help="Test images of a subject.")] = 40,
    shared: Annotated[int, typer.Option(help="Training images that all subjects saw.")] = 50,
    vertices: Annotated[int, typer.Option(help="Vertices of both hemispheres together.")] = 989,
    size: Annotated[int, typer.Option(help="Pixels on a side of an image.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one a core.")] = None,
    as_json: AsJson = False,
) -> Job:
    """Write a challenge tree whose ground truth is known."""
    from featcache.machine.progress import steps
    from featcache.simulate import SimulateConfig
    from featcache.simulate import simulate as run

    left = round(vertices * 19_004 / 39_548)
    config = (
        SimulateConfig.full(seed=seed, workers=workers)
        if full
        else SimulateConfig(
            n_subjects=subjects,
            n_train=images,
            n_test=test_images,
            n_shared=shared,
            n_vertices=(left, vertices - left),
            image_size=size,
            seed=seed,
            workers=workers,
        )
    )

    def call() -> Outcome:
        with steps("simulate", "steps") as update:
            run(config, data, update)
        return Outcome(f"wrote {data}", {"data": str(data)})

    return Job(config, call, as_json, is_done=data.is_dir)


def check(
    data: Data = DATA,
    noise_ceiling: Ceiling = None,
    workers: Annotated[int, typer.Option(help="Threads that decode images.")] = ExtractConfig().workers,
    as_json: AsJson = False,
) -> Job:
    """List everything that is wrong with a challenge tree."""

    def call() -> Outcome:
        from featcache.dataset.algonauts import deep_faults, scan_tree
        from featcache.machine.progress import bar, say

        challenge, faults = scan_tree(existing(data), noise_ceiling)
        total = sum(len(subject.image_paths) for subject in challenge.subjects)
        with bar("check", total, "images") as advance:
            faults += deep_faults(challenge, workers, advance)
        for note in challenge.notes:
            say(note)
        for fault in faults:
            typer.echo(str(fault))
        result = {"data": str(data), "faults": [str(fault) for fault in faults], "notes": challenge.notes}
        found = f"{data}: {len(challenge.subjects)} subjects, {total} images, {len(faults)} faults"
        return Outcome(found, result, code=1 if faults else 0)

    return Job(None, call, as_json)
