"""A backbone reads images at the size that is asked for, with the transform of its weights."""

import pytest
import torch
from PIL import Image
from torch import nn

from featcache.backbone.network import load_backbone
from featcache.config import BackboneConfig, LayerConfig
from featcache.errors import BackboneError

SMALL = "test_resnet"  # timm keeps tiny members of each family for tests
LITE = [f"tf_efficientnet_lite{n}" for n in range(3)]


def test_a_transformer_takes_another_size():
    backbone = load_backbone(BackboneConfig(name="test_vit", weights="none", size=64))
    assert backbone.pooled(torch.zeros(2, 3, 64, 64)).shape == (2, 64)


def test_size_reaches_the_transform():
    backbone = load_backbone(BackboneConfig(name=SMALL, weights="none", size=96))
    assert backbone.transform(Image.new("RGB", (425, 425))).shape == (3, 96, 96)
    assert backbone.transform_settings["input_size"] == [3, 96, 96]


def test_the_transform_is_the_one_of_the_weights():
    """tf_efficientnet was trained on inputs in [-1, 1], convnext on ImageNet's mean and deviation."""
    grey = Image.new("RGB", (300, 300), (255, 255, 255))
    lite = load_backbone(BackboneConfig(name=LITE[0], weights="none")).transform(grey)
    assert lite.shape == (3, 224, 224) and torch.allclose(lite, torch.ones(()))
    convnext = load_backbone(BackboneConfig(name="test_convnext", weights="none"))
    mean, std = (torch.tensor(convnext.transform_settings[key])[:, None, None] for key in ("mean", "std"))
    assert torch.allclose(convnext.transform(grey), (1 - mean) / std, atol=1e-5)


def framed(width, height, colour):
    """A grey image with a frame of a colour, 1/32 of its longer side."""
    frame = max(width, height) // 32
    image = Image.new("RGB", (width, height), colour)
    image.paste(Image.new("RGB", (width - 2 * frame, height - 2 * frame), (128, 128, 128)), (frame, frame))
    return image


@pytest.mark.parametrize("shape", [(425, 425), (600, 400), (100, 160)])
@pytest.mark.parametrize(("fit", "sees"), [("crop", False), ("whole", True), ("pad", True)])
def test_what_the_border_alone_shows_is_seen_by_whole_and_pad_and_lost_by_crop(fit, sees, shape):
    backbone = load_backbone(BackboneConfig(name=LITE[0], weights="none", fit=fit))
    one, other = (backbone.pixels(framed(*shape, colour)) for colour in ("red", "blue"))
    assert one.shape == (3, 224, 224) and torch.equal(one, other) is not sees
    if sees:  # on all four sides
        differs = (one != other).any(0)
        rows, columns = differs.any(1).nonzero(), differs.any(0).nonzero()
        left, top = (min(1, side / max(shape)) if fit == "pad" else 1 for side in shape)
        for at, part in ((columns, left), (rows, top)):
            assert abs(at.min() - 112 * (1 - part)) <= 1 and abs(at.max() - 223 + 112 * (1 - part)) <= 1


