"""Checks that settings of several stages share."""

import pytest

from featcache.errors import ConfigError
from heads.config.checks import check_dropout, refuse_given


@pytest.mark.parametrize("value", [0, 0.3, 0.999])
def test_a_part_that_leaves_something_passes(value):
    check_dropout(value)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan")])
def test_a_part_that_leaves_nothing_or_is_no_part_is_refused(value):
    with pytest.raises(ConfigError, match="--token-dropout: expected a number from 0 and below 1; found"):
        check_dropout(value)


def test_the_first_option_that_decides_nothing_is_named_as_it_is_typed():
    refuse_given([], "--solver adamw", "--solver ridge")
    with pytest.raises(ConfigError) as refused:
        refuse_given(["batch_size", "epochs"], "--solver adamw", "--solver ridge")
    assert str(refused.value) == (
        "--batch-size: expected --solver adamw with it; found --solver ridge; "
        "leave --batch-size out, or use --solver adamw"
    )
