"""Rows of a pass: as the network gives them, in the types of a store, and refused where float16 cannot hold them."""

import numpy as np
import pytest
import torch

from featcache.backbone.network import TorchBackbone, load_backbone
from featcache.cache.forward import BeyondFloat16Error, as_stored, rows_of, start_rows
from featcache.config import BackboneConfig, LayerConfig

DTYPES = {"pooled": "float32", "layer2": "float16", "layer4": "float16"}


@pytest.fixture(scope="module")
def backbone() -> TorchBackbone:
    return load_backbone(BackboneConfig(name="test_resnet", weights="none", size=64))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def started(backbone, pixels, dtypes=DTYPES):
    taps = backbone.taps(LayerConfig(layers=tuple(dtypes), grid="2"))
    return start_rows(backbone, pixels, [(taps, dtypes)], "float32", "cpu")


def test_passes_that_were_started_together_give_each_its_own_rows(backbone, pixels):
    passes = [started(backbone, one[None]) for one in pixels]
    for one, arrive in reversed(list(zip(pixels, passes, strict=True))):
        (rows,) = arrive()
        with torch.inference_mode():
            expected = backbone.read(
                backbone.normalise(one[None]), backbone.taps(LayerConfig(layers=tuple(DTYPES), grid="2"))
            )
        assert list(rows) == list(DTYPES)
        for layer, values in expected.items():
            assert torch.equal(rows[layer], values.to(getattr(torch, DTYPES[layer])))


def test_several_taps_are_read_in_one_pass(backbone, pixels):
    choices = [("pooled", "layer2"), ("layer4",)]
    wanted = [(backbone.taps(LayerConfig(layers=names, grid="2")), DTYPES) for names in choices]
    together = rows_of(backbone, pixels, wanted, "float32", "cpu")
    for names, rows, each in zip(choices, together, wanted, strict=True):
        (alone,) = rows_of(backbone, pixels, [each], "float32", "cpu")
        assert tuple(rows) == names and all(torch.equal(rows[layer], alone[layer]) for layer in names)


HELD, BEYOND, NO_NUMBERS = (65_504.0, -65_519.9), (65_520.0, -65_520.0, 1e30), (np.inf, -np.inf, np.nan)


@pytest.mark.parametrize("value", HELD + BEYOND + NO_NUMBERS)
def test_what_float16_would_make_infinite_is_refused_and_what_is_no_number_is_left_to_the_store(
    backbone, pixels, monkeypatch, value
):
    honest = TorchBackbone.read

    def reading(self, images, taps):
        rows = honest(self, images, taps)
        rows["layer4"][1, 0, 1, 3] = value
        return rows

    monkeypatch.setattr(TorchBackbone, "read", reading)
    arrive, values = started(backbone, pixels), np.array([[0, value, 1]], dtype=np.float32)
    assert (value in BEYOND) is bool(np.isfinite(value) and torch.tensor(value).half().isinf())  # how torch rounds
    for given in (arrive, lambda: as_stored(values, "layer4", "float16")):
        if value in BEYOND:
            with pytest.raises(BeyondFloat16Error, match="layer4"):
                given()
        else:
            given()
    assert started(backbone, pixels, dict.fromkeys(DTYPES, "float32"))()[0]["layer4"].dtype == torch.float32


def test_rows_of_another_store_are_kept_in_the_type_of_this_one():
    values = np.array([[1.5, -2.25]], dtype=np.float32)
    assert as_stored(values, "a", "float32") is values and as_stored(values, "a", "float16").dtype == np.float16
