"""Closed-form heads: ridge regression of every vertex on the same features, with a penalty per vertex.

With X the centred features and U e U' = X'X, the weights of a vertex under penalty p are

    w(p) = U (U'X'y) / (e + p)

so one eigendecomposition serves every vertex and penalty, and the responses enter only by (XU)'y: with fewer features
than images this is one product of the size of X'Y, with more features one of images by images. XU are the scores of the
images on their principal axes.

Penalties are chosen on the training images alone. Each vertex takes the penalty with the smallest
- 'loo': exact leave-one-out error, mean of ((y - h y) / (1 - h_ii))^2; one product of the size of X'Y per penalty;
- 'gcv': generalised cross-validation, the same with h_ii replaced by its mean. It needs only X'Y, but assumes that
  leverages are alike, which fails with few images that resemble each other (docs/decisions/0002).
'auto' takes 'loo' up to 1,024 training images and 'gcv' beyond.

Golub, Heath and Wahba 1979, https://doi.org/10.1080/00401706.1979.10489751
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from heads.config import RidgeConfig
from heads.modules.linear import LinearMap

_FEW_VERTICES = 64
_LOO_IMAGES = 1024  # up to here the exact error costs seconds
# Eigenvalues below this share of the largest are rounding: products in float32, whose epsilon is 1.2e-7, leave null
# eigenvalues of up to 1e-7 where images are repeated. Products in float64 leave 1e-14 with thousands of images.
_NULL = {torch.float32: 5e-7, torch.float64: 1e-13}
_ROUGH_NULL = 2e-6  # the same where the decomposition is in float32 too
_RESOLVED = 5e-5  # of the largest eigenvalue, see resolved_penalty
_LARGE = 512  # rows of a matrix whose eigenvectors a CUDA device computes
FULL = 0.99  # a fit with more than this share of the degrees of freedom leaves too little error to judge its penalty
MAX_NUMBERS_AT_ONCE = 1 << 22  # in the predictions under penalties that are tried at once
VERTEX_BLOCK = 2048  # vertices at a time, so that elementwise steps between two products stay in the processor's cache


@dataclass(frozen=True)
class Eigenbasis:
    """The principal axes of centred features.

    n_images : number of images they come from
    mean : (n_features,) mean of the features over those images
    values : (rank,) eigenvalues of X'X that are not null, ascending
    mixing : (n_features, rank) their eigenvectors; if n_images <= n_features, the eigenvectors are rows.T @ mixing, and
        this is (n_images, rank)
    rows : (n_images, n_features) the centred features if n_images <= n_features, else None
    """

    n_images: int
    mean: torch.Tensor
    values: torch.Tensor
    mixing: torch.Tensor
    rows: torch.Tensor | None = None

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """(n, rank) scores of any images. features : (n, n_features)"""
        centred = features - self.mean
        return (centred if self.rows is None else centred @ self.rows.T) @ self.mixing

    def train_scores(self, features: torch.Tensor) -> torch.Tensor:
        """(n_images, rank) scores of the training images. `features` must be the same rows as in the fit."""
        return self.scores(features) if self.rows is None else self.mixing * self.values

    def weights(self, on_axes: torch.Tensor) -> torch.Tensor:
        """(n_features, n_vertices) weights on the features, from weights on the axes, (rank, n_vertices)."""
        return self.mixing @ on_axes if self.rows is None else self.rows.T @ (self.mixing @ on_axes)

    def penalties(self, multiples: Sequence[float]) -> torch.Tensor:
        """(n_penalties,) multiples of the mean eigenvalue, in its units."""
        return penalties_of(self.values, multiples)


def penalties_of(values: torch.Tensor, multiples: Sequence[float]) -> torch.Tensor:
    """(n_penalties,) multiples of the mean eigenvalue, in its units."""
    scale = values.mean() if len(values) else torch.ones((), device=values.device)
    return torch.as_tensor(multiples, dtype=values.dtype, device=values.device) * scale


def eigenbasis(features: torch.Tensor, image_weights: torch.Tensor | None = None) -> Eigenbasis:
    """Axes of (n_images, n_features) rows, from the smaller of the two Gram matrices.

    image_weights : (n_images,) with a mean of 1; the axes are those of the centred rows times their roots
    """
    n_images, n_features = features.shape
    mean = weighted_mean(features, image_weights)
    centred = features - mean
    if image_weights is not None:
        centred *= image_weights.sqrt()[:, None]
    if n_images > n_features:
        return eigenbasis_of_gram(centred.T @ centred, mean, n_images)
    values, left = eigh_of(centred @ centred.T)
    return Eigenbasis(n_images, mean, values, left / values.sqrt(), centred)


def weighted_mean(values: torch.Tensor, image_weights: torch.Tensor | None) -> torch.Tensor:
    """(n_columns,) mean over images. image_weights : (n_images,); None: all alike"""
    return values.mean(0) if image_weights is None else (image_weights / image_weights.sum()) @ values


def eigenbasis_of_gram(gram: torch.Tensor, mean: torch.Tensor, n_images: int) -> Eigenbasis:
    """Axes from centred X'X, (n_features, n_features)."""
    return Eigenbasis(n_images, mean, *eigh_of(gram))


