"""Which backbone reads the images of which subjects: one as its weights came, or checkpoints of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.backbone.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, refuse_trained, usable
from featcache.backbone.network import Backbone, load_backbone
from featcache.backbone.taps import Taps
from featcache.cache.keys import FoldKey
from featcache.cache.store import Row
from featcache.config import ExtractConfig
from featcache.dataset.image_lists import SubjectDigests
from featcache.dataset.subject import Subject
from featcache.errors import CheckpointError
from featcache.machine.device import refused_memory
from featcache.machine.progress import say
from featcache.workdir import Workdir


@dataclass(frozen=True)
class Source:
    """A backbone that is ready to read images.

    checkpoint : where it was trained; None for one as its weights came
    taps, rows : the layers that are read, and the rows of each array that they give
    """

    backbone: Backbone
    checkpoint: Checkpoint | None
    taps: Taps
    rows: dict[str, Row]
    device: str

    @property
    def fold(self) -> FoldKey | None:
        """The training of the backbone; None for one as its weights came, which saw none of the images."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return None
        key = checkpoint.key
        return FoldKey(
            stage=key.stage,
            training=key.training,
            soup=len(key.mean_of) or None,
            fold=key.split.fold,
            n_folds=key.split.n_folds,
            seed=key.split.seed,
            split=key.split.by,
        )

    @property
    def label(self) -> str:
        """Backbone, stage and fold, as names of stores have them."""
        fold = self.fold
        return self.backbone.name if fold is None else f"{self.backbone.name}-{fold.label}-fold{fold.fold}"


def choose_checkpoints(
    subjects: Sequence[Subject], config: ExtractConfig, work: Path
) -> list[tuple[Checkpoint | None, list[Subject]]]:
    """Checkpoints by name, each with the subjects that it serves; None stands for the backbone as its weights come.

    Raises CheckpointError for a checkpoint that was asked for and cannot serve every subject.
    """
    if config.checkpoint == "none":
        return [(None, list(subjects))]
    if config.checkpoint != "auto":
        checkpoint = find_checkpoint(work, config.checkpoint)
        _refuse_other_backbone(checkpoint, config)
        checkpoint.refuse_other_tree({subject.name: SubjectDigests.of(subject, work) for subject in subjects})
        return [(checkpoint, list(subjects))]
    chosen = _all_checkpoints(subjects, config, work)
    # where backbones were trained, and removed once their features were cached, there is nothing to do
    pruned = [one for one in list_checkpoints(work) if _admits(one, config) and one.facts.pruned]
    done = any(one.concerns(subject) for one in pruned for subject in subjects)
    return chosen if chosen or done else [(None, list(subjects))]


def _admits(checkpoint: Checkpoint, config: ExtractConfig) -> bool:
    return config.backbone.admits(checkpoint.key.backbone.name)


def _all_checkpoints(
    subjects: Sequence[Subject], config: ExtractConfig, work: Path
) -> list[tuple[Checkpoint | None, list[Subject]]]:
    """Every checkpoint of the backbone that serves a subject; a subject that none serves is named and left out."""
    checkpoints = [checkpoint for checkpoint in list_checkpoints(work) if _admits(checkpoint, config)]
    served: dict[str, tuple[Checkpoint | None, list[Subject]]] = {}
    for subject in subjects if checkpoints else ():
        for checkpoint in usable(subject, checkpoints, SubjectDigests.of(subject, work)):
            served.setdefault(checkpoint.name, (checkpoint, []))[1].append(subject)
    if served:
        folder = Workdir(work).checkpoints
        say(f"{len(served)} checkpoints in {folder}; --checkpoint none is the backbone before training")
        names = {subject.name for _, its_subjects in served.values() for subject in its_subjects}
        for subject in subjects:
            if subject.name not in names:
                say(f"{subject.name}: left out: no checkpoint was trained on it; train one, or use --checkpoint none")
    return [served[name] for name in sorted(served)]


def _refuse_other_backbone(checkpoint: Checkpoint, config: ExtractConfig) -> None:
    if not _admits(checkpoint, config):
        raise CheckpointError(
            checkpoint.path,
            expected=f"a checkpoint of {config.backbone.name}",
            found=f"one of {checkpoint.key.backbone.name}",
            remedy=f"name --backbone {checkpoint.network}, or another checkpoint",
        )


def load_source(checkpoint: Checkpoint | None, config: ExtractConfig, device: str) -> Source:
    """The backbone of a checkpoint, or as its weights come, with the layers that are asked for.

    Raises BackboneError, CheckpointError or ConfigError for what cannot be loaded or read.
    """
    with refused_memory("the network"):
        backbone = _load(checkpoint, config, device)
        taps = backbone.taps(config.layers)
        backbone = backbone.optimised(taps)
        return Source(backbone, checkpoint, taps, stored_rows(backbone.shapes(taps)), device)


def _load(checkpoint: Checkpoint | None, config: ExtractConfig, device: str) -> Backbone:
    if checkpoint is not None:
        return checkpoint.backbone(device, config.backbone.size, config.backbone.fit, config.backbone.name)
    refuse_trained(config.backbone.resolved_weights, "--checkpoint")
    backbone = load_backbone(config.backbone, device)  # which refuses what has no random weights
    if config.backbone.resolved_weights == "none":
        say(f"{config.backbone.resolved_name}: random weights, as asked; the scores will show it")
    return backbone


def stored_rows(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Row]:
    """{array: its row} for shapes of rows. Maps are large and are stored as float16, vectors as float32."""
    return {name: Row(shape, "float16" if len(shape) > 1 else "float32") for name, shape in shapes.items()}
