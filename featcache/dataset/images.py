"""Decoding of image files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from featcache.dataset.subject import Fault
from featcache.errors import ChallengeError

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on bad files
_TURNED = range(5, 9)  # rotation flags that exchange width and height


def load_image(path: Path) -> Image.Image:
    """Decode a PNG or JPEG of any size and mode to 8-bit RGB.

    Transparent parts are laid over mid-grey, 16-bit grey is scaled to 8 bits, and a camera's rotation flag is applied.

    Raises ChallengeError for a file that cannot be decoded to its end.
    """
    with _opened(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def image_shape(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of an image as `load_image` gives it, from its header. Raises ChallengeError."""
    with _opened(path) as image:
        turned = image.width != image.height and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return image.size[::-1] if turned else image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file, open. What Pillow raises on it becomes a ChallengeError."""
    try:
        with Image.open(path) as image:
            yield image
    except _UNREADABLE as error:
        raise ChallengeError(
            path,
            expected="a whole PNG or JPEG image",
            found=f"one that cannot be decoded ({(str(error).splitlines() or [type(error).__name__])[0]})",
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
    """Fault of an image file that cannot be decoded to its end; None for a whole one."""
    try:
        load_image(path)
    except ChallengeError as error:
        return Fault(path, error.expected, error.found)
    return None


# Another package in the process may have asked Pillow to fill up truncated files with grey. They must be errors here.
ImageFile.LOAD_TRUNCATED_IMAGES = False
