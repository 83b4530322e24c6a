"""Weights over models, learnt from out-of-fold predictions, and the blend that they make.

All that a weighted average of models needs to know of a vertex are the first and second moments of the models'
predictions and their products with the responses. They are gathered in one pass over the stores, per fold of the
images, so that weights can be learnt on some folds and scored on the others without reading anything again.

Predictions are standardised per vertex before they are averaged: r ignores scale, an average does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from featcache.challenge import Subject
from featcache.splits import assign_folds, refuse_leak
from featcache.store import Store

_FOLDS, _SEED = 5, 0  # on which weights are learnt and scored; any split by image id serves
_GREEDY_ROUNDS = 30  # members a greedy blend may have, counting repeats
_BATCH_ROWS, _BATCH_VERTICES = 512, 256  # read at a time, and worked on: these stay in a cache
_TIE = 1e-6  # parts of a score: less is the rounding of its sums, and no reason to take another model
_MINIMUM_SLOPE = 1e-3  # a vertex that no model explains keeps a trace of the blend instead of a constant


@dataclass(frozen=True)
class Moments:
    """Sums over a set of images, float64; the first axis is the fold, or is absent after `total`.

    n : (...,) images
    model : (..., n_vertices, n_models) predictions
    product : (..., n_vertices, n_models, n_models) products of two models' predictions
    cross : (..., n_vertices, n_models) predictions times responses
    response, response_square : (..., n_vertices)
    """

    n: np.ndarray
    model: np.ndarray
    product: np.ndarray
    cross: np.ndarray
    response: np.ndarray
    response_square: np.ndarray

    def total(self, without: int | None = None) -> "Moments":
        """Over all folds, or all but one."""
        kept = [fold for fold in range(len(self.n)) if fold != without]
        return Moments(*(values[kept].sum(0) for values in vars(self).values()))


def gather_moments(subject: Subject, hemisphere: str, stores: Sequence[Store]) -> Moments:
    """One pass over the out-of-fold predictions of some models and the responses they are of."""
    folds = assign_folds(subject.train.ids, _FOLDS, _SEED)
    n_vertices, n_models = subject.n_vertices[hemisphere], len(stores)
    sums = torch.zeros(_FOLDS, n_vertices, n_models + 2, n_models + 2)
    responses = subject.responses(hemisphere)
    chunk = max(store.chunk_rows(hemisphere) for store in stores)
    step = -(-_BATCH_ROWS // chunk) * chunk
    shift = torch.zeros(n_vertices, n_models + 1)
    rows = torch.empty(min(step, len(folds)), n_vertices)  # one place for all: nothing is left between
    batch = torch.empty(n_models + 1, *rows.shape)
    for start in range(0, len(folds), step):
        of_fold = folds[start : start + step]
        stop = start + len(of_fold)
        order = torch.from_numpy(np.argsort(of_fold, kind="stable"))  # each fold's rows side by side
        columns, place = batch[:, : len(order)], rows[: len(order)]
        for column, store in zip(columns, stores, strict=False):
            store.read(hemisphere, start, stop, out=place.numpy())
            torch.index_select(place, 0, order, out=column)
        place.numpy()[:] = responses[start:stop]
        torch.index_select(place, 0, order, out=columns[-1])
        if start == 0:
            means = [column.numpy().mean(0, dtype=np.float64) for column in columns]
            shift = torch.from_numpy(np.stack(means, axis=1)).float()
        _add(sums, np.bincount(of_fold, minlength=_FOLDS).tolist(), columns, shift)
    del batch, rows
    return _shifted_back(sums, np.bincount(folds, minlength=_FOLDS).astype(np.float64), shift)


def _add(sums: torch.Tensor, counts: Sequence[int], columns: torch.Tensor, shift: torch.Tensor) -> None:
    """Add a batch of rows, fold by fold, less `shift`, (n_vertices, n_models + 1).

    sums : (n_folds, n_vertices, n_models + 2, n_models + 2) products of models, responses and ones with each other
    counts : (n_folds,) rows of each fold, which follow each other
    columns : (n_models + 1, n, n_vertices) predictions of each model, then the responses

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


def _shifted_back(sums: torch.Tensor, n_images: np.ndarray, shift: torch.Tensor) -> Moments:
    """The moments of the numbers as they were, from those of (numbers - shift), as `_add` leaves them.

    n_images : (n_folds,)
    """
    whole, of_model = sums.numpy(), slice(len(shift[0]) - 1)
    response = len(shift[0]) - 1
    moments = Moments(
        n_images,
        *(
            whole[:, :, rows, columns].astype(np.float64)
            for rows, columns in (
                (of_model, -1),
                (of_model, of_model),
                (of_model, response),
                (response, -1),
                (response, response),
            )
        ),
    )
    models, level = shift[:, :-1].double().numpy(), shift[:, -1].double().numpy()
    for n, model, product, cross, of_response, square in zip(*vars(moments).values(), strict=True):
        product += model[:, :, None] * models[:, None] + models[:, :, None] * model[:, None]
        product += n * models[:, :, None] * models[:, None]
        cross += model * level[:, None] + models * (of_response + n * level)[:, None]
        square += 2 * level * of_response + n * level**2
        model += n * models
        of_response += n * level
    return moments


