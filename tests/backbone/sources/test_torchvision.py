"""A network of torchvision reads images as torchvision itself does."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from featcache.backbone.network import described_layers, load_backbone
from featcache.backbone.outline import outline
from featcache.backbone.sources.torchvision import _crop_pct
from featcache.backbone.weights import RANDOM_SEED
from featcache.config import BackboneConfig, LayerConfig
from featcache.errors import BackboneError

RESNET = BackboneConfig(name="torchvision:resnet18", weights="none")


def picture(width: int = 300, height: int = 260) -> Image.Image:
    torch.manual_seed(0)
    return Image.fromarray(torch.randint(0, 255, (height, width, 3), dtype=torch.uint8).numpy())


def reference(name: str):
    """torchvision's own network with the same random weights, and its own transform."""
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        network = models.get_model(name, weights=None).eval()
    return network, models.get_model_weights(name).DEFAULT.transforms()


def test_features_of_resnet18_are_those_of_its_own_forward_pass():
    backbone, (network, transform) = load_backbone(RESNET), reference("resnet18")
    image, seen = transform(picture())[None], {}
    torch.testing.assert_close(backbone.transform(picture())[None], image, rtol=0, atol=1e-6)
    for name in ("layer1", "layer2", "layer3", "layer4", "avgpool"):
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out + 0}))
    taps = backbone.taps(LayerConfig(layers=("auto",), grid="native"))
    with torch.no_grad():
        network(image)
        rows = backbone.read(backbone.transform(picture())[None], taps)
    assert list(rows) == ["pooled", "layer1", "layer2", "layer3", "layer4"]
    torch.testing.assert_close(rows["pooled"], seen["avgpool"].flatten(1), rtol=1e-4, atol=1e-4)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        torch.testing.assert_close(rows[name], seen[name].permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    assert backbone.optimised(taps).fused


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "swin_v2_t", "efficientnet_b0", "convnext_tiny"])
def test_the_transform_is_that_of_its_weights(name):
    from timm.data.transforms_factory import create_transform

    from featcache.backbone.network import settings_of
    from featcache.backbone.sources.torchvision import outline as of_torchvision

    config = BackboneConfig(name=f"torchvision:{name}", weights="none")
    settings = settings_of(of_torchvision(config, "meta"), config)
    ours = create_transform(**settings, is_training=False)(picture(500, 411))
    theirs = models.get_model_weights(name).DEFAULT.transforms()(picture(500, 411))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_timm_resizes_to_exactly_the_size_of_torchvision():
    for crop in range(200, 520, 4):
        for resize in range(crop, crop + 60):
            assert int(crop / _crop_pct(crop, resize)) == resize


def test_layers_of_a_transformer_are_its_blocks_with_a_class_token():
    layers = described_layers(BackboneConfig(name="torchvision:vit_b_16", weights="none"))
    assert list(layers) == [f"encoder.layers.encoder_layer_{k}" for k in range(12)]
    assert set(layers.values()) == {(768, 14, 14)}
    shapes = outline(BackboneConfig(name="torchvision:vit_b_16"), LayerConfig(layers=("-1", "pooled"))).shapes
    name = "encoder.layers.encoder_layer_11"
    assert shapes == {"pooled": (768,), f"{name}.cls": (768,), name: (7, 7, 768)}


def test_an_outline_is_that_of_the_network():
    backbone = load_backbone(RESNET)
    found = outline(RESNET, LayerConfig())
    assert found.shapes == backbone.shapes(backbone.taps(LayerConfig())) and found.size == 224


def test_a_file_with_or_without_the_classifier_is_read(tmp_path):
    with torch.random.fork_rng():
        network = models.resnet18()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(BackboneConfig(name="torchvision:resnet18", weights=str(tmp_path / "w.safetensors")))
    torch.testing.assert_close(backbone.model.layer4[1].conv2.weight, network.layer4[1].conv2.weight.detach())
    bare = {name: tensor.contiguous() for name, tensor in backbone.model.state_dict().items()}
    save_file(bare, tmp_path / "bare.safetensors")
    again = load_backbone(BackboneConfig(name="torchvision:resnet18", weights=str(tmp_path / "bare.safetensors")))
    assert again.digest == backbone.digest != load_backbone(RESNET).digest
    with pytest.raises(BackboneError, match=r"expected weights of torchvision-resnet50; found others in .*bare"):
        load_backbone(BackboneConfig(name="torchvision:resnet50", weights=str(tmp_path / "bare.safetensors")))


def test_weights_of_an_earlier_download_are_taken_and_none_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    hub = BackboneConfig(name="torchvision:resnet18")
    with pytest.raises(
        BackboneError, match=r"found no .*checkpoints/resnet18-\w+.pth \(no network\); use --weights"
    ) as e:
        load_backbone(hub)
    assert "\n" not in str(e.value)
    with torch.random.fork_rng():
        network = models.resnet18()
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    torch.testing.assert_close(load_backbone(hub).model.conv1.weight, network.conv1.weight.detach())


def test_an_unknown_name_lists_its_neighbours():
    with pytest.raises(BackboneError, match=r"found 'torchvision:resnet'; did you mean torchvision:resnet"):
        load_backbone(BackboneConfig(name="torchvision:resnet"))
    with pytest.raises(BackboneError, match="--weights: expected hub, none or a weights file; found no file packaged"):
        load_backbone(BackboneConfig(name="torchvision:resnet18", weights="packaged"))