def centre_kernel(across: torch.Tensor, means: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
    """(..., n, n_train) kernels of any images with the training images, as if the features were centred over these.

    across : (..., n, n_train) kernels of the features as they are
    means : (..., n_train) mean over the training images of each column of their kernel
    shares : (n_train,) weights of the training images in means, with sum 1; None: all alike
    """
    if shares is None:
        rows, whole = across.mean(-1), means.mean(-1)
    else:
        rows, whole = across @ shares, means @ shares
    centred = across - rows[..., None]
    centred -= means[..., None, :]
    centred += whole[..., None, None]
    return centred


def eigh_of(gram: torch.Tensor, *, precise: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors without the null space, on the device of the matrix (n, n).

    precise : in float64 (docs/decisions/0010); else in the matrix's own format, in half the time, where a CPU computes
        it. A GPU always takes float64: float32 decompositions can fail there
    """
    place = decomposed_on(gram)
    precise = precise or place.type != "cpu"
    values, vectors = torch.linalg.eigh((gram.double() if precise else gram).to(place))
    null = _NULL[gram.dtype] if precise else _ROUGH_NULL
    first = int(
        (values <= null * values.max().clamp_min(torch.finfo(torch.float32).tiny)).sum()
    )  # null ones come first
    kept = values[first:], vectors[:, first:].contiguous()
    return kept[0].to(gram), kept[1].to(gram)


def decomposed_on(gram: torch.Tensor) -> torch.device:
    """Where the eigenvectors of a matrix (n, n) are computed: on a CUDA device from `_LARGE` rows on, else on the CPU.

    A device takes a large matrix apart faster, also where its float64 is slow, but a small one in many short steps. The
    host waits for the result in either case. `_LARGE` is an estimate: no device has been measured.
    """
    return gram.device if len(gram) >= _LARGE else torch.device("cpu")


def resolved_penalty(values: torch.Tensor) -> float:
    """Smallest penalty at which axes that were decomposed in float32 predict as those of float64, to about 1 %.

    Errors of float32 are some 4e-7 of the largest eigenvalue; they are seen in what eigenvalue and penalty are together
    (measured on real features, docs/decisions/0032). 0 where no eigenvalue is so small.

    values : (rank,) eigenvalues
    """
    return max(float(values.max()) * _RESOLVED - float(values.min()), 0.0) if len(values) else 0.0


def penalty_errors(
    values: torch.Tensor,
    n_images: int,
    rotated: torch.Tensor,
    response_squares: torch.Tensor,
    penalties: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
) -> torch.Tensor:
    """(n_penalties, n_vertices) mean squared leave-one-out error, exact or generalised.

    values : (rank,) eigenvalues of X'X
    rotated : (rank, n_vertices) U'X'Y
    response_squares : (n_vertices,) squares of the centred responses, summed over images
    rows : scores XU (n_images, rank) and centred responses (n_images, n_vertices) for the exact one, and weights of
        images, if both were multiplied by their roots; None: generalised
    """
    shrinkage = values / (values + penalties[:, None])  # (n_penalties, rank)
    freedom = (shrinkage.sum(1) + 1) / n_images  # the intercept is one degree of freedom
    if rows is None:
        errors = _gcv_errors(values, n_images, rotated, response_squares, shrinkage, freedom)
    else:
        errors = _loo_errors(values, rotated, shrinkage, *rows)
    errors[freedom > FULL] = torch.inf
    largest = penalties.argmax()[None]  # which can always be chosen
    errors.index_copy_(0, largest, errors.index_select(0, largest).clamp_max(torch.finfo(errors.dtype).max))
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

    The residual is the part of y outside the axes plus the part on the axes that shrinkage removes. Both are sums of
    squares, so float32 is enough.
    """
    shares = torch.cat([(1 - shrinkage).square(), torch.ones_like(shrinkage[:1])]) / values
    *shrunk, explained = (shares @ rotated.square()).double()
    # With rank n_images - 1 nothing is left outside the axes; set it to 0 to avoid rounding noise.
    unexplained = (response_squares.double() - explained).clamp_min(0) * (len(values) < n_images - 1)
    errors: torch.Tensor = (unexplained + torch.stack(shrunk)) / n_images
    return errors / (1 - freedom.double()).clamp_min(1e-9)[:, None] ** 2


def _loo_errors(
    values: torch.Tensor,
    rotated: torch.Tensor,
    shrinkage: torch.Tensor,
    scores: torch.Tensor,
    responses: torch.Tensor,
    image_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """(n_penalties, n_vertices) mean over images of ((y - h y) / (1 - h_ii))^2."""
    left = scores / values.sqrt()  # left singular vectors
    target = rotated / values.sqrt()[:, None]
    of_intercept: Any = 1 / len(scores)
    if image_weights is not None:
        of_intercept = (image_weights / image_weights.sum())[:, None]
    one_minus_leverage = (1 - of_intercept - left.square() @ shrinkage.T).clamp_min(1e-6)  # (n_images, n_penalties)
    n_at_once = max(MAX_NUMBERS_AT_ONCE // max(responses.numel(), 1), 1)
    errors = []
    for shrinkages, divisors in zip(shrinkage.split(n_at_once), one_minus_leverage.split(n_at_once, 1), strict=True):
        fitted = left @ (shrinkages.T[:, :, None] * target[:, None]).flatten(1)  # penalties side by side: one product
        residuals = responses[:, None] - fitted.view(len(scores), len(shrinkages), -1)
        errors.append((residuals / divisors[:, :, None]).square().mean(0))
    return torch.cat(errors)


def least_loo_errors(
    values: torch.Tensor,
    rotated: torch.Tensor,
    penalties: torch.Tensor,
    scores: torch.Tensor,
    responses: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_vertices,) least exact leave-one-out error of each vertex, and the number of its penalty.

    Each vertex goes down from the penalty that generalised cross-validation prefers, until both neighbours are worse:
    three or four products where there are nine penalties. The answer is that of all penalties, unless the error has
    several valleys.

    values, rotated : eigenvalues of X'X (rank,), and U'X'Y (rank, n_vertices)
    penalties : (n_penalties,) ascending
    scores, responses : XU (n_images, rank), and centred responses (n_images, n_vertices)
    """
    squares, n_vertices = sum_of_squares(responses), responses.shape[1]
    offered = penalty_errors(values, len(scores), rotated, squares, penalties, None)
    if n_vertices < _FEW_VERTICES:  # too few to be worth taking apart
        errors = penalty_errors(values, len(scores), rotated, squares, penalties, (scores, responses))
        least, which = errors.min(0)
        return least, which
    allowed = offered.isfinite().any(1)  # a penalty is judged for all vertices, or leaves too little error to judge it
    shrinkage = values / (values + penalties[:, None])
    errors = torch.full_like(offered, torch.inf)
    which, numbers = offered.argmin(0), torch.arange(len(penalties), device=values.device)[:, None]
    while True:
        near = (numbers - which).abs() <= 1
        wanted = near & errors.isinf() & allowed[:, None]
        if not wanted.any():
            return errors.gather(0, which[None])[0], which
        for number in torch.nonzero(wanted.any(1))[:, 0].tolist():
            some = torch.nonzero(wanted[number])[:, 0]
            of_penalty = shrinkage[number : number + 1]
            (found,) = _loo_errors(values, rotated[:, some], of_penalty, scores, responses[:, some])
            errors[number, some] = found.clamp_max(torch.finfo(found.dtype).max).to(errors.dtype)
        which = errors.argmin(0)


def held_out_errors(
    values: torch.Tensor,
    rotated: torch.Tensor,
    penalties: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """(n_parts + 1, n_penalties, n_vertices) mean squared error over a fold without each part, and over all of it.

    values, rotated : eigenvalues of X'X (rank,), and U'X'Y (rank, n_vertices)
    parts : scores XU (n, rank) and centred responses (n, n_vertices) of each part
    """
    squares = torch.stack([squared_errors(values, rotated, penalties, x, y) for x, y in parts])
    counts = torch.tensor([len(y) for _, y in parts], device=squares.device)[:, None, None]
    # summed, not subtracted from the total: rounding would let a part's outliers influence the choice for that part
    others = 1 - torch.eye(len(parts), device=squares.device, dtype=squares.dtype)
    without_each = torch.einsum("ij,jpv->ipv", others, squares) / (counts.sum() - counts)
    return torch.cat([without_each, squares.sum(0)[None] / counts.sum()])


def squared_errors(
    values: torch.Tensor, rotated: torch.Tensor, penalties: torch.Tensor, scores: torch.Tensor, responses: torch.Tensor
) -> torch.Tensor:
    """(n_penalties, n_vertices) squared errors of the predictions of any images, summed over them.

    values, rotated : eigenvalues of X'X (rank,), and U'X'Y (rank, n_vertices), of the images to fit to
    scores, responses : XU (n, rank) and centred responses (n, n_vertices) of the images to predict
    """
    errors = [(responses - scores @ (rotated / (values[:, None] + p))).square().sum(0) for p in penalties]
    return torch.stack(errors)


def is_exact(config: RidgeConfig, n_images: int) -> bool:
    """Whether penalties are chosen by the exact leave-one-out error."""
    return config.selection == "loo" or (config.selection == "auto" and n_images <= _LOO_IMAGES)


class AxesFit(NamedTuple):
    """Heads of all vertices, on the axes of the features or of a kernel.

    penalties : (n_vertices,) in the units of the eigenvalues
    on_axes : (rank, n_vertices) weights on the scores
    mean : (n_vertices,) mean of the responses
    """

    penalties: torch.Tensor
    on_axes: torch.Tensor
    mean: torch.Tensor


def fit_on_axes(
    values: torch.Tensor,
    scores: torch.Tensor,
    responses: torch.Tensor,
    offered: torch.Tensor,
    *,
    exact: bool,
    image_weights: torch.Tensor | None = None,
) -> AxesFit:
    """Give each vertex the penalty with the least leave-one-out error, exact or generalised, and fit it.

    values, scores : (rank,) eigenvalues, and (n_images, rank) scores of the images on their axes
    responses : (n_images, n_vertices), not centred
    offered : (n_penalties,) penalties to choose from, in the units of the eigenvalues
    image_weights : (n_images,) with a mean of 1, by whose roots the scores were multiplied
    """
    n_images, n_vertices = responses.shape
    mean, penalties = responses.new_empty(2, n_vertices)
    on_axes = responses.new_empty(len(values), n_vertices)
    for start in range(0, n_vertices, VERTEX_BLOCK):
        block = slice(start, start + VERTEX_BLOCK)
        mean[block] = weighted_mean(responses[:, block], image_weights)
        centred = responses[:, block] - mean[block]
        if image_weights is not None:
            centred *= image_weights.sqrt()[:, None]
        rotated = scores.T @ centred
        rows = (scores, centred, image_weights) if exact else None
        errors = penalty_errors(values, n_images, rotated, sum_of_squares(centred), offered, rows)
        penalties[block] = offered[errors.argmin(0)]
        torch.div(rotated, values[:, None] + penalties[block], out=on_axes[:, block])
    return AxesFit(penalties, on_axes, mean)


def maps_of_penalties(
    basis: Eigenbasis, rotated: torch.Tensor, response_mean: torch.Tensor, penalties: torch.Tensor
) -> LinearMap:
    """Linear map with a penalty per vertex, (n_vertices,), from U'X'Y."""
    weights = basis.weights(rotated / (basis.values[:, None] + penalties))
    return LinearMap(weights, response_mean - basis.mean @ weights)


def sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """(n_vertices,) sums of squares over rows."""
    squares: torch.Tensor = torch.linalg.vecdot(values, values, dim=0)
    return squares
