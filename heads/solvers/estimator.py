"""Ridge regression as scikit-learn estimators, for use without the rest.

All three take NumPy arrays, torch tensors or pandas DataFrames, and work in Pipeline, GridSearchCV and
cross_val_predict.

- Shapes: features (n_images, n_features), responses (n_images, n_vertices), or (n_images,) of one vertex. Predictions
  and attributes then have no axis of vertices.
- Dtype: that of the features. float64 and whole numbers are computed in float64, smaller floating-point numbers in
  float32; so are predictions. Penalties and errors are float64, because squares leave the range of float32.
- Kind: predictions from tensors are tensors on the device of these. Otherwise they are a DataFrame (or Series) if the
  responses were one, with the columns of the responses and the index of the features, else an array. Attributes are
  tensors if the responses were, else arrays.
- Features times 1e18 or 1e-24 give the same predictions; responses times 1e37 or 1e-30 give predictions times as much.
  Predictions or weights that the dtype cannot hold are refused. A column that varies more than 16 times as much as a
  quarter of the columns do is divided by what is beyond, so that it cannot hide the others (see column_units).

What scikit-learn checks raises its errors. The rest raises ArgumentError, which is a ValueError.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.utils.validation import check_is_fitted

from featcache.errors import ArgumentError
from heads.config import RidgeConfig
from heads.modules.linear import LinearMap
from heads.solvers.banded import by_root, rooted_kernel
from heads.solvers.inputs import (
    argument_errors,
    features_of,
    in_range,
    penalties_in,
    refuse_not_dense,
    rescaled,
    responses_of,
    weights_of,
)
from heads.solvers.ridge import centre_kernel, eigenbasis, eigh_of, fit_on_axes, is_exact, penalties_of
from heads.solvers.units import column_units, in_units, means_of, unit_of


class Head(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What the estimators share: how they read what is passed, and give back predictions."""

    def _read(
        self, X: Any, y: Any, sample_weight: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Features, responses in the unit of each vertex, and weights of the images that have one above 0, for a fit.

        The weights have a mean of 1; None: all alike. Last come the numbers of these images.
        """
        x = features_of(self, X, y)
        self._n_images = len(x)
        responses, self._form = responses_of(self, y, x)
        weights, rows = weights_of(self, sample_weight, x), torch.arange(len(x), device=x.device)
        if weights is not None and not weights.all():
            rows = torch.nonzero(weights)[:, 0]
            x, responses, weights = x[rows], responses[rows], weights[rows]
        self._response_unit, self._dtype, self._device = unit_of(responses), x.dtype, x.device
        return x, in_units(responses, self._response_unit), weights, rows

    def _read_again(self, X: Any) -> torch.Tensor:
        """Features to predict from."""
        check_is_fitted(self)
        return features_of(self, X, dtype=self._dtype).to(self._device)

    def _give(self, predictions: torch.Tensor, X: Any) -> Any:
        """Predictions in the responses' units and form."""
        return self._form.predictions(rescaled("predictions", predictions, self._response_unit), X)

    def _attribute(self, name: str, values: torch.Tensor, unit: float = 1.0) -> Any:
        """Values per vertex, in the responses' units for one `unit`, in the responses' form."""
        return self._form.attribute(rescaled(name, values, self._response_unit.double() / unit))

    def predict(self, X: Any) -> Any:
        raise NotImplementedError

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of variance that is explained, 1 at most, summed in float64; mean over vertices."""
        predictions, y = (as_float64(values) for values in (self.predict(X), y))
        return float(r2_score(y, predictions, sample_weight=sample_weight))


class RidgeHead(Head):
    """Ridge regression with a penalty for each vertex, chosen on the training images.

    Parameters
    ----------
    penalties : numbers from 0 to choose from, in multiples of the mean eigenvalue of the scatter X'X of the centred
        features
    selection : how a penalty is chosen: 'loo', by exact leave-one-out error; 'gcv', by generalised cross-validation;
        'auto', the first for up to 1,024 images

    Attributes
    ----------
    weights_ : (n_features, n_vertices), in the responses' unit for one unit of the feature
    intercept_ : (n_vertices,)
    penalties_ : (n_vertices,) float64, in the features' unit squared, on the weights of the features over their scales
    feature_scales_ : (n_features,) float64 from 1, that features are divided by: 1 but for those that vary 16 times as
        much as a quarter of them do; infinite for those that vary by no more than rounding
    n_features_in_, feature_names_in_ : number of features, and their names if they were a DataFrame

    Examples
    --------
    >>> import numpy as np, featcache as fc
    >>> rng = np.random.default_rng(0)
    >>> features, weights = rng.normal(size=(100, 20)), rng.normal(size=(20, 3))
    >>> head = fc.RidgeHead().fit(features[:80], features[:80] @ weights)
    >>> head.predict(features[80:]).shape
    (20, 3)
    >>> bool(head.score(features[80:], features[80:] @ weights) > 0.999)
    True
    """

    def __init__(
        self, penalties: Sequence[float] = RidgeConfig.penalties, selection: str = RidgeConfig.selection
    ) -> None:
        self.penalties = penalties
        self.selection = selection

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit a ridge model to each vertex. X : (n_images, n_features); y : (n_images, n_vertices) or (n_images,)

        sample_weight : (n_images,) from 0, of the squared error of each image in the fit and in the choice of a
            penalty; only their ratios count. An image of weight 0 is left out

        Raises ValueError for shapes that do not match, values that are not finite, or fewer than 3 images.
        """
        with argument_errors():
            config = RidgeConfig(penalties=penalties_in(self.penalties), selection=self.selection)
        x, y, image_weights, _ = self._read(X, y, sample_weight)
        self._units, self._unit = column_units(x)
        x = in_units(x, self._units)
        self._basis = eigenbasis(x, image_weights)
        offered = self._basis.penalties(config.penalties)
        exact = is_exact(config, len(x))
        scores = self._basis.train_scores(x)
        if image_weights is not None and self._basis.rows is None:  # rows are multiplied already
            scores = scores * image_weights.sqrt()[:, None]
        fit = fit_on_axes(self._basis.values, scores, y, offered, exact=exact, image_weights=image_weights)
        self._on_axes, self._mean = fit.on_axes, fit.mean
        self._map: LinearMap | None = None
        self.penalties_ = self._form.attribute(fit.penalties.double() * self._unit * self._unit)
        return self

    @property
    def feature_scales_(self) -> np.ndarray:
        """(n_features,) float64, at least 1."""
        check_is_fitted(self)
        return _scales_of(self._units, self._unit)

    @property
    def weights_(self) -> Any:
        weights = self._linear_map().weights.double() / self._units[:, None]
        return self._form.attribute(rescaled("weights_", weights, self._response_unit, self._dtype))

    @property
    def intercept_(self) -> Any:
        return self._attribute("intercept_", self._linear_map().intercept)

    def _linear_map(self) -> LinearMap:
        """Weights on features and intercept, computed at first use: predictions do not need them, and they are slow."""
        check_is_fitted(self)
        if self._map is None:
            weights = self._basis.weights(self._on_axes)
            self._map = LinearMap(weights, self._mean - self._basis.mean @ weights)
            del self._on_axes
        return self._map

    def predict(self, X: Any) -> Any:
        """(n, n_vertices) predictions, in the responses' unit. X : (n, n_features)

        Raises NotFittedError before `fit`, ValueError for other columns than in `fit` or values that are not finite.
        """
        x = in_units(self._read_again(X), self._units)
        if self._map is not None:
            return self._give(self._map(x), X)
        return self._give(torch.addmm(self._mean, self._basis.scores(x), self._on_axes), X)


class KernelHead(Head):
    """Ridge regression on a kernel of images, with a penalty for each vertex chosen by exact leave-one-out.

    For more features than images, and for any measure of how alike two images are. The kernel is centred over the
    training images. With a linear kernel, the predictions are those of `RidgeHead(selection='loo')`.

    Parameters
    ----------
    kernel : 'linear'; another name that `sklearn.metrics.pairwise.pairwise_kernels` knows; a function of the features
        of two images; or 'precomputed', if kernels are passed as X, (n_images, n_images) to `fit` and (n, n_images) to
        `predict`
    gamma, degree, coef0 : of the kernels that have them; gamma is 1 / n_features if it is None
    kernel_params : arguments of a function
    penalties : numbers from 0 to choose from, in multiples of the mean eigenvalue of the centred kernel

    All kernels but 'linear' and 'precomputed' are computed on the CPU.

    Attributes
    ----------
    dual_coef_ : (n_images, n_vertices), in the responses' unit for one unit of the kernel
    penalties_ : (n_vertices,) float64, in the unit of the kernel
    n_features_in_, feature_names_in_ : number of features, and their names if they were a DataFrame

    Examples
    --------
    >>> import numpy as np, featcache as fc
    >>> rng = np.random.default_rng(0)
    >>> features = rng.normal(size=(60, 200))
    >>> responses = features[:, :3] + features[:, 3:6]
    >>> head = fc.KernelHead().fit(features[:50], responses[:50])
    >>> kernel = features @ features[:50].T
    >>> same = fc.KernelHead(kernel="precomputed").fit(kernel[:50], responses[:50])
    >>> np.allclose(head.predict(features[50:]), same.predict(kernel[50:]))
    True
    """

    def __init__(
        self,
        kernel: str | Callable[..., float] = "linear",
        *,
        gamma: float | None = None,
        degree: float = 3,
        coef0: float = 1,
        kernel_params: Mapping[str, Any] | None = None,
        penalties: Sequence[float] = RidgeConfig.penalties,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.kernel_params = kernel_params
        self.penalties = penalties

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit a model to each vertex. X : (n_images, n_features); y : (n_images, n_vertices) or (n_images,)

        sample_weight : as for `RidgeHead.fit`

        Raises ValueError for shapes that do not match, values that are not finite, fewer than 3 images, or a kernel
        that is not square and symmetric.
        """
        with argument_errors():
            config = RidgeConfig(penalties=penalties_in(self.penalties), selection="loo")
        x, y, image_weights, self._rows = self._read(X, y, sample_weight)
        self._kernel_means, self._kernel_unit, self._shares = x.new_zeros(()), 1.0, None
        self._units, self._unit, self._origin = x.new_ones(()), 1.0, x.new_zeros(())
        if self.kernel == "linear":
            self._units, self._unit = column_units(x)
            self._origin = means_of(in_units(x, self._units))
        if self.kernel != "precomputed":
            self._train = in_units(x, self._units) - self._origin
        kernel = self._kernels(x)
        _check_kernel(kernel)
        self._kernel_unit = float(unit_of(kernel).max())
        kernel = kernel / self._kernel_unit
        if image_weights is not None:
            self._shares = (image_weights / image_weights.sum()).double()
        self._kernel_means = kernel.mean(0) if self._shares is None else self._shares @ kernel
        centred = centre_kernel(kernel, self._kernel_means, self._shares)
        values, vectors = eigh_of(rooted_kernel(centred, image_weights).to(x.dtype))
        offered = penalties_of(values, config.penalties)
        scores = vectors * values.sqrt()
        fit = fit_on_axes(values, scores, y, offered, exact=True, image_weights=image_weights)
        self._dual, self._mean = by_root(vectors / values.sqrt(), image_weights) @ fit.on_axes, fit.mean
        self.penalties_ = self._form.attribute(fit.penalties.double() * self._unit_of_kernel)
        return self

    @property
    def dual_coef_(self) -> Any:
        check_is_fitted(self)
        dual = self._dual.new_zeros(self._n_images, self._dual.shape[1])
        dual[self._rows] = self._dual
        return self._attribute("dual_coef_", dual, self._unit_of_kernel)

    @property
    def _unit_of_kernel(self) -> float:
        return self._kernel_unit * self._unit * self._unit

    def _kernels(self, x: torch.Tensor) -> torch.Tensor:
        """(n, n_images) float64 kernels of any images with the training images: centring takes differences of them."""
        if self.kernel == "precomputed":
            some = len(self._rows) < self._n_images == x.shape[1]
            return (x[:, self._rows] if some else x).double()
        if self.kernel == "linear":
            return ((in_units(x, self._units) - self._origin) @ self._train.T).double()
        parameters = {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}
        if callable(self.kernel):
            parameters = dict(self.kernel_params or {})
        pair = (part.cpu().numpy() for part in (x, self._train))
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name
            kernel = pairwise_kernels(*pair, metric=self.kernel, filter_params=True, **parameters)
        return in_range("kernel", torch.as_tensor(kernel, device=x.device)).double()

    def predict(self, X: Any) -> Any:
        """(n, n_vertices) predictions, in the responses' unit. X : (n, n_features), or (n, n_images) kernels

        Raises NotFittedError before `fit`, ValueError for other columns than in `fit` or values that are not finite.
        """
        across = self._kernels(self._read_again(X)) / self._kernel_unit
        centred = centre_kernel(across, self._kernel_means, self._shares).to(self._dtype)
        return self._give(torch.addmm(self._mean, centred, self._dual), X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    def _more_tags(self) -> dict[str, bool]:  # scikit-learn before 1.6
        return {"pairwise": self.kernel == "precomputed"}


def _check_kernel(kernel: torch.Tensor) -> None:
    """Raise ArgumentError for kernels of the training images that are not square and symmetric."""
    if kernel.shape[0] != kernel.shape[1] or not torch.allclose(
        kernel, kernel.T, rtol=0, atol=1e-4 * float(kernel.abs().max())
    ):
        raise ArgumentError(
            "kernel",
            expected="a square, symmetric matrix: the kernels of the training images with each other",
            found=f"shape {tuple(kernel.shape)}",
            remedy="pass all of them, in one order",
        )


def _scales_of(units: torch.Tensor, shared: float) -> np.ndarray:
    scales: np.ndarray = (units / shared).cpu().numpy()
    return scales


def as_float64(values: Any) -> np.ndarray:
    """Responses or predictions for a score. Raises ArgumentError for those that are sparse."""
    if isinstance(values, torch.Tensor):
        refuse_not_dense(values, "y")
        values = values.detach().cpu().double()
    elif issparse(values):
        raise ArgumentError("y", expected="dense responses", found="sparse ones", remedy="pass y.toarray()")
    return np.asarray(values, dtype=np.float64)
