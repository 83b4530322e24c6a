"""Files that lie or are broken are refused by a DataError, before memory is taken; whatever is in them."""

import gzip
import struct
import sys
import zipfile
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import scipy.io
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featcache.errors import DataError, FeatcacheError
from featcache.formats.arrays import open_array
from featcache.formats.lazy import Place, numbers, rows_of
from featcache.formats.names import array_names
from featcache.formats.tables import read_table
from featcache.formats.volumes import read_volumes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/faults"))
import fuzz_mutations as mutations

VALUES = np.arange(40, dtype=np.float32).reshape(10, 4)
FREE = 64 << 20  # bytes of memory that readers are told of


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB are free, and nothing is small enough not to ask."""
    for module in ("lazy", "hdf5", "volumes"):
        monkeypatch.setattr(f"featcache.formats.{module}.free_memory", lambda: FREE)
    monkeypatch.setattr("featcache.formats.lazy._SURELY_FREE", 0)


def npy(shape: str, descr: str = "'<f4'", data: bytes = VALUES.tobytes()) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def test_a_member_of_a_zip_that_inflates_is_refused_before_it_is_read(tmp_path, little_memory):
    content = npy("(20000000,)", data=bytes(80_000_000))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
        archive.writestr("lies.npy", npy("(2, 4)", data=b"") + bytes(8))
    with pytest.raises(DataError, match="fits into memory"):
        open_array(Place(tmp_path / "a.npz", "x"))
    with pytest.raises(DataError, match="lies is said to be"):
        open_array(Place(tmp_path / "a.npz", "lies"))


def test_a_zarr_array_with_chunks_of_nothing_is_refused(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=VALUES, chunks=(5, 4), zarr_format=2)
    path = tmp_path / "a.zarr/.zarray"
    path.write_text(path.read_text().replace("5,", "0,", 1))
    with pytest.raises(DataError, match="cannot"):
        rows_of(open_array(tmp_path / "a.zarr"), np.array([3, 1]))


def test_a_matlab_array_that_inflates_is_refused_whatever_its_header_says(tmp_path, little_memory):
    scipy.io.savemat(tmp_path / "a.mat", {"x": np.zeros(10_000_000)}, do_compression=True)
    with pytest.raises(DataError, match="fits into memory"):
        open_array(tmp_path / "a.mat")


def test_a_nifti_header_that_claims_more_than_memory_is_refused(tmp_path, little_memory):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
    content = bytearray(image.to_bytes())
    for offset, kind, values in ((42, "<3h", (2_000, 2_000, 2_000)), (108, "<f", (1e9,))):
        lies = bytearray(content)
        struct.pack_into(kind, lies, offset, *values)
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(lies) + bytes(1000)))
        with pytest.raises(DataError, match="fits into memory"):
            read_volumes([tmp_path / "a.nii.gz"])


def test_one_chunk_that_is_larger_than_memory_is_refused(tmp_path, little_memory):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", shape=(20_000_000,), chunks=(20_000_000,), dtype="f4", compression="gzip")
        file["x"][:1] = 1
    with pytest.raises(DataError, match="fits into memory"):
        open_array(tmp_path / "a.h5")


def test_groups_inside_each_other_without_end_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file
        for _ in range(200):
            group = group.create_group("a")
        group["x"] = VALUES
        file["loop"] = file["a"]  # a second name of one group
    for read in (open_array, array_names):
        with pytest.raises(DataError, match="more than 64 groups inside each other"):
            read(tmp_path / "a.h5")


def test_a_text_of_parquet_that_repeats_is_held_once(tmp_path, little_memory):
    long = "x" * 100_000
    parquet.write_table(pa.table({"id": [long] * 5_000, "n": range(5_000)}), tmp_path / "a.parquet")  # 500 MB of text
    table = read_table(tmp_path / "a.parquet")
    assert table.column("id") == (long,) * 5_000 and table.column("n")[:3] == ("0", "1", "2")
    with pytest.raises(DataError, match="column id is of string"):
        open_array(tmp_path / "a.parquet")


def test_values_larger_than_memory_are_refused_when_they_are_asked_for(tmp_path, little_memory):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", shape=(2**40, 4), chunks=(100, 4), dtype="f4")[:1] = 1
    array = open_array(tmp_path / "a.h5")
    assert array[:1].tolist() == [[1, 1, 1, 1]]
    with pytest.raises(DataError, match="values that fit into memory"):
        np.asarray(array)


def write_valid(folder: Path) -> dict[str, tuple]:
    """{name of a valid file: how it is changed}"""
    np.save(folder / "a.npy", VALUES)
    np.savez_compressed(folder / "a.npz", x=VALUES)
    (folder / "a.csv").write_text("id,x\n1,0.5\n2,1\n")
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("x", data=VALUES, chunks=(2, 4), compression="gzip")
    scipy.io.savemat(folder / "a.mat", {"x": VALUES}, do_compression=True)
    parquet.write_table(pa.table({"id": [1, 2], "x": [0.5, 1.0]}), folder / "a.parquet")
    nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.int16), np.eye(4)), folder / "a.nii.gz")
    return {
        "a.npy": (mutations.of_npy,),
        "a.npz": (mutations.of_zip, mutations.of_npy),
        "a.csv": (mutations.of_text,),
        "a.h5": (mutations.of_bytes,),
        "a.mat": (mutations.of_deflated,),
        "a.parquet": (mutations.of_bytes,),
        "a.nii.gz": (mutations.of_nifti,),
    }


def read_whatever(path: Path) -> None:
    if path.suffix == ".gz":
        array = read_volumes([path]).rows
        rows_of(array, np.array([0]))
        return
    if path.suffix in (".csv", ".parquet"):
        read_table(path)
    for name in array_names(path)[:2]:
        array = open_array(Place(path, name))
        numbers(array, path, (1, 2, 3))
        rows_of(array, np.array([0]))


@pytest.mark.filterwarnings("ignore")  # of libraries, on names that are twice in an archive and the like
@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.sampled_from(range(7)))
def test_a_changed_file_is_read_or_refused(tmp_path_factory, rng, number):
    folder = tmp_path_factory.mktemp("files")
    name, ways = list(write_valid(folder).items())[number]
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(rng.choice(ways)(content, rng))
    try:
        read_whatever(path)
    except FeatcacheError as error:
        assert len(str(error).splitlines()) == 1
