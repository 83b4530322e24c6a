"""run: a recipe, all of its commands in order."""

from pathlib import Path
from typing import Annotated, cast

import typer
import typer.core

from featcache.config import ExtractConfig
from heads.commands.options import DATA, WORK, AsJson, Ceiling, Data, Device, Subjects, Work, on_command_line
from heads.recipes.steps import Job, Outcome, commands_of, read_recipe, ready, run_steps


def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A file of commands in order, such as recipes/demo.toml.")],
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    device: Device = ExtractConfig.device,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what each step is expected to take, and run nothing.")
    ] = False,
    as_json: AsJson = False,
) -> Job:
    """Run every step of a recipe, or go on where it stopped. Options given here go to every step."""
    for_all = {
        name.replace("_", "-"): context.params[name]
        for name in on_command_line(context)
        if name in ("data", "work", "noise_ceiling", "subject", "device")
    }
    group = cast(typer.core.TyperGroup, context.find_root().command)
    steps = [ready(group, step) for step in read_recipe(recipe, commands_of(group), for_all)]
    from featcache.machine.progress import say
    from heads.recipes.plan import estimates_of, subjects_of

    subjects = subjects_of(steps)

    def show() -> Outcome:
        from heads.report.tables import plan_as_json, plan_table, print_table

        estimates = estimates_of(steps, subjects)
        print_table(plan_table(estimates))
        return Outcome(f"{recipe}: {len(steps)} steps planned, none run", plan_as_json(estimates))

    def call() -> Outcome:
        results, code = run_steps(steps, say)
        return Outcome(f"{recipe}: {len(results)} of {len(steps)} steps", {"steps": results}, code)

    return Job(None, show if plan else call, as_json)
