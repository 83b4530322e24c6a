"""Outlines have the shapes and sizes of the network itself, which they never build."""

import math

import pytest
import torch

from featcache.backbone.network import load_backbone
from featcache.backbone.outline import outline
from featcache.config import BackboneConfig, LayerConfig
from featcache.errors import BackboneError, ConfigError


@pytest.mark.slow
@pytest.mark.parametrize("layers", [("pooled",), ("auto",), ("all",)])
@pytest.mark.parametrize(("name", "size"), [("test_resnet", 48), ("test_vit", 32), ("test_efficientnet", 64)])
def test_shapes_and_weights_are_those_of_the_network(name, size, layers):
    config = BackboneConfig(name=name, weights="none", size=size)
    backbone = load_backbone(config)
    taps = backbone.taps(LayerConfig(layers=layers))
    found = outline(config, LayerConfig(layers=layers))
    assert found.shapes == backbone.shapes(taps)
    assert found.n_features == sum(map(math.prod, found.shapes.values()))
    assert found.weights == sum(t.numel() * t.element_size() for t in backbone.model.state_dict().values())
    assert found.pixels == 3 * size * size


def test_outputs_of_layers_are_counted_as_they_come(monkeypatch: pytest.MonkeyPatch):
    """Against hooks on a real forward pass, whose tensors say their own bytes."""
    config = BackboneConfig(name="test_resnet", weights="none", size=48)
    backbone = load_backbone(config)
    sizes = []
    for layer in backbone.model.modules():
        if not any(layer.children()):
            layer.register_forward_hook(lambda _, inputs, output: sizes.append((inputs[0].nbytes, output.nbytes)))
    with torch.inference_mode():
        backbone.model(torch.zeros(1, 3, 48, 48))
    found = outline(config, LayerConfig(layers=("pooled",)))
    assert found.kept == sum(after for _, after in sizes) and found.widest == max(map(sum, sizes))
    half = outline(config, LayerConfig(layers=("pooled",)), "bfloat16")
    assert half.kept == found.kept / 2 and half.weights == found.weights


@pytest.mark.slow
def test_a_large_network_takes_no_memory():
    found = outline(BackboneConfig(name="convnext_xlarge"), LayerConfig())
    assert found.weights > 1.3e9 and all(shape for shape in found.shapes.values())


def test_what_a_network_cannot_do_is_refused_as_extract_does():
    with pytest.raises(BackboneError, match=r"--size: expected a size that test_vit can take; found 17"):
        outline(BackboneConfig(name="test_vit", size=17), LayerConfig())
    with pytest.raises(ConfigError, match="--layers: expected auto"):
        outline(BackboneConfig(name="test_resnet"), LayerConfig(layers=("nothing",)))
    with pytest.raises(BackboneError, match="did you mean"):
        outline(BackboneConfig(name="test_resnett"), LayerConfig())
