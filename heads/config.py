"""Settings of fitting and blending heads. Imports no torch, so that `--help` answers at once."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from featcache.config import DEVICES, at_least, one_of
from featcache.errors import ConfigError

LOSS_NAMES = ("smooth_l1", "mse", "pearson", "mnnpc")
HEADS = ("linear", "roi")
SOLVERS = ("auto", "exact", "adamw")
BLENDS = ("uniform", "score", "greedy")

# Under each of these, and any sum of them, the best linear map of a vertex points in the least-squares direction:
# mse by definition, the others because they fall as the vertex's r rises, and least squares maximises r.
_LEAST_SQUARES = frozenset({"mse", "pearson", "mnnpc"})

_TERM = re.compile(r"(?:(?P<weight>\d+\.?\d*(?:e-?\d+)?|\.\d+)\*)?(?P<name>[a-z_0-9]+)")


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
class FitConfig:
    """Which heads are fitted to a feature store, and how."""

    loss: str = "mnnpc"  # a weighted sum of LOSS_NAMES
    head: str = "linear"  # linear | roi
    solver: str = "auto"  # auto | exact | adamw
    n_folds: int = 5  # of the training images, by image id
    seed: int = 0  # of the folds and of the gradient loop
    device: str = "auto"
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)

    def __post_init__(self) -> None:
        one_of("head", self.head, HEADS)
        one_of("solver", self.solver, SOLVERS)
        one_of("device", self.device, DEVICES)
        at_least("folds", self.n_folds, 2)
        at_least("seed", self.seed, 0)
        parse_loss(self.loss)
        if self.solver == "exact" and not self.exact_reaches_optimum:
            raise ConfigError(
                "--solver exact: expected --head linear and a loss of mse, pearson and mnnpc, whose optimum it is; "
                f"found --head {self.head} --loss {loss_label(self.terms)}; use --solver adamw"
            )

    @property
    def terms(self) -> tuple[tuple[float, str], ...]:
        return parse_loss(self.loss)

    @property
    def exact_reaches_optimum(self) -> bool:
        return self.head == "linear" and all(name in _LEAST_SQUARES for _, name in self.terms)

    @property
    def resolved_solver(self) -> str:
        if self.solver == "auto":
            return "exact" if self.exact_reaches_optimum else "adamw"
        return self.solver

    @property
    def objective(self) -> str:
        """What the heads optimise, in a word: every loss that closed form serves has the same heads."""
        return "ridge" if self.resolved_solver == "exact" else loss_label(self.terms)

    def recipe(self) -> dict[str, Any]:
        """What decides the heads, given features, responses and ceilings."""
        solver = self.ridge if self.resolved_solver == "exact" else self.adamw
        settings = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(solver).items()}
        common = {"head": self.head, "n_folds": self.n_folds, "seed": self.seed}
        return common | {"solver": self.resolved_solver, "objective": self.objective, "settings": settings}


@dataclass(frozen=True)
class BlendConfig:
    """How models are weighed against each other, per subject and hemisphere."""

    method: str = "greedy"  # uniform | score | greedy

    def __post_init__(self) -> None:
        one_of("method", self.method, BLENDS)
