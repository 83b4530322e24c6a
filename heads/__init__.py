"""Cached feature rows in, scored predictions out."""

from typing import Any

from featcache.alias import take_name

__all__ = ["RidgeHead"]

if __name__ != "heads":  # installed, as featcache.heads
    take_name("heads", __name__)


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing `heads.config` for `--help` must not import torch.
    if name == "RidgeHead":
        from heads.solvers.estimator import RidgeHead

        return RidgeHead
    raise AttributeError(f"module 'heads' has no attribute {name!r}")
