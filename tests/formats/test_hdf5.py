"""HDF5 and MATLAB files give the values that were planted in them, in the axes of the program that wrote them."""

import h5py
import numpy as np
import pytest
from scipy import io, sparse

from featcache.errors import DataError
from featcache.formats.arrays import open_array
from featcache.formats.lazy import numbers, rows_of, vector

BETAS = np.random.default_rng(0).integers(-32768, 32767, (40, 5, 6, 7)).astype(np.int16)  # (volume, z, y, x)
ROWS = np.array([39, 0, 7, 7, 8, 21])
MATRIX = np.random.default_rng(1).standard_normal((40, 9))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.h5"


def write_matlab(path, compressed=True, **arrays):
    """A file as MATLAB 7.3 writes it: 512 bytes of its own first, reversed axes, and the class of each array."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array.T, **({"chunks": True, "compression": "gzip"} if compressed else {}))
            file[name].attrs["MATLAB_class"] = np.bytes_({"f": "double", "i": "int16"}[array.dtype.kind])
        file.create_dataset("#refs#/b", data=np.arange(3.0)).attrs["MATLAB_class"] = np.bytes_("double")
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(512))


STORAGE = {
    "contiguous": {},
    "chunks over rows": {"chunks": (1, 5, 6, 7), "compression": "gzip"},
    "chunks over columns": {"chunks": (40, 1, 2, 3), "compression": "lzf"},
    "shuffled chunks of neither": {"chunks": (7, 2, 6, 3), "compression": "gzip", "shuffle": True},
}


@pytest.mark.parametrize("storage", STORAGE)
def test_betas_of_integers_are_read_from_every_storage(path, storage):
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=BETAS, **STORAGE[storage])
    array = open_array(path)
    assert (array.shape, array.dtype, str(array.place)) == (BETAS.shape, BETAS.dtype, f"{path}:betas")
    np.testing.assert_array_equal(rows_of(array, ROWS), BETAS[ROWS])
    np.testing.assert_array_equal(array[3:5], BETAS[3:5])


def test_arrays_are_found_by_the_name_of_their_group_and_the_only_one_by_none(path):
    with h5py.File(path, "w") as file:
        file["subject/lh"], file["note"], file["scalar"] = MATRIX, "text", 3.0
        file["link"] = h5py.SoftLink("/subject/lh")
    for place in (str(path), f"{path}:subject/lh", f"{path}:/subject/lh", f"{path}:link"):
        np.testing.assert_array_equal(open_array(place)[:], MATRIX)
    with h5py.File(path, "a") as file:
        file["rh"] = MATRIX
    with pytest.raises(DataError, match=r"found 'rh', 'subject/lh'; name one: .*a.h5:rh$"):
        open_array(path)
    for name in ("lh", "subject", "subject/lh/x"):
        with pytest.raises(DataError, match=f"no '{name}'; there is 'note', 'rh', 'scalar', 'subject/lh'"):
            open_array(f"{path}:{name}")
    with pytest.raises(DataError, match="found Python objects or text"):
        numbers(open_array(f"{path}:note"), "note", 0)


def test_a_file_is_open_as_long_as_its_array_lives(path):
    with h5py.File(path, "w") as file:
        file["betas"] = MATRIX
    array = open_array(path)
    with pytest.raises(OSError, match="already open"):
        h5py.File(path, "w")
    np.testing.assert_array_equal(array[:], MATRIX)
    del array
    h5py.File(path, "w").close()


def test_links_to_what_is_missing_are_named(path, tmp_path):
    with h5py.File(path, "w") as file:
        file["soft"], file["external"] = h5py.SoftLink("/nothing"), h5py.ExternalLink("other.h5", "betas")
        file["whole"] = MATRIX
    for name in ("soft", "external"):
        with pytest.raises(DataError, match=f"a.h5:{name}: expected an array; found a link to one that is missing"):
            open_array(f"{path}:{name}")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["betas"] = MATRIX + 1
    np.testing.assert_array_equal(open_array(f"{path}:external")[:], MATRIX + 1)


def test_arrays_of_other_files_that_are_missing_are_not_zeros(path, tmp_path):
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file["betas"] = MATRIX
    layout = h5py.VirtualLayout(MATRIX.shape, MATRIX.dtype)
    layout[:] = h5py.VirtualSource("part.h5", "betas", MATRIX.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("betas", layout)
    np.testing.assert_array_equal(open_array(path)[:], MATRIX)
    (tmp_path / "part.h5").unlink()
    with pytest.raises(DataError, match=r"found one of other files, without part\.h5"):
        open_array(path)


def test_values_that_were_never_written_or_are_packed_are_refused(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("unwritten", (9, 9), "f4")
        file["packed"] = BETAS
        file["packed"].attrs["scale_factor"] = 0.01
    for name, found in {"unwritten": "never written", "packed": "packed values"}.items():
        with pytest.raises(DataError, match=found):
            open_array(f"{path}:{name}")


def test_a_file_that_was_cut_off_or_is_no_hdf5_is_refused(path):
    with h5py.File(path, "w") as file:
        file["betas"] = BETAS
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"expected an HDF5 file that can be read; found one that cannot .*truncated"):
        open_array(path)
    path.write_text("text")
    with pytest.raises(DataError, match="file signature not found"):
        open_array(path)


def test_a_damaged_chunk_is_found_when_it_is_read(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=BETAS, chunks=(20, 5, 6, 7), compression="gzip", fletcher32=True)
        chunk = file["betas"].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 50 : chunk.byte_offset + 60] = bytes(10)
    path.write_bytes(content)
    array = open_array(path)
    np.testing.assert_array_equal(array[:20], BETAS[:20])
    with pytest.raises(DataError, match=r"a\.h5:betas: expected an array that can be read"):
        rows_of(array, np.array([30]))


def test_complex_numbers_and_dimension_scales_are_not_taken_for_responses(path):
    with h5py.File(path, "w") as file:
        file["complex"], file["x"], file["betas"] = MATRIX.astype(complex), np.arange(9.0), MATRIX
        file["x"].make_scale("x")
    np.testing.assert_array_equal(open_array(path)[:], MATRIX)
    with pytest.raises(DataError, match="found complex numbers"):
        numbers(open_array(f"{path}:complex"), "here", 2)


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_hdf5_has_its_axes_put_right(tmp_path, compressed):
    write_matlab(tmp_path / "a.mat", compressed, betas=BETAS)
    array = open_array(tmp_path / "a.mat")
    assert array.shape == BETAS.shape
    np.testing.assert_array_equal(rows_of(array, ROWS), BETAS[ROWS])
    np.testing.assert_array_equal(array[2:4, 1:3], BETAS[2:4, 1:3])


def test_matlab_hdf5_names_its_arrays_and_refuses_text_and_empty_ones(tmp_path):
    path = tmp_path / "a.mat"
    write_matlab(path, betas=MATRIX, ids=np.arange(40.0).reshape(40, 1), nothing=np.array([0.0, 0.0]))
    with h5py.File(path, "a") as file:
        file["nothing"].attrs["MATLAB_empty"] = np.uint8(1)
        file["text"] = np.array([[104], [105]], dtype=np.uint16)
        file["text"].attrs["MATLAB_class"] = np.bytes_("char")
    assert vector(open_array(f"{path}:ids"), "ids").tolist() == list(range(40))
    for name, found in {"text": "found text", "nothing": "found an empty one"}.items():
        with pytest.raises(DataError, match=found):
            open_array(f"{path}:{name}")
    with pytest.raises(DataError, match="'betas', 'ids'"):
        open_array(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_older_matlab_files_give_the_array_that_is_named(tmp_path, compressed):
    path = tmp_path / "a.mat"
    arrays = {"betas": BETAS, "matrix": MATRIX, "text": "hi", "parts": {"a": 1}, "sparse": sparse.csc_matrix(np.eye(3))}
    io.savemat(path, arrays, do_compression=compressed)
    np.testing.assert_array_equal(rows_of(open_array(f"{path}:betas"), ROWS), BETAS[ROWS])
    np.testing.assert_array_equal(rows_of(open_array(f"{path}:matrix"), ROWS), MATRIX[ROWS].astype(np.float32))
    with pytest.raises(DataError, match="found 'betas', 'matrix'; name one"):
        open_array(path)
    with pytest.raises(DataError, match="no 'nothing'; there is 'betas'"):
        open_array(f"{path}:nothing")
    with pytest.raises(DataError, match="sparse is a sparse array"):
        open_array(f"{path}:sparse")
    for name in ("text", "parts"):
        with pytest.raises(DataError, match="real numbers"):
            numbers(open_array(f"{path}:{name}"), name, (1, 2))


def test_an_older_matlab_file_that_is_broken_or_too_large_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.mat"
    io.savemat(path, {"betas": BETAS}, do_compression=True)
    with monkeypatch.context() as patch:
        patch.setattr("featcache.formats.lazy.free_memory", lambda: BETAS.nbytes)
        with pytest.raises(DataError, match=r"fits into memory.*save it as MATLAB's version 7\.3"):
            open_array(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="expected a MATLAB file that can be read"):
        open_array(path)
