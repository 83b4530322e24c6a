"""A network of the hub is read from the cache, and one that is not there is one line that names the cache."""

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from featcache.backbone.network import described_layers, load_backbone
from featcache.backbone.outline import outline
from featcache.config import BackboneConfig, LayerConfig
from featcache.errors import BackboneError

NAME = "hf-hub:owner/small"
TRANSFORM = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A network of 7 classes as timm puts one on the hub, in a cache; and no network to reach the hub by."""
    with torch.random.fork_rng():
        model = timm.create_model("test_resnet", num_classes=7).eval()
    settings = {"architecture": "test_resnet", "num_classes": 7}
    settings["pretrained_cfg"] = {**TRANSFORM, "num_classes": 7, "classifier": "fc", "first_conv": "conv1.0"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    def cached(repository, name):
        return str(tmp_path / name) if repository == "owner/small" and (tmp_path / name).exists() else None

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("featcache.backbone.sources.hf_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    return model


def test_features_are_those_of_timms_own_network_with_the_transform_of_the_hub(network):
    backbone, images = load_backbone(BackboneConfig(name=NAME)), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(backbone.pooled(images), expected, rtol=1e-4, atol=1e-5)
    assert backbone.name == "hf-hub-owner-small"
    assert {key: backbone.transform_settings[key] for key in TRANSFORM} == TRANSFORM


def test_its_shapes_are_known_without_its_weights(network, tmp_path):
    (tmp_path / "model.safetensors").unlink()
    config = BackboneConfig(name=NAME, weights="none")
    backbone = load_backbone(config)
    assert outline(config, LayerConfig()).shapes == backbone.shapes(backbone.taps(LayerConfig()))
    assert list(described_layers(config)) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    with pytest.raises(BackboneError, match=r"no model.safetensors of owner/small in the cache .*\(no network\)"):
        load_backbone(BackboneConfig(name=NAME))


def test_weights_of_a_file_go_into_it(network, tmp_path):
    state = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    backbone = load_backbone(BackboneConfig(name=NAME, weights=str(tmp_path / "w.safetensors")))
    torch.testing.assert_close(backbone.model.state_dict()["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])


def test_a_name_that_is_not_in_the_cache_names_it_where_there_is_no_network(network):
    with pytest.raises(BackboneError, match=r"found no config.json of owner/other in the cache") as found:
        load_backbone(BackboneConfig(name="hf-hub:owner/other"))
    assert constants.HF_HUB_CACHE in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"architecture": "bert"}', "{}"])
def test_what_is_no_network_of_timm_is_one_line(network, tmp_path: Path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=r"expected a network of timm .* in owner/small; found .*FILE.py:FUNCTION"):
        load_backbone(BackboneConfig(name=NAME))
