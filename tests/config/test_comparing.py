"""Bands are read from what the user writes, and what names none is refused."""

import pytest

from featcache.errors import ConfigError
from heads.config.comparing import BandSpec, CompareConfig


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("captions=captions*", BandSpec("captions", "captions*")),
        ("early=*lite0*:blocks.0, blocks.1", BandSpec("early", "*lite0*", ("blocks.0", "blocks.1"))),
        (" a = x@112 whole,y ", BandSpec("a", "x@112 whole,y")),
    ],
)
def test_a_band_is_a_name_a_pattern_and_layers(text, spec):
    assert BandSpec.read(text) == spec


@pytest.mark.parametrize("text", ["layer", "=x", "a=", "a=x:", "a=x:b,,c", "a=:b"])
def test_what_names_no_band_is_refused(text):
    with pytest.raises(ConfigError, match="--features: expected layers, backbones or bands"):
        CompareConfig(features=("a=x", text))


def test_bands_are_two_or_more_of_different_names_or_all_of_a_kind():
    assert CompareConfig().band_set == "layers" and CompareConfig().bands == ()
    config = CompareConfig(features=("a=x", "b=y"))
    assert config.band_set is None and [spec.name for spec in config.bands] == ["a", "b"]
    for wrong in (("a=x",), ("a=x", "a=y"), ("layers", "a=x")):
        with pytest.raises(ConfigError):
            CompareConfig(features=wrong)


@pytest.mark.parametrize(
    "wrong", [{"per": "hemisphere"}, {"n_folds": 1}, {"n_candidates": -1}, {"split": "nothing"}, {"seed": -1}]
)
def test_settings_out_of_their_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        CompareConfig(**wrong)
