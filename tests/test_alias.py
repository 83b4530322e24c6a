"""A second name for a package means the very modules of the first, and is refused where it is somebody else's."""

import importlib
import sys
from types import ModuleType

import pytest

from featcache.alias import take_name

PACKAGE, NAME = "whole_of_a_test", "short_of_a_test"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a module in a room; afterwards nothing of it is left in the process."""
    folder = tmp_path / PACKAGE
    (folder / "room").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "room" / "__init__.py").write_text("")
    (folder / "room" / "thing.py").write_text("LOADED = []\nLOADED.append(__name__)\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield importlib.import_module(PACKAGE)
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.split(".")[0] in (PACKAGE, NAME)]:
        del sys.modules[name]


def test_both_names_are_one_module_that_is_loaded_once(package):
    take_name(NAME, PACKAGE)
    short = importlib.import_module(f"{NAME}.room.thing")
    assert short is importlib.import_module(f"{PACKAGE}.room.thing")
    assert list(short.LOADED) == [f"{PACKAGE}.room.thing"] and sys.modules[NAME] is package


def test_a_module_keeps_the_name_of_its_package(package):
    take_name(NAME, PACKAGE)
    short = importlib.import_module(f"{NAME}.room.thing")
    assert short.__name__ == short.__spec__.name == f"{PACKAGE}.room.thing"


def test_what_the_package_lacks_is_no_module(package):
    take_name(NAME, PACKAGE)
    with pytest.raises(ModuleNotFoundError, match=f"{PACKAGE}.nothing"):
        importlib.import_module(f"{NAME}.nothing")


def test_a_name_that_is_taken_is_refused(package, monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    finders = list(sys.meta_path)
    with pytest.raises(ImportError, match=f"{NAME}: expected the name of {PACKAGE}; found another module"):
        take_name(NAME, PACKAGE)
    assert sys.meta_path == finders


def test_a_name_that_stands_for_the_package_already_is_taken_again(package, monkeypatch):
    (stand_in := ModuleType(NAME)).ALIAS_OF = PACKAGE
    monkeypatch.setitem(sys.modules, NAME, stand_in)
    take_name(NAME, PACKAGE)
    assert sys.modules[NAME] is package
