"""Rows read from chunk files are those that zarr reads, and a chunk that is not whole is noticed."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from featcache.cache.chunks import Chunk, chunk_file, read_rows, stored_checksum

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


CHANGES = {
    "0 is 45 bytes": lambda content: content[:-7],
    "0 is 53 bytes": lambda content: content + b"!",  # after which comes nothing that a reader asks for
    "stored .*, computed": lambda content: content[:5] + b"!" + content[6:],
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_chunk_that_was_cut_short_made_longer_or_changed_is_refused(folder, said):
    path = folder / "c" / "1" / "0"
    path.write_bytes(CHANGES[said](path.read_bytes()))
    with pytest.raises(ValueError, match=said):
        read_rows(folder, np.empty((10, 3), np.float32), CHUNK, 0)
    assert re.fullmatch(rf"it fails its checksum \(.*{said}.*\)", Chunk(path, 48, None).fault)


def test_the_fault_of_a_chunk_is_told(folder):
    path, other = chunk_file(folder, 1, 2), chunk_file(folder, 2, 2)
    checksum = stored_checksum(path)
    assert Chunk(path, 48, checksum).fault == Chunk(path, 48, None).fault == ""
    shutil.copy(other, path)
    assert Chunk(path, 48, checksum).fault == "it is of another array, or of other rows"
    assert Chunk(path, 48, None).fault == ""  # of an earlier version, where nobody wrote it down
    path.unlink()
    assert Chunk(path, 48, checksum).fault == "it is missing"
    path.mkdir()
    assert Chunk(path, 48, checksum).fault.startswith("it fails its checksum (")


def test_a_whole_chunk_of_another_array_or_place_is_refused(folder, tmp_path):
    """Both are whole and of one size, so nothing but the checksums that were written down can tell them apart."""
    other = stored(tmp_path / "other", -np.arange(30, dtype=np.float32).reshape(10, 3))
    files = [chunk_file(folder, index, 2) for index in range(3)]
    checksums = [stored_checksum(path) for path in files]
    rows = np.empty((10, 3), np.float32)
    read_rows(folder, rows, CHUNK, 0, checksums)
    assert rows[-1].tolist() == [27, 28, 29]
    for wrong in (chunk_file(tmp_path / "other", 1, other.ndim), files[0]):
        shutil.copy(wrong, files[1])
        with pytest.raises(ValueError, match="chunk 1 is of another array"):
            read_rows(folder, rows, CHUNK, 0, checksums)
        read_rows(folder, rows[8:], CHUNK, 8, checksums)


def test_a_chunk_that_is_a_pipe_is_refused_and_not_waited_for(folder):
    path = chunk_file(folder, 1, 2)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no regular file"):
        read_rows(folder, np.empty((10, 3), np.float32), CHUNK, 0)
    with pytest.raises(OSError, match="no regular file"):
        stored_checksum(path)


def test_rows_are_read_where_the_number_of_cores_is_not_known(folder, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: None)
    rows = np.empty((10, 3), np.float32)
    read_rows(folder, rows, CHUNK, 0)
    assert rows.ravel().tolist() == list(range(30))