def test_crop_is_the_transform_of_the_weights_in_the_values_and_the_order_of_earlier_keys():
    earlier = {"input_size": [3, 32, 32], "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    earlier |= {"crop_pct": 0.95, "crop_mode": "center"}
    for fit in (None, "crop"):
        found = load_backbone(BackboneConfig(name=SMALL, weights="none", size=32, fit=fit)).transform_settings
        assert list(found.items()) == list(earlier.items())


def test_a_size_that_the_network_cannot_take_is_refused():
    with pytest.raises(BackboneError, match="--size: expected a size that"):
        load_backbone(BackboneConfig(name="test_vit", weights="none", size=70)).taps(LayerConfig())


def test_a_size_refused_while_building_is_one_line():
    with pytest.raises(BackboneError, match="--size: expected a size that xcit_nano_12_p16_224 can take; found 100"):
        load_backbone(BackboneConfig(name="xcit_nano_12_p16_224", weights="none", size=100))


def test_an_optimised_backbone_has_no_batch_norms_and_reads_the_same_to_rounding():
    backbone = load_backbone(BackboneConfig(name=SMALL, weights="none", size=64))
    taps = backbone.taps(LayerConfig(layers=("all",)))
    optimised = backbone.optimised(taps)
    assert optimised.fused and not backbone.fused and optimised.digest == backbone.digest
    assert not any(isinstance(module, nn.BatchNorm2d) for module in optimised.model.modules())
    images = torch.randn(2, 3, 64, 64)
    for before, after in zip(backbone.read(images, taps).values(), optimised.read(images, taps).values(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_backbone_without_batch_norms_is_its_own_optimum():
    backbone = load_backbone(BackboneConfig(name="test_vit", weights="none", size=64))
    assert backbone.optimised(backbone.taps(LayerConfig())) is backbone


def test_a_backbone_stays_as_it_is_where_fusing_would_change_a_layer(monkeypatch):
    other = load_backbone(BackboneConfig(name=SMALL, weights="none", size=64)).model
    next(other.parameters()).mul_(1.001)
    monkeypatch.setattr("featcache.backbone.network.fuse_batch_norms", lambda model: other)
    backbone = load_backbone(BackboneConfig(name=SMALL, weights="none", size=64))
    assert backbone.optimised(backbone.taps(LayerConfig())) is backbone


def test_mean_and_deviation_go_to_a_device_once_and_are_those_of_the_transform(monkeypatch):
    backbone = load_backbone(BackboneConfig(name="test_resnet", weights="none", size=32))
    pixels, made, tensor = torch.full((2, 3, 32, 32), 51, dtype=torch.uint8), [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **more: made.append(more["device"]) or tensor(*args, **more))
    for device in ("cpu", "meta", "cpu", "meta"):
        with torch.inference_mode():
            backbone.normalise(pixels.to(device))
    assert [device.type for device in made] == ["cpu", "cpu", "meta", "meta"]  # the mean and the deviation
    other = backbone.with_transform({**backbone.transform_settings, "mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.4]})
    torch.testing.assert_close(other.normalise(pixels)[1, :, 3, 5], tensor([0.0, -1.0, -1.0]))
    weight = torch.nn.Parameter(torch.ones(()))
    (backbone.normalise(pixels) * weight).sum().backward()  # after a use without gradients, with gradients
    assert weight.grad == backbone.normalise(pixels).sum()


COMPILED = BackboneConfig(name="test_resnet", weights="none", size=64)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile as it reads a network, without what makes machine code of it; the shapes that it was given."""
    honest, shapes = torch.compile, []

    def compile_(function, **options):
        compiled = honest(function, backend="eager", **options)
        return lambda model, images, taps: shapes.append(tuple(images.shape)) or compiled(model, images, taps)

    monkeypatch.setattr(torch, "compile", compile_)
    return shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_backbone_reads_the_same_and_knows_one_shape_of_batches(traced, dtype):
    backbone = load_backbone(COMPILED)
    taps = backbone.taps(LayerConfig(grid="2", layers="pooled,layer2,layer4"))
    compiled = backbone.compiled(taps, 4, dtype)
    assert compiled.is_compiled and not backbone.is_compiled
    images = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        for n in (4, 1, 3):
            expected, found = backbone.read(images[:n], taps), compiled.read(images[:n], taps)
            for layer, rows in expected.items():
                torch.testing.assert_close(found[layer], rows, rtol=1e-4, atol=1e-5)
        assert compiled.pooled(images).shape == (4, 96)
    assert set(traced) == {(4, 3, 64, 64)}


def test_a_network_that_cannot_be_compiled_or_would_read_otherwise_stays_as_it_is(monkeypatch, said):
    backbone = load_backbone(COMPILED)
    taps = backbone.taps(LayerConfig(layers="pooled,layer2"))

    def refuse(*_):
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    assert not backbone.compiled(taps, 2, "float32").is_compiled
    assert said[-1] == "test_resnet: not compiled: no compiler"
    for by, dtype, stays in ((1.001, "float32", False), (1.001, "bfloat16", True), (1.3, "bfloat16", False)):

        def other(function, by=by, **_):
            def run(*args):
                return [{name: rows * by for name, rows in each.items()} for each in function(*args)]

            return run

        monkeypatch.setattr(torch, "compile", other)
        assert backbone.compiled(taps, 2, dtype).is_compiled is stays
        assert stays or "times as far from float32 as without" in said[-1]
