"""pretrain and finetune: images and responses -> checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.config import BackboneConfig
from featcache.errors import ConfigError
from featcache.machine.progress import counted
from featcache.workdir import WORK, Workdir
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, given, in_parts, read, settled
from heads.config import PAPER_FIT, PAPER_SIZE, PRESETS, StageConfig, TrainConfig
from heads.config import preset as settings_of
from heads.recipes.jobs import Job, Outcome

if TYPE_CHECKING:
    from featcache.dataset.splits import Split
    from featcache.dataset.subject import Subject

_OLD_HEADS = {"pooled": "linear"}  # {name in earlier versions: name}


def _training_command(stage: str, meaning: str) -> Callable[..., Job]:
    """The command of one stage of training. meaning : its help text"""

    @command(
        BackboneConfig,
        StageConfig,
        TrainConfig,
        old={"recipe": "preset"},
        presets={TrainConfig: {name: vars(settings_of(name, stage)) for name in PRESETS}},
        leave_out=("init", "roi_loss") if stage == "pretrain" else (),
        has_parts=True,
    )
    def train(
        data: Data = DATA,
        work: Work = WORK,
        noise_ceiling: Ceiling = None,
        subject: Subjects = "all",
        fold: Annotated[
            str, typer.Option(help="The fold that is held out, or all: each in turn.", rich_help_panel="Data")
        ] = "all",
        preset: Annotated[
            str,
            typer.Option(
                help=f"Set of defaults: {', '.join(PRESETS)}. paper: as published, at {PAPER_SIZE} pixels "
                "and of the whole image.",
                rich_help_panel="Training",
            ),
        ] = PRESETS[0],
        **options: Any,
    ) -> Job:
        if not fold.isdecimal() and fold != "all":
            last = options["n_folds"] - 1
            raise ConfigError(
                "--fold", expected=f"all or a number from 0 to {last}", found=f"{fold!r}", remedy="correct it"
            )
        options |= {"head": _OLD_HEADS.get(options["head"], options["head"])}
        paper = {"size": PAPER_SIZE, "fit": PAPER_FIT} if preset == "paper" else {}
        config = read(
            StageConfig,
            options,
            stage=stage,
            train=replace(settings_of(preset, stage), **given(TrainConfig, options)),
            backbone=read(BackboneConfig, paper | given(BackboneConfig, options)),
            fold=None if fold == "all" else int(fold),
        )

        def parts(*given: Any) -> Sequence[Any]:
            from heads.backbones.stages import stage_parts

            return stage_parts(*given)

        def settle() -> "tuple[Sequence[Subject], Split]":
            return settled(data, noise_ceiling, work, subject, config.split, decodes=True)

        return in_parts(config, settle, _train, parts, work)

    train.__doc__ = meaning
    return train


def _train(subjects: Sequence["Subject"], config: StageConfig, work: Path, by: "Split") -> Outcome:
    from featcache.backbone.trainings import stops_on_fold
    from heads.backbones.stages import train_stage

    done = train_stage(subjects, config, work, by)
    checkpoints = [
        {
            "path": str(trained.checkpoint.path),
            "score": trained.checkpoint.facts.score,
            "chosen_on": stops_on_fold(trained.checkpoint.key.settings),
            "seconds": round(trained.seconds, 1),
        }
        for trained in done
    ]
    n_new = sum(trained.new for trained in done)
    message = f"{counted(len(done), 'checkpoint')}, {n_new} of them new, in {Workdir(work).checkpoints}"
    return Outcome(message, {"checkpoints": checkpoints})


pretrain = _training_command("pretrain", "Train a backbone on all subjects at once: stage 1.")
finetune = _training_command("finetune", "Train a backbone on each subject alone: stage 2.")
