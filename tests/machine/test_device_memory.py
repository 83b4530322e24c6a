"""Memory of the device: what is free there, and a full device, which is met with half the work."""

import pytest
import torch

from featcache.errors import ConfigError
from featcache.machine import device_memory
from featcache.machine.device_memory import (
    forget_freed,
    free_on,
    halving,
    is_out_of_memory,
    refuse_beyond,
    said_on,
    spare_on,
)
from featcache.machine.memory import free_memory, spare_memory

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes")


def test_memory_of_a_cpu_is_main_memory(monkeypatch):
    monkeypatch.setattr("featcache.machine.memory.free_memory", lambda: 3e9)
    monkeypatch.setattr(device_memory, "free_memory", lambda: 3e9)
    assert free_on("cpu") == 3e9 and spare_on("cpu", 2) == spare_memory(2)
    assert said_on("cpu", 2e9) == "about 2.0 GB of memory"


def test_memory_of_a_device_is_its_own_and_not_limited_by_main_memory(pretended_cuda):
    pretended_cuda.limit_memory(10**10, others=4 * 10**9)
    held = torch.zeros(10**6, device="cuda")
    assert free_on("cuda") == 6 * 10**9 - held.numel() * 4
    assert spare_on("cuda", 0.001) == spare_on("cuda", 0) == pytest.approx(0.9 * free_on("cuda"))
    assert said_on("cuda", 2e9) == "about 2.0 GB of the device's memory"


def test_memory_that_torch_holds_and_does_not_use_counts_as_free(pretended_cuda, monkeypatch):
    before = free_on("cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 1000)
    assert free_on("cuda") == before + 1000


def test_only_main_memory_is_refused_beforehand(pretended_cuda):
    with pytest.raises(ConfigError, match="--max-memory"):
        refuse_beyond("cpu", 1, 2e9)
    refuse_beyond("cuda", 1, 2e9)
    refuse_beyond("cpu", 0, 2 * free_memory())


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (RuntimeError("Expected all tensors to be on the same device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_full_memory_is_known_from_other_errors(error, full):
    assert is_out_of_memory(error) is full


def test_work_that_does_not_fit_is_halved_until_it_does(pretended_cuda, said):
    pretended_cuda.limit_memory(4 * 1000 + 100)
    found = halving(lambda n: torch.ones(n, device="cuda").sum().item(), 3000, device="cuda", things="rows", remedy="")
    assert found == (750.0, 750)
    assert [line for line in said if "full" in line] == [
        "the device's memory is full: goes on with 1,500 rows",
        "the device's memory is full: goes on with 750 rows",
    ]


def test_what_failed_is_gone_when_it_is_tried_again(pretended_cuda, said):
    pretended_cuda.limit_memory(4 * 1500)

    def two(n):
        first = torch.ones(n, device="cuda")
        return (first + 1).sum().item()  # the second vector does not fit beside the first

    assert halving(two, 1000, device="cuda", things="rows", remedy="")[1] == 500
    assert pretended_cuda.allocated == 0


def test_the_least_that_does_not_fit_is_one_line_with_what_to_do(pretended_cuda, said):
    pretended_cuda.limit_memory(100)
    with pytest.raises(ConfigError) as error:
        halving(lambda n: torch.ones(n, device="cuda"), 400, device="cuda", things="rows", remedy="buy", least=200)
    assert str(error.value).startswith("--device cuda: expected enough memory for 200 rows; found CUDA out of memory")
    assert str(error.value).endswith("; buy")


@pytest.mark.parametrize(("device", "error"), [("cpu", MemoryError("full")), ("cuda", RuntimeError("another"))])
def test_other_errors_are_as_they_were(pretended_cuda, device, error):
    def fail(n):
        raise error

    with pytest.raises(type(error), match=str(error)):
        halving(fail, 4, device=device, things="rows", remedy="")


def test_forgetting_does_nothing_where_there_is_nothing(pretended_cuda):
    forget_freed("cpu")
    forget_freed("cuda")
