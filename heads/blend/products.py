"""All that a blend has to know of its models: for each vertex and fold, sums over images of products of two columns.

The columns of a vertex are the predictions of each model, the responses, and ones. The sums of their products give r of
any weighted average of the models, on any set of folds, without reading a prediction again. One pass over the stores
gathers them.

Columns are standardised for each vertex first: r does not depend on the scale of a model, an average does.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from featcache.cache.store import Store
from featcache.dataset.splits import BY_ID, Split
from featcache.dataset.subject import Subject
from featcache.machine.prefetch import prefetch
from featcache.machine.tensors import copy_as_float32
from heads.scores.metrics import r_from_sums

T = TypeVar("T")

N_FOLDS, SEED = 5, 0  # on which weights are learnt and scored; any folds of the split of the models serve
_BATCH_ROWS = 512  # of every model that are read at a time
_TILE_VERTICES = 64  # whose rows of a batch are turned and multiplied together: about 3 MB for 20 models
_TILE = 512  # vertices whose products are worked on together: these stay in a cache
_UNIT = 8  # rows of a matrix to which the products of vector units are fastest
_SAMPLE_BYTES = 256e6  # of rows kept beside the products, for what needs single images: bootstrap and permutations


def of_tiles(of_tile: Callable[[slice], T], n_vertices: int, step: int = _TILE) -> list[T]:
    """What a function gives for each tile of the vertices, in order, worked out on a thread for each core.

    NumPy lets go of the interpreter while it sums and solves.
    """
    tiles = [slice(first, min(first + step, n_vertices)) for first in range(0, n_vertices, step)]
    if len(tiles) < 2:
        return [of_tile(tile) for tile in tiles]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(of_tile, tiles))


@dataclass(frozen=True)
class Products:
    """Sums of products of the standardised columns of each vertex: the models, the responses and ones, fold by fold.

    sums : (n_folds, n_vertices, n_models + 2, n_models + 2)
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
        return int(self.sums.shape[1])

    def total(self, without: Collection[int] = ()) -> "Total":
        """Sums over all folds but some, free of the responses of these: see `cross_fitted` above."""
        return Total(self, frozenset(without))

    def fold(self, number: int) -> "Total":
        """Sums over one fold."""
        return Products(self.sums[number : number + 1]).total()

    def at(self, vertices: np.ndarray | slice) -> "Products":
        """Products of some of the vertices, given by number."""
        some = Products(self.sums[:, vertices], self.cross_fitted)
        if "of_each" in self.__dict__:  # known already: learners ask every tile for it, without each fold
            some.__dict__["of_each"] = self.of_each[..., vertices]
        return some

    @cached_property
    def of_each(self) -> np.ndarray:
        """Of every model alone its sum, its squares and its products with the responses, float64.

        (n_folds, 3, n_models, n_vertices)
        """

        def of_tile(tile: slice) -> np.ndarray:
            sums = self.sums[:, tile]
            parts = [sums[..., -1, :-2], np.einsum("fvcc->fvc", sums)[..., :-2], sums[..., -2, :-2]]
            return np.stack(parts, axis=1, dtype=np.float64).swapaxes(2, 3)

        return np.concatenate(of_tiles(of_tile, self.n_vertices), axis=-1)

    @cached_property
    def of_responses(self) -> np.ndarray:
        """Number of images, sum of the responses and of their squares, float64, (n_folds, 3, n_vertices)."""
        rows = [self.sums[..., -1, -1], self.sums[..., -2, -1], self.sums[..., -2, -2]]
        return np.stack(rows, axis=1, dtype=np.float64)

    def shared(self, without: Collection[int]) -> float:
        """How much of the products of left-out folds with their responses the other folds have."""
        filled = np.flatnonzero(self.sums[:, :1, -1, -1].any(1)).tolist()  # few groups fill few folds
        return len(set(filled).difference(without)) / max(len(filled) - 1, 1) if self.cross_fitted else 0.0


