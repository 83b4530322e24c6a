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
            str, typer.Option(help="stage1, hub, packaged, none, a weights file, or a checkpoint's folder.")
        ] = "stage1",
        fold: Annotated[str, typer.Option(help="The fold held out, or all: each in turn.")] = "all",
        folds: Annotated[int, typer.Option(help="Folds of the training images, by image id.")] = StageConfig.n_folds,
        fold_seed: Annotated[int, typer.Option(help="Of the folds.")] = StageConfig.fold_seed,
        preset: Annotated[str, typer.Option(help=f"Settings to start from: {', '.join(PRESETS)}.")] = "fast",
        save_every: Annotated[
            int, typer.Option(help="Steps between states to go on from, besides epochs; 0: none.")
        ] = StageConfig.save_every,
        image_cache: Annotated[
            float, typer.Option(help="GB that decoded images may take on the disk.")
        ] = StageConfig.image_cache,
        workers: Annotated[int, typer.Option(help="Threads that decode images.")] = StageConfig(
            stage="pretrain"
        ).workers,
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
    """The command with every field of TrainConfig as an option, which reach it by name."""
    signature = inspect.signature(command)
    options = [one for one in signature.parameters.values() if one.kind is one.KEYWORD_ONLY]
    options = [one for one in options if one.name not in leave_out]
    for setting in fields(TrainConfig):
        kind: Any = Annotated[cast(type, setting.type) | None, typer.Option(help=setting.metadata["help"])]
        options.append(inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


def _train(subjects: "Sequence[Subject]", config: StageConfig, work: Path) -> Outcome:
    from heads.backbones.stages import train_stage

    done = train_stage(subjects, config, work)
    checkpoints = [
        {"path": str(one.checkpoint.path), "score": one.checkpoint.facts["score"], "seconds": round(one.seconds, 1)}
        for one in done
    ]
    new = sum(one.new for one in done)
    found = f"{len(done)} checkpoints, {new} of them new, in {work / 'checkpoints'}"
    return Outcome(found, {"checkpoints": checkpoints})


pretrain, finetune = _training_command("pretrain"), _training_command("finetune")
