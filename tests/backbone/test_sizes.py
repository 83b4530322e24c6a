"""Whatever lists the layers of a network says of a size what reading them says, in one line."""

import pytest
import torch
from torch import nn

from featcache.backbone.network import described_layers, load_backbone
from featcache.backbone.outline import outline
from featcache.backbone.sizes import unread_pixels, without_numbers
from featcache.cache.sources import load_source
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.errors import BackboneError

ALL = LayerConfig(layers=("all",), grid="native")


def said(name, size):
    """What `layers`, a plan and `extract` say of a network at a size: a refusal, or the shapes of maps."""
    config = BackboneConfig(name=name, weights="none", size=size)

    def listed():
        return {
            layer: (height, width, channels) for layer, (channels, height, width) in described_layers(config).items()
        }

    def planned():
        return maps(outline(config, ALL).shapes)

    def loaded():
        return maps(
            {
                n: row.shape
                for n, row in load_source(None, ExtractConfig(backbone=config, layers=ALL), "cpu").rows.items()
            }
        )

    def maps(shapes):
        return {layer: shape for layer, shape in shapes.items() if layer != "pooled" and not layer.endswith(".cls")}

    for call in (listed, planned, loaded):
        try:
            yield call()
        except BackboneError as error:
            yield str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "refused"),
    [
        ("test_resnet", 100, ""),
        ("test_vit_relpos", 64, ""),
        ("deit_tiny_patch16_224", 100, ""),
        ("test_vit", 100, "--size: expected a size that test_vit can take; found 100 (Input height"),
        ("test_coatnet", 100, "--size: expected a size that test_coatnet can take; found 100 ("),
        ("mvitv2_tiny", 112, "--size: expected a size that mvitv2_tiny can take; found 112 (index"),  # a look-up alone
        ("coat_tiny", 224, "--layers: expected layers of coat_tiny that can be read at 224 px; found zip"),
        ("qwen3_vit_88m_enc", 224, "--backbone: expected a network that gives one vector of each image; found qwen3"),
    ],
)
def test_listing_planning_and_reading_agree(name, size, refused):
    listed, planned, loaded = said(name, size)
    assert listed == planned == loaded
    assert isinstance(loaded, str) == bool(refused) and (not refused or loaded.startswith(refused))
    assert "\n" not in str(loaded)


class LooksUp(nn.Module):
    """A table of four numbers, which is asked for the one at the width of the image."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.arange(4.0))

    def forward(self, images):
        return self.table[torch.full((1,), images.shape[-1], device=self.table.device)]


def test_a_look_up_is_tried_with_numbers_and_nothing_else_is():
    devices = []

    def look_up(device):
        devices.append(device)
        with torch.device(device):
            try:
                return len(LooksUp()(torch.zeros(1, 3, 4, 4)))
            except IndexError as error:
                raise BackboneError(expected="a size", found=error, remedy="choose another") from error

    assert without_numbers(look_up, own_size=True) == 1 and devices == ["meta"]  # which takes any place
    with pytest.raises(BackboneError, match="index 4 is out of bounds"):
        without_numbers(look_up, own_size=False)
    devices.clear()

    def add(device):
        devices.append(device)
        return torch.ones(2, device=device) + 1

    assert without_numbers(add, own_size=False).is_meta and devices == ["meta"]


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (nn.Conv2d(3, 4, 16, 16), (3, 100, 112)),  # patches
        (nn.Conv2d(3, 4, 3, 2), (3, 64, 65)),
        (nn.Conv2d(3, 4, 7, 2, 3), (3, 100, 100)),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 4, 4)), (3, 30, 32)),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)), (3, 8, 8)),
    ],
)
def test_pixels_that_nothing_depends_on_are_counted(network, size):
    """Against outputs on images in which one row or column after the other is changed."""
    image = torch.randn(1, *size)

    def matters(*place):
        changed = image.clone()
        changed[place] += 1
        return not torch.equal(network(changed), network(image))

    with torch.no_grad():
        rows = [matters(..., row, slice(None)) for row in range(size[1])]
        columns = [matters(..., slice(None), column) for column in range(size[2])]
    expected = tuple(len(seen) - 1 - max(k for k, one in enumerate(seen) if one) for seen in (rows, columns))
    assert unread_pixels(network, size) == expected


@pytest.mark.parametrize(("size", "left_out"), [(100, 4), (112, 0)])
def test_a_transformer_says_which_pixels_it_leaves_out(size, left_out):
    reads = load_backbone(BackboneConfig(name="deit_tiny_patch16_224", weights="none", size=size)).reads
    said = "does not read the last 4 rows and 4 columns of pixels, and reads all of --size 96"
    assert (said in reads) == bool(left_out) and f"images of {size} px" in reads