@dataclass(frozen=True)
class Total:
    """Sums over all folds but some, float64, none of which is added up before it is asked for."""

    products: Products
    without: frozenset[int]

    @property
    def n_models(self) -> int:
        return self.products.n_models

    @property
    def n_vertices(self) -> int:
        return self.products.n_vertices

    @property
    def _folds(self) -> list[int]:
        return [fold for fold in range(len(self.products.sums)) if fold not in self.without]

    @cached_property
    def sums(self) -> np.ndarray:
        """(n_vertices, n_models + 2, n_models + 2)"""
        every = self.products.sums
        total, left_out = np.zeros(every.shape[1:]), np.zeros((self.n_vertices, self.n_models))
        for fold in self._folds:
            total += every[fold]
        for fold in self.without:
            left_out += every[fold][:, :-2, -2]
        left_out *= self.products.shared(self.without)
        total[:, :-2, -2] -= left_out
        total[:, -2, :-2] -= left_out
        return total

    @cached_property
    def of_each(self) -> tuple[np.ndarray, ...]:
        """What `r_from_sums` takes of every model alone, of shapes (n_models, n_vertices) or (n_vertices,)."""
        every = self.products.of_each
        total, left_out = np.zeros(every.shape[1:]), np.zeros(every.shape[2:])
        for fold in self._folds:
            total += every[fold]
        for fold in self.without:
            left_out += every[fold, 2]
        total[2] -= self.products.shared(self.without) * left_out
        n, y, y_squares = self.products.of_responses[self._folds].sum(0)
        return n, *total, y, y_squares

    @cached_property
    def r_of_each(self) -> np.ndarray:
        """r of every model alone, (n_models, n_vertices)."""
        return r_from_sums(*self.of_each)

    @property
    def varies(self) -> np.ndarray:
        """Whether each model varies at a vertex, (n_vertices, n_models)."""
        return np.asarray(self.of_each[2].T > 0)

    @cached_property
    def covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Covariances of the models, (n_vertices, n_models, n_models), and with the response, (n_vertices, n_models).

        In units of the response's standard deviation over these images.
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
    sums = np.zeros((N_FOLDS, n_vertices, n_columns + 1, n_columns + 1), np.float32)
    shift = np.zeros((n_vertices, n_columns), np.float32)
    n_kept = n_sampled(n_train * n_columns, n_vertices)
    vertices = np.arange(n_kept) * n_vertices // n_kept  # evenly spread
    rows = np.empty((n_columns, n_train, len(vertices)), np.float32)
    for surface, block in surface_blocks(subject).items():
        kept = slice(*np.searchsorted(vertices, (block.start, block.stop)))
        own: np.ndarray | slice = vertices[kept] - block.start
        own = slice(None) if n_kept == n_vertices else own  # a slice is read faster than numbers
        for start, columns in _batches(subject, surface, stores):
            some = slice(start, start + len(columns[0]))
            for column, of_column in zip(columns, rows[:, some, kept], strict=True):
                of_column[:] = column[:, own]
            add_products(sums[:, block], shift[block], columns, folds[some], first=start == 0)
    return _standardised(sums, shift.astype(np.float64), Sample(vertices, rows))


def surface_blocks(subject: Subject) -> dict[str, slice]:
    """{surface: where its vertices are among those of all surfaces side by side}."""
    ends = np.cumsum([0, *subject.n_vertices.values()]).tolist()
    return {surface: slice(*ends[k : k + 2]) for k, surface in enumerate(subject.surfaces)}


def n_sampled(numbers_a_vertex: int, n_vertices: int) -> int:
    """Vertices whose rows are kept: all, or as many as there is room for."""
    return min(n_vertices, max(int(_SAMPLE_BYTES / 4 / numbers_a_vertex), 1))


def bytes_of(n_images: int, n_vertices: Mapping[str, int], n_models: int) -> float:
    """Bytes of what is gathered of a subject, and of the two batches that are read for it; float16 takes less."""
    n, n_columns = sum(n_vertices.values()), n_models + 1
    sample = n_columns * n_images * n_sampled(n_columns * n_images, n)
    batches = n_columns * min(2 * _BATCH_ROWS, n_images) * max(n_vertices.values())
    return 4.0 * (N_FOLDS * n * (n_columns + 1) ** 2 + sample + batches)


