"""Cached feature rows in, scored predictions out."""

__all__ = ["RidgeHead"]


def __getattr__(name: str) -> object:
    # Loaded on first use: importing `heads.config` for `--help` must not import torch.
    if name == "RidgeHead":
        from heads.solvers.ridge import RidgeHead

        return RidgeHead
    raise AttributeError(f"module 'heads' has no attribute {name!r}")
