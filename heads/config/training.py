"""Settings of the two stages that train backbones."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from featcache.config import (
    DEVICES,
    POOLED,
    BackboneConfig,
    LayerConfig,
    at_least,
    check_split,
    one_of,
    option,
    split_option,
    usual_workers,
)
from featcache.errors import ConfigError
from heads.config.checks import check_dropout, refuse_given
from heads.config.losses import LOSS_HELP, LOSS_NAMES, LOSS_SPECS, SAME, loss_label, parse_loss, parse_roi_loss

STAGES = ("pretrain", "finetune")
PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float16")
HEAD_STARTS = ("default", "small", "fitted")
STOPS = ("fold", "never")
BATCHES = ("mixed", "subject")


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """What has to be known of one kind of heads before it is loaded."""

    build: str  # 'module:name' of a function (shapes, subjects, config, size) -> SubjectHeads; heads/backbones/heads.py
    start: str  # 'module:name' of a function (heads, first weights) -> note, for heads of stage 2
    settings: tuple[str, ...] = ()  # those that no other heads read; with 'layers' and 'grid', they read places
    reads_rois: bool = False  # whether stage 2 has a head for each ROI
    idle_weights: bool = False  # whether a step may leave weights without a gradient, as those of absent subjects


# A new kind of heads is one file and one entry here.
HEAD_KINDS = {
    "linear": HeadKind(
        build="heads.backbones.heads:build_linear",
        start="heads.backbones.heads:start_linear",
        settings=("roi_loss",),
        reads_rois=True,
    ),
    "spatial": HeadKind(
        build="heads.backbones.heads:build_spatial",
        start="heads.backbones.heads:start_spatial",
        settings=("layers", "grid", "space", "rank", "token_dropout", "smoothness", "sparsity"),
        idle_weights=True,
    ),
    "core": HeadKind(
        build="heads.backbones.heads:build_core",
        start="heads.backbones.heads:start_spatial",
        settings=("layers", "grid", "hidden", "channels", "blocks", "core_dropout"),
        idle_weights=True,
    ),
}


def _in_panel(panel: str, default: Any, meaning: str) -> Any:
    return option(default, meaning, panel)


_train, _more = partial(_in_panel, "Training"), partial(_in_panel, "Training, in detail")
_heads, _spatial = partial(_in_panel, "Heads"), partial(_in_panel, "Spatial heads")
_core, _layers = partial(_in_panel, "Shared core"), partial(_in_panel, "Layers")
_machine = partial(_in_panel, "Machine")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of a backbone and its heads together, for both stages. The defaults are the fast preset.

    The order of the fields is the order of the settings in checkpoint.json.
    """

    loss: str = _train(
        "smooth_l1",
        f"What training optimises: {', '.join(LOSS_NAMES)}, or a weighted sum such as smooth_l1+0.5*mnnpc. {LOSS_HELP}",
    )
    epochs: int = _train(
        5, "Largest number of passes over the training images. The learning rate falls to zero at their end."
    )
    batch_size: int = _train(32, "Images in one pass of each device.")
    batches: str = _more(
        "mixed",
        "Whose images make a batch in stage 1. mixed: those of all subjects. subject: those of one, so that a "
        "correlation over images has a whole batch.",
    )
    accumulate: int = _more(1, "Batches for each step of the optimiser.")
    correlation_batch: int = _more(
        0, "Images over which pearson and mnnpc correlate, gathered from several batches and devices. 0: one batch."
    )
    learning_rate: float = _train(3e-4, "Highest learning rate of the last layer of the backbone.")
    head_learning_rate: float = _train(1e-3, "Highest learning rate of the heads.")
    layer_decay: float = _more(1.0, "Learning rate of a layer, divided by that of the next layer. 1: all are equal.")
    weight_decay: float = _more(0.05, "Decoupled weight decay (AdamW); biases and norms have none.")
    warmup: float = _more(0.0, "Epochs in which the learning rate rises from zero, before it falls.")
    clip_norm: float = _more(1.0, "Largest norm of the gradient; a longer gradient is shortened to it. 0: no limit.")
    ema: float = _more(0.0, "Keep a running mean of the weights, with this largest decay per step. 0: no mean.")
    precision: str = _machine(
        "auto",
        f"Precision of the network in training: {', '.join(PRECISIONS)}. auto: float32 on a CPU; on CUDA bfloat16, or "
        "float16 where that is missing. Weights stay float32. tf32: products of float32 numbers rounded to 10 bits.",
    )
    freeze_norm: bool = _more(True, "Keep the statistics of batch norms that the backbone came with.")
    head_start: str = _heads(
        "fitted",
        "First weights of the heads. default: torch's random weights. small: a tenth of these. fitted: in stage 2, the "
        "heads of stage 1, or else the closed form (linear heads); in stage 1, as small.",
    )
    augment: bool = _more(
        False, "Shift and zoom images by up to 3 %; change brightness, contrast and saturation by up to 10 %."
    )
    stop: str = _train("fold", "Epoch to keep. fold: the one that scores best on the held-out fold. never: the last.")
    patience: int = _train(3, "With --stop fold: training ends after so many epochs without a better score.")
    embedding: int = _heads(512, "Linear heads of stage 1: length of the learnt vector that stands for a subject.")
    head: str = _heads(
        "linear",
        "Kind of head. linear: linear maps on the pooled features. spatial: maps over the places of layers. "
        "core: a small network on the layers that all subjects share, and maps over its places.",
    )
    layers: str = _layers(
        "auto",
        "Layers that spatial heads and cores read: auto (pooled and up to 6 others), all, pooled, or names or numbers "
        "with commas between them; the command 'layers' lists them.",
    )
    grid: str = _layers("auto", "Places on a side of each layer: a number, native, or auto (at most 7).")
    space: int = _spatial(
        0,
        "Outputs of one readout that all subjects share; each vertex is a linear combination of them. 0: no shared "
        "readout.",
    )
    rank: int = _spatial(1, "Number of maps over places, each with weights on channels, for each output and layer.")
    token_dropout: float = _spatial(0.1, "Fraction of the places of a layer that training leaves out of an image.")
    smoothness: float = _spatial(0.0, "Weight of the penalty on differences between neighbouring places of a map.")
    sparsity: float = _spatial(0.0, "Weight of the penalty on maps that spread over many places.")
    hidden: int = _core(512, "Channels that every layer is brought to.")
    channels: int = _core(384, "Channels of the core's output.")
    blocks: int = _core(2, "Residual blocks of the core.")
    core_dropout: float = _core(
        0.1, "Fraction of the places of the core's output that training leaves out of an image."
    )
    roi_loss: str = _heads(
        SAME,
        "Linear heads of stage 2: what the head of each ROI optimises, where --loss is of the surface's head. "
        "same: the same.",
    )
    seed: int = _train(0, "Seed of the order of images, of the first weights of heads, and of dropout.")

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        parse_roi_loss(self.roi_loss, self.loss)
        one_of("precision", self.precision, PRECISIONS)
        one_of("head-start", self.head_start, HEAD_STARTS)
        one_of("stop", self.stop, STOPS)
        one_of("batches", self.batches, BATCHES)
        one_of("head", self.head, tuple(HEAD_KINDS))
        for name, least in (
            ("epochs", 1),
            ("batch_size", 2),
            ("accumulate", 1),
            ("patience", 1),
            ("embedding", 1),
            ("hidden", 1),
            ("channels", 1),
            ("blocks", 0),
        ):
            self._check(name, getattr(self, name) >= least, f"{least} or more", "raise it")
        self._check("space", self.space >= 0, "0 or more", "raise it")
        self._check("rank", self.rank >= 1, "1 or more", "raise it")
        for name in ("correlation_batch", "weight_decay", "warmup", "clip_norm", "smoothness", "sparsity", "seed"):
            self._check(name, getattr(self, name) >= 0, "0 or more", "raise it")
            self._check(name, getattr(self, name) < math.inf, "a finite number", "correct it")
        for name in ("learning_rate", "head_learning_rate"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a number above 0", "correct it")
        for name in ("ema", "layer_decay"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1", "correct it")
        check_dropout(self.token_dropout)
        check_dropout(self.core_dropout, "core-dropout")
        unread = [name for name in self._read_by_others() if getattr(self, name) != getattr(TrainConfig, name)]
        for head, kind in HEAD_KINDS.items():
            refuse_given([name for name in unread if name in kind.settings], f"--head {head}", f"--head {self.head}")
        _ = self.tapped  # raises ConfigError for a grid that is none

    def _check(self, name: str, right: bool, expected: str, remedy: str) -> None:
        if not right:  # NaN compares as wrong everywhere
            where = f"--{name.replace('_', '-')}"
            raise ConfigError(where, expected=expected, found=getattr(self, name), remedy=remedy)

    @property
    def kind(self) -> HeadKind:
        """What the settings of `--head` mean."""
        return HEAD_KINDS[self.head]

    def _read_by_others(self) -> list[str]:
        """Settings that only other kinds of heads read."""
        names = [name for kind in HEAD_KINDS.values() for name in kind.settings]
        return [name for name in names if name not in self.kind.settings]

    @property
    def tapped(self) -> LayerConfig:
        """The layers that the heads read."""
        if "layers" not in self.kind.settings:
            return LayerConfig(layers=(POOLED,))
        return LayerConfig(layers=tuple(self.layers.replace(" ", "").split(",")), grid=self.grid)

    @property
    def terms(self) -> tuple[tuple[float, str], ...]:
        """The loss as pairs of weight and name."""
        return parse_loss(self.loss)

    @property
    def roi_terms(self) -> tuple[tuple[float, str], ...]:
        """The loss of heads of ROIs as pairs of weight and name."""
        return parse_roi_loss(self.roi_loss, self.loss)

    @property
    def uses_correlation(self) -> bool:
        """Whether a part of the loss is a correlation over images."""
        return any(LOSS_SPECS[name].correlation for _, name in (*self.terms, *self.roi_terms))

    def key(self, roi_heads: bool = False) -> dict[str, Any]:
        """Settings that decide the weights that come out, given data, start and fold.

        roi_heads : whether there are heads of ROIs, each with a loss. Keys without them are older than the setting.
        """
        unread = set(self._read_by_others())
        # checkpoints that are older than one of these choices keep their key
        unread |= {name for name in ("head", "batches") if getattr(self, name) == getattr(TrainConfig, name)}
        unread.add("roi_loss")
        settings = {name: value for name, value in vars(self).items() if name not in unread}
        if "layers" in settings:
            settings["layers"] = ",".join(self.tapped.layers)
        if roi_heads or self.roi_terms != self.terms:
            settings["roi_loss"] = loss_label(self.roi_terms)
        return settings | {"loss": loss_label(self.terms)}


PAPER_SIZE = 384  # pixels on a side, where --size says nothing else
PAPER_FIT = "whole"  # how an image is brought to that size, where --fit says nothing else

PRESETS = ("fast", "paper")


def preset(name: str, stage: str) -> TrainConfig:
    """Settings of a stage under a preset, one of PRESETS. Raises ConfigError."""
    one_of("preset", name, PRESETS)
    if name == "fast":
        # A batch of one subject is enough for correlations; shared among eight, it is not (docs/decisions/0017).
        return TrainConfig(loss="smooth_l1+pearson+mnnpc" if stage == "finetune" else "smooth_l1")
    # As published: AdamW, 1e-4 on a cosine to zero, batches of 8, 12 epochs or early stopping; the rest is torch's own.
    return TrainConfig(
        loss="smooth_l1",
        epochs=12,
        batch_size=8,
        learning_rate=1e-4,
        head_learning_rate=1e-4,
        weight_decay=0.01,
        clip_norm=0.0,
        freeze_norm=False,
        head_start="default",
    )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training: what starts from what, and which folds are held out."""

    stage: str  # pretrain (all subjects together) | finetune (each subject alone)
    train: TrainConfig = field(default_factory=TrainConfig)
    # pretrain: what it starts from. finetune: of which stage-1 checkpoint, unless `init` names another start
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    init: str = option(
        "stage1",
        "What training starts from: stage1 (the checkpoint of stage 1 of the same fold), weights (those that --weights "
        "names, without stage 1), hub, packaged, none, a weights file, or the folder of a checkpoint.",
        "Backbone",
    )
    fold: int | None = None  # the one held out; None: each in turn
    n_folds: int = option(5, "Parts (folds) that the training images are divided into.", "Data", name="folds")
    fold_seed: int = option(
        0, "Seed of the folds. The same --folds and --fold-seed give the same folds in every command.", "Data"
    )
    split: str = split_option()
    device: str = option("auto", f"Where to compute: {', '.join(DEVICES)}.", "Machine")
    save_every: int = option(
        0,
        "Steps between saved states. An interrupted run goes on from the last. 0: only after epochs.",
        "Machine",
    )
    image_cache: float = option(50.0, "Disk space that decoded images may take, in 10^9 bytes.", "Machine")
    workers: int = option(
        usual_workers, "Threads that decode images. With --engine: processes or jobs that share the work.", "Machine"
    )
    compile: bool = option(
        False, "Compile the backbone for training with torch.compile: minutes at first, then faster steps.", "Machine"
    )

    def __post_init__(self) -> None:
        one_of("stage", self.stage, STAGES)
        one_of("device", self.device, DEVICES)
        if self.stage == "pretrain" and self.train.roi_loss != SAME:
            raise ConfigError(
                "--roi-loss",
                expected="stage 2 (finetune), which has heads of ROIs",
                found="stage 1 (pretrain)",
                remedy="leave it out",
            )
        at_least("folds", self.n_folds, 2)
        at_least("fold-seed", self.fold_seed, 0)
        check_split(self.split)
        at_least("save-every", self.save_every, 0)
        at_least("workers", self.workers, 1)
        if self.fold is not None and not 0 <= self.fold < self.n_folds:
            raise ConfigError(
                "--fold",
                expected=f"all or a number from 0 to {self.n_folds - 1}",
                found=self.fold,
                remedy="choose one of those",
            )