def _batches(subject: Subject, surface: str, stores: Sequence[Store]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number of the first row, columns) of some training images at a time, while the next are read.

    columns : (n, n_vertices) predictions of each model, as they are stored, then the responses; good until the next
    """
    responses, n_train = subject.responses(surface), len(subject.train)
    chunk = max(store.chunk_rows(surface) for store in stores)
    step = min(-(-_BATCH_ROWS // chunk) * chunk, n_train)
    kinds = [*(store.arrays[surface].dtype for store in stores), np.dtype(np.float32)]
    # two places in turn, one of which is read into while the other is worked on
    n_places, shape = min(2, -(-n_train // step)), (step, responses.shape[1])
    places = [[np.empty(shape, kind) for kind in kinds] for _ in range(n_places)]

    def load(start: int) -> tuple[int, list[np.ndarray]]:
        stop = min(start + step, n_train)
        columns = [place[: stop - start] for place in places[start // step % 2]]
        for column, store in zip(columns, stores, strict=False):
            store.read(surface, start, stop, out=column)
        columns[-1][:] = responses[start:stop]
        return start, columns

    return prefetch(load, range(0, n_train, step), depth=1)


def add_products(
    sums: np.ndarray, shift: np.ndarray, columns: Sequence[np.ndarray], folds: np.ndarray, first: bool
) -> None:
    """Add the products of a batch of rows to `sums`, fold by fold.

    sums : (n_folds, n_vertices, n_columns + 1, n_columns + 1) float32, products of the columns and of ones with each
        other
    shift : (n_vertices, n_columns) float32, subtracted first: float32 sums of small numbers are good to some parts in
        10^7. Set to the mean of the batch if it is the first
    columns : (n, n_vertices) predictions of each model, then the responses; float16 or float32
    folds : (n,) of the rows

    With a column of ones every sum is an inner product, and all sums of a vertex are one small matrix product.
    """
    n_vertices, n_columns = shift.shape
    order = np.argsort(folds, kind="stable")  # each fold's rows side by side
    ends = np.cumsum([0, *np.bincount(folds, minlength=len(sums))]).tolist()
    parts = [(fold, slice(*ends[fold : fold + 2])) for fold in range(len(sums)) if ends[fold] < ends[fold + 1]]
    # Rows of zeros fill vector units; and NumPy takes the product of a matrix and its own transpose for `syrk`, which
    # is half as fast as a product of two matrices here
    n_filled = n_columns + 1 + (-(n_columns + 1) % _UNIT or _UNIT)

    def work(vertices: slice) -> None:
        tile = np.zeros((_TILE_VERTICES, n_filled, len(order)), np.float32)
        tile[:, n_columns] = 1
        for start in range(vertices.start, vertices.stop, _TILE_VERTICES):
            block = slice(start, min(start + _TILE_VERTICES, vertices.stop))
            own = tile[: block.stop - block.start]
            for number, column in enumerate(columns):
                copy_as_float32(column[:, block].take(order, axis=0).T, own[:, number])
            values = own[:, :n_columns]
            if first:
                shift[block] = values.mean(-1)
            values -= shift[block, :, None]
            for fold, some in parts:
                part = own[..., some]
                product = part @ part[:, : n_columns + 1].transpose(0, 2, 1)
                sums[fold, block] += product[:, : n_columns + 1]

    of_tiles(work, n_vertices, step=_TILE)


def _standardised(sums: np.ndarray, shift: np.ndarray, sample: Sample) -> Gathered:
    """Standardise, in place, sums of the columns less `shift`, as `add_products` leaves them, and the sample."""
    mean, scale = np.empty_like(shift), np.empty_like(shift)

    def standardise(block: slice) -> None:
        block_sums = sums[:, block].astype(np.float64)
        total = block_sums.sum(0)
        n = total[:, -1, -1, None]
        mean[block] = total[:, :-1, -1] / n
        variance = np.einsum("vcc->vc", total)[:, :-1] / n - mean[block] ** 2
        # the variance of a constant column is the rounding of its sums
        constant = variance <= 1e-12 * np.maximum((shift[block] + mean[block]) ** 2, np.finfo(np.float64).tiny)
        scale[block] = np.sqrt(np.where(constant, 1, variance))
        # z = (p - mean) / scale, of which a constant column is 0 exactly, and ones stay ones
        level = np.concatenate([mean[block], np.zeros_like(n)], 1)
        slope = np.concatenate([np.where(constant, 0, 1 / scale[block]), np.ones_like(n)], 1)
        of_ones = block_sums[..., -1] - level * block_sums[..., -1:, -1]
        block_sums -= level[:, :, None] * block_sums[..., -1:, :]
        block_sums -= of_ones[..., None] * level[:, None]
        block_sums *= slope[:, :, None]
        block_sums *= slope[:, None]
        sums[:, block] = block_sums

    of_tiles(standardise, len(shift), step=_TILE_VERTICES)
    of_sample = (values[sample.vertices].T[:, None] for values in ((shift + mean).astype(np.float32), scale))
    for change, values in zip((np.subtract, np.divide), of_sample, strict=True):
        change(sample.columns, values.astype(np.float32), out=sample.columns)
    return Gathered(Products(sums), Units(shift + mean, scale), sample)
