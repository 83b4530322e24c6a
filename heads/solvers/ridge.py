"""Closed-form heads: ridge regression of every vertex on the same features, with a penalty per vertex.

With X the centred features and U e U' = X'X, the weights of a vertex under penalty p are

    w(p) = U (U'X'y) / (e + p)

so one eigendecomposition serves every vertex and penalty, and (XU)'y is all that is needed of the responses: with fewer
features than images one product of the size of X'Y, with more of them one of images by images. XU are the scores of the
images on their principal axes.

Penalties are chosen on the training images alone, per vertex, by the smallest of
- 'loo': the exact leave-one-out error, mean of ((y - h y) / (1 - h_ii))^2, one product of the size of X'Y a penalty;
- 'gcv': generalised cross-validation, the same with h_ii replaced by its mean. It needs only X'Y, but trusts that
  leverages are alike, which fails with few images that resemble each other (docs/decisions/0002).
'auto' takes 'loo' up to 1,024 training images and 'gcv' beyond.

Golub, Heath and Wahba 1979, https://doi.org/10.1080/00401706.1979.10489751
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from heads.config import RidgeConfig
from heads.modules.linear import LinearMap

_LOO_IMAGES = 1024  # up to here the exact error costs seconds
_NULL = 1e-7  # eigenvalues below this part of the largest are rounding of float32 features
FULL = 0.99  # a penalty that leaves fewer than 1 % of the degrees of freedom has no error left to judge it by
TOGETHER = 1 << 22  # numbers in the predictions of penalties that are tried at once
VERTEX_BLOCK = 2048  # vertices at a time: what is done to each number between two products stays in a cache


@dataclass(frozen=True)
class Eigenbasis:
    """The principal axes of centred features.

    n_images : number of images they come from
    mean : (n_features,) mean of the features over those images
    values : (rank,) eigenvalues of X'X that are not null, ascending
    mixing : (n_features, rank) their eigenvectors; with fewer images than features these are rows' @ mixing instead
    rows : None, or (n_images, n_features) the centred features
    """

    n_images: int
    mean: torch.Tensor
    values: torch.Tensor
    mixing: torch.Tensor
    rows: torch.Tensor | None = None

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """(n, rank) of any images, (n, n_features)."""
        centred = features - self.mean
        return (centred if self.rows is None else centred @ self.rows.T) @ self.mixing

    def own_scores(self, features: torch.Tensor) -> torch.Tensor:
        """(n_images, rank) of the images that the axes come from, given again."""
        return self.scores(features) if self.rows is None else self.mixing * self.values

    def weights(self, on_axes: torch.Tensor) -> torch.Tensor:
        """(n_features, n_vertices) on the features, from weights on the axes, (rank, n_vertices)."""
        return self.mixing @ on_axes if self.rows is None else self.rows.T @ (self.mixing @ on_axes)

    def penalties(self, multiples: Sequence[float]) -> torch.Tensor:
        """(n_penalties,) in the units of the eigenvalues."""
        return penalties_of(self.values, multiples)


def penalties_of(values: torch.Tensor, multiples: Sequence[float]) -> torch.Tensor:
    """(n_penalties,) multiples of the mean eigenvalue, in its units."""
    scale = values.mean() if len(values) else torch.ones((), device=values.device)
    return torch.as_tensor(multiples, dtype=values.dtype, device=values.device) * scale


def eigenbasis(features: torch.Tensor) -> Eigenbasis:
    """Of (n_images, n_features) rows, by the smaller of the two Gram matrices."""
    n_images, n_features = features.shape
    mean = features.mean(0)
    centred = features - mean
    if n_images > n_features:
        return eigenbasis_of_gram(centred.T @ centred, mean, n_images)
    values, left = eigh_of(centred @ centred.T)
    return Eigenbasis(n_images, mean, values, left / values.sqrt(), centred)


def eigenbasis_of_gram(gram: torch.Tensor, mean: torch.Tensor, n_images: int) -> Eigenbasis:
    """Of centred X'X, (n_features, n_features)."""
    return Eigenbasis(n_images, mean, *eigh_of(gram))


