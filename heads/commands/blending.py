"""models and blend: predictions -> submission."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.errors import ConfigError
from featcache.machine.progress import counted
from featcache.workdir import WORK, Workdir
from heads.commands.options import (
    DATA,
    Ceiling,
    Data,
    Subjects,
    Work,
    command,
    given,
    on_command_line,
    open_data,
    option_of,
)
from heads.config import BLEND_PRESETS, BlendConfig, blend_preset
from heads.recipes.jobs import Job, Outcome

if TYPE_CHECKING:
    from featcache.dataset.subject import Dataset

_PRESETS = {name: vars(blend_preset(name)) for name in BLEND_PRESETS}


@command(writes=False)
def models(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    models: Annotated[str, option_of(BlendConfig, "models")] = BlendConfig.models,
    exclude: Annotated[str, option_of(BlendConfig, "exclude")] = BlendConfig.exclude,
) -> Job:
    """List the models that can be blended, with their scores fold by fold, and how alike they are."""

    def call() -> Outcome:
        subjects = open_data(data, noise_ceiling, work).select(subject)
        from heads.blend.overview import list_models
        from heads.report.models import model_table
        from heads.report.printing import print_table

        found, accuracy = list_models(subjects, work, models, exclude)
        print_table(model_table(found, accuracy))
        return Outcome(f"{counted(len(found), 'model')} in {work}", {"models": [vars(model) for model in found]})

    return Job(None, call)


@command(BlendConfig, old={"recipe": "preset", "hemispheres": "surfaces"}, presets={BlendConfig: _PRESETS})
def blend(
    context: typer.Context,
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    preset: Annotated[
        str,
        typer.Option(
            help=f"Set of defaults: {', '.join(BLEND_PRESETS)}. best: what measured best. paper: as published.",
            rich_help_panel="Blend",
        ),
    ] = BLEND_PRESETS[0],
    apply: Annotated[
        Path | None,
        typer.Option(
            help="File of a saved blend: apply it to the predictions in the work folder, and learn nothing.",
            rich_help_panel="Blend",
        ),
    ] = None,
    surfaces: Annotated[
        bool,
        typer.Option(
            "--surfaces",
            help="In the table of scores, list the surfaces of each subject and each ROI too.",
            rich_help_panel="Output",
        ),
    ] = False,
    **options: Any,
) -> Job:
    """Average all models with learnt weights, score this blend, and write its predictions of the test images."""
    if apply is not None:
        _refuse_beside_apply(on_command_line(context))
    config = replace(blend_preset(preset), **given(BlendConfig, options))

    def call() -> Outcome:
        dataset = open_data(data, noise_ceiling, work)
        subjects = dataset.select(subject)
        from heads.blend import run as ensemble
        from heads.report.blends import blend_as_json, blend_table, gain_lines
        from heads.report.printing import print_table
        from heads.report.scores import score_table

        if apply is not None:
            return _handed_in(ensemble.apply(dataset, apply, work, subjects), dataset, work, {})
        done = ensemble.blend(dataset, config, work, subjects)
        print_table(blend_table(done, config.label, surfaces))
        for line in gain_lines(done):
            typer.echo(line)
        if done.test:
            print_table(score_table(done.test, "Scores on test images", each_surface=surfaces))
        return _handed_in(done.submission, dataset, work, blend_as_json(done))

    return Job(config, call)


def _refuse_beside_apply(options: Sequence[str]) -> None:
    """Raise ConfigError for options of learning, which a saved blend has no use for."""
    for name in ("preset", "recipe", "method", "per", "models", "exclude", "seed"):
        if name in options:
            raise ConfigError(
                f"--{name}",
                expected="no --apply beside it, which takes a blend as it was saved",
                found="both",
                remedy="leave one of them out",
            )


def _handed_in(submission: Path | None, dataset: "Dataset", work: Path, result: dict[str, Any]) -> Outcome:
    folder = Workdir(work).submission
    files = {"submission": str(submission) if submission else None, "predictions": str(folder)}
    why = "it takes predictions of every subject" if dataset.challenge else ""
    without_zip = f"{folder}, and no {Workdir(work).submission_zip.name}: {why}" if why else str(folder)
    return Outcome(f"wrote {submission or without_zip}", files | result)
