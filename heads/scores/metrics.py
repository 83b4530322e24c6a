"""How good predictions are: Pearson r per vertex, noise-normalised accuracy, and means over subjects and ROIs.

Every r and every accuracy that is reported comes from here. `pearson_r` starts from matrices, `r_from_sums` from sums
that were gathered before; they differ in how much rounding a constant column may show. Training has a correlation of
its own, in heads/scores/losses.py, because it has to be differentiable and to stay on the device of the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.errors import FeatcacheError

Array = NDArray[Any]
Float64s = NDArray[np.float64]
ZeroCeiling = Literal["exclude", "epsilon"]

# Of each thread's two tiles, 1.3 MB each in float64, the rows are long: memory is read about twice as fast as in rows
# of 4096 vertices. Few enough of them stay in a core's share of the cache.
_TILE_VERTICES = 10_000
_TILE_NUMBERS = 16 * _TILE_VERTICES
_FEWEST_VERTICES = 1024  # of a tile, where there are cores for more tiles

_MAX_MEAN_TO_SD = 10.0  # above it, sums of squares that were not shifted lose more than two digits
_CONSTANT_SD_TO_MEAN = 1e-13  # below it, the variation is rounding of float64
_CONSTANT_SCATTER = 1e-6  # share of the sum of squares: below it, the variation is rounding of sums stored as float32
ALL_SURFACES = "both"
_EPSILON_CEILING = 1e-14  # replaces a ceiling of 0 in the organisers' published script


def pearson_r(predictions: ArrayLike, responses: ArrayLike) -> Float64s:
    """Pearson correlation over images, for each vertex, summed in float64.

    ``r_v = sum_i(dp_iv dy_iv) / sqrt(sum_i(dp_iv**2) sum_i(dy_iv**2))``, where dp and dy are the predictions and
    responses less their means over images; exactly 0 where either is constant (up to the rounding of float64).

    Works tile by tile, on one thread a core, so that the memory it needs does not grow with the matrices.

    Parameters
    ----------
    predictions, responses : (n_images, n_vertices), any unit, real and finite; arrays, memory maps or CPU tensors

    Returns
    -------
    r : (n_vertices,) float64 in [-1, 1]

    Raises
    ------
    FeatcacheError : shapes that do not match, numbers that are not real and finite, or fewer than 2 images
    """
    predictions, responses = _checked_matrices(predictions, responses)
    n_vertices = predictions.shape[1]
    r = np.empty(n_vertices)

    n_tiles = max(-(-n_vertices // _TILE_VERTICES), min(os.cpu_count() or 1, n_vertices // _FEWEST_VERTICES), 1)
    step = -(-n_vertices // n_tiles) or 1

    def fill(first: int) -> None:
        block = slice(first, first + step)
        with np.errstate(over="ignore", invalid="ignore"):  # _block_r refuses values that are not finite
            r[block] = _block_r(predictions[:, block], responses[:, block])

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy lets go of the interpreter while it sums
        for _ in threads.map(fill, range(0, n_vertices, step)):
            pass
    return r


def r_from_sums(n: Array, p: Array, pp: Array, py: Array, y: Array, yy: Array) -> Float64s:
    """Pearson correlation from sums over images; exactly 0 where either side is constant.

    ``r = (sum py - sum p sum y / n) / sqrt((sum pp - (sum p)**2 / n) (sum yy - (sum y)**2 / n))``. A side is constant
    where its scatter is below 1e-6 of its sum of squares: the sums may have been rounded to float32.

    Parameters
    ----------
    n : number of images, or sum of their weights
    p, pp, py, y, yy : sums of the predictions, of their squares, of their products with the responses, of the responses
        and of their squares; float64, of any shapes that broadcast

    Returns
    -------
    r : float64 in [-1, 1], of the common shape
    """
    n = np.maximum(n, 1)
    p_scatter, y_scatter = pp - p**2 / n, yy - y**2 / n
    defined = (p_scatter > _CONSTANT_SCATTER * pp) & (y_scatter > _CONSTANT_SCATTER * yy)
    norm = np.sqrt(np.where(defined, p_scatter * y_scatter, 1))
    r: Float64s = np.clip(np.where(defined, (py - p * y / n) / norm, 0), -1, 1)
    return r


def noise_normalized_accuracy(
    predictions: ArrayLike, responses: ArrayLike, noise_ceiling: ArrayLike, zero_ceiling: ZeroCeiling = "exclude"
) -> Float64s:
    """The challenge's metric for each vertex, percent: `accuracy_from_r` of `pearson_r`.

    Parameters
    ----------
    predictions, responses : (n_images, n_vertices), as for `pearson_r`
    noise_ceiling, zero_ceiling : as for `accuracy_from_r`

    Returns
    -------
    accuracy : (n_vertices,) float64, percent in [0, 100], or NaN where the vertex is left out

    Raises
    ------
    FeatcacheError : as `pearson_r` and `accuracy_from_r`
    """
    return accuracy_from_r(pearson_r(predictions, responses), noise_ceiling, zero_ceiling)


def accuracy_from_r(r: ArrayLike, noise_ceiling: ArrayLike, zero_ceiling: ZeroCeiling = "exclude") -> Float64s:
    """Share of the explainable variance that is explained: ``min(100, 100 max(r, 0)**2 / NC)``, percent.

    Parameters
    ----------
    r : (n_vertices,), in [-1, 1]
    noise_ceiling : (n_vertices,), fraction of variance in [0, 1]
    zero_ceiling : "exclude" gives NaN where the ceiling is 0, to be left out of means, as the challenge's scorer does;
        "epsilon" takes 1e-14 in its place, as the organisers' published script does, so that any r > 0 counts as 100

    Returns
    -------
    accuracy : (n_vertices,) float64, percent in [0, 100], or NaN

    Raises
    ------
    FeatcacheError : shapes that do not match, an r or a ceiling out of its range, or another ``zero_ceiling``

    Source: Gifford et al., The Algonauts Project 2023 Challenge: How the Human Brain Makes Sense of Natural Scenes
    (2023).
    """
    if zero_ceiling not in ("exclude", "epsilon"):
        raise FeatcacheError(
            "zero_ceiling", expected="'exclude' or 'epsilon'", found=repr(zero_ceiling), remedy="use 'exclude'"
        )
    r = _checked_r(r)
    noise_ceiling = _checked_ceiling(noise_ceiling, len(r))
    ceiling = np.where(noise_ceiling == 0, np.nan if zero_ceiling == "exclude" else _EPSILON_CEILING, noise_ceiling)
    return explained_share(r, ceiling, whole=100)


def explained_share(r: Array, noise_ceiling: Array, whole: float = 1) -> Float64s:
    """Explained part of the explainable variance, ``whole * min(max(r, 0)**2, NC) / NC``; nothing is checked.

    r : (..., n_vertices), in [-1, 1]
    noise_ceiling : (n_vertices,), fraction of variance in (0, 1], or NaN
    whole : value for all of the explainable variance: 1 for fractions, 100 for percent
    """
    # clipped before the division, because dividing by the smallest ceilings would overflow
    share: Float64s = whole * np.minimum(np.maximum(r, 0) ** 2, noise_ceiling) / noise_ceiling
    return share


@dataclass(frozen=True, eq=False)  # arrays have no one truth value to compare by
class VertexScores:
    """Scores of the vertices of one surface of one subject; checked when built."""

    subject: str  # e.g. "subj01"
    surface: str  # e.g. "lh"; any name but "both", which summaries have for all surfaces together
    r: Array  # (n_vertices,), in [-1, 1]
    noise_ceiling: Array | None = None  # (n_vertices,), fraction of variance in [0, 1]; None where there is none
    rois: Mapping[str, Array] = field(default_factory=dict)  # name -> (n_vertices,) bool; ROIs may overlap

    def __post_init__(self) -> None:
        if self.surface == ALL_SURFACES:
            raise FeatcacheError(
                "a surface", expected="the name of one", found=repr(self.surface), remedy="score one at a time"
            )
        n_vertices = len(_checked_r(self.r))
        if self.noise_ceiling is not None:
            _checked_ceiling(self.noise_ceiling, n_vertices)
        for roi, mask in self.rois.items():
            if np.shape(mask) != (n_vertices,) or np.asarray(mask).dtype != bool:
                raise FeatcacheError(
                    f"the mask of ROI {roi} of {self.subject} {self.surface}",
                    expected=f"({n_vertices},) bool",
                    found=f"{np.shape(mask)} {np.asarray(mask).dtype}",
                    remedy="pass labels != 0",
                )


@dataclass(frozen=True)
class Summary:
    """Means over a set of vertices."""

    subject: str  # "all" for every subject together
    surface: str  # e.g. "lh", or "both" for all surfaces together
    roi: str  # "all" for every vertex
    n_vertices: int  # over which r is averaged
    mean_r: float  # in [-1, 1]
    mean_r2: float  # mean of max(r, 0)**2, in [0, 1]
    accuracy: float | None  # mean noise-normalised accuracy, percent; None where no vertex has a ceiling to count with

    @property
    def all_surfaces(self) -> bool:
        """Whether the vertices are those of all surfaces."""
        return self.surface == ALL_SURFACES

    def to_json(self) -> dict[str, Any]:
        """The row as commands write it."""
        return dict(vars(self))


def summarize(scores: Sequence[VertexScores], zero_ceiling: ZeroCeiling = "exclude") -> list[Summary]:
    """Means for each surface of each subject, each subject, each ROI of all subjects, and last for all vertices.

    Every mean is over vertices, never over means. ``mean_r`` keeps negative r; ``mean_r2`` takes them as 0 before
    squaring, as the metric does. ``accuracy`` covers only the vertices that have a ceiling: subjects without one, and
    (unless ``zero_ceiling`` is "epsilon") vertices whose ceiling is 0, count only in the other columns. An ROI or a
    surface without vertices has no row.

    Parameters
    ----------
    scores : one for each subject and surface
    zero_ceiling : as for `accuracy_from_r`

    Raises
    ------
    FeatcacheError : no scores, or the same surface of a subject twice
    """
    _check_distinct(scores)
    scores = sorted(scores, key=lambda score: (score.subject, score.surface))
    by_subject = {subject: list(group) for subject, group in groupby(scores, key=lambda score: score.subject)}
    rois = dict.fromkeys(roi for score in scores for roi in score.rois)

    def rows() -> Iterator[Summary | None]:
        for score in scores:
            yield summary_of(score.subject, score.surface, "all", [score], zero_ceiling)
        for subject, group in by_subject.items():
            yield summary_of(subject, ALL_SURFACES, "all", group, zero_ceiling)
        for roi in rois:
            yield summary_of("all", ALL_SURFACES, roi, scores, zero_ceiling)
        yield summary_of("all", ALL_SURFACES, "all", scores, zero_ceiling)

    return [row for row in rows() if row is not None]


def summary_of(
    subject: str, surface: str, roi: str, scores: Sequence[VertexScores], zero_ceiling: ZeroCeiling
) -> Summary | None:
    """Means over the vertices of ``roi`` in all of ``scores``; None if there are none. Names are taken as they are."""
    parts = [_in_roi(score, roi, zero_ceiling) for score in scores]
    r, accuracy = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    if not r.size:
        return None
    counted = accuracy[~np.isnan(accuracy)]
    return Summary(
        subject=subject,
        surface=surface,
        roi=roi,
        n_vertices=r.size,
        mean_r=float(r.mean()),
        mean_r2=float((np.maximum(r, 0) ** 2).mean()),
        accuracy=float(counted.mean()) if counted.size else None,
    )


def _in_roi(score: VertexScores, roi: str, zero_ceiling: ZeroCeiling) -> tuple[Float64s, Float64s]:
    """r and accuracy of the vertices in ``roi``; an accuracy is NaN if it does not count."""
    r = np.asarray(score.r, dtype=np.float64)
    if score.noise_ceiling is None:
        accuracy = np.full(r.shape, np.nan)
    else:
        accuracy = accuracy_from_r(r, score.noise_ceiling, zero_ceiling)
    mask = slice(None) if roi == "all" else score.rois.get(roi, np.zeros(r.shape, dtype=bool))
    return r[mask], accuracy[mask]


def _check_distinct(scores: Sequence[VertexScores]) -> None:
    keys = [(score.subject, score.surface) for score in scores]
    twice = next((" ".join(key) for key in keys if keys.count(key) > 1), None)
    if twice or not keys:
        raise FeatcacheError(
            "a summary",
            expected="scores of a surface or more, each once",
            found=f"{twice} twice" if twice else "none",
            remedy="score each surface once",
        )


def _checked_matrices(predictions: ArrayLike, responses: ArrayLike) -> tuple[Array, Array]:
    predictions, responses = np.asarray(predictions), np.asarray(responses)
    if predictions.ndim != 2 or predictions.shape != responses.shape:
        raise FeatcacheError(
            "predictions and responses",
            expected="(n_images, n_vertices) both",
            found=f"{predictions.shape} and {responses.shape}",
            remedy="pass the same images and vertices",
        )
    if len(predictions) < 2:
        raise FeatcacheError("a correlation", expected="2 images or more", found=len(predictions), remedy="score more")
    for name, matrix in (("predictions", predictions), ("responses", responses)):
        if matrix.dtype.kind not in "fiub":
            raise FeatcacheError(name, expected="real numbers", found=matrix.dtype, remedy="convert them to float32")
    return predictions, responses


def _checked_r(r: ArrayLike) -> Float64s:
    r = np.asarray(r, dtype=np.float64)
    if r.ndim != 1 or not (np.abs(r) <= 1).all():  # in this form NaN is refused too
        raise FeatcacheError(
            "r", expected="(n_vertices,) in [-1, 1]", found=_range(r), remedy="compute it with pearson_r"
        )
    return r


def _checked_ceiling(noise_ceiling: ArrayLike, n_vertices: int) -> Float64s:
    noise_ceiling = np.asarray(noise_ceiling, dtype=np.float64)
    if noise_ceiling.shape != (n_vertices,) or not ((noise_ceiling >= 0) & (noise_ceiling <= 1)).all():
        raise FeatcacheError(
            "the noise ceiling",
            expected=f"({n_vertices},), fractions of variance in [0, 1]",
            found=_range(noise_ceiling),
            remedy="pass one value per vertex, and divide percent by 100",
        )
    return noise_ceiling


def _range(values: Float64s) -> str:
    return f"{values.shape} from {values.min():.4g} to {values.max():.4g}" if values.size else f"{values.shape}"


def _block_r(predictions: Array, responses: Array) -> Float64s:
    """r of one block of vertices, (n_images, n_block) -> (n_block,)."""
    n_images = len(predictions)
    shifts = np.zeros((2, predictions.shape[1]))
    sums, squares, products = _sums(predictions, responses, shifts)
    if _mean_dominates(sums, squares, n_images).any():
        # Minus its first row, a constant column is exactly 0; others lose at most log10(n_images) digits, because
        # (first - mean)**2 is at most the sum of all such squares. Rarely needed, so not done for every block.
        shifts = np.stack([predictions[0], responses[0]]).astype(np.float64)
        sums, squares, products = _sums(predictions, responses, shifts)
    means = sums / n_images
    scatter = squares - sums * means
    if not np.isfinite(scatter).all():
        raise FeatcacheError(
            "predictions and responses",
            expected="finite numbers",
            found="some that are NaN, infinite or too large to square",
            remedy="look for a diverged fit or a damaged file",
        )
    constant = scatter <= n_images * (_CONSTANT_SD_TO_MEAN * (shifts + means)) ** 2
    norms = np.sqrt(np.where(constant, 1, scatter))
    r = (products - sums[0] * means[1]) / norms[0] / norms[1]
    return np.where(constant.any(axis=0), 0, np.clip(r, -1, 1))


def _mean_dominates(sums: Float64s, squares: Float64s, n_images: int) -> NDArray[np.bool_]:
    """Whether a column's mean is so large against its standard deviation that sums of squares lose digits."""
    mean_squares = sums**2 / n_images
    return mean_squares > _MAX_MEAN_TO_SD**2 * (squares - mean_squares)


def _sums(predictions: Array, responses: Array, shifts: Float64s) -> tuple[Float64s, Float64s, Float64s]:
    """Sums over images of both matrices minus ``shifts``, (2, n_block), of their squares, and of p y, (n_block,)."""
    n_images, n_block = predictions.shape
    n_rows = _TILE_NUMBERS // n_block  # 16 or more, as no block is wider than a tile
    sums, squares, products = np.zeros((2, n_block)), np.zeros((2, n_block)), np.zeros(n_block)
    buffer, ones = np.empty((2, min(n_rows, n_images), n_block)), np.ones(n_rows)
    for first in range(0, n_images, n_rows):
        tile = buffer[:, : min(n_rows, n_images - first)]
        np.copyto(tile[0], predictions[first : first + n_rows])
        np.copyto(tile[1], responses[first : first + n_rows])
        if shifts.any():
            tile -= shifts[:, None]
        sums += ones[: tile.shape[1]] @ tile
        squares += np.einsum("kiv,kiv->kv", tile, tile)
        products += np.einsum("iv,iv->v", *tile)
    return sums, squares, products
