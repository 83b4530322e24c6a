"""Where tensors live."""

import torch

from featcache.errors import ConfigError


def resolve_device(device: str) -> str:
    """'auto' is CUDA where there is one. Raises ConfigError for a CUDA that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: expected a CUDA device; found none that torch can use; use --device cpu")
    return device
