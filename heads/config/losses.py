"""Losses by name, and how a sum of them is written.

A new loss is one file with a function and one entry in LOSS_SPECS (docs/extending.md).
"""

import math
import re
from dataclasses import dataclass

from featcache.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What has to be known of a loss before it is loaded."""

    function: str  # 'module:name' of a function (predictions, responses, noise_ceiling) -> 0-d tensor
    correlation: bool = False  # whether it compares images with each other, so that a batch needs two of a subject
    # Whether the best linear map of a vertex points in the least-squares direction: mse by definition; others because
    # they fall as the vertex's r rises, and least squares maximises r. Then any sum of such losses has that optimum.
    least_squares: bool = False


LOSS_SPECS: dict[str, LossSpec] = {
    "smooth_l1": LossSpec(function="heads.scores.losses:smooth_l1"),
    "mse": LossSpec(function="heads.scores.losses:mse", least_squares=True),
    "pearson": LossSpec(function="heads.scores.losses:pearson", correlation=True, least_squares=True),
    "pattern": LossSpec(function="heads.scores.losses:pattern"),  # within an image: it needs no other
    "mnnpc": LossSpec(function="heads.scores.losses:mnnpc", correlation=True, least_squares=True),
}
LOSS_NAMES = tuple(LOSS_SPECS)
CORRELATIONS = frozenset(name for name, spec in LOSS_SPECS.items() if spec.correlation)
LEAST_SQUARES = frozenset(name for name, spec in LOSS_SPECS.items() if spec.least_squares)
SAME = "same"  # the value of --roi-loss that stands for that of --loss

_TERM = re.compile(r"(?:(?P<weight>\d+\.?\d*(?:e-?\d+)?|\.\d+)\*)?(?P<name>[a-z_0-9]+)")


LOSS_HELP = (
    "smooth_l1, mse: errors. pearson: correlation over images. pattern: correlation over the vertices of an image. "
    "mnnpc: as pearson, weighed by noise ceilings."
)


def split_losses(text: str) -> list[str]:
    """Split several losses: 'mnnpc,pearson' -> ['mnnpc', 'pearson']."""
    return text.replace(" ", "").split(",")


def parse_loss(text: str, option: str = "--loss") -> tuple[tuple[float, str], ...]:
    """Read a sum of losses: 'smooth_l1+0.5*mnnpc' -> ((1.0, 'smooth_l1'), (0.5, 'mnnpc')). Raises ConfigError.

    option : the one that it is of, for messages
    """
    terms = []
    for part in text.replace(" ", "").split("+"):
        match = _TERM.fullmatch(part)
        if match is None or match["name"] not in LOSS_SPECS or not 0 < float(match["weight"] or 1) < math.inf:
            raise ConfigError(
                option,
                expected=f"{', '.join(LOSS_SPECS)} or a weighted sum such as smooth_l1+0.5*mnnpc",
                found=repr(part) if part == text else f"{part!r} in {text!r}",
                remedy="correct it",
            )
        terms.append((float(match["weight"] or 1), match["name"]))
    if len({name for _, name in terms}) < len(terms):
        raise ConfigError(
            option, expected="each loss once", found=f"one twice in {text!r}", remedy="add their weights up"
        )
    return tuple(sorted(terms, key=lambda term: list(LOSS_SPECS).index(term[1])))


def parse_roi_loss(text: str, loss: str) -> tuple[tuple[float, str], ...]:
    """Read the loss of heads of ROIs, or SAME: that of heads of whole surfaces, `loss`. Raises ConfigError."""
    return parse_loss(loss) if text == SAME else parse_loss(text, "--roi-loss")


def loss_label(terms: tuple[tuple[float, str], ...]) -> str:
    """Write a sum of losses as names have it: ((1.0, 'smooth_l1'), (0.5, 'mnnpc')) -> 'smooth_l1+0.5*mnnpc'."""
    return "+".join(name if weight == 1 else f"{_digits(weight)}*{name}" for weight, name in terms)


def _digits(weight: float) -> str:
    """As many as tell it from every other, and no '+', which `parse_loss` would take for another term."""
    return repr(float(weight)).removesuffix(".0").replace("e+", "e")
