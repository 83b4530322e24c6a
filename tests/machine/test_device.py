import os
import platform
import subprocess
import sys

import pytest
import torch

from featcache.errors import ConfigError
from featcache.machine import device, memory
from featcache.machine.device import (
    _cpu_flags,
    check_products,
    is_emulated,
    matrix_products,
    resolve_device,
    resolve_dtype,
)
from featcache.machine.memory import free_memory

FAULTS = """
import resource, sys, torch
from featcache.machine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):
    torch.ones(8, 1 << 20).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(8, 1 << 20).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

HELD = """
import numpy as np
from featcache.machine.memory import used_memory
before = used_memory()
held = np.ones(40_000_000, dtype=np.uint8)  # written, so that its pages are there
print(used_memory() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_kept_memory_is_not_cleared_again():
    """32 MB blocks, freed and asked for 20 times: page faults in each mode, counted by the kernel."""

    def faults(mode: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout
        )

    few = faults("default") / 4
    # small blocks that lie in the way make the heap grow, now and then by a few times 32 MB
    assert any(faults("keep") < few for _ in range(3))


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto") == expected and resolve_device("cpu") == "cpu"


def test_a_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a CUDA device; found none"):
        resolve_device("cuda")


def limits(monkeypatch, tmp_path, available: str, limit: str | None, current: str = "0") -> int:
    """Free memory of a machine with these files."""
    (tmp_path / "meminfo").write_text(available)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(current)
    found = {str(tmp_path / "meminfo"): memory._available, str(tmp_path / "memory.max"): memory._below_limit}
    monkeypatch.setattr(memory, "_LIMITS", found)
    return free_memory()


MEMINFO = "MemTotal:       32000 kB\nMemFree:        100 kB\nMemAvailable:   3000 kB\n"
TOTAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("available", "limit", "current", "free"),
    [
        (MEMINFO, None, "", 3_072_000),
        (MEMINFO, "max\n", "9\n", 3_072_000),
        (MEMINFO, "2000000\n", "500000\n", 1_500_000),
        (MEMINFO, "9000000000\n", "1\n", 3_072_000),
        ("nothing of the kind", None, "", TOTAL),
        ("", "damaged", "", TOTAL),
    ],
)
def test_free_memory_is_the_least_that_machine_and_container_leave(
    monkeypatch, tmp_path, available, limit, current, free
):
    assert limits(monkeypatch, tmp_path, available, limit, current) == free


def test_free_memory_of_this_machine_is_some_and_not_more_than_it_has():
    assert 0 < free_memory() <= TOTAL


def test_used_memory_grows_with_what_is_held():
    """In a process of its own: beside other tests, memory given back meanwhile would hide what is held."""
    grown = int(subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True).stdout)
    assert 36_000_000 <= grown <= 60_000_000


GIVEN_BACK = """
import numpy as np
from featcache.machine.memory import give_back_memory, keep_freed_memory, used_memory
keep_freed_memory()
blocks = [np.ones(1_000_000, dtype=np.uint8) for _ in range(100)]
held = used_memory()
blocks = blocks[1::2]  # holes of 1 MB, which the heap keeps
assert give_back_memory()
print(held - used_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the call")
def test_holes_in_kept_memory_go_back():
    freed = int(subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True).stdout)
    assert 40_000_000 <= freed <= 60_000_000


def settings_of_products():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("outside", ["float32", "tf32"])
def test_products_are_as_asked_for_and_as_before_afterwards(outside):
    with matrix_products(outside):
        before = settings_of_products()
        with pytest.raises(ZeroDivisionError), matrix_products("tf32"):
            assert settings_of_products() == ("high", True)
            with matrix_products("float32"):
                assert settings_of_products() == ("highest", False)
            assert settings_of_products() == ("high", True)
            _ = 1 / 0
        assert settings_of_products() == before


def test_tf32_without_cuda_is_refused():
    with pytest.raises(ConfigError, match="--products tf32: expected a CUDA device; found cpu; use float32"):
        check_products("products", "tf32", "cpu")
    check_products("products", "float32", "cpu")


def test_auto_is_float32_on_cuda_and_a_dtype_that_was_named_stays(monkeypatch):
    monkeypatch.setattr(device, "_cpu_flags", lambda: {"amx_bf16"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_dtype("auto", "cpu") == "bfloat16"
    assert resolve_dtype("auto", "cuda") == resolve_dtype("auto", "auto") == "float32"
    assert resolve_dtype("float16", "cpu") == "float16"


@pytest.mark.parametrize("flags", [set(), {"avx512_bf16"}, {"avx512_bf16", "avx512_fp16"}])
def test_numbers_without_units_are_known_as_emulated(monkeypatch, flags):
    monkeypatch.setattr(device, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert is_emulated("bfloat16", "cpu") is ("avx512_bf16" not in flags)
    assert is_emulated("float16", "cpu") is ("avx512_fp16" not in flags)
    assert not any(is_emulated(dtype, "cpu") for dtype in ("float32", "tf32"))
    assert not any(is_emulated(dtype, "cuda") for dtype in ("float16", "bfloat16"))


def test_flags_are_read_where_linux_has_them(tmp_path):
    cpuinfo = "processor : 0\nflags\t\t: fpu avx512_bf16 fsrm\nbugs : none\nprocessor : 1\nflags : fpu\n"
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert _cpu_flags(tmp_path / "cpuinfo") >= {"fpu", "avx512_bf16"}
    assert "none" not in _cpu_flags(tmp_path / "cpuinfo")
    assert _cpu_flags(tmp_path / "missing") == set()
