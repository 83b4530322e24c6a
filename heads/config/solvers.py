"""Solvers and heads by name: the two tables that know all of them.

A new solver is one file with a builder and one entry in SOLVERS; a new head is one file with a module and one entry in
HEADS (docs/extending.md). Nobody else compares their names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from featcache.errors import StoreError
from heads.config.losses import LOSS_SPECS


@dataclass(frozen=True, kw_only=True)
class SolverSpec:
    """What has to be known of a solver before it is loaded."""

    build: str  # 'module:name' of a function (Problem) -> Solver (see heads/solvers/base.py)
    stored: str  # its name in the key of a prediction store
    settings: str | None = None  # the field of FitConfig that holds its settings
    options: tuple[str, ...] = ()  # options of fit-heads that it reads, beyond those that every solver reads
    automatic: bool = False  # whether --solver auto may take it; the first in the table that serves is taken
    linear_heads: bool = False  # whether it serves linear heads alone
    serves_loss: Callable[[str], bool] | None = None  # whether it serves a loss, by name; None: every loss
    blockwise: bool = False  # whether it takes blocks of vertices on features of a frozen backbone, as plans estimate
    fits: bool = True  # False: it takes heads as they are, so that loss, head and folds decide nothing
    random: bool = False  # whether its heads depend on the seed, beyond the folds
    reads_noise_ceiling: bool = False
    under_priors: bool = False  # whether it fits several layers, or places, under priors
    objective: str | None = None  # what all its heads optimise, in a word; None: the loss says it
    named_settings: bool = True  # whether settings that are not the default are part of a model's name

    def serves(self, head: str, losses: Sequence[str]) -> bool:
        """Whether it can fit these heads under a sum of these losses."""
        return head in self.heads and set(losses) <= set(self.losses)

    @property
    def heads(self) -> list[str]:
        """Names of the heads that it serves."""
        return [name for name, head in HEADS.items() if head.linear or not self.linear_heads]

    @property
    def losses(self) -> list[str]:
        """Names of the losses that it serves, and sums of which."""
        return [name for name in LOSS_SPECS if self.serves_loss is None or self.serves_loss(name)]


def least_squares(loss: str) -> bool:
    """Whether the best linear map under a loss is that of least squares."""
    return LOSS_SPECS[loss].least_squares


SOLVERS: dict[str, SolverSpec] = {
    "ridge": SolverSpec(
        build="heads.solvers.ridge_folds:build",
        stored="exact",
        settings="ridge",
        automatic=True,
        linear_heads=True,
        serves_loss=least_squares,
        blockwise=True,
        objective="ridge",
        under_priors=True,
        named_settings=False,  # it chooses penalties by itself
    ),
    "adamw": SolverSpec(
        build="heads.solvers.gradient:build",
        stored="adamw",
        settings="adamw",
        options=("epochs", "learning_rate", "weight_decay", "batch_size"),
        automatic=True,
        random=True,
        reads_noise_ceiling=True,
    ),
    "trained": SolverSpec(
        build="heads.solvers.trained:build", stored="trained", fits=False, objective="trained", named_settings=False
    ),
}


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What has to be known of a kind of head before it is loaded."""

    module: str | None = None  # 'module:name' of a function (n_features, n_vertices, rois) -> module, on one matrix
    build: str | None = None  # or of a function (Problem) -> Solver, for heads that read something else
    linear: bool = False  # whether it is one linear layer, whose optimum closed form can find
    reads_rois: bool = False  # whether it has heads of ROIs, which --roi-loss may give a loss of their own
    copies: int = 1  # layers that predict each vertex, at most: what memory is estimated from
    settings: str | None = None  # the field of FitConfig that holds its settings
    under_priors: bool = False  # whether its last step is the closed form under priors
    auto_precision: bool = False  # whether it multiplies in bfloat16 on a CPU that has units for it; the key says which


HEADS: dict[str, HeadSpec] = {
    "linear": HeadSpec(module="heads.modules.linear:make_linear", linear=True),
    "roi": HeadSpec(module="heads.modules.linear:make_roi", reads_rois=True, copies=2),
    "spatial": HeadSpec(build="heads.solvers.spatial:build", settings="spatial"),
    "core": HeadSpec(build="heads.solvers.core:build", settings="core", under_priors=True, auto_precision=True),
}


def solver_of(stored: str) -> SolverSpec:
    """The solver that a prediction store names in its key. Raises StoreError for one that is not in the table."""
    for spec in SOLVERS.values():
        if spec.stored == stored:
            return spec
    raise StoreError(
        "a prediction store",
        expected=f"heads of a solver among {', '.join(spec.stored for spec in SOLVERS.values())}",
        found=repr(stored),
        remedy="add the solver's entry, or move the store out of the work folder",
    )


def automatic_solver(head: str, losses: Sequence[str]) -> str:
    """The solver that --solver auto takes for these heads and losses."""
    return next(name for name, spec in SOLVERS.items() if spec.automatic and spec.serves(head, losses))
