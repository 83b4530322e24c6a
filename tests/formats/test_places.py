"""Chosen places of every row: the same values as from the whole array, whatever its chunks."""

import h5py
import numpy as np
import pytest

from featcache.formats.arrays import open_array
from featcache.formats.lazy import Joined
from featcache.formats.places import at_places

SHAPE = (9, 5, 6, 7)
CHUNKS = [(9, 1, 1, 1), (3, 1, 1, 1), (2, 5, 2, 7), None]


def opened(path, values, chunks):
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=values, chunks=chunks)
    return open_array(path)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("share", [0.05, 0.5, 1])
def test_voxels_of_a_mask(tmp_path, chunks, share):
    rng = np.random.default_rng(0)
    values = rng.integers(-30_000, 30_000, SHAPE, dtype=np.int16)
    mask = rng.random(SHAPE[1:]) < share
    mask[0, 0, 0] = True
    rows = at_places(opened(tmp_path / "x.h5", values, chunks), np.nonzero(mask))
    assert rows.shape == (9, mask.sum()) and rows.dtype == np.int16
    np.testing.assert_array_equal(rows[:], values[:, mask])
    np.testing.assert_array_equal(rows[2:5, 1:3], values[:, mask][2:5, 1:3])
    assert rows[4:4].shape == (0, mask.sum()) and rows[:, 1:1].shape == (9, 0)


@pytest.mark.parametrize("chunks", [(4, 1), (4, 100), None])
def test_places_in_any_order_along_one_axis(tmp_path, chunks):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 9000)).astype(np.float32)
    places = rng.permutation(9000)[:200]
    rows = at_places(opened(tmp_path / "x.h5", values, chunks), [places])
    np.testing.assert_array_equal(rows[:], values[:, places])


def test_joined_sessions_know_the_chunks_of_each(tmp_path):
    """So that whoever reads them in blocks reads each chunk once."""
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    places = np.nonzero(np.ones(SHAPE[1:], dtype=bool))
    parts = [at_places(opened(tmp_path / f"{n}.h5", values[:n], (3, 1, 1, 1)), places) for n in (9, 6, 4)]
    assert Joined(parts).chunks == (3, 1)
    assert Joined(parts[::-1]).chunks is None  # the chunks of the second begin inside those of the whole
