"""models and blend: predictions -> submission."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.errors import ConfigError
from heads.commands.options import (
    DATA,
    WORK,
    AsJson,
    Ceiling,
    Chosen,
    Data,
    Exclude,
    Subjects,
    Work,
    given,
    on_command_line,
    open_tree,
)
from heads.config import BLEND_PRESETS, BLENDS, LEVELS, BlendConfig, blend_preset
from heads.recipes.steps import Job, Outcome


def models(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    chosen: Chosen = BlendConfig.models,
    exclude: Exclude = BlendConfig.exclude,
    as_json: AsJson = False,
) -> Job:
    """List what there is to blend: each model, its score fold by fold, and how alike models are."""

    def call() -> Outcome:
        subjects = open_tree(data, noise_ceiling).select(subject)
        from heads.blend.overview import list_models
        from heads.report.tables import model_table, print_table

        found, accuracy = list_models(subjects, work, chosen, exclude)
        print_table(model_table(found, accuracy))
        return Outcome(f"{len(found)} models in {work}", {"models": [vars(one) for one in found]})

    return Job(None, call, as_json)


def blend(
    context: typer.Context,
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    preset: Annotated[
        str, typer.Option(help=f"What the next options start from: {', '.join(BLEND_PRESETS)}.")
    ] = BLEND_PRESETS[0],
    method: Annotated[str | None, typer.Option(help=f"{', '.join(BLENDS)}. [{BlendConfig.method}]")] = None,
    per: Annotated[
        str | None, typer.Option(help=f"What has weights of its own: {', '.join(LEVELS)}. [{BlendConfig.per}]")
    ] = None,
    chosen: Chosen = BlendConfig.models,
    exclude: Exclude = BlendConfig.exclude,
    apply: Annotated[
        Path | None, typer.Option(help="Learn nothing: put these predictions through a blend that was saved.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of bags, bootstrap and permutations.")] = BlendConfig.seed,
    as_json: AsJson = False,
) -> Job:
    """Blend every model, score the blend, and write the submission."""
    if apply is not None:
        _refuse_beside_apply(on_command_line(context))
    overrides = given(method=method, per=per)
    config = replace(blend_preset(preset), **overrides, models=chosen, exclude=exclude, seed=seed)

    def call() -> Outcome:
        challenge = open_tree(data, noise_ceiling)
        from heads.blend import run as ensemble
        from heads.report.tables import blend_as_json, gain_lines, print_table, score_table

        if apply is not None:
            return _handed_in(ensemble.apply(challenge, apply, work), work, {})
        done = ensemble.blend(challenge, config, work)
        print_table(score_table(done.scores, f"out-of-fold, blend weights ({config.label}) learnt on other folds"))
        for line in gain_lines(done):
            typer.echo(line)
        return _handed_in(done.submission, work, blend_as_json(done))

    return Job(config, call, as_json)


def _refuse_beside_apply(options: Sequence[str]) -> None:
    """Raise ConfigError for options of learning, which a saved blend has no use for."""
    for name in ("preset", "method", "per", "chosen", "exclude", "seed"):
        if name in options:
            option = "models" if name == "chosen" else name
            raise ConfigError(
                f"--{option}",
                expected="no --apply beside it, which takes a blend as it was saved",
                found="both",
                remedy="leave one of them out",
            )


def _handed_in(submission: Path | None, work: Path, result: dict[str, Any]) -> Outcome:
    folder = work / "submission"
    files = {"submission": str(submission) if submission else None, "predictions": str(folder)}
    return Outcome(f"wrote {submission or folder}", files | result)
