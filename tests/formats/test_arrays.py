"""Every format gives back the array that was written in it, and what is broken or dangerous is one line."""

import io
import pickle
import zipfile

import numpy as np
import pyarrow
import pytest
import torch
import zarr
from pyarrow import parquet
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from featcache.errors import DataError
from featcache.formats.arrays import is_zarr, open_array
from featcache.formats.lazy import numbers, rows_of

MATRIX = np.random.default_rng(0).standard_normal((30, 4))
ROWS = np.array([29, 3, 3, 0])


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def agrees(place, values):
    """The array at a place, which has these values, whole and by rows."""
    array = open_array(place)
    assert array.shape == values.shape
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(rows_of(array, ROWS), values[ROWS].astype(np.float32))
    return array


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2", ">i2", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_every_type_and_order_is_mapped(tmp_path, dtype, order):
    values = np.asarray(MATRIX * 100, dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", values)
    array = agrees(tmp_path / "a.npy", values)
    assert array.dtype == values.dtype and isinstance(array[:2], np.memmap)
    assert array.chunks == (None if order == "C" else (30, 1))


def test_npy_that_is_cut_off_or_is_one_array_with_a_name_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, MATRIX)
    with pytest.raises(DataError, match="found :betas"):
        open_array(f"{path}:betas")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.npy: expected a \.npy file of numbers that can be read"):
        open_array(path)


def test_pickles_are_never_opened(tmp_path):
    opened = tmp_path / "opened"
    bomb = np.array([Bomb(opened), None], dtype=object)
    np.save(tmp_path / "a.npy", bomb)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb(opened)))
    np.savez(tmp_path / "c.npz", bomb=bomb, matrix=MATRIX)
    np.savez_compressed(tmp_path / "d.npz", bomb=bomb)
    for place in ("a.npy", "b.npy", "c.npz:bomb", "d.npz:bomb", "d.npz"):
        with pytest.raises(DataError):
            open_array(f"{tmp_path}/{place}")
    agrees(tmp_path / "c.npz", MATRIX)
    assert not opened.exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)[0].close()
    assert opened.exists()  # the pickle was a live one


@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_is_mapped_where_it_is_not_compressed(tmp_path, order):
    values = np.asarray(MATRIX, order=order)
    np.savez(tmp_path / "a.npz", first=values[:3] + 1, second=values)
    np.savez_compressed(tmp_path / "b.npz", second=values)
    assert isinstance(agrees(f"{tmp_path}/a.npz:second", values)[:2], np.memmap)
    assert not isinstance(agrees(tmp_path / "b.npz", values)[:2], np.memmap)
    with pytest.raises(DataError, match="found 'first', 'second'; name one"):
        open_array(tmp_path / "a.npz")
    with pytest.raises(DataError, match="no 'third'; there is 'first', 'second'"):
        open_array(f"{tmp_path}/a.npz:third")


def test_npz_that_is_too_large_or_broken_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros((1000, 1000)))
    monkeypatch.setattr("featcache.formats.lazy.free_memory", lambda: 8e6)
    with pytest.raises(DataError, match=r"an array that fits into memory, .*; found 8\.0 MB; save it as a \.npy"):
        open_array(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="File is not a zip file"):
        open_array(path)


def test_npz_with_an_extra_field_in_its_local_header_is_mapped_where_its_values_begin(tmp_path):
    content = io.BytesIO()
    np.save(content, MATRIX)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "text")
        info = zipfile.ZipInfo("a.npy")
        info.extra = b"\x99\x99\x04\x00abcd"
        archive.writestr(info, content.getvalue())
    agrees(tmp_path / "a.npz", MATRIX)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_of_both_formats_is_read(tmp_path, zarr_format):
    path = tmp_path / "a.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    stored = group.create_array("deep/betas", shape=MATRIX.shape, chunks=(7, 3), dtype="f8")
    stored[:] = MATRIX
    for place in (path, f"{path}:deep/betas", f"{path}/deep/betas", f"{path}/deep:betas"):
        assert agrees(place, MATRIX).chunks == (7, 3)
    group.create_array("other", shape=(3,), chunks=(3,), dtype="i4")
    with pytest.raises(DataError, match="found 'deep/betas', 'other'; name one: "):
        open_array(path)
    with pytest.raises(DataError, match="no 'betas'; there is 'deep/betas', 'other'"):
        open_array(f"{path}:betas")
    assert is_zarr(path / "deep") and not is_zarr(tmp_path)


