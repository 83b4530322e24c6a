"""`python -m featcache` is the command line of this process, and ends with its exit code."""

import sys

import pytest

from featcache import __version__
from featcache.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--version"], 0, f"featcache {__version__}, ", ""),
        (["extract", "--data", "nowhere"], 1, "", "error: --data: expected a dataset; found no folder nowhere;"),
    ],
    ids=["what works", "a mistake"],
)
def test_it_ends_with_the_exit_code_of_the_command_line(monkeypatch, capfd, arguments, code, out, err):
    monkeypatch.setattr(sys, "argv", ["featcache", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capfd.readouterr()
    assert left.value.code == code and said.out.startswith(out) and said.err.startswith(err)
