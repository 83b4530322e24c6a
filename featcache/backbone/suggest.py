"""Networks of timm that a name may mean: a word for a family of networks, a slip of the pen, or a part of a name."""

import difflib
import re

import timm

# {word for a family: its networks of a usual size, the first of which is meant most often}
FAMILIES = {
    "clip": ("vit_base_patch16_clip_224", "vit_large_patch14_clip_224", "convnext_base.clip_laion2b"),
    "openai": ("vit_base_patch16_clip_224.openai", "vit_large_patch14_clip_224.openai"),
    "siglip": ("vit_base_patch16_siglip_224", "vit_base_patch16_siglip_256"),
    "siglip2": ("vit_base_patch16_siglip_224.v2_webli", "vit_base_patch16_siglip_256.v2_webli"),
    "dino": ("vit_base_patch14_dinov2", "vit_base_patch16_224.dino", "vit_small_patch16_224.dino"),
    "dinov2": ("vit_base_patch14_dinov2", "vit_small_patch14_dinov2"),
    "dinov3": ("vit_base_patch16_dinov3", "convnext_base.dinov3_lvd1689m"),
    "mae": ("vit_base_patch16_224.mae", "vit_large_patch16_224.mae"),
    "sam": ("samvit_base_patch16", "vit_base_patch16_224.sam_in1k"),
    "vit": ("vit_base_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224"),
    "deit": ("deit3_base_patch16_224", "deit_base_patch16_224"),
    "beit": ("beit_base_patch16_224", "beitv2_base_patch16_224"),
    "eva": ("eva02_base_patch14_224", "eva02_large_patch14_224"),
    "swin": ("swin_base_patch4_window7_224", "swinv2_base_window8_256"),
    "convnext": ("convnext_base", "convnext_tiny", "convnext_xlarge"),
    "convnextv2": ("convnextv2_base", "convnextv2_tiny"),
    "resnet": ("resnet50", "resnet18", "resnet101"),
    "resnext": ("resnext50_32x4d", "resnext101_32x8d"),
    "efficientnet": ("efficientnet_b0", "efficientnetv2_s", "tf_efficientnet_b4"),
    "mobilenet": ("mobilenetv3_large_100", "mobilenetv2_100"),
    "regnet": ("regnety_016", "regnetx_016"),
    "densenet": ("densenet121", "densenet169"),
    "vgg": ("vgg16", "vgg19"),
    "inception": ("inception_v3", "inception_v4"),
}
_A_SLIP = 0.85  # likeness, from 0 to 1, from which a name is another one with a letter or two wrong
_ALIKE = 0.7  # likeness from which a name is worth a try, where nothing better is found
_MOST = 3


def suggestions(name: str) -> list[str]:
    """At most three networks of timm that a name may mean, the likeliest first; [] where it means none.

    A word for a family is looked for first, then a slip of the pen, then networks that have the whole name as a word,
    then families within the name, and last whatever is spelled alike.
    """
    asked = name.lower()
    known = [*timm.list_models(), *timm.list_pretrained()]
    slips = difflib.get_close_matches(asked, known, n=_MOST, cutoff=_A_SLIP)
    within = [network for word in _families_in(asked) for network in _family(word)]
    alike = difflib.get_close_matches(asked, known, n=_MOST, cutoff=_ALIKE)
    ordered = dict.fromkeys([*_family(asked), *slips, *_with_word(asked, known), *within, *alike])
    return [network for network in ordered if _is_there(network)][:_MOST]


def _family(word: str) -> tuple[str, ...]:
    return FAMILIES.get(word, ())


def _families_in(name: str) -> list[str]:
    """Families that are whole words of a name; else those that are a part of one, the longest first."""
    words = re.split(r"[^a-z0-9]+", name)
    whole = [word for word in words if word in FAMILIES]
    return whole or sorted((family for family in FAMILIES if family in name), key=len, reverse=True)


def _with_word(word: str, known: list[str]) -> list[str]:
    """Networks that have a whole word, or words that begin with it: those of base size first, then short names."""
    if len(word) < 3:
        return []
    words = {network: re.split(r"[^a-z0-9]+", network.lower()) for network in known}
    found = [network for network in known if word in words[network]]
    found = found or [network for network in known if any(one.startswith(word) for one in words[network])]
    return sorted(found, key=lambda network: ("base" not in words[network], len(network)))


def _is_there(network: str) -> bool:
    """Whether this version of timm has the network, with this tag."""
    try:
        return timm.is_model(network) and bool(timm.models.get_pretrained_cfg(network))
    except RuntimeError:
        return False
