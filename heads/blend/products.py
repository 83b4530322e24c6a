"""All that a blend has to know of its models: per vertex and fold, sums over the images of products of two columns.

The columns of a vertex are what each model predicts, what was measured, and ones. From the sums of their products
follows r of any weighted average of the models, on any set of folds, without reading a prediction again. They are
gathered in one pass over the stores.

Columns are standardised per vertex first: r ignores scale, an average does not.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from featcache.cache.store import Store
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject

N_FOLDS, SEED = 5, 0  # on which weights are learnt and scored; any split by image id serves
_BATCH_ROWS, _BATCH_VERTICES = 512, 256  # read at a time, and worked on: these stay in a cache
_SAMPLE_BYTES = 256e6  # of rows kept beside the moments, for what moments cannot tell: bootstrap and permutations


@dataclass(frozen=True)
class Moments:
    """Sums of products of the standardised columns of each vertex: the models, the responses and ones.

    sums : ([n_folds,] n_vertices, n_models + 2, n_models + 2); the first axis is gone after `total`
    cross_fitted : whether the predictions of a fold come from the responses of the others. Then what a fold is left out
        of still knows it: its responses went into the predictions of all other folds. A linear model's prediction times
        the response is a sum over pairs of images, y_i K_ij y_j, and that of fold k over the pairs with one image in k.
        The same pairs, K being symmetric, are in the sums of the other folds; they are taken out again by subtracting
        the fold's own sum. Of two folds that are left out only three quarters are, for pairs between the two are in
        neither of the others. Nothing else makes scores of weights of many models on few images honest (docs/blend.md).
    """

    sums: np.ndarray
    cross_fitted: bool = True

    @property
    def n_models(self) -> int:
        return self.sums.shape[-1] - 2

    @property
    def n_vertices(self) -> int:
        return self.sums.shape[-3]

    def total(self, without: Collection[int] = ()) -> "Moments":
        """Over all folds but these, float64, and free of them: see `cross_fitted` above."""
        whole, theirs = np.zeros(self.sums.shape[1:]), np.zeros((self.n_vertices, self.n_models))
        for fold, sums in enumerate(self.sums):
            if fold not in without:
                whole += sums
            elif self.cross_fitted:
                theirs += sums[:, :-2, -2]
        theirs *= (N_FOLDS - len(without)) / (N_FOLDS - 1)
        whole[:, :-2, -2] -= theirs
        whole[:, -2, :-2] -= theirs
        return Moments(whole)

    def fold(self, number: int) -> "Moments":
        return Moments(self.sums[number].astype(np.float64))

    def at(self, vertices: np.ndarray) -> "Moments":
        """Of some of the vertices, given by number."""
        return Moments(self.sums[..., vertices, :, :], self.cross_fitted)

    @cached_property
    def covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Without a fold axis: (n_vertices, n_models, n_models) of models, (n_vertices, n_models) with the response.

        In units of the response's standard deviation over these images.
        """
        n = np.maximum(self.sums[:, -1, -1], 1)[:, None, None]
        level = self.sums[:, :-1, -1:] / n
        centred = self.sums[:, :-1, :-1] / n - level * level.transpose(0, 2, 1)
        spread = np.sqrt(np.maximum(centred[:, -1, -1], 0))
        return centred[:, :-1, :-1], centred[:, :-1, -1] / np.where(spread > 0, spread, 1)[:, None]


