"""All that a blend has to know of its models: for each vertex and fold, sums over images of products of two columns.

The columns of a vertex are the predictions of each model, the responses, and ones. The sums of their products give r of
any weighted average of the models, on any set of folds, without reading a prediction again. One pass over the stores
gathers them.

Columns are standardised for each vertex first: r does not depend on the scale of a model, an average does.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from featcache.cache.store import Store
from featcache.dataset.splits import BY_ID, Split
from featcache.dataset.subject import Subject

N_FOLDS, SEED = 5, 0  # on which weights are learnt and scored; any folds of the split of the models serve
_BATCH_ROWS, _BATCH_VERTICES = 512, 256  # read at a time, and worked on: these stay in a cache
_SAMPLE_BYTES = 256e6  # of rows kept beside the products, for what needs single images: bootstrap and permutations


@dataclass(frozen=True)
class Products:
    """Sums of products of the standardised columns of each vertex: the models, the responses and ones.

    sums : ([n_folds,] n_vertices, n_models + 2, n_models + 2); the first axis is gone after `total`
    cross_fitted : whether the predictions of a fold come from the responses of the others. If so, leaving a fold out is
        not enough: its responses went into the predictions of all other folds. A linear model's prediction times the
        response is a sum over pairs of images, y_i K_ij y_j, and that of fold k is over the pairs with one image in k.
        K is symmetric, so the same pairs are in the sums of the other folds; subtracting the fold's sum takes them out
        again. Where two folds are left out, three quarters are subtracted: pairs between the two are in neither of the
        other folds. Without this, weights of many models learnt on few images score too high (docs/blend.md).
    """

    sums: np.ndarray
    cross_fitted: bool = True

    @property
    def n_models(self) -> int:
        return int(self.sums.shape[-1]) - 2

    @property
    def n_vertices(self) -> int:
        return int(self.sums.shape[-3])

    def total(self, without: Collection[int] = ()) -> "Products":
        """Sums over all folds but some, float64, free of the responses of these: see `cross_fitted` above."""
        total, left_out = np.zeros(self.sums.shape[1:]), np.zeros((self.n_vertices, self.n_models))
        for fold, sums in enumerate(self.sums):
            if fold not in without:
                total += sums
            elif self.cross_fitted:
                left_out += sums[:, :-2, -2]
        with_images = {
            fold for fold, sums in enumerate(self.sums) if sums[:, -1, -1].any()
        }  # few groups fill few folds
        left_out *= len(with_images.difference(without)) / max(len(with_images) - 1, 1)
        total[:, :-2, -2] -= left_out
        total[:, -2, :-2] -= left_out
        return Products(total)

    def fold(self, number: int) -> "Products":
        """Sums over one fold, float64."""
        return Products(self.sums[number].astype(np.float64))

    def at(self, vertices: np.ndarray | slice) -> "Products":
        """Products of some of the vertices, given by number."""
        return Products(self.sums[..., vertices, :, :], self.cross_fitted)

    @cached_property
    def covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Covariances of the models, (n_vertices, n_models, n_models), and with the response, (n_vertices, n_models).

        Only without a fold axis. In units of the response's standard deviation over these images.
        """
        n = np.maximum(self.sums[:, -1, -1], 1)[:, None, None]
        level = self.sums[:, :-1, -1:] / n
        centred = self.sums[:, :-1, :-1] / n - level * level.transpose(0, 2, 1)
        spread = np.sqrt(np.maximum(centred[:, -1, -1], 0))
        return centred[:, :-1, :-1], centred[:, :-1, -1] / np.where(spread > 0, spread, 1)[:, None]


@dataclass(frozen=True)
class Units:
    """Mean and scale of the columns before they were standardised.

    mean, scale : (n_vertices, n_models + 1), the responses last; a constant column has scale 1
    """

    mean: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Sample:
    """The standardised columns themselves, of some vertices.

    vertices : (n_sample,) their numbers
    columns : (n_models + 1, n_images, n_sample) float32, the responses last
    """

    vertices: np.ndarray
    columns: np.ndarray

    def thinned(self, most: int) -> "Sample":
        """At most so many of the vertices, evenly spread."""
        n = len(self.vertices)
        kept = np.arange(min(n, most)) * n // min(n, most)
        return Sample(self.vertices[kept], self.columns[:, :, kept])


