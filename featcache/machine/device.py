"""Where tensors live."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from featcache.errors import ConfigError


def resolve_device(device: str) -> str:
    """'auto' is CUDA where there is one. Raises ConfigError for a CUDA that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda", expected="a CUDA device", found="none that torch can use", remedy="use --device cpu"
        )
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """'auto' is bfloat16 on a CPU that multiplies it, where it takes half the time of float32 and changes features by
    0.4 to 2.5 % and scores by nothing that was found (docs/log.md); it is float32 elsewhere.
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if resolve_device(device) == "cpu" and not is_emulated("bfloat16", device) else "float32"


# what Linux calls them on x86 and on Arm
_UNITS = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


def is_emulated(dtype: str, device: str) -> bool:
    """Whether this is a CPU that is not known to multiply such numbers: ten times as slow as float32, and more."""
    return dtype in _UNITS and resolve_device(device) == "cpu" and not _UNITS[dtype] & _cpu_flags()


def _cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What Linux says that the processor can do; nothing elsewhere."""
    with suppress(OSError, StopIteration):
        lines = path.read_text().splitlines()
        return set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    return set()


def check_products(option: str, products: str, device: str) -> None:
    """Raises ConfigError for TF32 on what has no such units."""
    if products == "tf32" and resolve_device(device) != "cuda":
        raise ConfigError(
            f"--{option} tf32", expected="a CUDA device", found=resolve_device(device), remedy="use float32"
        )


@contextmanager
def matrix_products(products: str) -> Iterator[None]:
    """Whether CUDA multiplies float32 matrices and convolves as they are, or rounded to TF32, 10 bits behind the point.

    torch's own default differs between the two, and between releases. float32 means float32 unless TF32 was asked for.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = products == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
