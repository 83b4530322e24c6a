"""Names of labels are read from any numpy, and no file runs code."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from featcache.dataset.rois import read_mapping
from featcache.errors import DataError

LABELS = {0: "Unknown", 1: "V1v", 7: "hV4"}


def write_pickle(path: Path, payload: object, protocol: int = 4) -> Path:
    """What np.save writes for a 0-d object array, with any pickle behind the header."""
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(payload, file, protocol=protocol)
    return path


class Attack:
    """Unpickled by an ordinary reader, this would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reads_what_numpy_saves(tmp_path):
    np.save(tmp_path / "m.npy", LABELS)
    assert read_mapping(tmp_path / "m.npy") == LABELS


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_protocol(tmp_path, protocol):
    path = write_pickle(tmp_path / "m.npy", np.array(LABELS, dtype=object), protocol)
    assert read_mapping(path) == LABELS


def test_reads_integer_keys_of_numpy(tmp_path):
    path = write_pickle(tmp_path / "m.npy", np.array({np.int64(k): v for k, v in LABELS.items()}, dtype=object))
    assert read_mapping(path) == LABELS


def test_reads_files_of_numpy_before_version_2(tmp_path):
    path = write_pickle(tmp_path / "m.npy", np.array(LABELS, dtype=object), protocol=2)
    assert b"numpy._core.multiarray" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_mapping(path) == LABELS


def test_a_file_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    target = tmp_path / "made"
    for payload in (Attack(target), np.array({0: Attack(target)}, dtype=object), {0: Attack(target)}):
        path = write_pickle(tmp_path / "m.npy", payload)
        with pytest.raises(DataError, match=r"nothing in it was run"):
            read_mapping(path)
        assert not target.exists()


@pytest.mark.parametrize("payload", [[1, 2], {"a": "b"}, {1: 2}, {True: "x"}, "text"])
def test_anything_but_labels_and_names_is_refused(tmp_path, payload):
    box = np.empty((), dtype=object)
    box[()] = payload
    with pytest.raises(DataError, match="expected a pickled dict"):
        read_mapping(write_pickle(tmp_path / "m.npy", box))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"not an array at all"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "m.npy").write_bytes(content)
    with pytest.raises(DataError, match="expected a pickled dict"):
        read_mapping(tmp_path / "m.npy")


@pytest.mark.parametrize(
    "operations",
    [
        b"}r\xff\xff\xff\x0f.",  # a place of a memory of 2 GB
        b"}(" + b"K\x01K\x02\x86q\x01" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(1, 60)) + b"K\x01s.",
        b"\x8e" + b"\x7f" * 8,  # bytes without end
        b"(" * 50_000 + b"t" * 50_000 + b".",
        b"\x8f(K\x01\x90.",
    ],
)
def test_a_pickle_that_takes_memory_or_time_without_end_is_refused(tmp_path, operations):
    path = write_pickle(tmp_path / "m.npy", 0)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n", 10) + 1] + b"\x80\x04" + operations)
    with pytest.raises(DataError, match="nothing in it was run"):
        read_mapping(path)
