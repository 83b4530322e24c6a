"""Optional libraries are imported, or the one command that brings them is said."""

import sys

import pytest

from featcache.errors import ConfigError
from featcache.machine.extra import needed


def test_a_library_that_is_installed_is_imported():
    assert needed("json.decoder", "text") is sys.modules["json.decoder"]


def test_a_library_that_is_missing_is_one_line_with_the_command_to_install_it():
    with pytest.raises(ConfigError) as error:
        needed("h5py_of_nobody.io", "HDF5 files")
    assert str(error.value) == (
        "HDF5 files: expected the library h5py_of_nobody, which they need; found it is not installed; "
        "pip install 'featcache[formats]'"
    )


def test_a_library_that_is_broken_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_reader.py").write_text("import a_part_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported .No module named 'a_part_that_is_missing'"):
        needed("broken_reader", "files")


def test_another_extra_is_the_one_that_is_named():
    with pytest.raises(ConfigError, match=r"reports: .* pip install 'featcache\[report\]'"):
        needed("nilearn_of_nobody", "reports", "report")
