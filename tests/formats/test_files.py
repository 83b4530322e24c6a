"""Only files are opened, and what a library says of a broken one becomes one line."""

import os
import zlib

import pytest

from featcache.errors import ConfigError, DataError
from featcache.formats.files import MOST_INFLATED, inflates_beyond, reading, regular_file


def test_a_file_with_something_in_it_is_taken(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"x")
    (tmp_path / "link.npy").symlink_to(tmp_path / "a.npy")
    assert regular_file(tmp_path / "a.npy") == tmp_path / "a.npy"
    assert regular_file(tmp_path / "link.npy") == tmp_path / "link.npy"


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer
    found = {"empty": "0 bytes", "fifo": "something that is no file", "": "a folder", "missing": "none"}
    for name, message in found.items():
        with pytest.raises(DataError, match=f"; found {message};"):
            regular_file(tmp_path / name)


def test_a_name_that_the_system_refuses_is_no_file(tmp_path):
    long = tmp_path / ("x" * 300)  # no file system takes such a name, and asking for its kind is an error
    with pytest.raises(DataError, match="expected a file; found none"):
        regular_file(long)


def test_the_first_line_of_any_error_is_kept():
    with pytest.raises(DataError) as error, reading("a.h5", "an HDF5 file"):
        raise IndexError("first\nsecond")
    assert (error.value.where, error.value.found) == ("a.h5", "one that cannot be read (first)")


def test_errors_that_are_not_of_the_file_pass():
    kind = ConfigError("x", expected="a", found="b", remedy="c")
    with pytest.raises(ConfigError) as error, reading("a.h5", "an HDF5 file"):
        raise kind
    assert error.value is kind


def test_a_file_that_asks_for_more_memory_than_there_is_is_named():
    with pytest.raises(DataError) as error, reading("a.h5", "an HDF5 file"):
        raise MemoryError("9 GB")
    assert (error.value.where, error.value.expected) == ("a.h5", "an HDF5 file that fits into memory")
    assert "9 GB" in error.value.found


def test_data_that_inflates_is_told_without_being_held():
    data = zlib.compress(bytes(3_000_000))
    pieces = [data[:1000], data[1000:]]
    assert not inflates_beyond(pieces, 3_000_000) and inflates_beyond(pieces, 2_999_999)
    assert len(data) * MOST_INFLATED > 3_000_000
