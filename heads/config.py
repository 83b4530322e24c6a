"""Settings of training, fitting and blending. Imports no torch, so that `--help` answers at once."""

import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from featcache.config import DEVICES, POOLED, PRODUCTS, BackboneConfig, LayerConfig, at_least, one_of
from featcache.errors import ConfigError

LOSS_NAMES = ("smooth_l1", "mse", "pearson", "mnnpc")
HEADS = ("linear", "roi", "spatial")
SOLVERS = ("auto", "exact", "moments", "adamw", "trained")
TARGETS = ("responses", "blend")
BLENDS = ("uniform", "score", "greedy", "nnls")
LEVELS = ("all", "hemisphere", "roi", "vertex")
STAGES = ("pretrain", "finetune")
PRECISIONS = ("float32", "bfloat16", "float16")
HEAD_STARTS = ("default", "small", "fitted")
STOPS = ("fold", "never")
READOUTS = ("pooled", "spatial")
CORRELATIONS = frozenset({"pearson", "mnnpc"})

# Under each of these, and any sum of them, the best linear map of a vertex points in the least-squares direction:
# mse by definition, the others because they fall as the vertex's r rises, and least squares maximises r.
_LEAST_SQUARES = frozenset({"mse", "pearson", "mnnpc"})

_TERM = re.compile(r"(?:(?P<weight>\d+\.?\d*(?:e-?\d+)?|\.\d+)\*)?(?P<name>[a-z_0-9]+)")


def split_losses(text: str) -> list[str]:
    """'mnnpc,pearson' -> ['mnnpc', 'pearson']"""
    return text.replace(" ", "").split(",")


def parse_loss(text: str) -> tuple[tuple[float, str], ...]:
    """'smooth_l1+0.5*mnnpc' -> ((1.0, 'smooth_l1'), (0.5, 'mnnpc')). Raises ConfigError."""
    terms = []
    for part in text.replace(" ", "").split("+"):
        match = _TERM.fullmatch(part)
        if match is None or match["name"] not in LOSS_NAMES or not 0 < float(match["weight"] or 1) < math.inf:
            raise ConfigError(
                f"--loss: expected {', '.join(LOSS_NAMES)} or a weighted sum such as smooth_l1+0.5*mnnpc; "
                f"found {part!r} in {text!r}; correct it"
            )
        terms.append((float(match["weight"] or 1), match["name"]))
    if len({name for _, name in terms}) < len(terms):
        raise ConfigError(f"--loss: expected each loss once; found one twice in {text!r}; add their weights up")
    return tuple(sorted(terms, key=lambda term: LOSS_NAMES.index(term[1])))


def loss_label(terms: tuple[tuple[float, str], ...]) -> str:
    """The one way to write a loss: ((1.0, 'smooth_l1'), (0.5, 'mnnpc')) -> 'smooth_l1+0.5*mnnpc'."""
    return "+".join(name if weight == 1 else f"{_digits(weight)}*{name}" for weight, name in terms)


def _digits(weight: float) -> str:
    """As many as tell it from every other, and no '+', which `parse_loss` would take for another term."""
    return repr(float(weight)).removesuffix(".0").replace("e+", "e")


@dataclass(frozen=True)
class AdamWConfig:
    """The gradient loop of the heads."""

    learning_rate: float = 3e-4  # at the first step; falls to zero on a cosine
    weight_decay: float = 0.1  # decoupled, on the weights and not on the intercepts
    epochs: int = 60  # the most; the cosine ends there
    batch_size: int = 128  # images a step; a correlation loss sees no others
    patience: int = 10  # epochs without a better validation score before it stops
    validation: int = 10  # one in so many training images decides when to stop, and is not trained on

    def __post_init__(self) -> None:
        at_least("learning-rate", self.learning_rate, 0)
        at_least("weight-decay", self.weight_decay, 0)
        at_least("epochs", self.epochs, 1)
        at_least("batch-size", self.batch_size, 2)
        at_least("patience", self.patience, 1)
        at_least("validation", self.validation, 2)


