"""References to code that is loaded when it is needed, so that `--help` need not import torch."""

from functools import cache
from importlib import import_module
from typing import Any


@cache
def load(reference: str) -> Any:
    """Load what 'package.module:name' refers to."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
