"""What is read of a network is what its modules say, layer by layer, and the pooled vector is its own output."""

import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from featcache.backbone.network import TorchBackbone, described_layers, load_backbone
from featcache.backbone.taps import choose_taps, layer_names, map_shapes
from featcache.config import BackboneConfig, LayerConfig, fingerprint
from featcache.errors import BackboneError, ConfigError

NETWORKS = {"test_resnet": 96, "test_convnext": 96, "test_efficientnet": 96, "test_nfnet": 96, "test_vit": None}
NETWORKS |= {"test_vit3": None}  # transformers take one size; this one has registers and no class token
POOLS = {"avg": functional.adaptive_avg_pool2d, "max": functional.adaptive_max_pool2d}
RESNET = ("act1", "layer1", "layer2", "layer3", "layer4")


def network(name: str, size: int | None = 96) -> TorchBackbone:
    return load_backbone(BackboneConfig(name=name, weights="none", size=size))


def pictures(backbone: TorchBackbone, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *backbone.transform_settings["input_size"], generator=torch.Generator().manual_seed(0))


def hooked(model: nn.Module, images: torch.Tensor, layers) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The network's own output, and what each module gave on the way, by hooks of torch alone."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.clone()}))
        for name in layers
    ]
    with torch.no_grad():
        output = model(images)
    for hook in hooks:
        hook.remove()
    return output, seen


