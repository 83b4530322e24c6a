"""The part of an image that a network sees, against what timm makes of images whose colours are coordinates."""

import math

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data.transforms_factory import create_transform

from featcache.backbone.extent import TIMM_SETTINGS, WHOLE, extent_of, fit_of
from featcache.backbone.network import load_backbone
from featcache.config import FITS, BackboneConfig

WEIGHTS = {"interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.875, "crop_mode": "center"}
SHAPES = [(425, 425), (640, 480), (300, 500), (97, 61), (40, 40), (501, 500)]


def transform_of(fit, rows=224, columns=224, **weights):
    return {"input_size": [3, rows, columns], **WEIGHTS, **weights, **TIMM_SETTINGS[fit]}


def seen(transform, width, height):
    """(rows, columns, 3) that timm makes of an image whose red is its x, green its y, and whose blue is full."""
    image = np.full((height, width, 3), 255.0)
    image[..., 0] = 255 * (np.arange(width) + 0.5) / width
    image[..., 1] = 255 * ((np.arange(height) + 0.5) / height)[:, None]
    apply = create_transform(**transform, is_training=False, use_prefetcher=True)
    return np.asarray(apply(Image.fromarray(np.round(image).astype(np.uint8)))).transpose(1, 2, 0)


def recovered(values, inside):
    """First and last coordinate of a side, from the line through the coordinates of its pixels."""
    at = (np.arange(len(values)) + 0.5) / len(values)
    middle = inside & (values > 0.1 * 255) & (values < 0.9 * 255)  # resizing bends the coordinates at the ends
    slope, start = np.polyfit(at[middle], values[middle] / 255, 1)
    return start, start + slope


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "transform",
    [
        *(transform_of(fit) for fit in FITS),
        transform_of("crop", crop_pct=0.9),
        transform_of("crop", crop_pct=0.95, rows=48, columns=48),
        transform_of("crop", crop_pct=1.0, interpolation="bicubic"),
        *(transform_of(fit, rows=96, columns=160) for fit in FITS),
        *(transform_of(fit, rows=160, columns=97) for fit in FITS),
        transform_of("crop", crop_mode="squash", crop_pct=0.9),
        transform_of("crop", crop_mode="border", crop_pct=0.9),
    ],
    ids=lambda t: f"{t['crop_mode']} {t['crop_pct']} {t['input_size'][1]}x{t['input_size'][2]}",
)
def test_an_extent_is_where_the_pixels_of_the_input_come_from(transform, shape):
    pixels, extent = seen(transform, *shape), extent_of(transform, *shape)
    inside = pixels[..., 2] > 200  # padding is grey
    left, right = recovered(pixels[pixels.shape[0] // 2, :, 0].astype(float), inside[pixels.shape[0] // 2])
    top, bottom = recovered(pixels[:, pixels.shape[1] // 2, 1].astype(float), inside[:, pixels.shape[1] // 2])
    np.testing.assert_allclose(
        (extent.left, extent.top, extent.right, extent.bottom), (left, top, right, bottom), atol=0.006
    )
    assert extent.width == pytest.approx(extent.right - extent.left) and extent.height == extent.bottom - extent.top


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_is_the_whole_image_and_pad_is_more_on_one_axis(shape):
    assert extent_of(transform_of("whole"), *shape) == WHOLE
    width, height = shape
    padded, longer = extent_of(transform_of("pad"), *shape), max(shape)
    assert (padded.width, padded.height) == pytest.approx((longer / width, longer / height), rel=0.01)
    assert padded.left + padded.right == pytest.approx(1, abs=0.02)
    assert padded.top + padded.bottom == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("shape", [(425, 425), (640, 480)])
def test_pad_fills_with_the_mean_colour_and_nothing_else_does(shape):
    mean = [0.485, 0.456, 0.406]
    for fit in FITS:
        pixels = seen(transform_of(fit, mean=mean), *shape)
        filled = (pixels == [round(255 * value) for value in mean]).all(-1)
        rows = 224 - math.floor(224 * shape[1] / shape[0]) if fit == "pad" else 0
        assert filled.all(1).sum() == rows and (filled.sum() - filled.all(1).sum() * 224) <= 2


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "tf_efficientnet_lite0"])
def test_a_fit_changes_how_an_image_is_cropped_and_nothing_else(name, fit):
    own = load_backbone(BackboneConfig(name=name, weights="none", size=64)).transform_settings
    found = load_backbone(BackboneConfig(name=name, weights="none", size=64, fit=fit)).transform_settings
    assert found == dict(own) | dict(TIMM_SETTINGS[fit]) and fit_of(found) == fit
    assert list(found) == list(own)  # whose order is that of keys


@pytest.mark.parametrize(
    ("name", "first", "lost"),
    [
        ("convnext_xlarge", 0.0625, 0.23),
        ("tf_efficientnet_lite0", 0.0625, 0.23),
        ("vit_small_patch16_224", 0.05, 0.19),
        ("resnet152d", 0.025, 0.10),
    ],
)
def test_what_crop_leaves_out_is_what_docs_layers_says(name, first, lost):
    weights = timm.get_pretrained_cfg(name).to_dict()
    extent = extent_of(
        weights | {"input_size": [3, 384, 384], "crop_mode": weights.get("crop_mode", "center")}, 425, 425
    )
    assert (extent.left, 1 - extent.right) == pytest.approx((first, first), abs=0.002)
    assert 1 - extent.width * extent.height == pytest.approx(lost, abs=0.006)
