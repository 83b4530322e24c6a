"""Devices, the number formats in which they multiply, and copies to and from them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from featcache.errors import ConfigError, first_line


def resolve_device(device: str) -> str:
    """'cuda' or 'cpu' for a setting; 'auto' is CUDA where there is one.

    Raises ConfigError for 'cuda' where there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda", expected="a CUDA device", found="none that torch can use", remedy="use --device cpu"
        )
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """Number format for a setting; 'auto' is bfloat16 on a device that has units for it, and float32 elsewhere.

    On such a CPU bfloat16 takes half the time of float32. It changes features by 0.4 to 2.5 %, and no change of the
    scores was found (docs/decisions/0003).
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if _multiplies_bfloat16(resolve_device(device)) else "float32"


def network_dtype(dtype: str, device: str) -> str:
    """Precision of a network for a setting: as `resolve_dtype`, and float16 on a CUDA device without bfloat16 units."""
    resolved = resolve_dtype(dtype, device)
    if (dtype, resolved, resolve_device(device)) == ("auto", "float32", "cuda"):
        return "float16"
    return resolved


def _multiplies_bfloat16(device: str) -> bool:
    if device == "cpu":
        return not is_emulated("bfloat16", device)
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


# Flags by which Linux names a processor's units for these formats, on x86 and on Arm
_UNITS = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


def is_emulated(dtype: str, device: str) -> bool:
    """Whether a CPU has no known units for a format, which is then ten or more times as slow as float32."""
    return dtype in _UNITS and resolve_device(device) == "cpu" and not _UNITS[dtype] & _cpu_flags()


def _cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Names of what the processor can do, from Linux; an empty set on other systems."""
    with suppress(OSError, StopIteration):
        lines = path.read_text().splitlines()
        return set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    return set()


def check_products(option: str, products: str, device: str) -> None:
    """Raise ConfigError where `--option` asks for TF32 on a device that is not CUDA."""
    if products == "tf32" and resolve_device(device) != "cuda":
        raise ConfigError(
            f"--{option} tf32", expected="a CUDA device", found=resolve_device(device), remedy="use float32"
        )


@contextmanager
def refused_memory(what: str) -> Iterator[None]:
    """Raise ConfigError where the device's memory is too small for something, such as 'the network'."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "--device cuda",
            expected=f"memory of the device for {what}",
            found=first_line(error),
            remedy="end what else runs on the device, use less of it, or use --device cpu",
        ) from error


@contextmanager
def matrix_products(products: str) -> Iterator[None]:
    """Set whether CUDA multiplies and convolves float32 numbers as they are, or rounds them first to TF32 ('tf32').

    TF32 has 10 bits behind the point. torch's defaults for products and for convolutions differ, also between releases;
    here both are float32 unless TF32 was asked for. The earlier settings come back at the end.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = products == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def pinned(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """The tensor in page-locked memory where it is on its way to CUDA; the tensor itself for other devices.

    CUDA copies from such memory while the host goes on. Locking pages takes time itself, so threads that read ahead
    should do it.
    """
    leaves = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory() if leaves and not tensor.is_pinned() else tensor


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """The tensor on a device; the tensor itself where it is there already.

    From page-locked memory to CUDA the host does not wait for the copy: what runs on the device afterwards does, and
    torch keeps the memory until then. So a pinned tensor must not be written to again.
    """
    leaves = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return tensor.to(device, non_blocking=leaves and tensor.is_pinned())


def to_host(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Start copies to main memory, and return the function that waits for them, once for all, and gives them.

    Any thread may call that function. Tensors that are in main memory are given as they are.
    """
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # torch makes their memory page-locked
    if (device := next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)) is None:
        return lambda: copies
    done = torch.cuda.current_stream(device).record_event()

    def wait() -> list[torch.Tensor]:
        done.synchronize()
        return copies

    return wait
