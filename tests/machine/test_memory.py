"""Memory: how much is free, blocks that fit into it, and what goes back to the system."""

import os
import platform
import subprocess
import sys

import pytest

from featcache.errors import ConfigError
from featcache.machine import memory
from featcache.machine.memory import block_that_fits, free_memory, peak_memory, spare_memory


@pytest.fixture
def three_gigabytes(monkeypatch):
    """3 GB are free, and 1 GB was taken before the first fit."""
    monkeypatch.setattr(memory, "free_memory", lambda: 3e9)
    monkeypatch.setattr(memory, "memory_at_start", lambda: 1e9)


@pytest.mark.usefixtures("three_gigabytes")
@pytest.mark.parametrize(("max_memory", "spare"), [(0, 3e9), (2, 1e9), (100, 3e9)])
def test_a_cap_is_of_the_whole_process(max_memory, spare):
    assert spare_memory(max_memory) == spare


@pytest.mark.usefixtures("three_gigabytes")
@pytest.mark.parametrize(
    ("fixed", "per_vertex", "max_memory", "block"),
    [(1e9, 1e5, 0, 2048), (1e9, 2e6, 0, 1000), (0.5e9, 1e6, 2, 500), (2.9e9, 1e8, 0, 64), (9e9, 1, 0, 64)],
    ids=["all fit", "some fit", "capped", "the least", "too much, but only a guess"],
)
def test_blocks_fill_what_there_is(fixed, per_vertex, max_memory, block):
    assert block_that_fits(fixed, per_vertex, 2048, max_memory) == block


@pytest.mark.usefixtures("three_gigabytes")
def test_a_cap_that_nothing_fits_under_is_refused():
    with pytest.raises(ConfigError, match=r"--max-memory: expected 2\.11 GB or more .* found 2; give more"):
        block_that_fits(1.04e9, 1e6, 2048, 2)


@pytest.mark.usefixtures("three_gigabytes")
def test_a_small_head_takes_its_few_vertices():
    assert block_that_fits(1e9, 1e5, 7, 0) == 7


def limits(monkeypatch, tmp_path, available: str, limit: str | None, current: str = "0") -> int:
    """Free memory of a machine with these files."""
    (tmp_path / "meminfo").write_text(available)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(current)
    readers = {str(tmp_path / "meminfo"): memory._available, str(tmp_path / "memory.max"): memory._below_limit}
    monkeypatch.setattr(memory, "_LIMITS", readers)
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


def run(script: str, *arguments: str) -> int:
    """The number that a script prints, run in a process of its own."""
    return int(
        subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True).stdout
    )


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


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_kept_memory_is_not_cleared_again():
    """32 MB blocks, freed and asked for 20 times: page faults in each mode, counted by the kernel."""
    few = run(FAULTS, "default") / 4
    # small blocks that lie in the way make the heap grow, now and then by a few times 32 MB
    assert any(run(FAULTS, "keep") < few for _ in range(3))


HELD = """
import numpy as np
from featcache.machine.memory import used_memory
before = used_memory()
held = np.ones(40_000_000, dtype=np.uint8)  # written, so that its pages are there
print(used_memory() - before)
"""


def test_used_memory_grows_with_what_is_held():
    """In a process of its own: beside other tests, memory given back meanwhile would hide what is held."""
    assert 36_000_000 <= run(HELD) <= 60_000_000


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
    assert 40_000_000 <= run(GIVEN_BACK) <= 60_000_000


def test_peak_memory_is_that_since_it_was_forgotten(tmp_path):
    """In a process of its own: other tests have the allocator keep what is freed."""
    lines = ["from featcache.machine.memory import forget_peak, peak_memory", "forget_peak()", "before = peak_memory()"]
    lines += ["block = bytearray(200_000_000)", "block[::4096] = b'x' * len(block[::4096])", "larger = peak_memory()"]
    lines += ["del block", "forget_peak()", "print(before, larger, peak_memory())"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    before, larger, after = map(int, done.stdout.split())
    assert larger > before + 150e6
    assert platform.system() != "Linux" or after < before + 100e6
    assert peak_memory(tmp_path / "no_such_file") > 10e6  # other systems say it of the whole process
