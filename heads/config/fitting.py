"""Settings of heads on cached features."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from featcache.config import DEVICES, PRODUCTS, at_least, one_of
from featcache.errors import ConfigError
from heads.config.checks import check_dropout, refuse_given
from heads.config.losses import LEAST_SQUARES, loss_label, parse_loss, split_losses

HEADS = ("linear", "roi", "spatial")
SOLVERS = ("auto", "exact", "moments", "adamw", "trained")
TARGETS = ("responses", "blend")


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class RidgeConfig:
    """The closed-form heads."""

    # penalties on offer, as multiples of the mean eigenvalue of the features' scatter: three a decade
    penalties: tuple[float, ...] = tuple(float(f"{10 ** (k / 3):.4g}") for k in range(-12, 13))
    # auto | loo | gcv: how a vertex's penalty is chosen on the training images (see heads.solvers.ridge)
    selection: str = "auto"

    def __post_init__(self) -> None:
        one_of("selection", self.selection, ("auto", "loo", "gcv"))
        if not self.penalties or not all(0 <= penalty < math.inf for penalty in self.penalties):
            raise ConfigError(
                "penalties", expected="one or more numbers from 0", found=self.penalties, remedy="correct them"
            )


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """Full-batch descent on linear heads (see heads.solvers.moments)."""

    steps: int = 128  # the most; each vertex keeps the one of least left-out error
    learning_rate: float = 0.25  # in units of the curvature along the first axis at the start
    momentum: float = 0.9  # Nesterov's

    def __post_init__(self) -> None:
        at_least("epochs", self.steps, 1)
        at_least("learning-rate", self.learning_rate, 0)
        if not 0 <= self.momentum < 1:
            raise ConfigError(
                "momentum", expected="a number from 0 and below 1", found=self.momentum, remedy="correct it"
            )


@dataclass(frozen=True, kw_only=True)
class SpatialConfig:
    """Spatial heads on cached layers: maps over places times maps over channels (see heads.modules.spatial)."""

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


@dataclass(frozen=True, kw_only=True)
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
                    f"--solver {self.solver}",
                    expected="--head linear and a loss of mse, pearson and mnnpc",
                    found=f"--head {self.head} --loss {loss_label(terms)}",
                    remedy="use --solver adamw",
                )

    def variants(self) -> "list[FitConfig]":
        """One for each loss; of losses whose heads are the same, the first."""
        found: dict[str, FitConfig] = {}
        for loss in split_losses(self.loss):
            one = replace(self, loss=loss)
            found.setdefault(one.objective, one)
        return list(found.values())

    def _least_squares(self, terms: Sequence[tuple[float, str]]) -> bool:
        return self.head == "linear" and all(name in LEAST_SQUARES for _, name in terms)

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
    def exact_losses(self) -> list[str]:
        """Those of the losses whose heads are found in closed form."""
        return [loss for loss in split_losses(self.loss) if replace(self, loss=loss).resolved_solver == "exact"]

    @property
    def objective(self) -> str:
        """What the heads optimise, in a word: every loss that closed form serves has the same heads."""
        return {"exact": "ridge", "trained": "trained"}.get(self.resolved_solver, loss_label(self.terms))

    def key(self) -> dict[str, Any]:
        """What decides the heads, given features, responses and ceilings."""
        if self.resolved_solver == "trained":  # with the backbone, whose key has everything
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
        refuse_given([name for name in _OF_A_FIT if name in given], "a solver that fits heads", taken)
    unread = [name for name in _OF_ADAMW if name in given and not any(_reads(one, name) for one in solvers)]
    chosen = "" if config.solver in solvers else f", which is exact for --head {config.head} and this loss"
    refuse_given(unread, "--solver adamw", solver + chosen)
    if config.head != "spatial":
        refuse_given([name for name in _OF_SPATIAL if name in given], "--head spatial", f"--head {config.head}")


def _reads(solver: str, option: str) -> bool:
    return solver == "adamw" or (solver == "moments" and option in _OF_MOMENTS)
