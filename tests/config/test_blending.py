"""Settings of blends name methods that there are."""

import pytest

from featcache.errors import ConfigError
from heads.blend.weights import learners
from heads.config import BLENDS, BlendConfig


def test_names_are_those_of_the_functions():
    assert all(learners(method, 0) for method in BLENDS)


def test_settings_that_cannot_work_are_refused_when_built():
    with pytest.raises(ConfigError, match="expected"):
        BlendConfig(method="median")
