"""Tensors on the disk: the safetensors library reads what is written, and a full disk is an error and no signal."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file

from featcache.machine import tensors
from featcache.machine.tensors import Spool, as_float32, copy_as_float32, write_tensors

DTYPES = sorted(tensors._NAMES, key=str)


def some_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits of a type; of bool, random truths."""
    size = torch.empty(0, dtype=dtype).element_size()
    torch.manual_seed(size)
    high = 2 if dtype is torch.bool else 256
    return torch.randint(0, high, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    bits = [t.contiguous().flatten().view(torch.uint8) if t.numel() else t.flatten() for t in (found, expected)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_reads_every_tensor_bit_for_bit(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(tensors, "_AT_ONCE", 7)  # not a multiple of any size
    written = {
        "matrix": some_of(dtype, 3, 5),
        "number": some_of(dtype, 1)[0],
        "nothing": some_of(dtype, 2, 3)[:, :0],
        "turned": some_of(dtype, 4, 3).T,
        "every other": some_of(dtype, 9)[::2],
        "byte": torch.tensor(7, dtype=torch.uint8),  # what follows does not begin at a multiple of its size
        "ü.%d": some_of(dtype, 2, 2),
        "trained": torch.nn.Parameter(torch.ones(3)),
    }
    assert not written["turned"].is_contiguous() and not written["every other"].is_contiguous()
    write_tensors(tmp_path / "new" / "a.safetensors", written, {"made of": "nothing", "ü": "'\"\n"})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]
    found = load_file(tmp_path / "new" / "a.safetensors")
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        same_bits(found[name], tensor.detach())
    with safetensors.safe_open(tmp_path / "new" / "a.safetensors", "pt") as file:
        assert {name: text for name, text in file.metadata().items() if name != "crc32c"} == {
            "made of": "nothing",
            "ü": "'\"\n",
        }


def test_no_tensors_are_a_file_too(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {}, {"a": "b"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert not list(file.keys()) and file.metadata()["a"] == "b"


def test_an_error_midway_leaves_the_older_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.arange(3)}, {})
    before = path.read_bytes()
    with pytest.raises(NotImplementedError):  # a tensor without numbers, behind one that is written
        write_tensors(path, {"a": torch.arange(4), "b": torch.empty(2, device="meta")}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_zeros_are_in_memory_up_to_a_size_and_above_it_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_IN_MEMORY", 4 * 12)
    folder = tmp_path / "scratch"
    spool = Spool(folder)
    for shape in ((3, 4), (0, 4), ()):
        same_bits(spool.zeros(*shape), torch.zeros(shape))
    assert not folder.exists() and not spool.used
    room = []
    honest = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda *given: (room.append(given[1:]), honest(*given)))
    large = spool.zeros(5, 4)
    assert room == [(0, 80)] and list(folder.iterdir()) == []
    same_bits(large, torch.zeros(5, 4))
    other = spool.zeros(5, 4)
    large += torch.arange(20).view(5, 4)
    same_bits(large, torch.arange(20, dtype=torch.float32).view(5, 4))
    same_bits(other, torch.zeros(5, 4))  # each has a file of its own
    write_tensors(tmp_path / "a.safetensors", {"a": large, "b": other}, {}, spool=spool)
    found = load_file(tmp_path / "a.safetensors")
    same_bits(found["a"], torch.arange(20, dtype=torch.float32).view(5, 4))
    same_bits(found["b"], torch.zeros(5, 4))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc: memory of files is unknown")
def test_what_is_let_go_of_takes_no_memory_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_IN_MEMORY", 0)
    spool = Spool(tmp_path)
    large = spool.zeros(1 << 20)

    def resident() -> int:
        """Bytes of the spooled file in this process."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        of_file = next(line for line in lines if str(tmp_path) in line)
        assert "(deleted)" in of_file
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    large[:] = torch.arange(1 << 20)
    assert resident() == 4 << 20
    spool.let_go()
    assert resident() == 0
    same_bits(large, torch.arange(1 << 20, dtype=torch.float32))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch, number):
    """A quota may be used up on a disk that has room."""
    monkeypatch.setattr(tensors, "_IN_MEMORY", 0)

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=os.strerror(number)):
        Spool(tmp_path).zeros(5)
    assert list(tmp_path.iterdir()) == []


def test_where_no_room_can_be_promised_the_free_room_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_IN_MEMORY", 0)

    def unknown(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    same_bits(Spool(tmp_path).zeros(5), torch.zeros(5))
    with pytest.raises(OSError, match="not here"):
        Spool(tmp_path).zeros(1 << 45)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_of_any_type_become_float32(dtype):
    values = np.random.default_rng(0).normal(size=(7, 12)).astype(dtype)
    place = np.zeros((7, 5, 12), np.float32)
    copy_as_float32(values.T.copy().T, place[:, 3])  # rows that are turned, and a place with gaps
    np.testing.assert_array_equal(place[:, 3], values.astype(np.float32))
    found = as_float32(values)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.astype(np.float32))
