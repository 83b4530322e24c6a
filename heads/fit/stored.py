"""How predictions are stored: in float16 where that changes no score, which is checked as they are written."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from featcache.cache.store import Row, Store, open_store
from featcache.machine.progress import say

FEWEST_IMAGES = 120  # of a score: float16 has too few digits for fewer, even where predictions are around zero
_MOST_CHANGE = 1e-4  # of r of a vertex, over all images or over those of a fold
_DEVIATIONS = 4  # of that change which are allowed for: hardly one of all vertices is further away
_CONSTANT = 1e-6  # parts of the largest prediction: less variation is the rounding of float32
_ROWS = 512  # that are compared at a time


def type_of(dtype: str, n_together: int) -> str:
    """The type that predictions are to be stored in: `dtype`, or float32 where float16 has too few digits.

    n_together : fewest images that have a score of their own, as those of a fold
    """
    return "float32" if n_together < FEWEST_IMAGES else dtype


def prediction_rows(n_vertices: Mapping[str, int], dtype: str) -> dict[str, Row]:
    """{surface: row} of a prediction store."""
    return {surface: Row((n,), dtype) for surface, n in n_vertices.items()}


def float16_suffices(predictions: np.ndarray, n_scored: int, n_together: int) -> bool:
    """Whether rounding predictions to float16 changes r of no vertex by 1e-4, and none of them is out of its range.

    Rounding errors do not depend on the responses, so that r over n images changes by about N(0, 1) / sqrt(n) times
    their root mean square as a share of the predictions' standard deviation.

    predictions : (n_images, n_vertices) float32, of which the first n_scored rows have scores
    n_together : as for `type_of`
    """
    n_vertices = predictions.shape[1]
    shift = torch.from_numpy(predictions[:1].copy()).double()
    errors, sums, squares = (torch.zeros(n_vertices, dtype=torch.float64) for _ in range(3))
    largest = torch.zeros(n_vertices)
    for start in range(0, len(predictions), _ROWS):
        rows = torch.from_numpy(predictions[start : start + _ROWS])
        halves = rows.half()
        if not halves.isfinite().all():
            return False
        rows, halves = rows[: max(n_scored - start, 0)], halves[: max(n_scored - start, 0)]
        if len(rows):
            largest = torch.maximum(largest, rows.abs().amax(0))
            errors += (halves.double() - rows).square_().sum(0)  # in float64: squares leave the range of float32
            rows = rows - shift
            sums += rows.sum(0)
            squares += rows.square_().sum(0)
    n = max(n_scored, 1)
    spread = (squares / n - (sums / n) ** 2).clamp(min=0).sqrt()
    allowed = _MOST_CHANGE * math.sqrt(n_together) / _DEVIATIONS * spread
    return bool((((errors / n).sqrt() <= allowed) | (spread <= _CONSTANT * largest)).all())


def write_predictions(store: Store, surface: str, predictions: np.ndarray, n_together: int) -> None:
    """Append what a store lacks of one surface's predictions, in float32 from the first row on where float16 is too
    coarse.

    predictions : (n_rows, n_vertices) float32, all rows of the store
    n_together : as for `type_of`
    """
    halves = store.arrays[surface].dtype == np.float16
    if halves and not float16_suffices(predictions, store.n_train, n_together):
        say(f"{store.name}: predictions of {surface} are stored as float32: float16 would change scores by 0.0001")
        store.widen(surface)
        store, halves = open_store(store.path), False
    step = store.chunk_rows(surface)
    # an interrupted run left whole chunks of the same numbers
    for start in range(store.committed[surface], len(predictions), step):
        rows = predictions[start : start + step]
        store.append({surface: torch.from_numpy(rows).half().numpy() if halves else rows})
