"""How an image is brought to the network's size, and which part of the image the network then sees."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What is asked of timm for each of `featcache.config.FITS`, over the transform of the weights.
TIMM_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "crop": {},
    "whole": {"crop_mode": "squash", "crop_pct": 1.0},
    "pad": {"crop_mode": "border", "crop_pct": 1.0},
}


def fit_of(transform: Mapping[str, Any]) -> str:
    """The fit that a transform amounts to, one of FITS; whole or pad, too, where the weights came with that."""
    for fit, settings in TIMM_SETTINGS.items():
        if settings and all(transform.get(name) == value for name, value in settings.items()):
            return fit
    return "crop"


def size_of(transform: Mapping[str, Any]) -> int | None:
    """Pixels on a side of the images that a network reads; None for features that were made elsewhere."""
    return int(transform["input_size"][-1]) if transform else None


def in_words(transform: Mapping[str, Any]) -> str:
    """What a transform does with an image, on one line."""
    _, height, width = transform["input_size"]
    size = f"{width} px" if height == width else f"{width} x {height} px"
    if "own" in transform:
        return f"{size} by its own function, {transform['own']}"
    scaled = {"crop": f"crop {transform['crop_pct']:g}", "whole": "the whole image", "pad": "the whole image, padded"}
    mean, std = (" ".join(f"{value:g}" for value in transform[name]) for name in ("mean", "std"))
    return f"{size}, {scaled[fit_of(transform)]}, {transform['interpolation']}, mean {mean}, std {std}"


@dataclass(frozen=True)
class Extent:
    """The part of an image that a network sees, as parts of the image's width (left, right) and height (top, bottom).

    0 is the left or upper side of the image and 1 the right or lower one. What is below 0 or above 1 is padding.
    """

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Width of this part, as a part of the image's width."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Height of this part, as a part of the image's height."""
        return self.bottom - self.top


WHOLE = Extent(0.0, 0.0, 1.0, 1.0)


def extent_of(transform: Mapping[str, Any], width: int, height: int) -> Extent:
    """The part of an image of these pixels that a network sees through timm's transform, with timm's rounding.

    Parameters
    ----------
    transform : settings of the transform, as keys have them: input_size (3, height, width), crop_pct, crop_mode; a
        network's own function, of which nothing is known, counts as one that shows the whole image
    width, height : of the image, in pixels
    """
    if not transform or "own" in transform:  # made elsewhere, or by a function of which nothing is known
        return WHOLE
    _, *target = transform["input_size"]
    scaled = _scaled(transform, width, height)
    (top, bottom), (left, right) = (_centred(seen, all_of_it) for seen, all_of_it in zip(target, scaled, strict=True))
    return Extent(left, top, right, bottom)


def _scaled(transform: Mapping[str, Any], width: int, height: int) -> tuple[int, int]:
    """(height, width) to which timm scales an image before it crops or pads it."""
    _, *target = transform["input_size"]
    rows, columns = (math.floor(side / transform["crop_pct"]) for side in target)
    if transform["crop_mode"] == "squash":
        return rows, columns
    if transform["crop_mode"] == "border":
        ratio = max(height / rows, width / columns)
    elif rows == columns:  # torchvision's resize, which rounds down
        longer = int(rows * max(width, height) / min(width, height))
        return (rows, longer) if height <= width else (longer, columns)
    else:
        ratio = min(height / rows, width / columns)
    return round(height / ratio), round(width / ratio)


def _centred(seen: int, scaled: int) -> tuple[float, float]:
    """First and last part of a scaled side that is seen, where the middle is cropped or padded."""
    start = -((seen - scaled) // 2) if seen > scaled else round((scaled - seen) / 2)
    return start / scaled, (start + seen) / scaled
