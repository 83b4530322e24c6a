"""Devices and formats: what is there, what is fast, and settings that come back."""

import pytest
import torch

from featcache.errors import ConfigError
from featcache.machine import device
from featcache.machine.device import (
    _cpu_flags,
    check_products,
    is_emulated,
    matrix_products,
    network_dtype,
    pinned,
    resolve_device,
    resolve_dtype,
    to_device,
    to_host,
)


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto") == expected and resolve_device("cpu") == "cpu"


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a CUDA device; found none"):
        resolve_device("cuda")


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


@pytest.mark.parametrize("flags", [set(), {"amx_bf16"}])
@pytest.mark.parametrize("units", [False, True])
def test_auto_is_what_the_device_multiplies_and_a_dtype_that_was_named_stays(monkeypatch, flags, units):
    asked = []
    monkeypatch.setattr(device, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **more: asked.append(more) or units)
    on_cpu = "bfloat16" if flags else "float32"
    assert resolve_dtype("auto", "cpu") == network_dtype("auto", "cpu") == on_cpu and not asked
    for name in ("cuda", "auto"):
        assert resolve_dtype("auto", name) == ("bfloat16" if units else "float32")
        assert network_dtype("auto", name) == ("bfloat16" if units else "float16")
    assert all(more == {"including_emulation": False} for more in asked)  # an emulated one is slow
    for dtype in ("float32", "tf32", "float16", "bfloat16"):
        for name in ("cpu", "cuda"):
            assert resolve_dtype(dtype, name) == network_dtype(dtype, name) == dtype


@pytest.mark.parametrize("flags", [set(), {"avx512_bf16"}, {"avx512_bf16", "avx512_fp16"}])
def test_formats_without_units_are_emulated(monkeypatch, flags):
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


def test_tensors_that_stay_in_main_memory_are_not_copied():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert pinned(tensor, "cpu") is tensor and to_device(tensor, "cpu") is tensor
    first, second = to_host([tensor, tensor[1]])()
    assert first is tensor and torch.equal(second, tensor[1]) and to_host([])() == []