def adamw_of(head: str) -> AdamWConfig:
    """The settings that a head is trained with where nothing else is said."""
    if head == "spatial":  # they start from the closed form, which long steps would only undo (docs/layers.md)
        return AdamWConfig(learning_rate=1e-4, epochs=30, batch_size=32)
    return AdamWConfig()


@dataclass(frozen=True)
class RidgeConfig:
    """The closed-form heads."""

    # penalties on offer, as multiples of the mean eigenvalue of the features' scatter: three a decade
    penalties: tuple[float, ...] = tuple(float(f"{10 ** (k / 3):.4g}") for k in range(-12, 13))
    # auto | loo | gcv: how a vertex's penalty is chosen on the training images (see heads.ridge)
    selection: str = "auto"

    def __post_init__(self) -> None:
        one_of("selection", self.selection, ("auto", "loo", "gcv"))
        if not self.penalties or not all(0 <= penalty < math.inf for penalty in self.penalties):
            raise ConfigError(f"penalties: expected one or more numbers from 0; found {self.penalties}; correct them")


@dataclass(frozen=True)
class MomentsConfig:
    """Full-batch descent on linear heads (see heads.moments)."""

    steps: int = 128  # the most; each vertex keeps the one of least left-out error
    learning_rate: float = 0.25  # in units of the curvature along the first axis at the start
    momentum: float = 0.9  # Nesterov's

    def __post_init__(self) -> None:
        at_least("epochs", self.steps, 1)
        at_least("learning-rate", self.learning_rate, 0)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum: expected a number from 0 and below 1; found {self.momentum}; correct it")


@dataclass(frozen=True)
class SpatialConfig:
    """Spatial heads on cached layers: maps over places times maps over channels (see heads.spatial)."""

    rank: int = 4  # such products an output and layer
    space: int = 0  # outputs that the vertices of all subjects are linear in, trained together; 0: each subject alone
    token_dropout: float = 0.3  # part of a layer's places that an image lacks in training
    smoothness: float = 0.1  # penalty of differences between neighbouring places
    sparsity: float = 0.0  # penalty of maps that spread over many places

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        at_least("space", self.space, 0)
        at_least("smoothness", self.smoothness, 0)
        at_least("sparsity", self.sparsity, 0)
        check_dropout(self.token_dropout)


def check_dropout(value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"--token-dropout: expected a number from 0 and below 1; found {value}; correct it")


@dataclass(frozen=True)
class FitConfig:
    """Which heads are fitted to a feature store, and how."""

    loss: str = "mnnpc"  # a weighted sum of LOSS_NAMES, or several with commas between: a model of each
    head: str = "linear"  # linear | roi | spatial
    layers: str = "joint"  # joint: all that were extracted | each: a model of every one | names, with commas between
    solver: str = "auto"  # auto | exact | moments | adamw | trained, the heads that a checkpoint brought with it
    n_folds: int = 5  # of the training images, by image id
    seed: int = 0  # of the folds and of the gradient loop
    device: str = "auto"
    products: str = (
        "float32"  # float32 | tf32, on CUDA: of the products with responses, never those that are decomposed
    )
    max_memory: float = 0.0  # 10^9 bytes of main memory that the process may take; 0: what is free
    target: str = "responses"  # responses | blend: what the last blend predicts in their place
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    moments: MomentsConfig = field(default_factory=MomentsConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    spatial: SpatialConfig = field(default_factory=SpatialConfig)

    def __post_init__(self) -> None:
        one_of("head", self.head, HEADS)
        one_of("solver", self.solver, SOLVERS)
        one_of("target", self.target, TARGETS)
        one_of("device", self.device, DEVICES)
        one_of("products", self.products, PRODUCTS)
        at_least("folds", self.n_folds, 2)
        at_least("seed", self.seed, 0)
        at_least("max-memory", self.max_memory, 0)
        for loss in split_losses(self.loss):
            terms = parse_loss(loss)
            if self.solver in ("exact", "moments") and not self._least_squares(terms):
                raise ConfigError(
                    f"--solver {self.solver}: expected --head linear and a loss of mse, pearson and mnnpc; "
                    f"found --head {self.head} --loss {loss_label(terms)}; use --solver adamw"
                )

    def variants(self) -> "list[FitConfig]":
        """One for each loss; of losses whose heads are the same, the first."""
        found: dict[str, FitConfig] = {}
        for loss in split_losses(self.loss):
            one = replace(self, loss=loss)
            found.setdefault(one.objective, one)
        return list(found.values())

    def _least_squares(self, terms: Sequence[tuple[float, str]]) -> bool:
        return self.head == "linear" and all(name in _LEAST_SQUARES for _, name in terms)

    @property
    def terms(self) -> tuple[tuple[float, str], ...]:
        return parse_loss(self.loss)

    @property
    def exact_reaches_optimum(self) -> bool:
        return self._least_squares(self.terms)

    @property
    def resolved_solver(self) -> str:
        if self.solver == "auto":
            return "exact" if self.exact_reaches_optimum else "adamw"
        return self.solver

    @property
    def objective(self) -> str:
        """What the heads optimise, in a word: every loss that closed form serves has the same heads."""
        return {"exact": "ridge", "trained": "trained"}.get(self.resolved_solver, loss_label(self.terms))

    def recipe(self) -> dict[str, Any]:
        """What decides the heads, given features, responses and ceilings."""
        if self.resolved_solver == "trained":  # with the backbone, whose recipe has everything
            return {"head": "trained", "solver": "trained", "objective": "trained"}
        solver = {"exact": self.ridge, "moments": self.moments, "adamw": self.adamw}[self.resolved_solver]
        settings = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(solver).items()}
        if self.head == "spatial":
            settings |= vars(self.spatial)
        common = {"head": self.head, "n_folds": self.n_folds, "seed": self.seed}
        if self.products != "float32":
            common["products"] = self.products
        if self.target != "responses":
            common["target"] = self.target
        return common | {"solver": self.resolved_solver, "objective": self.objective, "settings": settings}


