import pytest

from featcache.config import BackboneConfig, ExtractConfig, LayerConfig, differences, fingerprint, is_named_by
from featcache.errors import ConfigError


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    key = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert fingerprint(key) == fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    for changed in ({"a": 1.5, "b": key["b"]}, {"a": 1, "b": {"c": [2, 1], "d": None}}, {"a": 1}):
        assert fingerprint(changed) != fingerprint(key)


def test_a_folder_is_named_by_one_key():
    assert is_named_by(f"a-{fingerprint({'a': 1})}", {"a": 1}) and is_named_by("a", {"a": 2})
    assert not is_named_by(f"a-{fingerprint({'a': 1})}", {"a": 2})
    assert not is_named_by(f"a-{fingerprint({'a': 1})}", {"a": float("nan")})


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
    [{"dtype": "float8"}, {"device": "tpu"}, {"batch_size": 0}, {"workers": 0}],
)
def test_extract_config_refuses(settings):
    with pytest.raises(ConfigError, match=r"expected .* found"):
        ExtractConfig(**settings)


def test_backbone_config_refuses_a_size_of_nothing():
    with pytest.raises(ConfigError, match="--size: expected 16 or more; found 0"):
        BackboneConfig(size=0)


def test_backbone_config_refuses_a_fit_that_there_is_not():
    with pytest.raises(ConfigError, match="--fit: expected one of crop, whole, pad; found 'squash'"):
        BackboneConfig(fit="squash")


def test_size_and_fit_that_are_given_go_over_those_of_another_backbone():
    trained = BackboneConfig(name="a", weights="hub", size=64, fit="pad")
    assert BackboneConfig(name="b", weights="none").applied_to(trained) == trained
    expected = BackboneConfig(name="a", weights="hub", size=32, fit="crop")
    assert BackboneConfig(size=32, fit="crop").applied_to(trained) == expected


@pytest.mark.parametrize(
    ("settings", "option"), [({"pool": "median"}, "--pool"), ({"grid": "0"}, "--grid"), ({"grid": "wide"}, "--grid")]
)
def test_layer_config_refuses(settings, option):
    with pytest.raises(ConfigError, match=rf"{option}: expected .* found"):
        LayerConfig(**settings)


def test_layers_may_be_a_text_with_commas():
    assert LayerConfig(layers="pooled, layer4") == LayerConfig(layers=("pooled", "layer4"))


def test_layers_are_spread_over_the_network_on_grids_of_its_own_unless_asked_for():
    assert ExtractConfig().layers == LayerConfig(layers=("auto",), grid="auto", pool="avg")
    assert [LayerConfig(grid=grid).grid for grid in ("native", "auto", "1", "14")] == ["native", "auto", "1", "14"]
