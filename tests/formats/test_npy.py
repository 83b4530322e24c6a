"""Headers of .npy files that lie or are broken are refused."""

import struct

import numpy as np
import pytest

from featcache.errors import DataError
from featcache.formats.arrays import open_array
from featcache.formats.npy import open_npy

VALUES = np.arange(40, dtype=np.float32).reshape(10, 4)


def npy(shape: str, descr: str = "'<f4'", data: bytes = VALUES.tobytes()) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [npy(f"({n}, 4)") for n in (2**63, 2**63 - 1, 2**62, 10**30, 11, -1, -10, 1.5, None)]
    + [npy("(10, 4)", descr) for descr in ("'|O'", "1", "''", "'|V2147483647'", "[('a', '|O')]")]
    + [b"\x93NUMPY\x01\x00" + struct.pack("<H", 9_000) + one * 9_000 for one in (b"(", b"[", b"-", b"\x00", b"9")],
)
def test_a_npy_header_that_lies_or_is_broken_is_refused(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    for read in (open_npy, open_array):
        with pytest.raises(DataError, match=r"a\.npy"):
            read(tmp_path / "a.npy")


def test_a_whole_file_is_opened_as_it_is(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    np.testing.assert_array_equal(open_npy(tmp_path / "a.npy"), VALUES)
