"""Errors of a command line are told from all others in every release of typer."""

import pytest
import typer
from typer.testing import CliRunner

import cli
from featcache.errors import ConfigError
from heads.recipes.jobs import usage_fault


def test_a_mistake_on_the_command_line_has_a_message():
    assert usage_fault(typer.BadParameter("wrong")) == "Invalid value: wrong"
    done = CliRunner().invoke(cli.app, ["extract", "--nonsense"], standalone_mode=False)
    assert done.exception is not None
    assert "--nonsense" in (usage_fault(done.exception) or "")


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), ConfigError(expected="a", found="b", remedy="c"), typer.Abort()]
)
def test_any_other_error_is_none(error):
    assert usage_fault(error) is None
