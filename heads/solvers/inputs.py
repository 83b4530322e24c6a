"""What is passed to an estimator, as tensors, and predictions in the form in which responses were passed.

scikit-learn checks shapes, numbers and names of columns, with its own errors. Of a torch tensor, which may be on a GPU,
it sees only the shape.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils import validation as sklearn_validation

from featcache.errors import ArgumentError, ConfigError, some_of

_MIN_IMAGES = 3
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def features_of(
    estimator: Any, features: Any, targets: Any = "no_validation", *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """(n, n_features) float32 or float64 features, checked by scikit-learn; tensors stay on their device.

    float64 and whole numbers give float64, smaller floating-point numbers float32.

    targets : the responses, in a fit
    dtype : that of the fit, when features are to be predicted from
    """
    fits = dtype is None
    checks: dict[str, Any] = {"reset": fits, "ensure_min_samples": _MIN_IMAGES if fits else 1}
    if fits and targets is None:  # refused by scikit-learn
        checks["y"] = None
    if not isinstance(features, torch.Tensor):
        small = getattr(features, "dtype", None) == np.float16
        wanted = [np.float64, np.float32] if dtype is None else _NUMPY[dtype]
        with _beyond_is_infinite():
            array = _validate(estimator, features, dtype=np.float32 if small and fits else wanted, **checks)
        return _tensor(array)
    refuse_not_dense(features, "X")
    _validate(estimator, _shape_of(features), **{_FINITE: False}, **checks)
    return _checked_tensor(features, "X", dtype or _float_of(features.dtype))


def responses_of(estimator: Any, responses: Any, features: torch.Tensor) -> tuple[torch.Tensor, "Form"]:
    """(n_images, n_vertices) responses of the features' dtype and device, and the form they had.

    responses : (n_images, n_vertices), or (n_images,) of one vertex
    """
    checks = {"ensure_2d": False, "input_name": "y", "estimator": estimator}
    if isinstance(responses, torch.Tensor):
        refuse_not_dense(responses, "y")
        check_array(_shape_of(responses), **{_FINITE: False}, **checks)
        y = _checked_tensor(responses, "y", features.dtype)
    else:
        with _beyond_is_infinite():
            y = _tensor(check_array(responses, dtype=_NUMPY[features.dtype], **checks))
    check_consistent_length(_shape_of(features), _shape_of(y))
    return y.reshape(len(y), -1).to(features.device), Form.of(responses, one_vertex=y.ndim == 1)


def weights_of(estimator: Any, sample_weight: Any, features: torch.Tensor) -> torch.Tensor | None:
    """(n_images,) weights of images, with a mean of 1 over those above 0; None where all are alike.

    Raises ValueError for weights that are negative, not finite or of another number.
    """
    if sample_weight is None:
        return None
    if isinstance(sample_weight, torch.Tensor):
        refuse_not_dense(sample_weight, "sample_weight")
        sample_weight = sample_weight.detach().cpu().numpy()
    if isinstance(sample_weight, Number):
        sample_weight = np.full(len(features), sample_weight)
    checks = {"ensure_2d": False, "ensure_min_samples": 0, "dtype": np.float64, "input_name": "sample_weight"}
    values = check_array(sample_weight, estimator=estimator, **checks)
    n_used = int((values > 0).sum())
    if values.shape != (len(features),) or (values < 0).any() or n_used < _MIN_IMAGES:
        raise ArgumentError(
            "sample_weight",
            expected=f"({len(features)},) numbers from 0, of which {_MIN_IMAGES} or more are above 0",
            found=f"shape {values.shape}, {n_used} above 0, {(values < 0).sum()} below, the others zero",
            remedy="pass a weight for each image",
        )
    if (values == values[0]).all():
        return None
    values = values / values.max()
    return torch.as_tensor(values * (n_used / values.sum()), dtype=features.dtype, device=features.device)


@dataclass(frozen=True)
class Form:
    """The form in which responses were passed to `fit`.

    one_vertex : 1-D responses
    tensors : torch tensors
    frame : the class, if it is one of pandas
    columns : of a DataFrame, or the name of a Series
    """

    one_vertex: bool
    tensors: bool
    frame: type | None = None
    columns: Any = None

    @classmethod
    def of(cls, responses: Any, *, one_vertex: bool) -> "Form":
        if not hasattr(responses, "iloc"):
            return cls(one_vertex, isinstance(responses, torch.Tensor))
        columns = responses.name if one_vertex else responses.columns
        return cls(one_vertex, False, type(responses), columns)

    def attribute(self, values: torch.Tensor) -> Any:
        """(..., n_vertices) values as an array or tensor, like the responses; no last axis if they were 1-D."""
        values = values[..., 0] if self.one_vertex else values
        return values if self.tensors else values.cpu().numpy()

    def predictions(self, values: torch.Tensor, features: Any) -> Any:
        """(n, n_vertices) values as what they were predicted from, or as the DataFrame that responses were."""
        values = values[..., 0] if self.one_vertex else values
        if isinstance(features, torch.Tensor):
            return values.to(features.device)
        array = values.cpu().numpy()
        if self.frame is None:
            return array
        labels = {"name" if self.one_vertex else "columns": self.columns}
        return self.frame(array, index=features.index if hasattr(features, "iloc") else None, **labels)


def in_range(name: str, values: torch.Tensor) -> torch.Tensor:
    """The values, if all are numbers of their dtype. Raises ArgumentError."""
    if not _finite(values):
        raise _out_of_range(name, values.dtype, "larger ones")
    return values


def rescaled(name: str, values: torch.Tensor, unit: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(..., n_vertices) values times the unit of each vertex, in their dtype or another.

    Raises ArgumentError where they leave the range of the dtype, or all of a vertex are too small for it.
    """
    dtype = dtype or values.dtype
    if values.dtype == dtype and bool((unit == 1).all()):
        return in_range(name, values)
    exact = values.double() * unit.double()
    low, high = exact.reshape(-1, exact.shape[-1]).aminmax(dim=0)
    largest = torch.maximum(-low, high)
    if bool(((largest > 0) & (largest < torch.finfo(dtype).tiny)).any()):
        raise _out_of_range(name, dtype, "smaller ones")
    return in_range(name, exact.to(dtype))


