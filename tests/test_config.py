import pytest

from featcache.config import BackboneConfig, ExtractConfig, differences, fingerprint
from featcache.errors import ConfigError


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    recipe = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert fingerprint(recipe) == fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    for changed in ({"a": 1.5, "b": recipe["b"]}, {"a": 1, "b": {"c": [2, 1], "d": None}}, {"a": 1}):
        assert fingerprint(changed) != fingerprint(recipe)


def test_fingerprint_refuses_what_json_cannot_say():
    with pytest.raises(ValueError):
        fingerprint({"a": float("nan")})


def test_differences_names_each_setting():
    ours = {"size": 384, "transform": {"mean": [0.5], "crop": 1.0}}
    theirs = {"size": 224, "transform": {"mean": [0.5], "crop": 0.9}, "old": True}
    assert differences(ours, theirs) == {"size": (384, 224), "transform.crop": (1.0, 0.9), "old": (None, True)}
    assert differences(ours, ours) == {}


@pytest.mark.parametrize(
    "settings",
    [{"dtype": "float8"}, {"device": "tpu"}, {"batch_size": 0}, {"workers": 0}, {"layers": ("nowhere",)}],
)
def test_extract_config_refuses(settings):
    with pytest.raises(ConfigError, match=r"expected .* found"):
        ExtractConfig(**settings)


def test_backbone_config_refuses_a_size_of_nothing():
    with pytest.raises(ConfigError, match="--size: expected 16 or more; found 0"):
        BackboneConfig(size=0)
