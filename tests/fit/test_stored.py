"""Predictions in float16 have the scores of those in float32, or are in float32."""

from pathlib import Path

import numpy as np
import pytest

from featcache.cache import store as store_module
from featcache.cache.store import Row, Store, create_store, open_store
from heads.fit.stored import FEWEST_IMAGES, float16_suffices, prediction_rows, type_of, write_predictions
from heads.scores.metrics import pearson_r

N, N_VERTICES = 600, 300


def predicted(offset: float = 0, scale: float = 1, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and responses, (n, N_VERTICES) float32, whose r is about 0.45."""
    rng = np.random.default_rng(0)
    responses = rng.standard_normal((n, N_VERTICES), dtype=np.float32)
    return scale * (0.2 * responses + 0.4 * rng.standard_normal(responses.shape, dtype=np.float32) + offset), responses


def change(predictions: np.ndarray, responses: np.ndarray) -> float:
    """Of r of the vertex where it is largest."""
    rounded = predictions.astype(np.float16).astype(np.float32)
    return float(np.abs(pearson_r(rounded, responses) - pearson_r(predictions, responses)).max())


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("n", [FEWEST_IMAGES, 600, 4000])
def test_what_is_rounded_changes_r_of_no_vertex_by_1e_4(n, scale):
    suffices = []
    for offset in (0, 0.3, 1, 3, 10, 30):
        predictions, responses = predicted(offset, scale, n)
        suffices.append(float16_suffices(predictions, n, n))
        assert not suffices[-1] or change(predictions, responses) < 1e-4
    assert suffices[0] and not suffices[-1]  # what is far from zero, for its spread, has too few digits left
    assert change(*predicted(30, scale, n)) > 1e-4


def test_one_vertex_is_enough_for_float32_but_not_one_that_is_constant():
    predictions, _ = predicted()
    predictions[:, 7] = 1000.1
    predictions[::2, 7] = np.nextafter(np.float32(1000.1), np.float32(0))  # the rounding of a constant
    assert float16_suffices(predictions, N, N)
    predictions[:, 8] += 100
    assert not float16_suffices(predictions, N, N)


@pytest.mark.parametrize("bad", [1e5, np.inf, np.nan])
def test_numbers_beyond_float16_are_seen_in_test_rows_too(bad):
    predictions, _ = predicted()
    predictions[-1, 3] = bad
    assert not float16_suffices(predictions, N - 50, N - 50)


def test_rows_without_scores_do_not_count():
    predictions, _ = predicted()
    predictions[-50:] += 100
    assert float16_suffices(predictions, N - 50, N - 50)


def test_few_images_are_float32_from_the_start():
    assert type_of("float16", FEWEST_IMAGES - 1) == type_of("float32", 10**6) == "float32"
    assert type_of("float16", FEWEST_IMAGES) == "float16"


def stored(folder: Path, n_vertices: dict[str, int]) -> Store:
    return create_store(folder, "one", {}, np.arange(N), N - 50, prediction_rows(n_vertices, "float16"), {})


def test_each_surface_is_stored_as_it_can_be(tmp_path, said, monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 128)
    predictions, _ = predicted()
    store = stored(tmp_path, {"lh": 100, "rh": 200})
    with store.writing():
        write_predictions(store, "lh", predictions[:, :100], 100)
        write_predictions(store, "rh", predictions[:, 100:] + 100, 100)
    found = open_store(store.path)
    assert {name: str(array.dtype) for name, array in found.arrays.items()} == {"lh": "float16", "rh": "float32"}
    assert found.complete
    np.testing.assert_array_equal(found.read("lh"), predictions[:, :100].astype(np.float16))
    np.testing.assert_array_equal(found.read("rh"), predictions[:, 100:] + 100)
    assert [line for line in said if "float32" in line] == [
        f"{store.name}: predictions of rh are stored as float32: float16 would change scores by 0.0001"
    ]


def test_an_interrupted_run_goes_on_in_the_type_that_it_had(tmp_path, said, monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 128)
    predictions, _ = predicted(offset=100)
    store = stored(tmp_path, {"lh": N_VERTICES})
    with store.writing():
        store.widen("lh")
        open_store(store.path).append({"lh": predictions[:128]})
        write_predictions(open_store(store.path), "lh", predictions, 100)
    np.testing.assert_array_equal(open_store(store.path).read("lh"), predictions)
    assert not said


def test_rows_are_half_as_many_bytes():
    halves, whole = (prediction_rows({"lh": 7}, dtype)["lh"] for dtype in ("float16", "float32"))
    assert isinstance(halves, Row) and 2 * halves.n_bytes == whole.n_bytes