@dataclass(frozen=True)
class Units:
    """What the columns were before they were standardised.

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
        """Of some of the vertices, evenly spread."""
        n = len(self.vertices)
        kept = np.arange(min(n, most)) * n // min(n, most)
        return Sample(self.vertices[kept], self.columns[:, :, kept])


@dataclass(frozen=True)
class Gathered:
    """Of one subject, left hemisphere first: its vertices are those of both, side by side."""

    moments: Moments
    units: Units
    sample: Sample


def gather(subject: Subject, stores: Sequence[Store]) -> Gathered:
    """One pass over the out-of-fold predictions of some models and the responses they are of."""
    n_train, n_columns = len(subject.train), len(stores) + 1
    n_vertices = sum(subject.n_vertices.values())
    sums = torch.zeros(N_FOLDS, n_vertices, n_columns + 1, n_columns + 1)
    shift = torch.zeros(n_vertices, n_columns)
    n_kept = n_sampled(n_train * n_columns, n_vertices)
    vertices = np.arange(n_kept) * n_vertices // n_kept  # evenly spread
    rows = np.empty((n_columns, n_train, len(vertices)), np.float32)
    first = 0
    for hemisphere in HEMISPHERES:
        last = first + subject.n_vertices[hemisphere]
        own = slice(*np.searchsorted(vertices, (first, last)))
        found = _Hemisphere(sums[:, first:last], shift[first:last], rows[:, :, own], vertices[own] - first)
        _gather_hemisphere(subject, hemisphere, stores, found)
        first = last
    return _standardised(sums.numpy(), shift.double().numpy(), Sample(vertices, rows))


def n_sampled(numbers_a_vertex: int, n_vertices: int) -> int:
    """Vertices whose rows are kept: all, or as many as there is room for."""
    return min(n_vertices, max(int(_SAMPLE_BYTES / 4 / numbers_a_vertex), 1))


def bytes_of(n_images: int, n_vertices: Mapping[str, int], n_models: int) -> float:
    """What is gathered of a subject, and the batches that are read for it."""
    n, n_columns = sum(n_vertices.values()), n_models + 1
    sample = n_columns * n_images * n_sampled(n_columns * n_images, n)
    batches = (n_columns + 1) * min(_BATCH_ROWS, n_images) * max(n_vertices.values())
    return 4.0 * (N_FOLDS * n * (n_columns + 1) ** 2 + sample + batches)


@dataclass(frozen=True)
class _Hemisphere:
    """Where what is gathered of one hemisphere goes."""

    sums: torch.Tensor  # (n_folds, n_vertices, n_columns + 1, n_columns + 1)
    shift: torch.Tensor  # (n_vertices, n_columns)
    rows: np.ndarray  # (n_columns, n_images, n_sample)
    vertices: np.ndarray  # (n_sample,)


def _gather_hemisphere(subject: Subject, hemisphere: str, stores: Sequence[Store], found: _Hemisphere) -> None:
    folds, n_vertices = assign_folds(subject.train.ids, N_FOLDS, SEED), len(found.shift)
    responses = subject.responses(hemisphere)
    chunk = max(store.chunk_rows(hemisphere) for store in stores)
    step = -(-_BATCH_ROWS // chunk) * chunk
    rows = torch.empty(min(step, len(folds)), n_vertices)  # one place for all: nothing is left between
    batch = torch.empty(len(stores) + 1, *rows.shape)
    for start in range(0, len(folds), step):
        of_fold = folds[start : start + step]
        stop = start + len(of_fold)
        order = np.argsort(of_fold, kind="stable")  # each fold's rows side by side
        columns, place = batch[:, : len(order)], rows[: len(order)]
        for column, store in zip(columns, stores, strict=False):
            store.read(hemisphere, start, stop, out=place.numpy())
            torch.index_select(place, 0, torch.from_numpy(order), out=column)
        place.numpy()[:] = responses[start:stop]
        torch.index_select(place, 0, torch.from_numpy(order), out=columns[-1])
        if start == 0:
            for number, column in enumerate(columns):
                found.shift[:, number] = torch.from_numpy(column.numpy().mean(0, dtype=np.float64))
        found.rows[:, start + order] = columns.numpy()[:, :, found.vertices]
        _add(found.sums, np.bincount(of_fold, minlength=N_FOLDS).tolist(), columns, found.shift)


def _add(sums: torch.Tensor, counts: Sequence[int], columns: torch.Tensor, shift: torch.Tensor) -> None:
    """Add a batch of rows, fold by fold, less `shift`, (n_vertices, n_columns).

    sums : (n_folds, n_vertices, n_columns + 1, n_columns + 1) products of the columns and of ones with each other
    counts : (n_folds,) rows of each fold, which follow each other
    columns : (n_columns, n, n_vertices) predictions of each model, then the responses

    All float32: of numbers that are small by then, so that what is summed in it is known to some parts in 10^7. With a
    column of ones every sum is an inner product, and all of a vertex's are one small matrix product.
    """
    n_columns, n, n_vertices = columns.shape
    buffer = torch.ones(min(_BATCH_VERTICES, n_vertices), n_columns + 1, n)
    for first in range(0, n_vertices, _BATCH_VERTICES):
        block = slice(first, min(first + _BATCH_VERTICES, n_vertices))
        tile = buffer[: block.stop - block.start]
        for number, column in enumerate(columns):
            torch.sub(column[:, block].T, shift[block, number, None], out=tile[:, number])
        for of_fold, part in zip(sums, tile.split(counts, dim=2), strict=True):
            of_fold[block].baddbmm_(part, part.transpose(1, 2))


def _standardised(sums: np.ndarray, shift: np.ndarray, sample: Sample) -> Gathered:
    """In place, from sums of the columns less `shift`, as `_add` leaves them."""
    mean, scale = np.empty_like(shift), np.empty_like(shift)
    for first in range(0, len(shift), _BATCH_VERTICES):
        block = slice(first, first + _BATCH_VERTICES)
        own = sums[:, block].astype(np.float64)
        total = own.sum(0)
        n = total[:, -1, -1, None]
        mean[block] = total[:, :-1, -1] / n
        variance = np.einsum("vcc->vc", total)[:, :-1] / n - mean[block] ** 2
        # what is left of a constant column is the rounding of its sums
        constant = variance <= 1e-12 * np.maximum((shift[block] + mean[block]) ** 2, np.finfo(np.float64).tiny)
        scale[block] = np.sqrt(np.where(constant, 1, variance))
        # z = (p - mean) / scale, and ones stay ones: the same linear map on either side of every matrix of sums
        change = np.zeros((*own.shape[1:],))
        np.einsum("vcc->vc", change)[:] = np.concatenate([1 / scale[block], np.ones_like(n)], 1)
        change[:, :-1, -1] = -mean[block] / scale[block]
        own = change @ own @ change.transpose(0, 2, 1)
        nothing = np.concatenate([constant, np.zeros_like(n, dtype=bool)], 1)
        own[:, nothing] = 0  # a constant column is 0 exactly
        own.transpose(0, 1, 3, 2)[:, nothing] = 0
        sums[:, block] = own
    of_sample = sample.columns.transpose(2, 0, 1)  # a view: (n_sample, n_columns, n_images)
    of_sample -= (shift + mean)[sample.vertices, :, None].astype(np.float32)
    of_sample /= scale[sample.vertices, :, None].astype(np.float32)
    return Gathered(Moments(sums), Units(shift + mean, scale), sample)