def eigh_of(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and -vectors without the null space. In float64: float32 decompositions can fail on a GPU."""
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > _NULL * values.max().clamp_min(torch.finfo(torch.float32).tiny)
    return values[keep].to(gram.dtype), vectors[:, keep].to(gram.dtype)


def penalty_errors(
    values: torch.Tensor,
    n_images: int,
    rotated: torch.Tensor,
    response_squares: torch.Tensor,
    penalties: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """(n_penalties, n_vertices) mean squared leave-one-out error, exact or generalised.

    values : (rank,) eigenvalues of X'X
    rotated : (rank, n_vertices) U'X'Y
    response_squares : (n_vertices,) squares of the centred responses, summed over images
    rows : scores XU (n_images, rank) and centred responses (n_images, n_vertices) for the exact one; None: generalised
    """
    shrinkage = values / (values + penalties[:, None])  # (n_penalties, rank)
    freedom = (shrinkage.sum(1) + 1) / n_images  # the intercept is one degree of freedom
    if rows is None:
        errors = _gcv_errors(values, n_images, rotated, response_squares, shrinkage, freedom)
    else:
        errors = _loo_errors(values, rotated, shrinkage, *rows)
    errors[freedom > FULL] = torch.inf
    errors[penalties.argmax()].clamp_max_(torch.finfo(errors.dtype).max)  # the largest penalty is always on offer
    return errors


def _gcv_errors(
    values: torch.Tensor,
    n_images: int,
    rotated: torch.Tensor,
    response_squares: torch.Tensor,
    shrinkage: torch.Tensor,
    freedom: torch.Tensor,
) -> torch.Tensor:
    """(n_penalties, n_vertices) float64, ||y - h y||^2 / n / (1 - trace(h) / n)^2.

    What h leaves of y is what no axis explains and what it shrinks away: two sums of squares, so that float32 serves.
    """
    shares = torch.cat([(1 - shrinkage).square(), torch.ones_like(shrinkage[:1])]) / values
    *shrunk, explained = (shares @ rotated.square()).double()
    # as many axes as centred images have leave nothing, and the rounding of nothing would be all there is
    beyond = (response_squares.double() - explained).clamp_min(0) * (len(values) < n_images - 1)
    errors: torch.Tensor = (beyond + torch.stack(shrunk)) / n_images
    return errors / (1 - freedom.double()).clamp_min(1e-9)[:, None] ** 2


def _loo_errors(
    values: torch.Tensor, rotated: torch.Tensor, shrinkage: torch.Tensor, scores: torch.Tensor, responses: torch.Tensor
) -> torch.Tensor:
    """(n_penalties, n_vertices) mean over images of ((y - h y) / (1 - h_ii))^2."""
    left = scores / values.sqrt()  # left singular vectors
    target = rotated / values.sqrt()[:, None]
    left_out = (1 - 1 / len(scores) - left.square() @ shrinkage.T).clamp_min(1e-6)  # (n_images, n_penalties)
    some = max(TOGETHER // max(responses.numel(), 1), 1)
    errors = []
    for h, out in zip(shrinkage.split(some), left_out.split(some, dim=1), strict=True):
        fitted = left @ (h.T[:, :, None] * target[:, None]).flatten(1)  # penalties side by side: one product
        residuals = responses[:, None] - fitted.view(len(scores), *h.shape[:1], -1)
        errors.append((residuals / out[:, :, None]).square().mean(0))
    return torch.cat(errors)


def held_out_errors(
    values: torch.Tensor,
    rotated: torch.Tensor,
    penalties: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """(n_parts + 1, n_penalties, n_vertices) mean squared error over the other parts of a fold, and over all.

    values, rotated : eigenvalues of X'X (rank,), and U'X'Y (rank, n_vertices)
    parts : scores XU (n, rank) and centred responses (n, n_vertices) of each
    """
    squares = torch.stack(
        [
            torch.stack([(y - x @ (rotated / (values[:, None] + penalty))).square().sum(0) for penalty in penalties])
            for x, y in parts
        ]
    )
    counts = torch.tensor([len(y) for _, y in parts], device=squares.device)[:, None, None]
    # added up and not subtracted from the whole: rounding would let a part's outliers have a say in its own choice
    others = 1 - torch.eye(len(parts), device=squares.device, dtype=squares.dtype)
    apart = torch.einsum("ij,jpv->ipv", others, squares) / (counts.sum() - counts)
    return torch.cat([apart, squares.sum(0)[None] / counts.sum()])


def is_exact(config: RidgeConfig, n_images: int) -> bool:
    """Whether penalties are chosen by the exact leave-one-out error."""
    return config.selection == "loo" or (config.selection == "auto" and n_images <= _LOO_IMAGES)


def maps_of_penalties(
    basis: Eigenbasis, rotated: torch.Tensor, response_mean: torch.Tensor, penalties: torch.Tensor
) -> LinearMap:
    """The map of each vertex under its penalty, (n_vertices,), from U'X'Y."""
    weights = basis.weights(rotated / (basis.values[:, None] + penalties))
    return LinearMap(weights, response_mean - basis.mean @ weights)


def sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """(n_vertices,) over rows."""
    squares: torch.Tensor = torch.linalg.vecdot(values, values, dim=0)
    return squares
