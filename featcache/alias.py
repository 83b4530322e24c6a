"""A second name for the package `featcache.heads` of an installation: `heads`, which it has in the repository.

Modules import each other as `heads.config` and the like. In an installation they are inside featcache, so that nobody's
own `heads` or `cli` is in their way (see setup.py), and this makes both names mean the same modules.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Alias(MetaPathFinder, Loader):
    """Finds modules of one package under a second name for it."""

    def __init__(self, name: str, package: str) -> None:
        self._name, self._package = name, package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.startswith(f"{self._name}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._package + spec.name.removeprefix(self._name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # its own, which the import system has just replaced


def take_name(name: str, package: str) -> None:
    """Have `name` and all names in it stand for a package that is being imported. Raises ImportError if it is taken."""
    module, taken = sys.modules[package], sys.modules.get(name)
    if taken is not None and taken is not module and getattr(taken, "ALIAS_OF", None) != package:
        where = getattr(taken, "__file__", None) or "somewhere"
        raise ImportError(
            f"{name}: expected the name of {package}; found another module of that name, from {where}; "
            f"import featcache before it, or rename it"
        )
    sys.modules[name] = module
    sys.meta_path.insert(0, _Alias(name, package))
