import platform
import subprocess
import sys

import pytest
import torch

from featcache.device import resolve_device
from featcache.errors import ConfigError

FAULTS = """
import resource, sys, torch
from featcache.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    torch.ones(8, 1 << 20).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(8, 1 << 20).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_kept_memory_is_not_cleared_again():
    """32 MB blocks, freed and asked for 20 times: page faults in each mode, counted by the kernel."""

    def faults(mode: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout
        )

    few = faults("default") / 10
    # a machine that reclaims idle pages adds faults of its own, now and then
    assert any(faults("keep") < few for _ in range(3))


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto") == device and resolve_device("cpu") == "cpu"


def test_a_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a CUDA device; found none"):
        resolve_device("cuda")
