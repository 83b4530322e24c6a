"""Noise ceilings as they are given: in percent or as fractions of variance, and what is neither."""

import re
from collections.abc import Sequence

import numpy as np

# Percent are told by their largest value. Of NSD it is above 69 in every subject and hemisphere, while ratios of signal
# to noise (ncsnr) reach 1.7 there; 4 would be a ceiling of 98 percent at three trials.
_LARGEST_NO_PERCENT = 4
# Shares of the values above 0 and below 0.2 that are below 0.05. In 16 files of NSD it is 0.08 to 0.25 of ceilings, and
# 0.01 to 0.05 of the ncsnr that they are made from: a ceiling goes with the square of the ncsnr.
_LOW, _LOWER, _FEW, _ENOUGH = 0.2, 0.05, (0.002, 0.065), 500
NCSNR = "ncsnr are no ceilings, which are ncsnr^2 / (ncsnr^2 + 1/n) of n trials an image"


def is_percent(largest: float) -> bool:
    """Whether ceilings of this largest value are in percent; others are fractions, or no ceilings."""
    return largest > _LARGEST_NO_PERCENT


def out_of_range(value: float, place: int, unit: int) -> str:
    """What is found in the place of a ceiling from 0 to `unit`, in words."""
    hint = f"; percent reach more than {_LARGEST_NO_PERCENT} in any recording, and {NCSNR}"
    return f"{value:.6g} at vertex {place}{hint if unit == 1 and 1 < value <= 100 else ''}"


def is_named_ncsnr(name: str) -> bool:
    """Whether the name of a file, a folder or an array says that it holds ratios of signal to noise."""
    return bool(re.search("ncsnr", name, re.IGNORECASE)) and not re.search("ceil", name, re.IGNORECASE)


def note_on_unit(ceilings: Sequence[np.ndarray], unit: int) -> str:
    """How ceilings were read: 'read as percent (median 39.1, largest 85.3)', and whether they look like ncsnr.

    ceilings : as they were given, (n_vertices,) each
    """
    values = np.concatenate([np.ravel(array) for array in ceilings])
    whole = values[np.isfinite(values)]
    if not len(whole):
        return "of which none is a number"
    about = f"median {np.median(whole):.3g}, largest {whole.max():.4g}"
    words = f"read as percent ({about})" if unit == 100 else f"read as fractions of variance, not percent ({about})"
    low = whole[(whole > 0) & (whole < _LOW)]
    share = float((low < _LOWER).mean()) if len(low) >= _ENOUGH else 1.0
    if unit == 1 and _FEW[0] < share < _FEW[1]:
        words += f"; they are distributed as ncsnr are: if they are, {NCSNR}"
    return words