def standardise(moments: Moments, mean: np.ndarray, scale: np.ndarray) -> Moments:
    """The moments of (predictions - mean) / scale, both (n_vertices, n_models), for moments with a fold axis."""
    product = np.empty_like(moments.product)
    for n, sums, own, out in zip(moments.n, moments.model, moments.product, product, strict=True):
        # (p - m)(q - l) = pq - m (q - l) - p l, summed: one fold at a time, for these are the largest arrays of a blend
        np.subtract(own, mean[:, :, None] * (sums - n * mean)[:, None], out=out)
        out -= sums[:, :, None] * mean[:, None]
        out /= scale[:, :, None] * scale[:, None]
    return Moments(
        moments.n,
        (moments.model - moments.n[:, None, None] * mean) / scale,
        product,
        (moments.cross - mean * moments.response[..., None]) / scale,
        moments.response,
        moments.response_square,
    )


def location_and_scale(total: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each model at each vertex; a constant model has scale 1."""
    mean = total.model / total.n
    variance = np.einsum("vmm->vm", total.product) / total.n - mean**2
    constant = variance <= 1e-12 * np.maximum(mean**2, np.finfo(np.float64).tiny)
    return mean, np.sqrt(np.where(constant, 1, variance))


def blend_r(moments: Moments, weights: np.ndarray) -> np.ndarray:
    """(..., n_vertices) r of blends with responses, from moments without a fold axis.

    weights : (..., n_models), any number of blends at once
    """
    predicted = weights @ moments.model.T
    squares = np.einsum("...m,vmk,...k->...v", weights, moments.product, weights, optimize=True)
    return _r(moments.n, predicted, squares, weights @ moments.cross.T, moments.response, moments.response_square)


def _each_r(moments: Moments) -> np.ndarray:
    """(n_models, n_vertices) r of every model alone."""
    squares = np.einsum("vmm->mv", moments.product)
    return _r(moments.n, moments.model.T, squares, moments.cross.T, moments.response, moments.response_square)


def nested_r(moments: Moments, weights: Sequence[np.ndarray]) -> np.ndarray:
    """(n_vertices,) r over all images of a blend whose weights (n_models,) differ from fold to fold."""
    parts = [
        (
            moments.model[fold] @ w,
            np.einsum("m,vmk,k->v", w, moments.product[fold], w, optimize=True),
            moments.cross[fold] @ w,
        )
        for fold, w in enumerate(weights)
    ]
    predicted, squares, cross = (np.sum(part, axis=0) for part in zip(*parts, strict=True))
    return _r(moments.n.sum(), predicted, squares, cross, moments.response.sum(0), moments.response_square.sum(0))


def _r(
    n: float | np.ndarray,
    predicted: np.ndarray,
    squares: np.ndarray,
    cross: np.ndarray,
    response: np.ndarray,
    square: np.ndarray,
) -> np.ndarray:
    """Correlation from sums; 0 where either side is constant."""
    spread = (squares - predicted**2 / n) * (square - response**2 / n)
    covariance = cross - predicted * response / n
    defined = spread > 1e-18 * np.maximum(squares * square, np.finfo(np.float64).tiny)
    return np.clip(np.where(defined, covariance / np.sqrt(np.where(defined, spread, 1)), 0), -1, 1)


Quality = Callable[[np.ndarray], np.ndarray]  # r (..., n_vertices) -> what a blend is chosen by (...,)


def challenge_quality(noise_ceiling: np.ndarray | None) -> Quality:
    """Mean noise-normalised accuracy, or mean r^2 where there is no ceiling; negative r count as 0."""

    def quality(r: np.ndarray) -> np.ndarray:
        if noise_ceiling is None or not noise_ceiling.any():
            return np.mean(np.maximum(r, 0) ** 2, axis=-1)
        judged = noise_ceiling > 0  # the others have no accuracy
        ceiling = np.asarray(noise_ceiling, dtype=np.float64)[judged]
        return np.mean(np.minimum(np.maximum(r[..., judged], 0) ** 2, ceiling) / ceiling, axis=-1) * 100

    return quality


def single(moments: Moments, quality: Quality) -> np.ndarray:
    """(n_models,) all weight on the best model."""
    scores = quality(_each_r(moments))
    return np.eye(len(scores))[np.argmax(scores)]


def uniform(moments: Moments, quality: Quality) -> np.ndarray:
    """(n_models,) the same weight for every model."""
    n_models = moments.model.shape[1]
    return np.full(n_models, 1 / n_models)


def by_score(moments: Moments, quality: Quality) -> np.ndarray:
    """(n_models,) weights in proportion to the models' scores."""
    scores = quality(_each_r(moments))
    return scores / scores.sum() if scores.sum() > 0 else uniform(moments, quality)


def greedy(moments: Moments, quality: Quality) -> np.ndarray:
    """(n_models,) add the model, old or new, that helps the average most; stop where none does.

    Caruana et al. 2004, Ensemble selection from libraries of models, https://doi.org/10.1145/1015330.1015432
    """
    # models first: their sums at all vertices lie side by side
    model, cross, own = map(
        np.ascontiguousarray, (moments.model.T, moments.cross.T, np.einsum("vmm->mv", moments.product))
    )
    chosen, best = np.zeros(len(model)), -np.finfo(np.float64).max
    # sums of the blend so far: of its predictions, their squares, with the responses, and with each model's
    predicted, squares, explained = np.zeros((3, len(moments.response)))
    with_models = np.zeros_like(model)
    for _ in range(_GREEDY_ROUNDS):
        r = _r(
            moments.n,
            predicted + model,
            squares + 2 * with_models + own,
            explained + cross,
            moments.response,
            moments.response_square,
        )
        scores = quality(r)
        if scores.max() <= best + _TIE * abs(best):
            break
        new = int(np.argmax(scores >= scores.max() - _TIE * abs(scores.max())))  # of equals the first
        best = scores[new]
        chosen[new] += 1
        squares += 2 * with_models[new] + own[new]
        predicted += model[new]
        explained += cross[new]
        with_models += moments.product[:, new].T
    return chosen / chosen.sum()


METHODS: dict[str, Callable[[Moments, Quality], np.ndarray]] = {"uniform": uniform, "score": by_score, "greedy": greedy}


@dataclass(frozen=True)
class Blended:
    """The blend of one hemisphere of one subject.

    weights : (n_models,) of the standardised predictions, adding up to 1, learnt on all training images
    r : {'best single' | 'uniform' | method: (n_vertices,)} scores; each fold's images were blended
        with weights learnt on the other folds
    test : (n_test, n_vertices) float32, in the units of the responses
    """

    weights: np.ndarray
    r: dict[str, np.ndarray]
    test: np.ndarray


def blend_hemisphere(subject: Subject, hemisphere: str, stores: Sequence[Store], method: str) -> Blended:
    """Learn weights for models, score them on folds they were not learnt on, and blend the test predictions."""
    folds = assign_folds(subject.train.ids, _FOLDS, _SEED)
    for fold in range(_FOLDS):
        refuse_leak(subject.train.ids[folds != fold], subject.train.ids[folds == fold], f"the blend of {subject.name}")
    raw = gather_moments(subject, hemisphere, stores)
    mean, scale = location_and_scale(raw.total())
    moments, quality = standardise(raw, mean, scale), challenge_quality(subject.noise_ceiling[hemisphere])
    del raw  # as large as the others
    learners = {"best single": single, "uniform": uniform, method: METHODS[method]}
    nested: dict[str, list[np.ndarray]] = {name: [] for name in learners}
    for fold in range(_FOLDS):
        others = moments.total(without=fold)
        for name, learn in learners.items():
            nested[name].append(learn(others, quality))
    r = {name: nested_r(moments, weights) for name, weights in nested.items()}
    total = moments.total()
    weights = METHODS[method](total, quality)
    return Blended(weights, r, _test_blend(subject, hemisphere, stores, total, mean, scale, weights))


def _test_blend(
    subject: Subject,
    hemisphere: str,
    stores: Sequence[Store],
    total: Moments,
    mean: np.ndarray,
    scale: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """The blend of the test predictions, regressed on the responses: it has their mean and their units."""
    n_train, n_test = len(subject.train), len(subject.test)
    blended = np.zeros((n_test, subject.n_vertices[hemisphere]))
    for store, weight, m, s in zip(stores, weights, mean.T, scale.T, strict=True):
        if weight:
            blended += weight * (store.read(hemisphere, n_train, n_train + n_test) - m) / s
    response_mean = total.response / total.n
    spread = np.sqrt(np.maximum(total.response_square / total.n - response_mean**2, 0))
    variance = np.einsum("m,vmk,k->v", weights, total.product, weights, optimize=True) / total.n
    slope = np.maximum(blend_r(total, weights), _MINIMUM_SLOPE) * spread / np.sqrt(np.where(variance > 0, variance, 1))
    return (response_mean + slope * blended).astype(np.float32)
