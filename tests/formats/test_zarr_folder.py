"""Zarr folders of others: what is no regular file in them is refused, and not waited for."""

import os

import numpy as np
import pytest
import zarr

from featcache.errors import DataError
from featcache.formats.arrays import open_array
from featcache.formats.lazy import Place
from featcache.formats.names import array_names

VALUES = np.arange(40, dtype=np.float32).reshape(10, 4)


@pytest.mark.parametrize("version", [2, 3])
def test_a_pipe_in_a_zarr_folder_is_not_waited_for(tmp_path, version):
    path = tmp_path / "a.zarr"
    zarr.open_group(path, mode="w", zarr_format=version).create_array("x", data=VALUES, chunks=(5, 4))
    for file in [one for one in path.rglob("*") if one.is_file()]:
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(DataError, match="no regular file"):
            array_names(path)
            np.asarray(open_array(Place(path, "x"))[:])
        file.unlink()
        file.write_bytes(content)
    np.testing.assert_array_equal(open_array(Place(path, "x"))[:], VALUES)
