"""A word for a family means networks of it, whatever else is spelled alike."""

import pytest
import timm

from featcache.backbone.suggest import FAMILIES, suggestions
from featcache.backbone.weights import refuse_unknown


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("clip", "vit_base_patch16_clip_224"),
        ("CLIP", "vit_base_patch16_clip_224"),
        ("dino", "vit_base_patch14_dinov2"),
        ("resnet", "resnet50"),
        ("convnext", "convnext_base"),
        ("vit", "vit_base_patch16_224"),
        ("siglip", "vit_base_patch16_siglip_224"),
        ("efficientnet", "efficientnet_b0"),
        ("ViT-B/16", "vit_base_patch16_224"),  # a whole word of the name
        ("dinov2_vitb14", "vit_base_patch14_dinov2"),
        ("resnet-50", "resnet50"),  # a slip of the pen goes before other networks of the family
        ("convnext_xlarg", "convnext_xlarge"),
        ("convnext_base.fb_in22", "convnext_base.fb_in22k"),
        ("hiera", "hiera_base_224"),  # no family of the table: a word that timm's names have
        ("maxvit", "maxvit_base_tf_224"),  # which is no kind of vit
    ],
)
def test_the_first_suggestion_is_what_is_meant(name, first):
    assert suggestions(name)[0] == first and len(suggestions(name)) <= 3


@pytest.mark.parametrize("name", ["zzzz", "", "q"])
def test_a_name_that_means_nothing_has_no_suggestion(name):
    assert suggestions(name) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_of_the_table_are_there_and_other_families_stay_apart(family):
    for network in FAMILIES[family]:
        refuse_unknown(network)
    assert suggestions(family) and set(suggestions(family)) & set(FAMILIES[family])
    assert family not in timm.list_models()  # the word itself is no network
