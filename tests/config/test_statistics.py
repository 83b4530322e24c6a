"""Settings of scores are checked when they are built."""

import pytest

from featcache.errors import ConfigError
from heads.config import ScoresConfig


@pytest.mark.parametrize(
    ("setting", "option"),
    [({"permutations": -1}, "--permutations"), ({"fdr": "no"}, "--fdr"), ({"seed": -1}, "--seed")],
)
def test_settings_that_mean_nothing_are_refused(setting, option):
    with pytest.raises(ConfigError, match=option):
        ScoresConfig(**setting)


def test_p_values_may_be_left_out():
    assert ScoresConfig(permutations=0).permutations == 0
