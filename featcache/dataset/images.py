"""Image files: their order, their ids and their pixels."""

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from featcache.dataset.subject import Fault, ImageFiles
from featcache.errors import ChallengeError

_NAME = re.compile(r"(?P<split>train|test)-(?P<number>\d+)_nsd-(?P<id>\d+)\.(png|jpg|jpeg)", re.IGNORECASE)
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on bad files


def list_images(folder: Path, split: str) -> tuple[ImageFiles, list[Fault]]:
    """The images of a folder by their number, and what is wrong with the folder's file names."""
    found: dict[int, tuple[Path, int]] = {}
    faults = [] if folder.is_dir() else [Fault(folder, "a folder of images", "none")]
    for entry in sorted(os.scandir(folder), key=lambda e: e.name) if folder.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        path = folder / entry.name
        if entry.name.startswith(".") or entry.name in ("Thumbs.db", "desktop.ini"):
            continue  # what file managers leave behind
        if match is None or match["split"].lower() != split:
            faults.append(Fault(path, f"a name such as {split}-0001_nsd-00013.png", "another"))
        elif (number := int(match["number"])) in found:
            faults.append(Fault(path, "one image a number", f"number {number} in {found[number][0].name}"))
        else:
            found[number] = (path, int(match["id"]))
    numbers = sorted(found)
    faults += _gaps(folder, numbers)
    ids = np.array([found[number][1] for number in numbers], dtype=np.int64)
    return ImageFiles(tuple(found[number][0] for number in numbers), ids), faults


def _gaps(folder: Path, numbers: list[int]) -> list[Fault]:
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    if numbers and numbers[0] == 0:
        return [Fault(folder, "images numbered from 1", "number 0")]
    if not missing:
        return []
    shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    return [Fault(folder, f"images numbered 1 to {numbers[-1]}", f"{len(missing)} missing: {shown}")]


def load_image(path: Path) -> Image.Image:
    """Decode a PNG or JPEG of any size and mode to 8-bit RGB.

    Transparency is laid over mid-grey, 16-bit grey is scaled to 8 bits, and a camera's rotation flag is applied.
    Raises ChallengeError where the file cannot be decoded to its end.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except _UNREADABLE as error:
        raise ChallengeError(
            path,
            expected="a whole PNG or JPEG image",
            found=f"one that cannot be decoded ({_first_line(error)})",
            remedy="copy the file again",
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255 instead of scaling them
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (128, 128, 128, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def image_fault(path: Path) -> Fault | None:
    """Decode an image to its end and say what is wrong with it, if anything is."""
    try:
        load_image(path)
    except ChallengeError as error:
        return Fault(path, error.expected, error.found)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Pillow pads a truncated file with grey if another package in the process asked for that. We never want it.
ImageFile.LOAD_TRUNCATED_IMAGES = False
