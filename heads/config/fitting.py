"""Settings of heads on cached features: which heads, which losses, which solver."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from featcache.config import DEVICES, PRODUCTS, at_least, check_split, one_of, option, split_option
from featcache.errors import ConfigError
from heads.config.checks import check_dropout, refuse_given
from heads.config.losses import LOSS_HELP, LOSS_NAMES, SAME, loss_label, parse_loss, parse_roi_loss, split_losses
from heads.config.solvers import HEADS, SOLVERS, SolverSpec, automatic_solver

STORED = ("float16", "float32")  # in which predictions can be stored


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """The gradient loop of the heads."""

    learning_rate: float = option(
        3e-4,
        "Learning rate of adamw at its first step; it falls to zero along a cosine.",
        "Training",
    )
    weight_decay: float = option(0.1, "Decoupled weight decay of adamw; intercepts have none.", "Training")
    epochs: int = option(60, "Largest number of passes of adamw over the training images.", "Training")
    batch_size: int = option(
        128, "Images in one step of adamw. A correlation loss is taken over these images alone.", "Training"
    )
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
    """Settings that a head is trained with where nothing else is said."""
    return _ADAMW.get(head, AdamWConfig())


# Spatial heads start from the closed form, which long steps would only undo (docs/decisions/0015).
_ADAMW = {
    "spatial": AdamWConfig(learning_rate=1e-4, epochs=30, batch_size=32),
    "core": AdamWConfig(learning_rate=2e-3, weight_decay=0.5, epochs=15, batch_size=64, patience=5),
}


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
class SpatialConfig:
    """Spatial heads on cached layers: maps over places times maps over channels (see heads.modules.spatial)."""

    rank: int = option(
        4, "Number of maps over places, each with weights on channels, for each output and layer.", "Spatial heads"
    )
    space: int = option(
        0,
        "Outputs of one readout that all subjects share; each vertex is a linear combination of them. 0: no shared "
        "readout.",
        "Spatial heads",
    )
    token_dropout: float = option(
        0.3, "Fraction of the places of a layer that training leaves out of an image.", "Spatial heads"
    )
    smoothness: float = option(
        0.1, "Weight of the penalty on differences between neighbouring places of a map.", "Spatial heads"
    )
    sparsity: float = option(0.0, "Weight of the penalty on maps that spread over many places.", "Spatial heads")

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        at_least("space", self.space, 0)
        at_least("smoothness", self.smoothness, 0)
        at_least("sparsity", self.sparsity, 0)
        check_dropout(self.token_dropout)

    @property
    def joint(self) -> bool:
        """Whether one training serves several subjects."""
        return self.space > 0


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """A small network on cached maps that all subjects share (see heads.modules.core)."""

    members: int = option(
        3, "Networks that are trained from different first weights; predictions are their mean.", "Shared core"
    )
    hidden: int = option(512, "Channels that every layer is brought to.", "Shared core")
    channels: int = option(384, "Channels of the core's output.", "Shared core")
    blocks: int = option(2, "Residual blocks of the core.", "Shared core")
    core_dropout: float = option(
        0.1, "Fraction of the places of the core's output that training leaves out of an image.", "Shared core"
    )

    def __post_init__(self) -> None:
        at_least("members", self.members, 1)
        at_least("hidden", self.hidden, 1)
        at_least("channels", self.channels, 1)
        at_least("blocks", self.blocks, 0)
        check_dropout(self.core_dropout, "core-dropout")

    @property
    def joint(self) -> bool:
        """Whether one training serves several subjects."""
        return True


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Which heads are fitted to a feature store, and how."""

    loss: str = option(
        "mnnpc",
        f"What heads optimise: {', '.join(LOSS_NAMES)}, or a weighted sum such as smooth_l1+0.5*mnnpc. "
        f"{LOSS_HELP} Several losses with commas between them give a model of each.",
        "Heads",
    )
    head: str = option(
        "linear",
        f"Kind of head: {', '.join(HEADS)}. linear: one linear map for each surface. roi: one more linear "
        "map for each ROI. spatial: maps over the places of layers. core: a small network "
        "on layers that all subjects share.",
        "Heads",
    )
    roi_loss: str = option(
        SAME,
        "ROI heads: what the map of each ROI optimises, where --loss is of the surface's map. same: the same.",
        "Heads",
    )
    features: str = option(
        "*",
        "Features that heads are fitted to, by names such as 'tf_efficientnet_lite0@112 whole pretrain' (backbone and "
        "size, fit if it is not crop, stage), with or without their six digits: patterns with commas between them.",
        "Layers",
    )
    layers: str = option(
        "all",
        "Extracted layers that the heads read. all: one model on all layers. each: one model on each layer. Or names "
        "with commas between them: one model on these layers.",
        "Layers",
    )
    solver: str = option(
        "auto",
        f"How heads are fitted: {', '.join(SOLVERS)}. auto: ridge (closed form) if it has the optimum of the loss, "
        "else adamw. trained: the heads that were trained with the backbone, unchanged.",
        "Heads",
    )
    n_folds: int = option(5, "Parts (folds) that the training images are divided into.", "Data", name="folds")
    seed: int = option(
        0,
        "Seed of the folds. The same --folds and --fold-seed give the same folds in every command. Also the seed of "
        "adamw.",
        "Data",
        name="fold-seed",
    )
    split: str = split_option()
    device: str = option("auto", f"Where to compute: {', '.join(DEVICES)}.", "Machine")
    # of the products with responses, never of those that are decomposed
    products: str = option("float32", f"Precision of matrix products on CUDA: {', '.join(PRODUCTS)}.", "Machine")
    dtype: str = option(
        "float16",
        f"Precision in which predictions are stored: {', '.join(STORED)}. float16 becomes float32 where it would "
        "change a score by 0.0001.",
        "Machine",
    )
    max_memory: float = option(
        0.0, "Main memory that the process may take, in 10^9 bytes. 0: all free memory.", "Machine"
    )
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    core: CoreConfig = field(default_factory=CoreConfig)

    def __post_init__(self) -> None:
        one_of("head", self.head, tuple(HEADS))
        one_of("solver", self.solver, ("auto", *SOLVERS))
        one_of("device", self.device, DEVICES)
        one_of("products", self.products, PRODUCTS)
        one_of("dtype", self.dtype, STORED)
        at_least("folds", self.n_folds, 2)
        at_least("fold-seed", self.seed, 0)
        check_split(self.split)
        at_least("max-memory", self.max_memory, 0)
        for loss in split_losses(self.loss):
            terms = parse_loss(loss)
            losses = names_of(terms)
            if self.solver != "auto" and not (spec := SOLVERS[self.solver]).serves(self.head, losses):
                raise ConfigError(
                    f"--solver {self.solver}",
                    expected=f"--head {' or '.join(spec.heads)} and a loss of {', '.join(spec.losses)}",
                    found=f"--head {self.head} --loss {loss_label(terms)}",
                    remedy=f"use --solver {automatic_solver(self.head, losses)}",
                )
            parse_roi_loss(self.roi_loss, loss)
        if self.roi_loss != SAME:
            _refuse_without_roi_heads(["roi_loss"], self.head)

    def variants(self) -> "list[FitConfig]":
        """The settings with each of the losses alone; of losses whose heads are the same, the first."""
        by_objective: dict[str, FitConfig] = {}
        for loss in split_losses(self.loss):
            variant = replace(self, loss=loss)
            by_objective.setdefault(variant.objective, variant)
        return list(by_objective.values())

    @property
    def terms(self) -> tuple[tuple[float, str], ...]:
        """(weight, name) of each loss in the sum."""
        return parse_loss(self.loss)

    @property
    def roi_terms(self) -> tuple[tuple[float, str], ...]:
        """(weight, name) of each loss in the sum that heads of ROIs have."""
        return parse_roi_loss(self.roi_loss, self.loss)

    @property
    def resolved_solver(self) -> str:
        """The solver's name, with auto resolved."""
        return automatic_solver(self.head, names_of(self.terms)) if self.solver == "auto" else self.solver

    @property
    def solver_spec(self) -> SolverSpec:
        """The solver's entry in SOLVERS, with auto resolved."""
        return SOLVERS[self.resolved_solver]

    @property
    def builder(self) -> str:
        """'module:name' of the function that builds the solver for these heads."""
        head = HEADS[self.head].build if self.solver_spec.fits else None
        return head or self.solver_spec.build

    @property
    def joint(self) -> bool:
        """Whether one training serves several subjects."""
        settings = HEADS[self.head].settings
        return self.solver_spec.fits and settings is not None and bool(getattr(self, settings).joint)

    @property
    def shared_losses(self) -> dict[str, list[str]]:
        """{solver: losses whose heads are the same}, for solvers that fit one objective whatever the loss."""
        shared: dict[str, list[str]] = {}
        for variant in (replace(self, loss=loss) for loss in split_losses(self.loss)):
            if variant.solver_spec.fits and variant.solver_spec.objective:
                shared.setdefault(variant.resolved_solver, []).append(variant.loss)
        return shared

    @property
    def objective(self) -> str:
        """What the heads optimise, in a word: the loss, or the one objective that their solver has."""
        return self.solver_spec.objective or loss_label(self.terms)

    def key(self) -> dict[str, Any]:
        """What decides the heads, given features, responses and ceilings."""
        spec = self.solver_spec
        if not spec.fits:  # its heads were trained with the backbone, whose key has everything
            return {"head": spec.stored, "solver": spec.stored, "objective": self.objective}
        key: dict[str, Any] = {"head": self.head, "n_folds": self.n_folds, "seed": self.seed}
        if self.products != "float32":
            key["products"] = self.products
        if HEADS[self.head].reads_rois:
            key["roi_loss"] = loss_label(self.roi_terms)
        settings = self._settings(spec.settings) | self._settings(HEADS[self.head].settings)
        return key | {"solver": spec.stored, "objective": self.objective, "settings": settings}

    def _settings(self, name: str | None) -> dict[str, Any]:
        settings = vars(getattr(self, name)) if name else {}
        return {option: list(value) if isinstance(value, tuple) else value for option, value in settings.items()}


