"""Rows read from chunk files are those that zarr reads, and a chunk that is not whole is noticed."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from featcache.cache.chunks import read_rows

CHUNK = 4


def stored(path: Path, values: np.ndarray, chunk: int = CHUNK) -> zarr.Array:
    """An array as stores have it, written by zarr."""
    chunks = (min(chunk, len(values)), *(max(side, 1) for side in values.shape[1:]))
    array = zarr.create_array(
        path, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=[Crc32cCodec()], fill_value=np.nan
    )
    array[:] = values
    return array


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    n_rows=st.integers(1, 40),
    chunk=st.sampled_from([1, 2, 4, 8, 16]),
    shape=st.sampled_from([(3,), (2, 3), (1, 1, 5), (0,)]),
    dtype=st.sampled_from(["float16", "float32"]),
    data=st.data(),
)
def test_rows_are_those_that_zarr_reads(n_rows, chunk, shape, dtype, data, tmp_path_factory):
    values = np.random.default_rng(0).normal(size=(n_rows, *shape)).astype(dtype)
    folder = tmp_path_factory.mktemp("rows") / "array"
    array = stored(folder, values, chunk)
    start = data.draw(st.integers(0, n_rows))
    stop = data.draw(st.integers(start, n_rows))  # a part of the last chunk, or nothing
    rows = np.full((stop - start, *shape), np.nan, dtype)
    read_rows(folder, rows, array.chunks[0], start)
    np.testing.assert_array_equal(rows, values[start:stop])
    np.testing.assert_array_equal(rows, array[start:stop])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stored(tmp_path / "array", np.arange(30, dtype=np.float32).reshape(10, 3))
    return tmp_path / "array"


def test_a_missing_chunk_is_told_from_a_damaged_one(folder):
    (folder / "c" / "1" / "0").unlink()
    rows = np.empty((4, 3), np.float32)
    read_rows(folder, rows, CHUNK, 0)
    with pytest.raises(FileNotFoundError):
        read_rows(folder, rows, CHUNK, 4)


@pytest.mark.parametrize("change", [lambda content: content[:-7], lambda content: content[:5] + b"!" + content[6:]])
def test_a_chunk_that_was_cut_short_or_changed_is_refused(folder, change):
    path = folder / "c" / "1" / "0"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"bytes|stored .* computed"):
        read_rows(folder, np.empty((10, 3), np.float32), CHUNK, 0)
