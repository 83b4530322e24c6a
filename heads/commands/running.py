"""run and units: a recipe, all of its commands in order, and the units that they consist of."""

import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
import typer.core

from featcache.config import BackboneConfig, ExtractConfig
from featcache.errors import ConfigError
from featcache.machine.progress import counted
from featcache.workdir import WORK
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, on_command_line, option_of
from heads.config import STAGES, EngineConfig
from heads.config.engines import ENGINE_PANEL
from heads.recipes.jobs import Job, Outcome
from heads.recipes.steps import Ready, Step, commands_of, described, read_recipe, ready, run_steps, work_of

_FOR_EVERY_STEP = ("data", "work", "noise_ceiling", "subject", "device", "backbone", "fold")


Recipe = Annotated[Path, typer.Argument(help="TOML file that lists commands in order, such as recipes/demo.toml.")]
Device = Annotated[str, option_of(ExtractConfig, "device")]
Backbone = Annotated[str | None, option_of(BackboneConfig, "name")]
Fold = Annotated[str, typer.Option(help="The fold that trainings hold out, or all.", rich_help_panel="Data")]
Seeds = Annotated[
    int,
    typer.Option(
        help="Train with the seeds 0 to N-1, in every step of pretrain and finetune that gives no seed. 0: as the "
        "recipe says.",
        rich_help_panel="Training",
        min=0,
    ),
]


@command(writes=False, has_parts=True)
def run(
    context: typer.Context,
    recipe: Recipe,
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    device: Device = ExtractConfig.device,
    backbone: Backbone = BackboneConfig.name,
    fold: Fold = "all",
    seeds: Seeds = 0,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print the memory and disk that each step will take, and run nothing.",
            rich_help_panel="Output",
        ),
    ] = False,
    open_at_end: Annotated[
        bool,
        typer.Option(
            "--open",
            help="Open the file that the recipe ends with, such as a report, in a browser, if this is a terminal with "
            "a display.",
            rich_help_panel="Output",
        ),
    ] = False,
) -> Job:
    """Run all steps of a recipe, or go on where it stopped. Options of data, backbone and device are for every step."""
    steps = _steps(context, recipe, seeds)
    about = described(recipe)
    from featcache.machine.progress import overall, say
    from heads.recipes.plan import estimates_of, subjects_of

    subjects = subjects_of(steps)

    def show() -> Outcome:
        from heads.report.plans import plan_as_json, plan_table
        from heads.report.printing import print_table

        estimates = estimates_of(steps, subjects)
        print_table(plan_table(estimates))
        return Outcome(f"{recipe}: {len(steps)} steps planned, none run", plan_as_json(estimates))

    def call() -> Outcome:
        say(f"{about} ({len(steps)} steps)")
        with overall("all steps", len(steps)) as advance:
            ran = run_steps(steps, say, advance)
        if ran.opens is not None and open_at_end and has_display():
            webbrowser.open(ran.opens.absolute().as_uri())
        message = f"{recipe}: {len(ran.results)} of {len(steps)} steps"
        return Outcome(message, {"steps": list(ran.results)}, ran.code, ran.opens)

    return Job(None, show if plan else call, steps=() if plan else steps)


@command(writes=False)
def units(
    context: typer.Context,
    recipe: Recipe,
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    device: Device = ExtractConfig.device,
    backbone: Backbone = BackboneConfig.name,
    fold: Fold = "all",
    seeds: Seeds = 0,
    attempts: Annotated[int, option_of(EngineConfig, "attempts")] = EngineConfig.attempts,
    lost_after: Annotated[float, option_of(EngineConfig, "lost_after")] = EngineConfig.lost_after,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry",
            help="Have units that failed tried again by the workers that there are.",
            rich_help_panel=ENGINE_PANEL,
        ),
    ] = False,
) -> Job:
    """List the units of a recipe, which --engine shares out: what each needs and makes, and how far it is."""
    steps = _steps(context, recipe, seeds)

    def call() -> Outcome:
        from heads.recipes.plan import estimates_of, subjects_of
        from heads.report.printing import print_table
        from heads.report.units import counted_states, unit_table
        from heads.units.listing import forget_failures, list_units, listed_as_json

        folder = work_of(steps)
        n = forget_failures(steps, folder) if retry else 0
        listed = list_units(steps, folder, estimates_of(steps, subjects_of(steps)), attempts, lost_after)
        print_table(unit_table(listed))
        again = f"; {counted(n, 'unit')} to be tried again" if retry else ""
        return Outcome(f"{recipe}: {counted_states(listed)}{again}", {"units": listed_as_json(listed), "retried": n})

    return Job(None, call)


def _steps(context: typer.Context, recipe: Path, seeds: int) -> list[Ready]:
    """The steps of a recipe, with the options of the command line that are for all of them."""
    for_all = {
        name.replace("_", "-"): context.params[name] for name in on_command_line(context) if name in _FOR_EVERY_STEP
    }
    group = cast(typer.core.TyperGroup, context.find_root().command)
    trainings = {stage: {"seed": list(range(seeds))} for stage in STAGES} if seeds else {}
    commands = commands_of(group)
    if seeds:
        _refuse_without_training(read_recipe(recipe, commands, for_all), recipe)
    return [ready(group, step) for step in read_recipe(recipe, commands, for_all, trainings)]


def has_display() -> bool:
    """Whether a person sits at this terminal and has a display to look at."""
    windows = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))
    return windows and sys.stdout.isatty()


def _refuse_without_training(steps: Sequence[Step], recipe: Path) -> None:
    """Raise ConfigError where no training of a recipe is left for --seeds to give a seed to."""
    if all("seed" in step.own for step in steps if step.command in STAGES):
        raise ConfigError(
            "--seeds",
            expected=f"a step of {' or '.join(STAGES)} that gives no seed",
            found=f"none in {recipe}",
            remedy="leave --seeds out",
        )