@dataclass(frozen=True)
class Gathered:
    """What one pass over the predictions of a subject gives; the vertices of its surfaces are side by side."""

    products: Products
    units: Units
    sample: Sample


def gather(subject: Subject, stores: Sequence[Store], by: Split = BY_ID) -> Gathered:
    """Read the out-of-fold predictions of some models and the responses once.

    stores : prediction stores of the models
    by : the split of the models
    """
    folds = by.folds(subject.train.ids, N_FOLDS, SEED)
    n_train, n_columns = len(subject.train), len(stores) + 1
    n_vertices = sum(subject.n_vertices.values())
    sums = torch.zeros(N_FOLDS, n_vertices, n_columns + 1, n_columns + 1)
    shift = torch.zeros(n_vertices, n_columns)
    n_kept = n_sampled(n_train * n_columns, n_vertices)
    vertices = np.arange(n_kept) * n_vertices // n_kept  # evenly spread
    rows = np.empty((n_columns, n_train, len(vertices)), np.float32)
    for surface, block in surface_blocks(subject).items():
        kept = slice(*np.searchsorted(vertices, (block.start, block.stop)))
        target = _Target(sums[:, block], shift[block], rows[:, :, kept], vertices[kept] - block.start)
        _gather_surface(subject, surface, stores, folds, target)
    return _standardised(sums.numpy(), shift.double().numpy(), Sample(vertices, rows))


def surface_blocks(subject: Subject) -> dict[str, slice]:
    """{surface: where its vertices are among those of all surfaces side by side}."""
    ends = np.cumsum([0, *subject.n_vertices.values()]).tolist()
    return {surface: slice(*ends[k : k + 2]) for k, surface in enumerate(subject.surfaces)}


def n_sampled(numbers_a_vertex: int, n_vertices: int) -> int:
    """Vertices whose rows are kept: all, or as many as there is room for."""
    return min(n_vertices, max(int(_SAMPLE_BYTES / 4 / numbers_a_vertex), 1))


def bytes_of(n_images: int, n_vertices: Mapping[str, int], n_models: int) -> float:
    """Bytes of what is gathered of a subject, and of the batches that are read for it."""
    n, n_columns = sum(n_vertices.values()), n_models + 1
    sample = n_columns * n_images * n_sampled(n_columns * n_images, n)
    batches = (n_columns + 1) * min(_BATCH_ROWS, n_images) * max(n_vertices.values())
    return 4.0 * (N_FOLDS * n * (n_columns + 1) ** 2 + sample + batches)


@dataclass(frozen=True)
class _Target:
    """Views into which the products of one surface are written."""

    sums: torch.Tensor  # (n_folds, n_vertices, n_columns + 1, n_columns + 1)
    shift: torch.Tensor  # (n_vertices, n_columns)
    rows: np.ndarray  # (n_columns, n_images, n_sample)
    vertices: np.ndarray  # (n_sample,)


