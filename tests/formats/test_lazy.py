"""Rows of every layout are those that numpy would give, and no more of a file is read than they need."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import DataError
from featcache.formats import lazy
from featcache.formats.lazy import Array, Joined, Place, numbers, rows_of, vector

VALUES = np.random.default_rng(0).integers(-3000, 3000, (57, 6, 7)).astype(np.int16)


class Recorder:
    """An array on a disk that counts how often each of its chunks is read."""

    def __init__(self, values: np.ndarray, chunks: tuple[int, ...] | None) -> None:
        self.values, self.chunks, self.reads = values, chunks, 0
        self.counts = np.zeros([math.ceil(n / c) for n, c in zip(values.shape, chunks or values.shape, strict=True)])

    def read(self, key: tuple[slice, ...]) -> np.ndarray:
        self.reads += 1
        chunks = self.chunks or self.values.shape
        self.counts[tuple(slice(k.start // c, math.ceil(k.stop / c)) for k, c in zip(key, chunks, strict=True))] += 1
        return self.values[key]

    def array(self) -> Array:
        return Array(Place(Path("x")), self.values.shape, self.values.dtype, self.read, self.chunks)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 56), max_size=40),
    chunks=st.one_of(st.none(), st.tuples(st.integers(1, 60), st.integers(1, 6), st.integers(1, 9))),
    block=st.sampled_from([1, 100, 1000, 10**6]),
)
def test_rows_in_any_order_are_those_of_numpy_and_no_chunk_is_read_twice(rows, chunks, block):
    recorder = Recorder(VALUES, chunks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "_BLOCK", block)
        patch.setattr(lazy, "_NEAR", 200)
        read = rows_of(recorder.array(), np.array(rows, dtype=int))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, VALUES[rows])
    if chunks is not None:
        needed = np.zeros(len(recorder.counts), dtype=bool)
        needed[np.array(rows, dtype=int) // chunks[0]] = True
        assert np.all(recorder.counts == needed[:, None, None])


def test_no_read_is_larger_than_a_block_where_chunks_are_smaller(monkeypatch):
    monkeypatch.setattr(lazy, "_BLOCK", 500)
    sizes: list[int] = []

    def read(key: tuple[slice, ...]) -> np.ndarray:
        sizes.append(VALUES[key].nbytes)
        return VALUES[key]

    columns = (57, 1, 2)
    rows_of(Array("x", VALUES.shape, VALUES.dtype, read, columns), np.arange(57))
    assert max(sizes) <= 500 and sum(sizes) == VALUES.nbytes


def test_rows_far_apart_are_read_by_themselves_and_near_ones_together(monkeypatch):
    monkeypatch.setattr(lazy, "_NEAR", VALUES[:4].nbytes)
    recorder = Recorder(VALUES, None)
    rows_of(recorder.array(), np.array([50, 0, 1, 3]))
    assert recorder.reads == 2


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_numpy_arrays_of_every_type_are_float32(order):
    for dtype in (">i2", ">f8", "<f2", "u1", "?"):
        values = np.asarray(VALUES % 2, dtype=dtype, order=order)
        read = rows_of(values, np.array([5, 5, 0]))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values[[5, 5, 0]])


def test_rows_of_arrays_of_one_dimension_are_numbers():
    np.testing.assert_array_equal(rows_of(VALUES[:, 0, 0], np.array([5, 1])), VALUES[[5, 1], 0, 0])


def test_what_is_too_large_for_float32_is_infinite():
    np.testing.assert_array_equal(rows_of(np.array([[1e300, np.nan]]), np.array([0])), [[np.inf, np.nan]])


@pytest.mark.parametrize("row", [-1, 57])
def test_rows_that_an_array_does_not_have_are_refused(row):
    with pytest.raises(DataError, match=rf"^x: expected rows from 0 to 56; found row {row};"):
        rows_of(Recorder(VALUES, None).array(), np.array([0, row]))


def test_slices_are_those_of_numpy():
    array = Recorder(VALUES, None).array()
    for key in (slice(3, 9), slice(None), slice(-5, None), slice(9, 3), (slice(2, 4), slice(1, 3), slice(-2, 99))):
        np.testing.assert_array_equal(array[key], VALUES[key])
    np.testing.assert_array_equal(np.asarray(array), VALUES)
    assert (len(array), array.ndim) == (57, 3)
    for key in (3, slice(0, 9, 2), (slice(1),) * 4):
        with pytest.raises(TypeError, match="slices without a step"):
            array[key]


def test_a_file_that_breaks_while_it_is_read_is_named():
    def broken(key: tuple[slice, ...]) -> np.ndarray:
        raise OSError("inflate() failed")

    array = Array(Place(Path("a.h5"), "betas"), (3, 2), np.dtype("f4"), broken)
    with pytest.raises(DataError, match=r"^a.h5:betas: .*inflate\(\) failed"):
        rows_of(array, np.array([1]))


def test_joined_arrays_are_read_as_one():
    parts = [Recorder(VALUES[:20], None).array(), Recorder(VALUES[20:21], (1, 6, 7)).array()]
    parts += [Recorder(VALUES[21:].astype(np.float32), (4, 3, 7)).array()]
    joined, rows = Joined(parts), np.array([56, 20, 0, 19, 21, 0, 40])
    assert joined.shape == VALUES.shape and joined.dtype == np.float32
    np.testing.assert_array_equal(rows_of(joined, rows), VALUES[rows])
    for key in (slice(18, 23), (slice(30, 57), slice(0, 2)), slice(4, 4), slice(None)):
        np.testing.assert_array_equal(joined[key], VALUES[key])
    with pytest.raises(DataError, match=r"expected rows of the shape \(6, 7\), as in x; found \(5, 7\)"):
        Joined([parts[0], Recorder(VALUES[:, :5], None).array()])


def test_a_place_is_a_file_and_a_name(tmp_path):
    for name in ("betas.h5", "a:b.npy"):
        (tmp_path / name).touch()
    cases = {
        "betas.h5": ("betas.h5", ""),
        "betas.h5:group/betas": ("betas.h5", "group/betas"),
        "betas.h5:a:b": ("betas.h5", "a:b"),
        "a:b.npy": ("a:b.npy", ""),
        "a:b.npy:c": ("a:b.npy", "c"),
        "missing.h5:betas": ("missing.h5", "betas"),
        "missing.npy": ("missing.npy", ""),
    }
    for text, (path, array) in cases.items():
        place = Place.of(f"{tmp_path}/{text}")
        assert place == Place(tmp_path / path, array)
        assert str(place) == f"{tmp_path}/{text}"


STRANGE = {
    "complex numbers": np.zeros((2, 2), dtype=complex),
    "Python objects or text": np.array([["a", None]], dtype=object),
    "text": np.array([["a"]]),
    "dates": np.zeros((2, 2), dtype="M8[D]"),
    "durations": np.zeros((2, 2), dtype="m8[s]"),
    "records of several fields": np.zeros((2, 2), dtype=[("real", "f8"), ("imag", "f8")]),
}


@pytest.mark.parametrize("found", STRANGE)
def test_values_that_are_no_real_numbers_are_named(found):
    with pytest.raises(DataError, match=rf"^here: expected real numbers in 2 dimension\(s\); found {found} \("):
        numbers(STRANGE[found], "here", 2)


def test_numbers_of_every_size_and_byte_order_are_taken():
    for dtype in ("?", "i1", ">i2", "u8", "f2", ">f4", "f8"):
        numbers(np.zeros((2, 2), dtype=dtype), "here", (1, 2))


def test_other_dimensions_and_empty_arrays_are_refused():
    with pytest.raises(DataError, match=r"in 1 or 2 dimension\(s\); found 3, of the shape \(57, 6, 7\)"):
        numbers(VALUES, "here", (1, 2))
    with pytest.raises(DataError, match=r"found none, in an array of the shape \(0, 3\)"):
        numbers(np.zeros((0, 3)), "here", 2)


def test_vectors_of_matlab_have_one_long_axis():
    for shape in ((4,), (1, 4), (4, 1), (1, 4, 1)):
        values = vector(np.arange(4, dtype=np.int64).reshape(shape), "here")
        assert values.dtype == np.int64 and values.tolist() == [0, 1, 2, 3]
    for array, found in ((np.zeros((2, 2)), r"\(2, 2\)"), (np.zeros(0), r"\(0,\)"), (np.array(3.0), "0, of the shape")):
        with pytest.raises(DataError, match=found):
            vector(array, "here")