# options of fit-heads that something reads, and not everything
_OF_ADAMW = ("epochs", "learning_rate", "weight_decay", "batch_size")
_OF_MOMENTS = ("epochs", "learning_rate")
_OF_SPATIAL = tuple(setting.name for setting in fields(SpatialConfig))
_OF_A_FIT = ("loss", "head", "target", "folds", "seed", *_OF_ADAMW, *_OF_SPATIAL)


def refuse_unread(given: Collection[str], config: FitConfig) -> None:
    """Raise ConfigError for options of fit-heads that were given and decide nothing under these settings."""
    variants = config.variants()
    solvers = {one.resolved_solver for one in variants}
    solver = f"--solver {config.solver}"
    if solvers == {"trained"}:
        taken = f"{solver}, which takes the heads of a checkpoint as they are"
        _refuse_given([name for name in _OF_A_FIT if name in given], "a solver that fits heads", taken)
    unread = [name for name in _OF_ADAMW if name in given and not any(_reads(one, name) for one in solvers)]
    chosen = "" if config.solver in solvers else f", which is exact for --head {config.head} and this loss"
    _refuse_given(unread, "--solver adamw", solver + chosen)
    if config.head != "spatial":
        _refuse_given([name for name in _OF_SPATIAL if name in given], "--head spatial", f"--head {config.head}")


def _reads(solver: str, option: str) -> bool:
    return solver == "adamw" or (solver == "moments" and option in _OF_MOMENTS)


def _refuse_given(unread: Sequence[str], wanted: str, found: str) -> None:
    if unread:
        option = unread[0].replace("_", "-")
        raise ConfigError(f"--{option}: expected {wanted} with it; found {found}; add that, or leave this out")


@dataclass(frozen=True)
class BlendConfig:
    """How models are weighed against each other, for each subject."""

    method: str = "score"  # uniform | score | greedy | nnls
    per: str = "vertex"  # all | hemisphere | roi | vertex: what has weights of its own
    by: str = "model"  # model | backbone: what has a weight; the models of one backbone are averaged first
    models: str = "*"  # patterns of names, with commas between: which models
    exclude: str = ""  # patterns as well: which of them not
    seed: int = 0  # of the bags of a greedy blend, the bootstrap and the permutations

    def __post_init__(self) -> None:
        one_of("method", self.method, BLENDS)
        one_of("per", self.per, LEVELS)
        one_of("by", self.by, ("model", "backbone"))
        at_least("seed", self.seed, 0)

    @property
    def label(self) -> str:
        return f"{self.method} per {self.per}" + (" by backbone" if self.by == "backbone" else "")


