"""Settings of the two stages that train backbones."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

from featcache.config import DEVICES, POOLED, BackboneConfig, LayerConfig, at_least, one_of
from featcache.errors import ConfigError
from heads.config.checks import check_dropout, refuse_given
from heads.config.losses import CORRELATIONS, LOSS_NAMES, loss_label, parse_loss

STAGES = ("pretrain", "finetune")
PRECISIONS = ("float32", "bfloat16", "float16")
HEAD_STARTS = ("default", "small", "fitted")
STOPS = ("fold", "never")
READOUTS = ("pooled", "spatial")


def _option(default: Any, meaning: str) -> Any:
    """A field that the command line offers as an option, with this help."""
    return field(default=default, metadata={"help": meaning})


# settings of TrainConfig that only its spatial heads have
_SPATIAL = ("layers", "grid", "space", "rank", "token_dropout", "smoothness", "sparsity")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The gradient loop of backbone and heads together, for both stages. The defaults are the fast preset."""

    loss: str = _option("smooth_l1", f"{', '.join(LOSS_NAMES)}, or a weighted sum: smooth_l1+0.5*mnnpc.")
    epochs: int = _option(5, "The learning rate reaches zero at the end of the last.")
    batch_size: int = _option(32, "Images a device and pass.")
    accumulate: int = _option(1, "Passes before each step of the optimiser.")
    correlation_batch: int = _option(0, "Images that a correlation loss sees, over passes and devices; 0: one pass.")
    learning_rate: float = _option(3e-4, "Of the backbone's last layer, at its highest.")
    head_learning_rate: float = _option(1e-3, "Of the heads.")
    layer_decay: float = _option(1.0, "Learning rate of a layer as a part of the next one's; 1: all the same.")
    weight_decay: float = _option(0.05, "Decoupled; not on biases and norms.")
    warmup: float = _option(0.0, "Epochs over which the learning rate rises from zero.")
    clip_norm: float = _option(1.0, "Largest norm of the gradient; 0: any.")
    ema: float = _option(0.0, "Decay a step, at most, of the average of the weights that is kept; 0: none.")
    precision: str = _option("float32", f"{', '.join(PRECISIONS)}.")
    freeze_norm: bool = _option(True, "Keep the batch statistics that the backbone came with.")
    head_start: str = _option("fitted", "Stage 2: default (torch's), small (a tenth), or fitted (docs/training.md).")
    augment: bool = _option(False, "Shifts and zooms of 3 %, brightness, contrast and saturation by a tenth.")
    stop: str = _option("fold", "fold: keep the epoch that scores best on the held-out fold; never: keep the last.")
    patience: int = _option(3, "Epochs without a better score before it stops.")
    embedding: int = _option(512, "Stage 1: features of a subject.")
    head: str = _option("pooled", "pooled: heads on the last layer's vector; spatial: on the places of several layers.")
    layers: str = _option("auto", "Head spatial: what it reads: auto, all, or names or numbers with commas between.")
    grid: str = _option("auto", "Head spatial: places a side of a layer: a number, native, or auto, 7 at most.")
    space: int = _option(0, "Head spatial: outputs that all vertices are linear in; 0: each has maps of its own.")
    rank: int = _option(1, "Head spatial: maps over places, each with channels of its own, an output and layer.")
    token_dropout: float = _option(0.1, "Head spatial: part of a layer's places that an image lacks in training.")
    smoothness: float = _option(0.0, "Head spatial: penalty of differences between neighbouring places.")
    sparsity: float = _option(0.0, "Head spatial: penalty of maps that spread over many places.")
    seed: int = _option(0, "Of batches, heads and dropout.")

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        one_of("precision", self.precision, PRECISIONS)
        one_of("head-start", self.head_start, HEAD_STARTS)
        one_of("stop", self.stop, STOPS)
        one_of("head", self.head, READOUTS)
        for name, least in (("epochs", 1), ("batch_size", 2), ("accumulate", 1), ("patience", 1), ("embedding", 1)):
            at_least(name.replace("_", "-"), getattr(self, name), least)
        at_least("space", self.space, 0)
        at_least("rank", self.rank, 1)
        for name in ("correlation_batch", "weight_decay", "warmup", "clip_norm", "smoothness", "sparsity", "seed"):
            at_least(name.replace("_", "-"), getattr(self, name), 0)
            if getattr(self, name) == math.inf:
                raise ConfigError(
                    f"--{name.replace('_', '-')}", expected="a finite number", found="inf", remedy="correct it"
                )
        for name in ("learning_rate", "head_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"--{name.replace('_', '-')}",
                    expected="a number above 0",
                    found=getattr(self, name),
                    remedy="correct it",
                )
        for name in ("ema", "layer_decay"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')}",
                    expected="a number from 0 to 1",
                    found=value,
                    remedy="correct it",
                )
        check_dropout(self.token_dropout)
        self._refuse_unread()
        _ = self.tapped  # refuses a grid that is none

    def _refuse_unread(self) -> None:
        """Settings of spatial heads decide nothing where there are none."""
        given = [name for name in _SPATIAL if getattr(self, name) != getattr(TrainConfig, name)]
        if self.head != "spatial":
            refuse_given(given, "--head spatial", f"--head {self.head}")

    @property
    def tapped(self) -> LayerConfig:
        """The layers that the heads read."""
        if self.head == "pooled":
            return LayerConfig(layers=(POOLED,))
        return LayerConfig(layers=tuple(self.layers.replace(" ", "").split(",")), grid=self.grid)

    @property
    def terms(self) -> tuple[tuple[float, str], ...]:
        return parse_loss(self.loss)

    @property
    def uses_correlation(self) -> bool:
        return any(name in CORRELATIONS for _, name in self.terms)

    def key(self) -> dict[str, Any]:
        """What decides the weights that come out, given data, start and fold."""
        spatial = () if self.head == "spatial" else ("head", *_SPATIAL)  # without them pooled heads stay what they were
        settings = {name: value for name, value in vars(self).items() if name not in spatial}
        if self.head == "spatial":
            settings["layers"] = ",".join(self.tapped.layers)
        return settings | {"loss": loss_label(self.terms)}


PAPER_SIZE = 384  # pixels on a side, where --size says nothing else

PRESETS = ("fast", "paper")


def preset(name: str, stage: str) -> TrainConfig:
    """The settings of a stage under a preset of that name. Raises ConfigError."""
    one_of("preset", name, PRESETS)
    if name == "fast":
        # A batch of one subject is enough for correlations; shared among eight, it is not (docs/training.md).
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
    init: str = "stage1"  # finetune only: stage1 | hub | packaged | none | a weights file | a checkpoint's folder
    fold: int | None = None  # the one held out; None: each in turn
    n_folds: int = 5
    fold_seed: int = 0  # the folds of fit-heads with the same number and seed
    device: str = "auto"
    save_every: int = 0  # steps between states to go on from, besides the end of each epoch; 0: none
    image_cache: float = 50.0  # 10^9 bytes that decoded images may take on the disk
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, 16))  # threads that decode images

    def __post_init__(self) -> None:
        one_of("stage", self.stage, STAGES)
        one_of("device", self.device, DEVICES)
        at_least("folds", self.n_folds, 2)
        at_least("seed", self.fold_seed, 0)
        at_least("save-every", self.save_every, 0)
        at_least("workers", self.workers, 1)
        if self.fold is not None and not 0 <= self.fold < self.n_folds:
            raise ConfigError(
                "--fold",
                expected=f"all or a number from 0 to {self.n_folds - 1}",
                found=self.fold,
                remedy="choose one of those",
            )
