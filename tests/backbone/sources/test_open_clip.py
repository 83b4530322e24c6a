"""The image network of open_clip, where it is installed; else one line that says what to install."""

import pytest
import torch
from PIL import Image

from featcache.backbone.network import load_backbone
from featcache.backbone.sources import open_clip as source
from featcache.config import BackboneConfig, LayerConfig
from featcache.errors import BackboneError


def test_without_the_package_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"found none; install it \(pip install open_clip_torch\), or choose"):
        load_backbone(BackboneConfig(name="open_clip:ViT-B-32/openai"))


@pytest.mark.filterwarnings("ignore")  # open_clip's own
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-S-32-alt", "RN50"])
def test_features_are_what_open_clip_gives(name):
    open_clip = pytest.importorskip("open_clip")
    backbone = load_backbone(BackboneConfig(name=f"open_clip:{name}", weights="none"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=None)
    image = Image.effect_noise((300, 260), 50).convert("RGB")
    images = preprocess(image)[None]
    torch.testing.assert_close(backbone.transform(image)[None], images, rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = model.eval().encode_image(images)
        rows = backbone.read(images, backbone.taps(LayerConfig()))
    torch.testing.assert_close(rows["pooled"], expected, rtol=1e-3, atol=1e-4)
    layers = [layer for layer in rows if not layer.endswith(".cls") and layer != "pooled"]
    blocks = name.startswith("ViT")
    assert all(layer.startswith("transformer.resblocks" if blocks else "layer") for layer in layers) and len(layers) > 3
    assert blocks == any(layer.endswith(".cls") for layer in rows)


@pytest.mark.filterwarnings("ignore")
def test_names_and_tags_that_it_lacks():
    pytest.importorskip("open_clip")
    with pytest.raises(BackboneError, match="expected a model of open_clip; found 'ViT-Z'"):
        load_backbone(BackboneConfig(name="open_clip:ViT-Z/openai"))
    with pytest.raises(BackboneError, match=r"with a tag of its weights, one of .*openai.*; found no tag"):
        load_backbone(BackboneConfig(name="open_clip:ViT-B-32"))