def test_sharded_zarr_is_read(tmp_path):
    stored = zarr.create_array(tmp_path / "a.zarr", shape=MATRIX.shape, chunks=(5, 2), shards=(15, 4), dtype="f8")
    stored[:] = MATRIX
    agrees(tmp_path / "a.zarr", MATRIX)


def test_zarr_that_is_broken_is_refused(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    zarr.create_array(tmp_path / "a.zarr", shape=MATRIX.shape, chunks=(30, 4), dtype="f8")[:] = MATRIX
    chunk = next(path for path in (tmp_path / "a.zarr" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(DataError, match=r"a\.zarr: expected an array that can be read"):
        rows_of(open_array(tmp_path / "a.zarr"), ROWS)
    (tmp_path / "a.zarr" / "zarr.json").write_text("{")
    for name in ("a.zarr", "empty.zarr"):
        with pytest.raises(DataError, match="expected a Zarr store that can be read"):
            open_array(tmp_path / name)


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i2", "u1", "?"])
def test_safetensors_of_every_type_are_read(tmp_path, dtype):
    values = (MATRIX * 10).astype(np.int8).astype(dtype)
    save_file({"a": values, "b": values[:2]}, tmp_path / "a.safetensors")
    assert agrees(f"{tmp_path}/a.safetensors:a", values).dtype == values.dtype
    with pytest.raises(DataError, match="found 'a', 'b'; name one"):
        open_array(tmp_path / "a.safetensors")


def test_bfloat16_is_read_as_float32(tmp_path):
    values = torch.from_numpy(MATRIX).bfloat16()
    save_torch({"a": values}, tmp_path / "a.safetensors")
    assert agrees(tmp_path / "a.safetensors", values.float().numpy()).dtype == np.float32


def test_safetensors_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": MATRIX}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="expected a safetensors file that can be read"):
        open_array(path)


TEXTS = {
    "a.csv": "1,2\n3,4.5\n",
    "b.csv": "\ufeffx,y\r\n1,2\r\n3,4.5\r\n",
    "c.csv": '"x";"y"\n1;2\n3;4.5\n',
    "d.tsv": "x\ty\n1\t2\n3\t4.5\n",
    "e.csv": "# made by savetxt\n1.0e+00,2\n3,4.5\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_of_numbers_is_a_matrix_with_or_without_a_header(tmp_path, name):
    (tmp_path / name).write_text(TEXTS[name], encoding="utf-8")
    np.testing.assert_array_equal(open_array(tmp_path / name)[:], [[1, 2], [3, 4.5]])


BROKEN_TEXTS = {
    "1,2\n3\n": "number of columns changed",
    "x,y\n1,a\n": "could not convert string 'a'",
    "x,y\n1,\n": "could not convert string ''",
    ",x\n0,2\n": "without the index",
    "x;y\n1,5;2,5\n": "could not convert string '1,5'",
}


@pytest.mark.parametrize("text", BROKEN_TEXTS)
def test_text_that_is_no_matrix_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=BROKEN_TEXTS[text]):
        open_array(tmp_path / "a.csv")


def test_parquet_of_numbers_is_a_matrix(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"a": [1, 2], "b": [0.5, None], "c": [True, False]}), path)
    np.testing.assert_array_equal(open_array(path)[:], [[1, 0.5, 1], [2, np.nan, 0]])
    parquet.write_table(pyarrow.table({"a": [1, 2], "name": ["x", "y"]}), path)
    with pytest.raises(DataError, match="column name is of string, and not of numbers"):
        open_array(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="expected a Parquet file of numbers that can be read"):
        open_array(path)


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "a.npy").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "b.pkl").write_bytes(b"x")
    found = {
        "a.npy": "found a folder",
        "b.pkl": r"endings \.csv, \.h5, .*; found another, '\.pkl'",
        "d": "expected a Zarr store, .*; found a folder that is none",
        "c.npy": "expected a file; found none",
        "c": "found no such file",
        "c.h5:betas": r"c\.h5: expected a file; found none",
    }
    for name, message in found.items():
        with pytest.raises(DataError, match=message):
            open_array(f"{tmp_path}/{name}")


def test_dates_and_text_are_opened_but_are_no_numbers(tmp_path):
    for values in (np.zeros((2, 2), dtype="M8[s]"), np.array([["a", "b"]])):
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(DataError, match="expected real numbers"):
            numbers(open_array(tmp_path / "a.npy"), tmp_path / "a.npy", 2)
