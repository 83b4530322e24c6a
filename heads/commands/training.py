"""pretrain and finetune: images and responses -> checkpoints."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from featcache.errors import ConfigError
from heads.commands.options import (
    DATA,
    WORK,
    AsJson,
    Ceiling,
    Data,
    Device,
    Name,
    Size,
    Subjects,
    Weights,
    Work,
    backbone_of,
    given,
    open_tree,
)
from heads.config import PAPER_SIZE, PRESETS, StageConfig, TrainConfig
from heads.config import preset as settings_of
from heads.recipes.steps import Job, Outcome

if TYPE_CHECKING:
    from featcache.dataset.subject import Subject


def _training_command(stage: str) -> Callable[..., Job]:
    """The command of one stage of training."""

    def command(
        *,
        data: Data = DATA,
        work: Work = WORK,
        noise_ceiling: Ceiling = None,
        subject: Subjects = "all",
        backbone: Name = None,
        weights: Weights = None,
        size: Size = None,
        init: Annotated[
            str,
            typer.Option(
                help="What it starts from: stage1, hub, packaged, none, a weights file, or a checkpoint's folder.",
                rich_help_panel="Backbone",
            ),
        ] = "stage1",
        fold: Annotated[
            str, typer.Option(help="The fold that is held out, or all: each in turn.", rich_help_panel="Data")
        ] = "all",
        folds: Annotated[
            int, typer.Option(help="Number of folds of the training images, by image id.", rich_help_panel="Data")
        ] = StageConfig.n_folds,
        fold_seed: Annotated[int, typer.Option(help="Seed of the folds.", rich_help_panel="Data")] = (
            StageConfig.fold_seed
        ),
        preset: Annotated[
            str, typer.Option(help=f"Set of defaults: {', '.join(PRESETS)}.", rich_help_panel="Training")
        ] = "fast",
        save_every: Annotated[
            int,
            typer.Option(
                help="Steps between saved states, from which an interrupted run goes on; 0: after epochs only.",
                rich_help_panel="Output",
            ),
        ] = StageConfig.save_every,
        image_cache: Annotated[
            float, typer.Option(help="GB that decoded images may take on the disk.", rich_help_panel="Machine")
        ] = StageConfig.image_cache,
        workers: Annotated[
            int, typer.Option(help="Threads that decode images.", rich_help_panel="Machine")
        ] = StageConfig(stage=stage).workers,
        device: Device = StageConfig.device,
        as_json: AsJson = False,
        **settings: Any,
    ) -> Job:
        if not fold.isdecimal() and fold != "all":
            raise ConfigError(
                "--fold", expected=f"all or a number from 0 to {folds - 1}", found=f"{fold!r}", remedy="correct it"
            )
        config = StageConfig(
            stage=stage,
            train=replace(settings_of(preset, stage), **given(**settings)),
            backbone=backbone_of(backbone, weights, size or (PAPER_SIZE if preset == "paper" else None)),
            init=init,
            fold=None if fold == "all" else int(fold),
            n_folds=folds,
            fold_seed=fold_seed,
            device=device,
            save_every=save_every,
            image_cache=image_cache,
            workers=workers,
        )
        return Job(config, lambda: _train(open_tree(data, noise_ceiling).select(subject), config, work), as_json)

    return _with_settings(command, leave_out=() if stage == "finetune" else ("init",))


def _with_settings(command: Callable[..., Job], leave_out: Sequence[str]) -> Callable[..., Job]:
    """The command with every field of TrainConfig as an option; it gets them as keyword arguments."""
    signature = inspect.signature(command)
    options = [
        option
        for option in signature.parameters.values()
        if option.kind is option.KEYWORD_ONLY and option.name not in leave_out
    ]
    for setting in fields(TrainConfig):
        option: Any = typer.Option(help=setting.metadata["help"], rich_help_panel=setting.metadata["panel"])
        annotation: Any = Annotated[cast(type, setting.type) | None, option]
        options.append(
            inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


def _train(subjects: "Sequence[Subject]", config: StageConfig, work: Path) -> Outcome:
    from heads.backbones.stages import train_stage

    done = train_stage(subjects, config, work)
    checkpoints = [
        {
            "path": str(trained.checkpoint.path),
            "score": trained.checkpoint.facts.score,
            "seconds": round(trained.seconds, 1),
        }
        for trained in done
    ]
    n_new = sum(trained.new for trained in done)
    message = f"{len(done)} checkpoints, {n_new} of them new, in {work / 'checkpoints'}"
    return Outcome(message, {"checkpoints": checkpoints})


pretrain, finetune = _training_command("pretrain"), _training_command("finetune")