def as_map(values: torch.Tensor, n_prefix: int) -> torch.Tensor:
    """(n_images, n_channels, height, width) of what a convolution or a transformer's block gives."""
    if values.ndim == 4:
        return values
    places = values[:, n_prefix:].transpose(1, 2)
    side = round(places.shape[-1] ** 0.5)
    return places.reshape(*places.shape[:2], side, side)


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(("name", "size"), NETWORKS.items())
def test_rows_are_what_the_modules_give_pooled_to_the_grid(name, size, pool):
    backbone = network(name, size)
    images, taps = pictures(backbone), backbone.taps(LayerConfig(layers=("all",), grid="2", pool=pool))
    output, seen = hooked(backbone.model, images, taps.grids)
    with torch.no_grad():
        rows = backbone.read(images, taps)
    torch.testing.assert_close(rows["pooled"], output)
    assert len(taps.grids) == len(layer_names(backbone.model))
    for layer, values in seen.items():
        expected = POOLS[pool](as_map(values, getattr(backbone.model, "num_prefix_tokens", 0)), 2)
        torch.testing.assert_close(rows[layer], expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize(("name", "size"), NETWORKS.items())
def test_native_is_every_place_and_auto_at_most_7(name, size):
    backbone = network(name, size)
    images = pictures(backbone)
    for grid, most in (("native", 1000), ("auto", 7)):
        taps = backbone.taps(LayerConfig(layers=("all",), grid=grid))
        _, seen = hooked(backbone.model, images, taps.grids)
        with torch.no_grad():
            rows = backbone.read(images, taps)
        for layer, values in seen.items():
            whole = as_map(values, getattr(backbone.model, "num_prefix_tokens", 0))
            sides = min(whole.shape[2], most), min(whole.shape[3], most)
            expected = functional.adaptive_avg_pool2d(whole, sides).permute(0, 2, 3, 1)
            torch.testing.assert_close(rows[layer], expected)


def test_the_class_token_is_an_array_of_its_own_before_its_layer():
    backbone = network("test_vit", None)
    images, taps = pictures(backbone), backbone.taps(LayerConfig(layers=("1", "-1")))
    _, seen = hooked(backbone.model, images, taps.grids)
    with torch.no_grad():
        rows = backbone.read(images, taps)
    assert list(rows) == ["blocks.1.cls", "blocks.1", "blocks.5.cls", "blocks.5"]
    for layer, values in seen.items():
        torch.testing.assert_close(rows[f"{layer}.cls"], values[:, 0])


def test_registers_are_neither_places_nor_a_class_token():
    backbone = network("test_vit3", None)
    model = backbone.model
    assert model.num_reg_tokens == model.num_prefix_tokens > 0
    shapes = backbone.shapes(backbone.taps(LayerConfig(layers=("all",), grid="native")))
    assert not any(name.endswith(".cls") for name in shapes)
    assert {shape for name, shape in shapes.items() if name != "pooled"} == {(10, 10, model.embed_dim)}


def test_a_class_token_before_registers_is_told_from_them():
    with torch.random.fork_rng():
        model = timm.create_model("test_vit", reg_tokens=2).eval()
    images = torch.randn(2, 3, 160, 160)
    taps = choose_taps(model, LayerConfig(layers=("0",), grid="native"), (3, 160, 160))
    _, seen = hooked(model, images, taps.grids)
    with torch.no_grad():
        rows = taps.read(model, images)
    torch.testing.assert_close(rows["blocks.0.cls"], seen["blocks.0"][:, 0])
    torch.testing.assert_close(rows["blocks.0"].flatten(1, 2), seen["blocks.0"][:, 3:])


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("test_vit", {"class_token": True, "reg_tokens": 0}),
        ("test_vit", {"class_token": True, "reg_tokens": 2}),
        ("test_vit", {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}),
        ("test_vit", {"class_token": True, "reg_tokens": 2, "no_embed_class": True}),
        ("vit_tiny_patch16_dinov3_qkvb", {"class_token": True, "num_reg_tokens": 1, "img_size": 64}),
        ("vit_tiny_patch16_dinov3_qkvb", {"class_token": False, "num_reg_tokens": 3, "img_size": 64}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
        ("naflexvit_base_patch16_gap", {"embed_dim": 48, "num_heads": 3, "class_token": False, "reg_tokens": 2}),
        ("naflexvit_base_patch16_gap", {"embed_dim": 48, "num_heads": 3, "class_token": True, "reg_tokens": 2}),
    ],
)
def test_a_class_token_is_the_one_that_the_network_has_under_that_name(name, tokens):
    """The token is found by its parameter: tokens that change with it before any block mixes them."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = timm.create_model(name, depth=1, **tokens).eval()
    images = torch.randn(2, 3, 64, 64) if name != "test_vit" else torch.randn(2, 3, 160, 160)
    coming, rows = [], {}
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: coming.append(inputs[0].clone()))

    def read():
        taps = choose_taps(model, LayerConfig(layers=("0",), grid="native"), tuple(images.shape[1:]))
        with torch.inference_mode():
            rows.update(taps.read(model, images))
        return coming[-1]

    before = read()
    moved = {}
    for key, parameter in model.named_parameters():
        if key.endswith("_token"):
            parameter.data += 1
            moved[key.rpartition(".")[2]] = (read() - before).abs().amax((0, 2)).nonzero().flatten().tolist()
            parameter.data -= 1
    read()
    _, seen = hooked(model, images, ("blocks.0",))
    assert ("blocks.0.cls" in rows) == ("cls_token" in moved)
    if "cls_token" in moved:
        (place,) = moved["cls_token"]
        torch.testing.assert_close(rows["blocks.0.cls"], seen["blocks.0"][:, place])
    without_place = {place for places in moved.values() for place in places}
    places = [place for place in range(before.shape[1]) if place not in without_place]
    torch.testing.assert_close(rows["blocks.0"].flatten(1, 2), seen["blocks.0"][:, places])


def test_a_transformer_without_any_prefix_tokens_is_read_too():
    backbone = network("test_vit_relpos", None)
    images, taps = pictures(backbone), backbone.taps(LayerConfig(layers=("all",), grid="native"))
    output, seen = hooked(backbone.model, images, taps.grids)
    with torch.no_grad():
        rows = backbone.read(images, taps)
    torch.testing.assert_close(rows["pooled"], output)
    for layer, values in seen.items():
        torch.testing.assert_close(rows[layer].flatten(1, 2), values)


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        (("layer3", "act1"), ("act1", "layer3")),
        (("-1", "0", "pooled"), ("pooled", "act1", "layer4")),
        (("1", "layer1", "-4"), ("layer1",)),
        (("all",), ("pooled", *RESNET)),
        (("auto",), ("pooled", *RESNET)),
        (("pooled",), ("pooled",)),
        (("pooled", "pooled"), ("pooled",)),
    ],
)
def test_layers_are_in_the_order_of_the_network_each_once(wanted, layers):
    taps = network("test_resnet").taps(LayerConfig(layers=wanted))
    assert taps.layers == layers and tuple(taps.grids) == tuple(name for name in layers if name != "pooled")


def test_auto_takes_at_most_six_layers_of_a_deep_network_evenly_and_the_last():
    layers = network("test_vit3", None).taps(LayerConfig()).layers
    assert layers == ("pooled", "blocks.0", "blocks.2", "blocks.4", "blocks.6", "blocks.8")


@pytest.mark.parametrize("wanted", ["layer9", "5", "-6", "", "1.5", "Layer1", "--1", "²"])
def test_a_layer_that_is_not_there_lists_those_that_are(wanted):
    backbone = network("test_resnet")
    with pytest.raises(ConfigError) as error:
        backbone.taps(LayerConfig(layers=("layer1", wanted)))
    assert f"auto, all, pooled, {', '.join(RESNET)}, or numbers from 0 to 4; found {wanted!r}" in str(error.value)


def test_a_grid_larger_than_a_layers_map_names_the_layer_and_its_map():
    backbone = network("test_resnet")
    assert backbone.taps(LayerConfig(layers=("layer3",), grid="6")).grids == {"layer3": (6, 6)}
    with pytest.raises(ConfigError, match=r"found 6 x 6 for layer4, whose map is 3 x 3; use a smaller grid"):
        backbone.taps(LayerConfig(layers=("all",), grid="6"))


def test_maps_need_not_be_square():
    model = network("test_resnet").model
    size = (3, 64, 160)
    assert map_shapes(model, size)["layer4"] == (96, 2, 5) and map_shapes(model, size)["layer2"] == (48, 8, 20)
    images = torch.randn(2, *size)
    _, seen = hooked(model, images, RESNET)
    for grid, sides in (("auto", (7, 7)), ("native", (8, 20)), ("3", (3, 3))):
        taps = choose_taps(model, LayerConfig(layers=("layer2",), grid=grid), size)
        rows = taps.read(model, images)["layer2"]
        assert tuple(rows.shape[1:3]) == sides
        expected = functional.adaptive_avg_pool2d(seen["layer2"], sides).permute(0, 2, 3, 1)
        torch.testing.assert_close(rows, expected)
    assert choose_taps(model, LayerConfig(layers=("layer4",)), size).grids == {"layer4": (2, 5)}
    with pytest.raises(ConfigError, match="map is 2 x 5"):
        choose_taps(model, LayerConfig(layers=("layer4",), grid="3"), size)


def test_the_key_of_the_pooled_layer_alone_is_what_older_caches_have():
    for config in (LayerConfig(layers=("pooled",)), LayerConfig(layers=("pooled",), grid="3", pool="max")):
        assert network("test_resnet").taps(config).key() == {"layers": ["pooled"]}


def test_keys_tell_layers_grids_and_pools_apart_and_nothing_else():
    backbone = network("test_resnet")

    def key(layers, grid="auto", pool="avg"):
        return fingerprint(backbone.taps(LayerConfig(layers=layers, grid=grid, pool=pool)).key())

    different = [
        key(("all",)),
        key(("all",), "2"),
        key(("all",), "native"),
        key(("all",), "2", "max"),
        key(("layer1",)),
        key(("layer1", "pooled")),
    ]
    assert len(set(different)) == len(different)
    assert key(("auto",)) == key(("all",)) == key(("pooled", "0", "1", "2", "3", "-1"))
    assert key(("layer4",), "auto") == key(("layer4",), "native") == key(("layer4",), "3")  # a map of 3 x 3


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 96), ("test_vit", None), ("test_vit", 64)])
def test_described_layers_are_those_of_the_real_network(name, size):
    backbone = network(name, size)
    shapes = backbone.shapes(backbone.taps(LayerConfig(layers=("all",), grid="native")))
    described = described_layers(BackboneConfig(name=name, weights="hub", size=size))
    assert list(described) == layer_names(backbone.model)
    for layer, (channels, height, width) in described.items():
        assert shapes[layer] == (height, width, channels)


def test_layers_are_described_at_the_size_of_the_weights_where_none_is_asked_for():
    backbone = network("test_resnet", None)
    assert described_layers(BackboneConfig(name="test_resnet")) == map_shapes(
        backbone.model, backbone.transform_settings["input_size"]
    )


def test_shapes_are_those_of_rows():
    backbone = network("test_vit", None)
    taps = backbone.taps(LayerConfig(layers=("auto",), grid="3"))
    with torch.no_grad():
        rows = backbone.read(pictures(backbone, 3), taps)
    assert backbone.shapes(taps) == {name: tuple(values.shape[1:]) for name, values in rows.items()}


def test_one_layer_alone_is_what_it_is_among_all():
    backbone = network("test_convnext")
    images = pictures(backbone)
    with torch.no_grad():
        whole = backbone.read(images, backbone.taps(LayerConfig(layers=("all",))))
        for name, values in whole.items():
            (alone,) = backbone.read(images, backbone.taps(LayerConfig(layers=(name,)))).values()
            np.testing.assert_allclose(alone, values, rtol=1e-5, atol=1e-6)


def test_a_network_whose_layers_timm_cannot_read_names_the_way_out():
    class Plain(nn.Module):
        pass

    with pytest.raises(BackboneError, match="found Plain, which has none; use --layers pooled, or another backbone"):
        layer_names(Plain())


@pytest.mark.parametrize("grid", ["0", "-1", "2.5", "", "7x7", "Native"])
def test_a_grid_that_is_none_is_refused(grid):
    with pytest.raises(ConfigError, match="--grid: expected auto, native or a number from 1"):
        LayerConfig(grid=grid)


def test_a_pool_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="--pool: expected one of avg, max; found 'median'"):
        LayerConfig(pool="median")


def test_a_layer_without_a_name_is_the_stem():
    """timm names no module for the first map of a TResNet, which is what its stages begin from."""
    model = timm.create_model("tresnet_m", num_classes=0).eval()
    taps = choose_taps(model, LayerConfig(layers=("all",), grid="native"), (3, 64, 64))
    assert taps.layers[:3] == ("pooled", "stem", "body.layer1") and "" not in taps.layers
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        rows = taps.read(model, images)
        expected = model.forward_intermediates(images, indices=[0], intermediates_only=True)[0]
    torch.testing.assert_close(rows["stem"], expected.permute(0, 2, 3, 1))