def _out_of_range(name: str, dtype: torch.dtype, found: str) -> ArgumentError:
    kind = str(dtype).removeprefix("torch.")
    remedy = "fit to responses or features in another unit" + (", or to float64 features" if kind == "float32" else "")
    return ArgumentError(name, expected=f"numbers in the range of {kind}", found=found, remedy=remedy)


def penalties_in(given: Any) -> tuple[float, ...]:
    """Penalties as numbers; one number is one penalty. Raises ArgumentError."""
    try:
        values = np.asarray(given, dtype=np.float64)
        if values.ndim < 2 and not isinstance(given, str | Mapping):
            return tuple(values.ravel().tolist())
    except (TypeError, ValueError):  # refused by name
        pass
    raise ArgumentError("penalties", expected="a number or a list of numbers", found=repr(given), remedy="correct them")


def columns_of(
    bands: Mapping[str, Any] | None, n_features: int, names: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """{band: its columns (n,)}, from slices, lists of numbers, masks, or names of columns; None is one band of all.

    names : (n_features,) names of the columns, if they have any

    Raises ArgumentError for bands that are empty, repeat a column, or have columns that there are not.
    """
    if bands is None:
        return {"all": np.arange(n_features)}
    if not isinstance(bands, Mapping) or not bands:
        raise ArgumentError(
            "bands", expected="a name for each band of columns", found=bands, remedy='pass {"name": slice(0, 100), ...}'
        )
    return {band: _columns(band, columns, n_features, names) for band, columns in bands.items()}


def _columns(band: str, columns: Any, n_features: int, names: np.ndarray | None) -> np.ndarray:
    where = f"band {band!r}"
    if isinstance(columns, slice):
        chosen = np.arange(n_features)[columns]
    else:
        chosen = np.atleast_1d(np.asarray(columns))
        if chosen.dtype.kind in "UOST":
            chosen = _named(where, chosen, names)
        elif chosen.dtype.kind == "b" and chosen.shape == (n_features,):
            chosen = np.flatnonzero(chosen)
    whole = chosen.ndim == 1 and len(chosen) and chosen.dtype.kind in "iu"
    if not whole or chosen.min() < -n_features or chosen.max() >= n_features:
        raise ArgumentError(
            where,
            expected=f"a slice, numbers, a mask or names of some of the {n_features} columns",
            found=columns,
            remedy="correct it",
        )
    chosen = chosen % n_features
    if len(np.unique(chosen)) < len(chosen):
        raise ArgumentError(where, expected="each column once", found="one twice", remedy="leave the second out")
    return chosen


def _named(where: str, wanted: np.ndarray, names: np.ndarray | None) -> np.ndarray:
    positions = {name: position for position, name in enumerate([] if names is None else names)}
    missing = [str(name) for name in wanted if name not in positions]
    if missing:
        found = some_of(missing) if positions else "features without names"
        raise ArgumentError(where, expected="names of columns", found=found, remedy="pass a DataFrame that has them")
    return np.array([positions[name] for name in wanted])


@contextmanager
def argument_errors() -> Iterator[None]:
    """Raise a ConfigError as an ArgumentError, which scikit-learn takes for the ValueError that it is."""
    try:
        yield
    except ConfigError as error:
        raise ArgumentError(
            error.where, expected=error.expected, found=error.found, remedy=error.remedy
        ) from error.__cause__


if hasattr(sklearn_validation, "validate_data"):  # scikit-learn 1.6
    _FINITE = "ensure_all_finite"

    def _validate(estimator: Any, features: Any, **checks: Any) -> Any:
        return sklearn_validation.validate_data(estimator, features, **checks)
else:
    _FINITE = "force_all_finite"

    def _validate(estimator: Any, features: Any, **checks: Any) -> Any:
        return estimator._validate_data(features, **checks)


def _beyond_is_infinite() -> np.errstate:
    """Convert numbers beyond the range of a dtype to infinity without a warning: scikit-learn then refuses them."""
    return np.errstate(over="ignore", invalid="ignore")


def _shape_of(tensor: torch.Tensor) -> np.ndarray:
    """An array of the tensor's shape that takes no memory."""
    return np.broadcast_to(np.zeros((), np.float32), tuple(tensor.shape))


def _float_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else torch.float64


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor, copied only where torch cannot share its memory."""
    shared = array.flags.writeable and all(stride > 0 for stride in array.strides)
    return torch.from_numpy(array if shared else array.copy())


def _checked_tensor(values: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another dtype, without gradients. The errors have scikit-learn's words."""
    refuse_not_dense(values, name)
    if values.is_complex():
        raise ValueError(f"Complex data not supported\n{name}")
    converted = values.detach().to(dtype)
    if not _finite(converted):
        kind = "NaN" if torch.isnan(converted).any() else f"infinity or a value too large for {dtype}"
        raise ValueError(f"Input {name} contains {kind}.")
    return converted


def refuse_not_dense(values: torch.Tensor, name: str) -> None:
    """Raise ArgumentError for a tensor that is not a plain array of numbers in memory."""
    kind = "nested" if values.is_nested else "meta" if values.is_meta else str(values.layout).removeprefix("torch.")
    kind = "quantized" if values.is_quantized else kind
    if kind != "strided":
        remedy = {"meta": "load its values", "nested": "pad it", "quantized": f"pass {name}.dequantize()"}
        raise ArgumentError(
            name,
            expected="a dense tensor",
            found=f"a {kind} one",
            remedy=remedy.get(kind, f"pass {name}.to_dense()"),
        )


def _finite(values: torch.Tensor) -> bool:
    # a sum takes a fraction of the time of a test of every number, and is finite only if all are
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())