def names_of(terms: Sequence[tuple[float, str]]) -> list[str]:
    """Names of the losses in a sum."""
    return [name for _, name in terms]


def default_settings(head: str, spec: SolverSpec) -> dict[str, Any]:
    """Settings of a solver and its heads where nothing is asked for."""
    usual = FitConfig(head=head, adamw=adamw_of(head))
    names = [name for name in (spec.settings, HEADS[head].settings) if name]
    return {option: value for name in names for option, value in vars(getattr(usual, name)).items()}


# {head: options of fit-heads that decide something for these heads alone}, and options for every solver that fits
_OF_HEADS = {
    "roi": ("roi_loss",),
    "spatial": tuple(setting.name for setting in fields(SpatialConfig)),
    "core": tuple(setting.name for setting in fields(CoreConfig)),
}
_OF_A_FIT = ("loss", "head", "folds", "fold_seed", "seed")


def refuse_unread(given: Collection[str], config: FitConfig) -> None:
    """Raise ConfigError for options of fit-heads that were given and decide nothing under these settings."""
    specs = {variant.resolved_solver: variant.solver_spec for variant in config.variants()}
    of_solvers = dict.fromkeys(name for spec in SOLVERS.values() for name in spec.options)
    found = f"--solver {config.solver}"
    if not any(spec.fits for spec in specs.values()):
        taken = f"{found}, which takes the heads of a checkpoint as they are"
        of_heads = [name for names in _OF_HEADS.values() for name in names]
        unread = [name for name in (*_OF_A_FIT, *of_solvers, *of_heads) if name in given]
        refuse_given(unread, "a solver that fits heads", taken)
    if config.solver not in specs:
        found += f", which is {' and '.join(specs)} for --head {config.head} and this loss"
    for name in of_solvers:
        readers = [solver for solver, spec in SOLVERS.items() if name in spec.options]
        if name in given and specs.keys().isdisjoint(readers):
            refuse_given([name], f"--solver {' or '.join(readers)}", found)
    for head, names in _OF_HEADS.items():
        if head != config.head:
            refuse_given([name for name in names if name in given], f"--head {head}", f"--head {config.head}")


def _refuse_without_roi_heads(given: Sequence[str], head: str) -> None:
    """Raise ConfigError for options of heads of ROIs that were given with other heads."""
    if not HEADS[head].reads_rois:
        readers = [name for name, spec in HEADS.items() if spec.reads_rois]
        refuse_given(given, f"--head {' or '.join(readers)}", f"--head {head}")
