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
  Predictions or weights that the dtype cannot hold are refused.

What scikit-learn checks raises its errors. The rest raises ArgumentError, which is a ValueError.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.model_selection import GroupKFold, check_cv
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from featcache.errors import ArgumentError
from heads.config import RidgeConfig
from heads.modules.linear import LinearMap
from heads.solvers.banded import Fold, candidates, contributions, fit_bands
from heads.solvers.inputs import (
    argument_errors,
    columns_of,
    features_of,
    in_range,
    in_units,
    means_of,
    rescaled,
    responses_of,
    unit_of,
)
from heads.solvers.ridge import centre_kernel, eigenbasis, eigh_of, fit_on_axes, is_exact, penalties_of

_BAND_PENALTIES = tuple(10.0 ** (k / 2) for k in range(-8, 11))  # ratios of noise to signal; two a decade


class _Head(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What the estimators share: how they read what is passed, and give back predictions."""

    def _read(self, X: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Features, and responses in the unit of each vertex, for a fit."""
        x = features_of(self, X, y)
        responses, self._form = responses_of(self, y, x)
        self._response_unit, self._dtype, self._device = unit_of(responses), x.dtype, x.device
        return x, in_units(responses, self._response_unit)

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
        predictions, y = (_float64(values) for values in (self.predict(X), y))
        return float(r2_score(y, predictions, sample_weight=sample_weight))


class RidgeHead(_Head):
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
    penalties_ : (n_vertices,) float64, in the features' unit squared
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

    def fit(self, X: Any, y: Any) -> Self:
        """Fit a ridge model to each vertex. X : (n_images, n_features); y : (n_images, n_vertices) or (n_images,)

        Raises ValueError for shapes that do not match, values that are not finite, or fewer than 3 images.
        """
        with argument_errors():
            config = RidgeConfig(penalties=tuple(self.penalties), selection=self.selection)
        x, y = self._read(X, y)
        self._unit = float(unit_of(x).max())
        x = in_units(x, self._unit)
        self._basis = eigenbasis(x)
        offered = self._basis.penalties(config.penalties)
        exact = is_exact(config, len(x))
        fit = fit_on_axes(self._basis.values, self._basis.train_scores(x), y, offered, exact=exact)
        self._on_axes, self._mean = fit.on_axes, fit.mean
        self._map: LinearMap | None = None
        self.penalties_ = self._form.attribute(fit.penalties.double() * self._unit**2)
        return self

    @property
    def weights_(self) -> Any:
        return self._attribute("weights_", self._linear_map().weights, self._unit)

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
        x = in_units(self._read_again(X), self._unit)
        if self._map is not None:
            return self._give(self._map(x), X)
        return self._give(torch.addmm(self._mean, self._basis.scores(x), self._on_axes), X)


class KernelHead(_Head):
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

    def fit(self, X: Any, y: Any) -> Self:
        """Fit a model to each vertex. X : (n_images, n_features); y : (n_images, n_vertices) or (n_images,)

        Raises ValueError for shapes that do not match, values that are not finite, fewer than 3 images, or a kernel
        that is not square and symmetric.
        """
        with argument_errors():
            config = RidgeConfig(penalties=tuple(self.penalties), selection="loo")
        x, y = self._read(X, y)
        self._kernel_means, self._kernel_unit = x.new_zeros(()), 1.0
        if self.kernel != "precomputed":
            self._unit = float(unit_of(x).max()) if self.kernel == "linear" else 1.0
            self._origin = means_of(in_units(x, self._unit)) if self.kernel == "linear" else x.new_zeros(())
            self._train = in_units(x, self._unit) - self._origin
        kernel = self._kernels(x)
        _check_kernel(kernel)
        self._kernel_unit = float(unit_of(kernel).max())
        kernel = kernel / self._kernel_unit
        self._kernel_means = kernel.mean(0)
        values, vectors = eigh_of(centre_kernel(kernel, self._kernel_means).to(x.dtype))
        offered = penalties_of(values, config.penalties)
        fit = fit_on_axes(values, vectors * values.sqrt(), y, offered, exact=True)
        self._dual, self._mean = (vectors / values.sqrt()) @ fit.on_axes, fit.mean
        self.penalties_ = self._form.attribute(fit.penalties.double() * self._unit_of_kernel)
        return self

    @property
    def dual_coef_(self) -> Any:
        check_is_fitted(self)
        return self._attribute("dual_coef_", self._dual, self._unit_of_kernel)

    @property
    def _unit_of_kernel(self) -> float:
        return self._kernel_unit * (self._unit**2 if self.kernel == "linear" else 1.0)

    def _kernels(self, x: torch.Tensor) -> torch.Tensor:
        """(n, n_images) float64 kernels of any images with the training images: centring takes differences of them."""
        if self.kernel == "precomputed":
            return x.double()
        if self.kernel == "linear":
            return ((in_units(x, self._unit) - self._origin) @ self._train.T).double()
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
        centred = centre_kernel(across, self._kernel_means).to(self._dtype)
        return self._give(torch.addmm(self._mean, centred, self._dual), X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    def _more_tags(self) -> dict[str, bool]:  # scikit-learn before 1.6
        return {"pairwise": self.kernel == "precomputed"}


class _Band(NamedTuple):
    """The features of one band, on the training images.

    columns : (n,) of the features
    unit : that they are divided by
    mean : (n,) that is then taken off
    train : (n_images, n)
    """

    columns: torch.Tensor
    unit: float
    mean: torch.Tensor
    train: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, columns: np.ndarray) -> Self:
        index = torch.as_tensor(columns, device=features.device)
        values = features[:, index]
        unit = float(unit_of(values).max())
        values = in_units(values, unit)
        mean = means_of(values)
        return cls(index, unit, mean, values - mean)

    def kernel(self, features: torch.Tensor) -> torch.Tensor:
        """(n, n_images) inner products with the training images. features : (n, n_features)"""
        return (in_units(features[:, self.columns], self.unit) - self.mean) @ self.train.T


class BandedRidge(_Head):
    """Ridge regression with a penalty for each band of features and each vertex, chosen by cross-validation.

    A band is a named group of features, such as one layer. Bands are brought to one mean variance; then each vertex
    gets weights of the bands and a penalty. They are those with the least squared error on held-out images of inner
    folds, among equal weights, each band alone, and random weights (see heads.solvers.banded). Time grows with the
    number of candidates, of inner folds, and the third power of the number of images.

    Dupré la Tour et al. 2022, https://doi.org/10.1016/j.neuroimage.2022.119728

    Parameters
    ----------
    bands : {name: columns}; columns are a slice, a list of numbers, a mask (n_features,), or names of columns of a
        DataFrame. Columns in no band are not used. None: one band, 'all'
    penalties : numbers above 0 to choose from, as ratios of the variance of noise to that of the signal: multiples of
        the mean squared length of the centred rows, under the weights
    n_random : number of random weights to try
    cv : number of inner folds, without shuffling; or a splitter of scikit-learn; or pairs of rows to fit to and rows
        held out
    random_state : seed of the random weights

    Attributes
    ----------
    bands_ : {name: columns (n,)}
    band_weights_ : (n_bands, n_vertices) from 0, with sum 1 over bands
    penalties_ : (n_bands, n_vertices) float64, on the weights of the features of each band, in the features' unit
        squared; infinite where a band has no weight
    errors_ : (n_vertices,) float64 mean squared error on the held-out images, in the responses' unit squared
    weights_ : (n_features, n_vertices), in the responses' unit for one unit of the feature
    intercept_ : (n_vertices,)
    n_features_in_, feature_names_in_ : number of features, and their names if they were a DataFrame

    Examples
    --------
    >>> import numpy as np, featcache as fc
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(100, 40))
    >>> y = np.stack([x[:, 0] - x[:, 1], x[:, 20] + x[:, 39]], 1)
    >>> head = fc.BandedRidge(bands={"early": slice(0, 20), "late": slice(20, None)}).fit(x[:80], y[:80])
    >>> head.band_weights_.argmax(0)  # vertex 0 reads the early band, vertex 1 the late one
    array([0, 1])
    >>> parts = head.predict_bands(x[80:])
    >>> total = sum(parts.values()) + y[:80].mean(0)
    >>> np.allclose(total, head.predict(x[80:]))
    True
    """

    def __init__(
        self,
        bands: Mapping[str, Any] | None = None,
        *,
        penalties: Sequence[float] = _BAND_PENALTIES,
        n_random: int = 30,
        cv: Any = 5,
        random_state: Any = 0,
    ) -> None:
        self.bands = bands
        self.penalties = penalties
        self.n_random = n_random
        self.cv = cv
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit a model to each vertex. X : (n_images, n_features); y : (n_images, n_vertices) or (n_images,)

        groups : (n_images,) labels; images of one group are in one inner fold

        Raises ValueError for shapes that do not match, values that are not finite, fewer than 3 images or than inner
        folds, or bands that there are not.
        """
        x, y = self._read(X, y)
        names = getattr(self, "feature_names_in_", None)
        self.bands_ = columns_of(self.bands, x.shape[1], names)
        self._bands = [_Band.of(x, columns) for columns in self.bands_.values()]
        with argument_errors():
            seed = int(check_random_state(self.random_state).randint(2**31))
            fit = fit_bands(
                self._kernels(x),
                y,
                weights=candidates(len(self._bands), self.n_random, seed),
                penalties=tuple(self.penalties),
                inner_folds=self._inner_folds(len(x), groups),
            )
        self._fit = fit
        units = torch.tensor([band.unit for band in self._bands], dtype=torch.float64, device=x.device)
        scales = fit.scales.double() * units.square()
        self.band_weights_ = self._form.attribute(fit.weights)
        self.penalties_ = self._form.attribute(fit.penalty.double() * scales[:, None] / fit.weights.double())
        self.errors_ = self._form.attribute(fit.error.double() * self._response_unit.double().square())
        return self

    def _inner_folds(self, n_images: int, groups: Any) -> list[Fold]:
        rows = np.empty((n_images, 0))
        if groups is not None and isinstance(self.cv, Integral):
            return list(GroupKFold(int(self.cv)).split(rows, groups=np.asarray(groups)))
        return list(check_cv(self.cv).split(rows, groups=groups))

    def _kernels(self, x: torch.Tensor) -> torch.Tensor:
        """(n_bands, n, n_images) of any images with the training images."""
        return torch.stack([band.kernel(x) for band in self._bands])

    def predict(self, X: Any, bands: str | Sequence[str] | None = None) -> Any:
        """(n, n_vertices) predictions, in the responses' unit. X : (n, n_features)

        bands : names of the bands to predict from, for the mean of the responses and what these bands add; None: all

        Raises NotFittedError before `fit`, ValueError for other columns than in `fit`, values that are not finite, or
        a band that there is not.
        """
        parts = self._parts(X)
        chosen = list(parts) if bands is None else [bands] if isinstance(bands, str) else list(bands)
        unknown = [band for band in chosen if band not in parts]
        if unknown:
            raise ArgumentError("bands", expected=" | ".join(map(str, parts)), found=unknown[0], remedy="correct it")
        total = self._fit.mean + sum(parts[band] for band in chosen)
        return self._give(total.expand(len(next(iter(parts.values()))), -1), X)

    def predict_bands(self, X: Any) -> dict[str, Any]:
        """{band: (n, n_vertices) what it adds to the predictions}; with the mean of the responses, they are the whole.

        Over the training images, what a band adds has a mean of 0.
        """
        return {band: self._give(part, X) for band, part in self._parts(X).items()}

    def score_bands(self, X: Any, y: Any, measure: str = "r") -> dict[str, Any]:
        """{band: (n_vertices,) float64 part of the score that is its own}; the parts add up to the score of the whole.

        measure : 'r', of the whole prediction p and the responses y, each less its mean over these images. The part of
            a band that adds p_b is sum(p_b y) / sqrt(sum(p²) sum(y²)). 'r2': share of variance explained,
            1 - sum((y - p)²) / sum(y²), with parts sum(p_b (2 y - p)) / sum(y²), the product measure. Parts may be
            below 0. All are 0 where p or y is constant.
        """
        if measure not in ("r", "r2"):
            raise ArgumentError("measure", expected="r | r2", found=measure, remedy="correct it")
        added = self.predict_bands(X)
        parts, responses = np.stack([_centred(part) for part in added.values()]), _centred(y)
        whole = parts.sum(0)
        target, norms = 2 * responses - whole, np.square(responses).sum(0)
        if measure == "r":
            target, norms = responses, np.sqrt(np.square(whole).sum(0) * norms)
        products = (parts * target).sum(1)
        shares = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
        return dict(zip(added, shares, strict=True))

    def _parts(self, X: Any) -> dict[str, torch.Tensor]:
        """{band: (n, n_vertices) what it adds, in the unit of each vertex}."""
        x = self._read_again(X)
        return dict(zip(self.bands_, contributions(self._fit, self._kernels(x)), strict=True))

    @property
    def weights_(self) -> Any:
        check_is_fitted(self)
        total = torch.zeros(self.n_features_in_, len(self._response_unit), dtype=torch.float64, device=self._device)
        for band, weights in self._band_maps():
            total[band.columns] += weights.double() / band.unit
        return self._form.attribute(rescaled("weights_", total, self._response_unit, self._dtype))

    @property
    def intercept_(self) -> Any:
        levels = [band.mean @ weights for band, weights in self._band_maps()]
        return self._attribute("intercept_", self._fit.mean - sum(levels))

    def _band_maps(self) -> Iterator[tuple[_Band, torch.Tensor]]:
        """Each band with its weights on its features, in the band's unit, (n, n_vertices)."""
        check_is_fitted(self)
        fit = self._fit
        for band, weights, scale in zip(self._bands, fit.weights, fit.scales, strict=True):
            yield band, band.train.T @ (fit.coefficients * (weights / scale))


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


def _float64(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def _centred(values: Any) -> np.ndarray:
    array = _float64(values)
    centred: np.ndarray = array - array.mean(0)
    return centred
