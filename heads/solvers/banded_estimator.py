"""Banded ridge regression as a scikit-learn estimator (see heads.solvers.estimator for what the estimators share)."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from sklearn.model_selection import GroupKFold, check_cv
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from featcache.errors import ArgumentError
from heads.solvers.banded import Fold, candidates, contributions, fit_bands
from heads.solvers.estimator import Head, as_float64
from heads.solvers.inputs import (
    argument_errors,
    columns_of,
    penalties_in,
    rescaled,
)
from heads.solvers.units import column_units, in_units, means_of

_BAND_PENALTIES = tuple(10.0 ** (k / 2) for k in range(-8, 11))  # ratios of noise to signal; two a decade


class _Band(NamedTuple):
    """The features of one band, on the training images.

    columns : (n,) of the features
    units : (n,) that they are divided by
    unit : the power of two among it that all share
    mean : (n,) that is then taken off
    train : (n_images, n)
    """

    columns: torch.Tensor
    units: torch.Tensor
    unit: float
    mean: torch.Tensor
    train: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, columns: np.ndarray) -> Self:
        index = torch.as_tensor(columns, device=features.device)
        values = features[:, index]
        units, unit = column_units(values)
        values = in_units(values, units)
        mean = means_of(values)
        return cls(index, units, unit, mean, values - mean)

    def kernel(self, features: torch.Tensor) -> torch.Tensor:
        """(n, n_images) inner products with the training images. features : (n, n_features)"""
        return (in_units(features[:, self.columns], self.units) - self.mean) @ self.train.T


class BandedRidge(Head):
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

    def fit(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> Self:
        """Fit a model to each vertex. X : (n_images, n_features); y : (n_images, n_vertices) or (n_images,)

        groups : (n_images,) labels; images of one group are in one inner fold
        sample_weight : as for `RidgeHead.fit`

        Raises ValueError for shapes that do not match, values that are not finite, fewer than 3 images or than inner
        folds, or bands that there are not.
        """
        x, y, image_weights, rows = self._read(X, y, sample_weight)
        names = getattr(self, "feature_names_in_", None)
        self.bands_ = columns_of(self.bands, x.shape[1], names)
        self._bands = [_Band.of(x, columns) for columns in self.bands_.values()]
        with argument_errors():
            seed = int(check_random_state(self.random_state).randint(2**31))
            fit = fit_bands(
                self._kernels(x),
                y,
                weights=candidates(len(self._bands), self.n_random, seed),
                penalties=penalties_in(self.penalties),
                inner_folds=self._inner_folds(groups, rows.cpu().numpy()),
                image_weights=image_weights,
            )
        self._fit = fit
        units = torch.tensor([band.unit for band in self._bands], dtype=torch.float64, device=x.device)
        scales = fit.scales.double() * units.square()
        self.band_weights_ = self._form.attribute(fit.weights)
        self.penalties_ = self._form.attribute(fit.penalty.double() * scales[:, None] / fit.weights.double())
        self.errors_ = self._form.attribute(fit.error.double() * self._response_unit.double().square())
        return self

    def _inner_folds(self, groups: Any, used: np.ndarray) -> list[Fold]:
        """Folds of the images that are used, by their numbers among these."""
        rows = np.empty((self._n_images, 0))
        splitter, groups = check_cv(self.cv), None if groups is None else np.asarray(groups)
        if groups is not None and isinstance(self.cv, Integral):
            splitter = GroupKFold(int(self.cv))
        folds = list(splitter.split(rows, groups=groups))
        if len(used) == self._n_images:
            return folds
        numbers = np.full(self._n_images, -1)
        numbers[used] = np.arange(len(used))
        parts = ((numbers[train], numbers[held_out]) for train, held_out in folds)
        return [(train[train >= 0], held_out[held_out >= 0]) for train, held_out in parts]

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
            total[band.columns] += weights.double() / band.units[:, None]
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


def _centred(values: Any) -> np.ndarray:
    array = as_float64(values)
    centred: np.ndarray = array - array.mean(0)
    return centred
