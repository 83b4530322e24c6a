"""Axes that the training images of a fold span under a prior.

On these axes ridge regression is one division (see ridge.py). There are three methods to compute them; the smallest of
images, features and landmarks decides:

    images         kernel of the training images                          dual, exact
    features       scatter of the features                                primal, exact
    landmarks      features from kernels with some images, the landmarks  Nyström, for many images and many features

Let C be the kernel of all images with the landmarks, and W W' the inverse of the kernel of the landmarks. Then C W are
features whose inner products approximate the kernel (Williams and Seeger 2001, Advances in Neural Information
Processing Systems 13). W is the inverse of a Cholesky factor, of a kernel that a little is added to on its diagonal:
much less than the smallest penalty, and more than rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.ridge import centre_kernel, eigh_of, resolved_penalty

_JITTER = 1e-5  # of the mean of the diagonal of the landmarks' kernel, added to it
LANDMARKS = 2048  # number of landmark images, if both images and features are more (docs/decisions/0014)


@dataclass(frozen=True)
class Basis:
    """Axes of one prior on one fold.

    rows : (n_train_rows,) numbers of the images that the fold trains on
    values : (rank,) eigenvalues of their centred scatter
    features : (n_images, n) of all images; folds may share them
    mean, axes : (n,) and (n, rank): scores on the axes are (features - mean) @ axes; None: features are the scores
    span : landmarks and their W, if the features come from landmarks
    resolved : smallest penalty that the arithmetic of the decomposition allows; 0 in float64
    """

    rows: np.ndarray
    values: torch.Tensor
    features: torch.Tensor
    mean: torch.Tensor | None = None
    axes: torch.Tensor | None = None
    span: tuple[np.ndarray, torch.Tensor] | None = None
    resolved: float = 0.0

    def scores(self, rows: np.ndarray) -> torch.Tensor:
        """(len(rows), rank) scores of any images."""
        features = self.features[rows]
        return features if self.axes is None or self.mean is None else (features - self.mean) @ self.axes

    def rotated(self, target: torch.Tensor) -> torch.Tensor:
        """(rank, n_vertices) scores' @ target. target : (n_train_rows, n_vertices) centred responses"""
        cross = self.features[self.rows].T @ target  # the target is centred, so the features need not be
        return cross if self.axes is None else self.axes.T @ cross

    def on_features(self, weights: torch.Tensor) -> torch.Tensor:
        """(n, n_vertices) weights on the features, from weights on the axes, (rank, n_vertices)."""
        return weights if self.axes is None else self.axes @ weights

    def predictions(self, weights: torch.Tensor) -> torch.Tensor:
        """(n_images, n_vertices) predictions without intercept. weights : (n, n_vertices) on the features"""
        if self.mean is None:
            return self.features @ weights
        return torch.addmm(-(self.mean @ weights), self.features, weights)

    def spanned(self, weights: torch.Tensor) -> tuple[np.ndarray | None, torch.Tensor]:
        """Image rows and dual weights with the same predictions, up to an intercept; None: the weights on features.

        weights : (n, n_vertices) on the features
        """
        return (None, weights) if self.axes is not None else self.dual(weights)

    def dual(self, weights: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """(image rows, dual weights (n, n_vertices)) with the same predictions, up to an intercept.

        weights : (rank, n_vertices) on the axes
        """
        if self.span is not None:
            landmarks, whitening = self.span
            return landmarks, whitening @ self.on_features(weights)
        duals = self.scores(self.rows) @ (weights / self.values[:, None])
        # kernels are centred over these images, which axes of small eigenvalues are not exactly
        return self.rows, duals - duals.mean(0)


@dataclass(frozen=True)
class PriorView:
    """Kernel or features of a store's images under one prior, from which the basis of every fold is computed.

    method : 'images', 'features' or 'landmarks'
    values : (n_images, n_images) kernel, or (n_images, n) features
    span : landmarks and their W, if the method is 'landmarks'
    """

    method: str
    values: torch.Tensor
    span: tuple[np.ndarray, torch.Tensor] | None = None

    def basis(self, rows: np.ndarray, *, precise: bool = True) -> Basis:
        """Axes of the images that a fold trains on. precise : see eigh_of"""
        if self.method == "images":
            return basis_of_kernel(self.values, rows, precise=precise)
        return basis_of_features(self.values, rows, self.span, precise=precise)


def method_for(n_images: int, n_features: int) -> str:
    """The method that decomposes the smallest matrix. n_images : images to fit to"""
    if min(n_images, n_features) > LANDMARKS:
        return "landmarks"
    return "images" if n_features >= n_images else "features"


def landmarks_of(kernels: LayerKernels) -> np.ndarray:
    """Numbers of the landmark images, the same for every prior.

    A held-out image must not be a landmark of its fold: landmarks are images that the scales are of.
    """
    return np.sort(np.random.default_rng(0).permutation(kernels.scale_rows)[:LANDMARKS])


def view_under(prior: Prior, kernels: LayerKernels, method: str) -> PriorView:
    """Kernel or features of all images under a prior."""
    return next(views_under([prior], kernels, method))


def views_under(priors: Sequence[Prior], kernels: LayerKernels, method: str) -> Iterator[PriorView]:
    """The same under several priors, in one pass over the rows."""
    if method == "features":
        yield from (PriorView(method, kernels.features(prior)) for prior in priors)
    elif method == "images":
        yield from (PriorView(method, kernel) for kernel in kernels.under(priors))
    else:
        landmarks = landmarks_of(kernels)
        for across in kernels.under(priors, landmarks):
            features, whitening = landmark_features(across, landmarks)
            yield PriorView(method, across.copy_(features), (landmarks, whitening))  # one memory for both


def basis_of_kernel(kernel: torch.Tensor, rows: np.ndarray, *, precise: bool = True) -> Basis:
    """Axes from a kernel (n_images, n_images), centred over the training images."""
    others = np.setdiff1d(np.arange(len(kernel)), rows)
    index, outside = (torch.from_numpy(some).to(kernel.device) for some in (rows, others))
    own = kernel[index][:, index]
    means = own.mean(0)
    values, vectors = eigh_of(centre_kernel(own, means), precise=precise)
    scores = kernel.new_empty(len(kernel), len(values))
    scores[outside] = centre_kernel(kernel[outside][:, index], means) @ (vectors / values.sqrt())
    # the same number without the rounding of the kernel, which small eigenvalues would magnify in dual weights
    scores[index] = vectors * values.sqrt()
    return Basis(rows, values, scores, resolved=0.0 if precise else resolved_penalty(values))


def basis_of_features(
    features: torch.Tensor,
    rows: np.ndarray,
    span: tuple[np.ndarray, torch.Tensor] | None = None,
    *,
    precise: bool = True,
) -> Basis:
    """Axes from features (n_images, n), which may come from landmarks."""
    train_features = features[rows]
    mean = train_features.mean(0)
    train_features -= mean
    values, vectors = eigh_of(train_features.T @ train_features, precise=precise)
    resolved = 0.0 if precise else resolved_penalty(values)
    return Basis(rows, values, features, mean, vectors, span, resolved)


def landmark_features(across: torch.Tensor, landmarks: np.ndarray | slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_images, n_landmarks) features and W (n_landmarks, n_landmarks), from kernels of all images with landmarks."""
    kernel = across[landmarks].double()
    kernel.diagonal().add_(_JITTER * kernel.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    factor = torch.linalg.cholesky(kernel, upper=True)
    whitening = torch.linalg.solve_triangular(factor, torch.eye(len(kernel)).to(kernel), upper=True).to(across.dtype)
    return across @ whitening, whitening
