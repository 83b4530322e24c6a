"""Pictures as a program or a command line gives them: files, folders, arrays, tensors, images of Pillow."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from featcache.dataset.images import image_endings, images_in, load_image, picture_count, to_rgb
from featcache.dataset.subject import ArrayImage, ImageSource
from featcache.errors import DataError, first_line
from featcache.formats.arrays import array_endings
from featcache.formats.lazy import Place

Picture = ImageSource | Image.Image | np.ndarray
_EXPECTED = (
    "pictures: paths, images of Pillow, or arrays or tensors (height, width, 3) or (3, height, width), of uint8 or of "
    "float from 0 to 1"
)
_REMEDY = "convert them first"
_READING = Lock()  # threads that read one image of Pillow share its file and the place in it


def pictures_of(images: Any) -> list[Picture]:
    """The single pictures in what was given, in order. Files are not opened yet; arrays are views.

    images : one of these or a sequence of them: a path of an image file, of a folder, or of a file with an array of
        pictures ('stimuli.hdf5:imgBrick'); an image of Pillow; an array or tensor, (height, width, 3),
        (3, height, width), (height, width), or (n, ...) of any of these with three axes, uint8 or float in [0, 1]

    Raises DataError for anything else, and where there is no picture.
    """
    pictures = list(_flat(images))
    if not pictures:
        raise DataError("images", expected="at least one picture", found="none", remedy="give some")
    return pictures


def _flat(images: Any) -> Iterable[Picture]:
    if isinstance(images, (str, Path)):
        return _on_disk(Path(images))
    if isinstance(images, (ArrayImage, Image.Image)):
        return [images]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return _in_array(images)
    if isinstance(images, (Sequence, Iterable)) and not isinstance(images, (bytes, dict)):
        return [picture for one in images for picture in _flat(one)]
    raise DataError("images", expected=_EXPECTED, found=f"an object of type {type(images).__name__}", remedy=_REMEDY)


def _on_disk(path: Path) -> Iterable[ImageSource]:
    if path.is_dir():
        return images_in(path, "name the folder that holds them")[0]
    place = Place.of(str(path))
    if not place.path.exists():
        raise DataError(path, expected="an image or a folder of images", found="no such file", remedy="correct it")
    if not place.array and place.path.suffix.lower() in image_endings():
        return [path]
    if place.path.suffix.lower() not in array_endings():
        raise DataError(
            path,
            expected=f"an image, a folder of images, or a file of many with an ending of {', '.join(array_endings())}",
            found=f"another, {place.path.suffix!r}",
            remedy="convert it to PNG, or name another",
        )
    n_pictures = picture_count(place.path, place.array)
    return [ArrayImage(place.path, place.array, row) for row in range(n_pictures)]


def _in_array(images: np.ndarray | torch.Tensor) -> Iterable[np.ndarray]:
    values = _of_tensor(images) if isinstance(images, torch.Tensor) else images
    if values.ndim == 4:
        return [one for many in values for one in _in_array(many)]
    if values.ndim == 3 and values.shape[-1] not in (1, 3) and values.shape[0] in (1, 3):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    whole = values.ndim == 2 or (values.ndim == 3 and values.shape[-1] == 3)
    if not whole or 0 in values.shape:
        raise DataError("images", expected=_EXPECTED, found=f"an array of shape {values.shape}", remedy=_REMEDY)
    return [_as_bytes(values)]


def _of_tensor(images: torch.Tensor) -> np.ndarray:
    images = images.detach().cpu()
    few_bits = images.is_floating_point() and images.element_size() < 4  # of which NumPy does not know all
    values: np.ndarray = (images.float() if few_bits else images).numpy()
    return values


def _as_bytes(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f" and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
        return np.round(values * 255).astype(np.uint8)
    span = f"{values.min():g} to {values.max():g}" if values.dtype.kind in "fiu" else "no numbers"
    raise DataError("images", expected=_EXPECTED, found=f"{values.dtype} values, {span}", remedy=_REMEDY)


def decoded(picture: Picture) -> Image.Image:
    """A picture as 8-bit RGB, as `load_image` makes it of a file. Raises DataError for what cannot be decoded."""
    if isinstance(picture, Image.Image):
        return as_rgb(picture)
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture).convert("RGB")
    return load_image(picture)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of Pillow as `load_image` gives it of its file. Raises DataError for pixels that are no integers."""
    try:
        with _READING:
            image.load()
        return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on broken files, and AssertionError on one that was closed
        raise DataError(
            "images", expected=_EXPECTED, found=f"one of mode {image.mode} ({first_line(error)})", remedy=_REMEDY
        ) from error


def name_of(picture: Picture, number: int) -> str:
    """What tables call a picture: its file name, its row of an array, or its number where it has none."""
    if isinstance(picture, (Path, ArrayImage)):
        return picture.name
    known = getattr(picture, "filename", "")
    return Path(known).name if known else f"image {number}"
