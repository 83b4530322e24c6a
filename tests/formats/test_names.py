"""The arrays of numbers in a file, whatever its format, without those that are none."""

import h5py
import numpy as np
import pytest
import zarr
from safetensors.numpy import save_file
from scipy import io

from featcache.errors import DataError
from featcache.formats.names import array_names

VALUES = {"b": np.arange(3.0), "a": np.ones((2, 2), np.int16), "c": np.array([True])}


def write(folder, suffix):
    path = folder / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, **VALUES)
    elif suffix == ".mat":
        io.savemat(path, VALUES)
    elif suffix == ".safetensors":
        save_file(VALUES, path)
    elif suffix == ".zarr":
        group = zarr.open_group(path, mode="w")
        for name, values in VALUES.items():
            group.create_array(name, data=values)
    else:
        with h5py.File(path, "w") as file:
            for name, values in VALUES.items():
                file[name] = values
    return path


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".safetensors", ".zarr", ".h5", ".hdf5", ".nc"])
def test_all_arrays_are_listed(suffix, tmp_path):
    assert sorted(array_names(write(tmp_path, suffix))) == ["a", "b", "c"]


def test_groups_are_looked_into_and_text_is_left_out(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["rois/lh/V1"], file["note"] = VALUES["b"], "text"
    assert array_names(tmp_path / "x.h5") == ["rois/lh/V1"]
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    group.create_array("rois/V1", data=VALUES["b"])
    assert array_names(tmp_path / "x.zarr") == ["rois/V1"]
    np.savez(tmp_path / "x.npz", V1=VALUES["b"], names=np.array(["a"]), objects=np.array([None]))
    assert array_names(tmp_path / "x.npz") == ["V1"]
    io.savemat(tmp_path / "x.mat", {"V1": VALUES["b"], "names": "text", "cell": np.array([VALUES["b"], "a"], object)})
    assert array_names(tmp_path / "x.mat") == ["V1"]


def test_a_file_of_one_array_has_no_name(tmp_path):
    np.save(tmp_path / "x.npy", VALUES["b"])
    zarr.create_array(tmp_path / "x.zarr", data=VALUES["b"])
    assert array_names(tmp_path / "x.npy") == array_names(tmp_path / "x.zarr") == [""]


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".safetensors", ".h5"])
def test_a_file_that_is_no_such_file_is_said(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    for content, words in ((b"", "0 bytes"), (b"no such file", "one that cannot")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            array_names(path)
    with pytest.raises(DataError, match="found none"):
        array_names(tmp_path / f"missing{suffix}")
