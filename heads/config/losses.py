"""Losses by name, and how a sum of them is written."""

import math
import re

from featcache.errors import ConfigError

LOSS_NAMES = ("smooth_l1", "mse", "pearson", "mnnpc")
CORRELATIONS = frozenset({"pearson", "mnnpc"})

# Under each of these, and any sum of them, the best linear map of a vertex points in the least-squares direction:
# mse by definition, the others because they fall as the vertex's r rises, and least squares maximises r.
LEAST_SQUARES = frozenset({"mse", "pearson", "mnnpc"})

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
                "--loss",
                expected=f"{', '.join(LOSS_NAMES)} or a weighted sum such as smooth_l1+0.5*mnnpc",
                found=f"{part!r} in {text!r}",
                remedy="correct it",
            )
        terms.append((float(match["weight"] or 1), match["name"]))
    if len({name for _, name in terms}) < len(terms):
        raise ConfigError(
            "--loss", expected="each loss once", found=f"one twice in {text!r}", remedy="add their weights up"
        )
    return tuple(sorted(terms, key=lambda term: LOSS_NAMES.index(term[1])))


def loss_label(terms: tuple[tuple[float, str], ...]) -> str:
    """The one way to write a loss: ((1.0, 'smooth_l1'), (0.5, 'mnnpc')) -> 'smooth_l1+0.5*mnnpc'."""
    return "+".join(name if weight == 1 else f"{_digits(weight)}*{name}" for weight, name in terms)


def _digits(weight: float) -> str:
    """As many as tell it from every other, and no '+', which `parse_loss` would take for another term."""
    return repr(float(weight)).removesuffix(".0").replace("e+", "e")
