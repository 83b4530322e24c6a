"""trainings: models of the work folder -> a table of arms with intervals."""

from typing import Annotated

import typer

from featcache.machine.progress import counted
from featcache.workdir import WORK, Workdir
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, open_data, option_of
from heads.config import BlendConfig
from heads.recipes.jobs import Job, Outcome


@command()
def trainings(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    models: Annotated[str, option_of(BlendConfig, "models")] = BlendConfig.models,
    exclude: Annotated[str, option_of(BlendConfig, "exclude")] = BlendConfig.exclude,
    reference: Annotated[
        str,
        typer.Option(
            help="Arm to compare with, by its name in the table: a pattern such as '*smooth_l1, refitted'.",
            rich_help_panel="Blend",
            show_default="the first, with the same kind of heads",
        ),
    ] = "",
) -> Job:
    """Compare trainings: models that differ in the training's seed alone are one arm, with intervals over seeds."""

    def call() -> Outcome:
        subjects = open_data(data, noise_ceiling, work).select(subject)
        from heads.blend.trainings import compare_trainings
        from heads.report.arms import arm_table
        from heads.report.printing import print_table

        arms = compare_trainings(subjects, work, models, exclude, reference)
        print_table(arm_table(arms))
        folder = Workdir(work).trainings
        return Outcome(
            f"{counted(len(arms), 'arm')}, in {folder}",
            {"arms": [arm.to_json() for arm in arms], "folder": str(folder)},
        )

    return Job(None, call)
