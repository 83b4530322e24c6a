"""layers and extract: what can be cached, and the settings that options make."""

from dataclasses import replace
from pathlib import Path

import pytest

from featcache.backbone.network import described_layers
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.errors import ConfigError
from featcache.workdir import Workdir
from support.commands import SMALL, job_of, run


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ((), ExtractConfig()),
        (
            ("--backbone", "test_vit", "--size", "64", "--fit", "pad", "--weights", "none"),
            ExtractConfig(backbone=BackboneConfig(name="test_vit", size=64, fit="pad", weights="none")),
        ),
        (("--layers", "pooled, layer2"), ExtractConfig(layers=LayerConfig(layers=("pooled", "layer2")))),
        (
            ("--grid", "4", "--pool", "max", "--checkpoint", "none"),
            ExtractConfig(layers=LayerConfig(grid="4", pool="max"), checkpoint="none"),
        ),
        (("--batch-size", "7", "--dtype", "float16"), ExtractConfig(batch_size=7, dtype="float16")),
    ],
)
def test_options_make_the_settings(arguments, config):
    found = job_of("extract", *arguments).config
    assert found == (config if "--checkpoint" in arguments else replace(config, checkpoint="auto"))


def test_options_of_the_environment_count(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    expected = BackboneConfig(name="test_resnet", weights="none", size=48)
    assert job_of("extract").config.backbone == expected


@pytest.mark.parametrize("arguments", [("--batch-size", "0"), ("--grid", "0"), ("--size", "0"), ("--fit", "big")])
def test_settings_that_cannot_work_are_refused_before_anything_is_read(arguments):
    with pytest.raises(ConfigError, match=arguments[0]):
        job_of("extract", *arguments)


def test_layers_are_those_of_the_network_with_their_maps(capfd):
    maps = described_layers(BackboneConfig(name="test_resnet", size=64))
    found = run(capfd, "layers", "test_resnet", "--size", "64")["layers"]
    assert found == [
        {"layer": name, "channels": channels, "height": height, "width": width}
        for name, (channels, height, width) in maps.items()
    ]


@pytest.mark.slow  # it runs a network
def test_new_images_are_counted_once(tiny, tmp_path, monkeypatch, capfd):
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    arguments = ("extract", "--data", str(tiny), "--work", str(tmp_path), "--subject", "2", "--layers", "pooled")
    for n_new in (30, 0):
        (store,) = run(capfd, *arguments)["stores"]
        assert (store["subject"], store["images"], store["new"]) == ("subj02", 30, n_new)
        assert Path(store["path"]).parent == Workdir(tmp_path).features
