"""References to code are loaded when they are needed, and once."""

import subprocess
import sys

import pytest

from heads.config.registry import load


def test_a_reference_is_what_it_names():
    from heads.scores.losses import mse

    assert load("heads.scores.losses:mse") is mse
    assert load("heads.scores.losses:mse") is load("heads.scores.losses:mse")


@pytest.mark.parametrize(
    ("reference", "error"),
    [("heads.no_such_module:name", ModuleNotFoundError), ("heads.scores.losses:no_such_name", AttributeError)],
)
def test_a_reference_to_nothing_is_an_error(reference, error):
    with pytest.raises(error):
        load(reference)


def test_no_torch_to_read_options():
    code = "import sys, heads.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
