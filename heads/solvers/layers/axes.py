"""Axes that the training images of a fold span under a prior, in three ways by what is few.

On such axes ridge regression is one division (see ridge.py), whatever they were found from:

    images         the kernel of the training images                        dual, exact
    features       their scatter                                            primal, exact
    landmarks      features by the kernel with some images, the landmarks   Nyström, where neither are few

With C the kernel of all images with the landmarks and W W' the inverse of the landmarks' own, C W are features whose
inner products are the kernel up to what landmarks do not span (Williams and Seeger 2001, Advances in Neural Information
Processing Systems 13).
"""

from dataclasses import dataclass

import numpy as np
import torch

from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.ridge import eigh_of

LANDMARKS = 2048  # as many images, where images and features are more (docs/decisions/0014)


@dataclass(frozen=True)
class Basis:
    """One prior's axes on one fold.

    rows : (n_trained,) numbers of the images that the fold trains on
    values : (rank,) of their centred scatter
    features : (n_images, n) of all images; folds may share them
    mean, axes : (n,) and (n, rank): scores on the axes are (features - mean) @ axes; None: features are the scores
    span : landmarks and their W, where features are of landmarks
    """

    rows: np.ndarray
    values: torch.Tensor
    features: torch.Tensor
    mean: torch.Tensor | None = None
    axes: torch.Tensor | None = None
    span: tuple[np.ndarray, torch.Tensor] | None = None

    def scores(self, rows: np.ndarray) -> torch.Tensor:
        """(len(rows), rank)"""
        own = self.features[rows]
        return own if self.axes is None or self.mean is None else (own - self.mean) @ self.axes

    def rotated(self, target: torch.Tensor) -> torch.Tensor:
        """(rank, n_vertices) scores' @ target, for responses (n_trained, n_vertices) centred over the rows."""
        cross = self.features[self.rows].T @ target  # features need no centring where responses have it
        return cross if self.axes is None else self.axes.T @ cross

    def predictions(self, weights: torch.Tensor) -> torch.Tensor:
        """(n_images, n_vertices) for weights on the axes, without a level."""
        if self.axes is None or self.mean is None:
            return self.features @ weights
        own = self.axes @ weights
        return torch.addmm(-(self.mean @ own), self.features, own)

    def dual(self, weights: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """Images, and what their kernels are weighed with (n, n_vertices) for the same predictions up to a level."""
        if self.span is None or self.axes is None:
            return self.rows, self.scores(self.rows) @ (weights / self.values[:, None])
        landmarks, whitening = self.span
        return landmarks, whitening @ (self.axes @ weights)


@dataclass(frozen=True)
class Seen:
    """What one prior leaves of a store's images, from which every fold's basis is made.

    way : 'images', 'features' or 'landmarks'
    values : (n_images, n_images) kernel, or (n_images, n) features
    """

    way: str
    values: torch.Tensor
    span: tuple[np.ndarray, torch.Tensor] | None = None

    def basis(self, rows: np.ndarray) -> Basis:
        """Of the images that a fold trains on."""
        return (
            basis_of_kernel(self.values, rows)
            if self.way == "images"
            else basis_of_features(self.values, rows, self.span)
        )


def way_for(n_images: int, n_features: int) -> str:
    """Of what there are few, for so many images to fit to: it sets the size of what is decomposed."""
    if min(n_images, n_features) > LANDMARKS:
        return "landmarks"
    return "images" if n_features >= n_images else "features"


def seen_under(prior: Prior, kernels: LayerKernels, way: str) -> Seen:
    if way == "landmarks":
        landmarks = np.sort(np.random.default_rng(0).permutation(kernels.n_train)[:LANDMARKS])
        features, whitening = landmark_features(kernels.across(prior, landmarks), landmarks)
        return Seen(way, features, (landmarks, whitening))
    return Seen(way, kernels.kernel(prior) if way == "images" else kernels.features(prior))


def basis_of_kernel(kernel: torch.Tensor, rows: np.ndarray) -> Basis:
    """Of a kernel (n_images, n_images), centred over the training images."""
    index = torch.from_numpy(rows).to(kernel.device)
    across = kernel[:, index]
    means = across[index].mean(0)
    centred = across - across.mean(1, keepdim=True) - means + means.mean()
    values, vectors = eigh_of(centred[index])
    return Basis(rows, values, centred @ (vectors / values.sqrt()))


def basis_of_features(
    features: torch.Tensor, rows: np.ndarray, span: tuple[np.ndarray, torch.Tensor] | None = None
) -> Basis:
    """Of features (n_images, n), which may be those of landmarks."""
    own = features[rows]
    mean = own.mean(0)
    own -= mean
    values, vectors = eigh_of(own.T @ own)
    return Basis(rows, values, features, mean, vectors, span)


def landmark_features(across: torch.Tensor, landmarks: np.ndarray | slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_images, rank) features and W (n_landmarks, rank), from kernels of all images with the landmarks."""
    values, vectors = eigh_of(across[landmarks])
    whitening = vectors / values.sqrt()
    return across @ whitening, whitening
