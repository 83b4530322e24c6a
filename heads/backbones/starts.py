"""What each fold of a training starts from: weights as they come, or the checkpoint of the same fold of stage 1."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from featcache.backbone.checkpoint import (
    Checkpoint,
    list_checkpoints,
    open_checkpoint,
    refuse_trained,
    siblings,
    usable,
)
from featcache.backbone.keys import Split, StartKey
from featcache.backbone.network import TorchBackbone, load_backbone, say_how_it_reads
from featcache.config import BackboneConfig
from featcache.dataset.image_lists import SubjectDigests
from featcache.dataset.subject import Subject
from featcache.errors import CheckpointError, LeakError
from featcache.workdir import Workdir
from heads.config import StageConfig, loss_label


@dataclass(frozen=True)
class Start:
    """The backbone that training starts from.

    checkpoint : the one that its weights are of; None for weights as they came
    settings : of the first weights, before any training, and of how images are read now
    """

    backbone: TorchBackbone
    checkpoint: Checkpoint | None
    settings: BackboneConfig

    def key(self) -> StartKey:
        """What the key of a checkpoint says of it."""
        training = None if self.checkpoint is None else self.checkpoint.training
        return StartKey(weights=self.backbone.digest, training=training)


class Starts:
    """Finds the start of each fold and subject of a stage. Folds that start from the same weights share one."""

    def __init__(self, config: StageConfig, work: Path) -> None:
        self._config, self._work, self._folder = config, work, Workdir(work).checkpoints
        self._load = lru_cache(maxsize=1)(self._load_start)
        self._digests = lru_cache(maxsize=None)(lambda subject: SubjectDigests.of(subject, work))

    def find(self, subjects: Sequence[Subject], split: Split) -> Start:
        """The start of one fold. Raises CheckpointError or LeakError where there is none that fits."""
        config = self._config
        if config.stage == "pretrain":
            refuse_trained(config.backbone.resolved_weights, "finetune --init")
            return self._load(config.backbone)
        (subject,) = subjects
        if config.init == "stage1":
            return self._load(self._stage1(subject, split))
        if config.init == "weights":
            refuse_trained(config.backbone.resolved_weights, "--init")
            return self._load(config.backbone)
        if config.init not in ("hub", "packaged", "none") and Path(config.init).is_dir():
            return self._load(self._given(open_checkpoint(Path(config.init)), subject, split))
        refuse_trained(config.init, "--init")
        return self._load(replace(config.backbone, weights=config.init))

    def _load_start(self, source: Path | BackboneConfig) -> Start:
        """Load weights as they come, or those of the checkpoint in a folder."""
        if isinstance(source, BackboneConfig):
            backbone = load_backbone(source)
            say_how_it_reads(backbone, trained=False)
            return Start(backbone, None, source)
        checkpoint = open_checkpoint(source)
        trained = checkpoint.key.backbone
        network = self._config.backbone.name or checkpoint.network
        settings = BackboneConfig(name=network, weights=trained.weights, size=trained.size, fit=trained.fit)
        settings = self._config.backbone.applied_to(settings)
        backbone = checkpoint.backbone(size=settings.size, fit=settings.fit, network=network)
        return Start(backbone, checkpoint, settings)

    def _stage1(self, subject: Subject, split: Split) -> Path:
        """The stage-1 checkpoint of this fold in the work folder. A mean of several has to be named to be a start.

        Of several trainings it is the one with the same loss, and of several with that loss (or without it) the one
        with the same seed.
        """
        known = [one for one in list_checkpoints(self._work) if one.key.stage == "pretrain" and not one.key.mean_of]
        checkpoints = usable(subject, [one for one in known if self._admits(one)], self._digests(subject))
        train = self._config.train
        for setting, value in (("loss", loss_label(train.terms)), ("seed", train.seed)):
            if len({checkpoint.training for checkpoint in checkpoints}) > 1:
                alike = [one for one in checkpoints if one.key.settings.get(setting) == value]
                checkpoints = alike or checkpoints
        self._refuse_several(checkpoints)
        return _of_fold(checkpoints, split, f"of {subject.name} in {self._folder}")

    def _refuse_several(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Raise CheckpointError where checkpoints are of several trainings."""
        trainings = sorted({checkpoint.training for checkpoint in checkpoints})
        if len(trainings) > 1:
            names = ", ".join(min(one.name for one in checkpoints if one.training == t) for t in trainings)
            raise CheckpointError(
                "--init stage1",
                expected=f"one stage-1 training in {self._folder}, or one alone with the same --loss and --seed",
                found=f"{len(trainings)} ({names})",
                remedy="name the folder of one with --init",
            )

    def _admits(self, checkpoint: Checkpoint) -> bool:
        asked, trained = self._config.backbone, checkpoint.key.backbone
        alike = asked.size in (None, trained.size) and asked.fit in (None, trained.fit)
        return asked.admits(trained.name) and alike

    def _given(self, given: Checkpoint, subject: Subject, split: Split) -> Path:
        """The checkpoint of this fold beside the one that was named."""
        trained = given.key.backbone.name
        if not self._config.backbone.admits(trained):
            raise CheckpointError(
                f"--init {given.path}",
                expected=f"a checkpoint of {self._config.backbone.name}",
                found=f"one of {trained}",
                remedy=f"name --backbone {given.network}, or another checkpoint",
            )
        given.refuse_other_tree({subject.name: self._digests(subject)})
        checkpoints = usable(subject, siblings(given), self._digests(subject))
        return _of_fold(checkpoints, split, f"like {given.path}")


def _of_fold(checkpoints: Sequence[Checkpoint], split: Split, where: str) -> Path:
    """Folder of the finished checkpoint of a fold. Raises LeakError where there are other folds, CheckpointError."""
    finished = [checkpoint for checkpoint in checkpoints if checkpoint.finished]
    for checkpoint in finished:
        if checkpoint.key.split == split:
            return checkpoint.path
    others = [one.key.split for one in checkpoints if replace(one.key.split, fold=split.fold) != split]
    if others:
        raise LeakError(
            expected=f"a stage-1 checkpoint of the same folds ({_folds_of(split)}) {where}",
            found=f"one of others, which saw images that are held out here ({_folds_of(others[0])})",
            remedy="give its --folds, --fold-seed and --split",
        )
    folds = sorted(checkpoint.fold for checkpoint in finished)
    raise CheckpointError(
        expected=f"a stage-1 checkpoint of fold {split.fold} {where}",
        found=(f"only folds {', '.join(map(str, folds))}" if folds else "none"),
        remedy=f"run pretrain --fold {split.fold}, or start without stage 1: --init hub",
    )


def _folds_of(split: Split) -> str:
    """Folds in words: '5, seed 0', and the split where it is not by image id."""
    return f"{split.n_folds}, seed {split.seed}" + (f", --split {split.by}" if split.by.digest else "")
