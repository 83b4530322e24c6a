"""Units of features and responses: powers of two that keep numbers away from the ends of their range.

Where numbers are ordinary, every unit is 1, and nothing changes.
"""

import numpy as np
import torch

# How many times as much as a quarter of the columns do a column may vary. Columns of real layers are within 6 of it.
WIDEST = 16.0
_NUMBERS_AT_ONCE = 1 << 22  # of features that are float64 at a time
_CONSTANT = 8  # epsilons of a column's mean: less variation is rounding
_ORDINARY = 2.0**20  # squares of numbers from 1 / this to this, and sums of them, are far from the ends of float32


def unit_of(values: torch.Tensor) -> torch.Tensor:
    """(n_columns,) powers of two to divide columns by, so that squares do not leave the range of the dtype.

    1 for a column of ordinary numbers, which need no unit. A power of two changes no digit.
    """
    low, high = values.aminmax(dim=0)
    largest = torch.maximum(-low, high)
    most = int(np.log2(torch.finfo(values.dtype).max)) - 7
    exponents = (torch.frexp(largest).exponent - 1).clamp(-most, most)
    ordinary = (largest == 0) | ((largest >= 1 / _ORDINARY) & (largest <= _ORDINARY))
    return torch.where(ordinary, torch.ones_like(largest), torch.ldexp(torch.ones_like(largest), exponents))


def column_units(features: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(n_features,) float64 that columns are divided by, and the power of two among it that all columns share.

    Penalties hang on the mean variance of the columns. One column of much larger numbers than the others, such as a
    time stamp, would set it alone, and the penalties on offer would then leave nothing of the others. So a column
    varies `WIDEST` times as much as a quarter of them do, at most; it is divided by what is beyond. Where no column is
    beyond, all have the one power of two, which is 1 for ordinary numbers. Columns that vary little are not multiplied:
    one new image in which such a column is not small would then be predicted by it alone. A column that varies by no
    more than rounding has infinity: it says nothing.
    """
    own = unit_of(features).double()
    low, high, std, mean = _column_statistics(features, own)
    noise = (low < high) & (std <= _CONSTANT * torch.finfo(features.dtype).eps * mean.abs())
    std = (std * own).clamp_max(torch.finfo(torch.float64).max)
    excess, widest = torch.ones_like(std), widest_of(torch.where((low < high) & ~noise, std, 0.0))
    if widest is not None:
        beyond = (std / widest).clamp_min(1)
        excess = torch.exp2(beyond.log2().ceil())  # a power of two changes no digit
    largest = (torch.maximum(-low, high) * own / excess).clamp_max(torch.finfo(features.dtype).max)
    shared = float(unit_of(largest[None].to(features.dtype)).max())
    return torch.where(noise, torch.inf, excess * shared), shared


def _column_statistics(features: torch.Tensor, units: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(n_features,) float64 smallest and largest value, standard deviation and mean of each column, in its unit."""
    found = []
    step = max(_NUMBERS_AT_ONCE // max(len(features), 1), 1)
    for columns, of_columns in zip(features.split(step, 1), units.split(step), strict=True):
        scaled = columns.double() / of_columns
        found.append(torch.stack([*scaled.aminmax(dim=0), *torch.std_mean(scaled, 0, correction=0)]))
    return tuple(torch.cat(found, 1))


def in_units(values: torch.Tensor, unit: torch.Tensor | float) -> torch.Tensor:
    """The values divided by their unit; the values themselves if it is 1."""
    if bool(torch.as_tensor(unit == 1).all()):
        return values
    if isinstance(unit, torch.Tensor) and unit.dtype != values.dtype:
        if bool((unit[unit.isfinite()] > torch.finfo(values.dtype).max).any()):
            return (values.double() / unit).to(values.dtype)
        unit = unit.to(values.dtype)
    return values / unit


def means_of(features: torch.Tensor) -> torch.Tensor:
    """(n_features,) means; of a constant column its value, so that nothing of it is left by rounding."""
    low, high = features.aminmax(dim=0)
    return torch.where(low == high, low, features.mean(0))


def widest_of(spreads: torch.Tensor) -> torch.Tensor | None:
    """Largest spread that a column may have beside others; None where none varies. spreads : (n,) above 0 if varying"""
    varying = spreads[spreads > 0].sort().values
    return WIDEST * varying[(len(varying) - 1) // 4] if len(varying) else None


def varies(std: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Where a standard deviation is more than the rounding of float32 leaves of a mean."""
    return std > _CONSTANT * torch.finfo(torch.float32).eps * mean.abs()


def to_train_on(responses: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """(n_images, n_vertices) responses that gradient steps of the usual size can reach, for a head that is calibrated.

    A vertex whose standard deviation over `rows` is beyond 16, or below 1/16, is divided by a power of two; one whose
    mean is beyond 16 standard deviations loses it. Others, such as z-scored ones, are as they were.
    """
    std, mean = torch.std_mean(responses[rows].double(), 0, correction=0)
    usual = (std == 0) | ((std >= 1 / WIDEST) & (std <= WIDEST))
    far = (std > 0) & (mean.abs() > WIDEST * std)
    if bool((usual & ~far).all()):
        return responses
    unit = torch.where(usual, 1.0, torch.exp2(torch.where(usual, 1.0, std).log2().round()))
    return ((responses.double() - torch.where(far, mean, 0.0)) / unit).to(responses.dtype)
