"""Networks of timm are as they always were: their keys have nothing of other sources."""

import timm
import torch
from safetensors.torch import save_file

from featcache.backbone.keys import BackboneKey
from featcache.backbone.network import load_backbone
from featcache.backbone.sources.timm import load, outline
from featcache.cache.extract import feature_key
from featcache.cache.sources import load_source
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig, fingerprint
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.image_lists import ImageList

CONFIG = BackboneConfig(name="test_resnet", weights="none", size=48)


def test_the_key_of_a_store_is_that_of_earlier_versions(tiny, tmp_path):
    """Field by field, as work folders have it; its fingerprint is the store's name."""
    subject = open_challenge(tiny).subjects[0]
    config = ExtractConfig(backbone=CONFIG, layers=LayerConfig(layers=("layer2", "pooled")), dtype="float32")
    source, images = load_source(None, config, "cpu"), ImageList.of(subject, tmp_path)
    found = feature_key(source, config, images).to_json()
    images = {name: found[name] for name in ("images", "image_ids", "weights")}
    earlier = {
        "layers": ["pooled", "layer2"],
        "grids": {"layer2": [6, 6]},
        "pool": "avg",
        "kind": "features",
        "subject": "subj01",
        "images": images["images"],
        "image_ids": images["image_ids"],
        "backbone": "test_resnet",
        "weights": load_backbone(CONFIG).digest,
        "timm": timm.__version__,
        "transform": {
            "input_size": [3, 48, 48],
            "interpolation": "bilinear",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "crop_pct": 0.95,
            "crop_mode": "center",
        },
        "dtype": "float32",
        "fold": None,
        "batch_norm": "folded",
    }
    assert list(found.items()) == list(earlier.items()) and fingerprint(found) == fingerprint(earlier)
    assert source.label == "test_resnet"


def test_the_key_of_a_checkpoint_has_no_code():
    key = BackboneKey(name="test_resnet", weights="none", size=48)
    assert key.to_json() == {"name": "test_resnet", "weights": "none", "size": 48}
    other = BackboneKey(name="net.build", weights="own", size=48, code={"source": "0"})
    assert BackboneKey.from_json(other.to_json()) == other


def test_timm_reads_the_layers_with_the_transform_of_the_weights():
    loaded, outlined = load(CONFIG), outline(CONFIG, "meta")
    assert loaded.timm_layers and outlined.timm_layers and loaded.transform == outlined.transform
    assert not loaded.code and next(outlined.model.parameters()).is_meta


def test_the_transform_is_said_with_the_tag_that_it_came_from(tmp_path):
    """One file under a name and under a tag of it: what timm does for each."""
    with torch.random.fork_rng(devices=[]):
        save_file(timm.create_model("resnet18").state_dict(), tmp_path / "w.safetensors")
    bare, tagged = (
        load_backbone(BackboneConfig(name=name, weights=str(tmp_path / "w.safetensors")))
        for name in ("resnet18", "resnet18.tv_in1k")
    )
    assert "crop 0.95, bicubic, mean 0.485 0.456 0.406" in bare.reads and "timm's resnet18.a1_in1k has it" in bare.reads
    assert "crop 0.875, bilinear" in tagged.reads and "timm's resnet18.tv_in1k has it" in tagged.reads
    assert "resnet18.tv_in1k" in bare.other_tags and "--backbone" in bare.other_tags and tagged.other_tags == ""
    assert load_backbone(BackboneConfig(name="resnet18", weights="none")).other_tags == ""