def _gather_surface(
    subject: Subject, surface: str, stores: Sequence[Store], folds: np.ndarray, target: _Target
) -> None:
    n_vertices, responses = len(target.shift), subject.responses(surface)
    chunk = max(store.chunk_rows(surface) for store in stores)
    step = -(-_BATCH_ROWS // chunk) * chunk
    rows = torch.empty(min(step, len(folds)), n_vertices)  # allocated once, so that no gaps are left between batches
    batch = torch.empty(len(stores) + 1, *rows.shape)
    for start in range(0, len(folds), step):
        of_fold = folds[start : start + step]
        stop = start + len(of_fold)
        order = np.argsort(of_fold, kind="stable")  # each fold's rows side by side
        columns, place = batch[:, : len(order)], rows[: len(order)]
        for column, store in zip(columns, stores, strict=False):
            store.read(surface, start, stop, out=place.numpy())
            torch.index_select(place, 0, torch.from_numpy(order), out=column)
        place.numpy()[:] = responses[start:stop]
        torch.index_select(place, 0, torch.from_numpy(order), out=columns[-1])
        if start == 0:
            for number, column in enumerate(columns):
                target.shift[:, number] = torch.from_numpy(column.numpy().mean(0, dtype=np.float64))
        target.rows[:, start + order] = columns.numpy()[:, :, target.vertices]
        _add(target.sums, np.bincount(of_fold, minlength=N_FOLDS).tolist(), columns, target.shift)


def _add(sums: torch.Tensor, counts: list[int], columns: torch.Tensor, shift: torch.Tensor) -> None:
    """Add the products of a batch of rows to `sums`, fold by fold.

    sums : (n_folds, n_vertices, n_columns + 1, n_columns + 1) products of the columns and of ones with each other
    counts : (n_folds,) rows of each fold, which follow each other
    columns : (n_columns, n, n_vertices) predictions of each model, then the responses
    shift : (n_vertices, n_columns) subtracted first: float32 sums of small numbers are good to some parts in 10^7

    With a column of ones every sum is an inner product, and all sums of a vertex are one small matrix product.
    """
    n_columns, n, n_vertices = columns.shape
    buffer = torch.ones(min(_BATCH_VERTICES, n_vertices), n_columns + 1, n)
    for first in range(0, n_vertices, _BATCH_VERTICES):
        block = slice(first, min(first + _BATCH_VERTICES, n_vertices))
        tile = buffer[: block.stop - block.start]
        for number, column in enumerate(columns):
            torch.sub(column[:, block].T, shift[block, number, None], out=tile[:, number])
        for of_fold, part in zip(sums, torch.split(tile, counts, dim=2), strict=True):
            of_fold[block].baddbmm_(part, part.transpose(1, 2))


def _standardised(sums: np.ndarray, shift: np.ndarray, sample: Sample) -> Gathered:
    """Standardise, in place, sums of the columns less `shift`, as `_add` leaves them, and the sample."""
    mean, scale = np.empty_like(shift), np.empty_like(shift)
    for first in range(0, len(shift), _BATCH_VERTICES):
        block = slice(first, first + _BATCH_VERTICES)
        block_sums = sums[:, block].astype(np.float64)
        total = block_sums.sum(0)
        n = total[:, -1, -1, None]
        mean[block] = total[:, :-1, -1] / n
        variance = np.einsum("vcc->vc", total)[:, :-1] / n - mean[block] ** 2
        # the variance of a constant column is the rounding of its sums
        constant = variance <= 1e-12 * np.maximum((shift[block] + mean[block]) ** 2, np.finfo(np.float64).tiny)
        scale[block] = np.sqrt(np.where(constant, 1, variance))
        # z = (p - mean) / scale, and ones stay ones: the same linear map on either side of every matrix of sums
        change = np.zeros((*block_sums.shape[1:],))
        np.einsum("vcc->vc", change)[:] = np.concatenate([1 / scale[block], np.ones_like(n)], 1)
        change[:, :-1, -1] = -mean[block] / scale[block]
        block_sums = change @ block_sums @ change.transpose(0, 2, 1)
        zero = np.concatenate([constant, np.zeros_like(n, dtype=bool)], 1)
        block_sums[:, zero] = 0  # a constant column is 0 exactly
        block_sums.transpose(0, 1, 3, 2)[:, zero] = 0
        sums[:, block] = block_sums
    of_sample = sample.columns.transpose(2, 0, 1)  # a view: (n_sample, n_columns, n_images)
    of_sample -= (shift + mean)[sample.vertices, :, None].astype(np.float32)
    of_sample /= scale[sample.vertices, :, None].astype(np.float32)
    return Gathered(Products(sums), Units(shift + mean, scale), sample)