BLEND_RECIPES = ("best", "paper")


def blend_recipe(name: str) -> BlendConfig:
    """best: what measured best; paper: as published, an average weighted by backbone. Raises ConfigError."""
    one_of("recipe", name, BLEND_RECIPES)
    return BlendConfig(method="score", per="all", by="backbone") if name == "paper" else BlendConfig()


def _option(default: Any, meaning: str) -> Any:
    """A field that the command line offers as an option, with this help."""
    return field(default=default, metadata={"help": meaning})


# settings of TrainConfig that only its spatial heads have
_SPATIAL = ("layers", "grid", "space", "rank", "token_dropout", "smoothness", "sparsity")


@dataclass(frozen=True)
class TrainConfig:
    """The gradient loop of backbone and heads together, for both stages. The defaults are the fast recipe."""

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
                raise ConfigError(f"--{name.replace('_', '-')}: expected a finite number; found inf; correct it")
        for name in ("learning_rate", "head_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: expected a number above 0; found {getattr(self, name)}; correct it"
                )
        for name in ("ema", "layer_decay"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: expected a number from 0 to 1; found {value}; correct it"
                )
        check_dropout(self.token_dropout)
        self._refuse_unread()
        _ = self.tapped  # refuses a grid that is none

    def _refuse_unread(self) -> None:
        """Settings of spatial heads decide nothing where there are none."""
        given = [name for name in _SPATIAL if getattr(self, name) != getattr(TrainConfig, name)]
        if self.head != "spatial":
            _refuse_given(given, "--head spatial", f"--head {self.head}")

    @property
    def tapped(self) -> LayerConfig:
        """The layers that the heads read."""
        if self.head == "pooled":
            return LayerConfig((POOLED,))
        return LayerConfig(tuple(self.layers.replace(" ", "").split(",")), self.grid)

    @property
    def terms(self) -> tuple[tuple[float, str], ...]:
        return parse_loss(self.loss)

    @property
    def uses_correlation(self) -> bool:
        return any(name in CORRELATIONS for _, name in self.terms)

    def recipe(self) -> dict[str, Any]:
        """What decides the weights that come out, given data, start and fold."""
        spatial = () if self.head == "spatial" else ("head", *_SPATIAL)  # without them pooled heads stay what they were
        settings = {name: value for name, value in vars(self).items() if name not in spatial}
        if self.head == "spatial":
            settings["layers"] = ",".join(self.tapped.layers)
        return settings | {"loss": loss_label(self.terms)}


PAPER_SIZE = 384  # pixels on a side, where --size says nothing else

RECIPES = ("fast", "paper")


def recipe(name: str, stage: str) -> TrainConfig:
    """The settings of a stage under a recipe of that name. Raises ConfigError."""
    one_of("recipe", name, RECIPES)
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


@dataclass(frozen=True)
class SoupConfig:
    """Which checkpoints are averaged."""

    stage: str = "finetune"  # pretrain | finetune
    models: str = "*"  # patterns of their folders' names or of their trainings' fingerprints, with commas between
    device: str = "auto"
    image_cache: float = 50.0  # 10^9 bytes that decoded images may take on the disk
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, 16))  # threads that decode images

    def __post_init__(self) -> None:
        one_of("stage", self.stage, STAGES)
        one_of("device", self.device, DEVICES)

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.models.split(","))


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: what starts from what, and which folds are held out."""

    stage: str  # pretrain (all subjects together) | finetune (each subject alone)
    train: TrainConfig = field(default_factory=TrainConfig)
    # pretrain: what it starts from. finetune: of which stage-1 checkpoint, unless `init` names another start
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    init: str = "stage1"  # finetune only: stage1 | hub | packaged | none | a weights file | a checkpoint's folder
    any_backbone: bool = False  # init stage1: the only stage-1 backbone there is, whatever `backbone` says
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
                f"--fold: expected all or a number from 0 to {self.n_folds - 1}; found {self.fold}; choose one of those"
            )
