"""Decoding of pictures: of image files, and of the rows of an array of many."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile

from featcache.dataset.subject import ArrayImage, Fault, ImageSource, listed
from featcache.errors import DataError, FeatcacheError, first_line
from featcache.formats.arrays import open_array
from featcache.formats.lazy import Array, Place
from featcache.machine.files import regular_status

_Turn = Image.Transpose
_TURNS = {  # {rotation flag of a camera: what makes the picture upright}
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
_TURNED = range(5, 9)  # rotation flags that exchange width and height
_NO_PICTURES = {"HDF5", "GRIB", "BUFR", "WMF", "EPS", "MPEG"}  # kinds that Pillow knows and cannot decode by itself
_OPEN_ARRAYS = 8  # files of many pictures that stay open


def load_image(source: ImageSource) -> Image.Image:
    """Decode a picture of any size and mode to 8-bit RGB.

    Transparent parts are laid over mid-grey, 16-bit grey is scaled to 8 bits, and a camera's rotation flag is applied.
    Of an animation (GIF, APNG, WebP) the first picture is taken, and of several in one file too.

    source : an image file, or a row of an array of 8 bits, (n_pictures, height, width, 3) or, of grey pictures,
        (n_pictures, height, width)

    Raises DataError for what cannot be decoded to its end.
    """
    if isinstance(source, ArrayImage):
        return Image.fromarray(array_row(source)).convert("RGB")
    with _opened(source) as image:
        return to_rgb(image)


def image_endings() -> set[str]:
    """Endings of the names of files that Pillow decodes by itself, in lower case: {'.png', '.jpg', ...}."""
    known = Image.registered_extensions()  # which also fills Image.OPEN
    return {ending for ending, kind in known.items() if kind in Image.OPEN and kind not in _NO_PICTURES}


def images_in(folder: Path, remedy: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Image files of a folder in the order of their names, and a sentence on what else is in it, if anything is.

    remedy : what to do about a folder without images, for which DataError is raised
    """
    known = image_endings()
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in known and path.is_file()]
    others = [path.name for path in files if path not in set(images)]
    if not images:
        raise DataError(
            folder,
            expected="images",
            found=f"none, but {listed(others)}" if others else "an empty folder",
            remedy=remedy,
        )
    return tuple(images), (f"{folder}: left out what is no image: {listed(others)}",) if others else ()


def image_shape(source: ImageSource) -> tuple[int, int]:
    """(width, height) in pixels of a picture as `load_image` gives it, from its header. Raises DataError."""
    if isinstance(source, ArrayImage):
        height, width = _array_of(source).shape[1:3]
        return width, height
    with _opened(source) as image:
        turned = image.width != image.height and _rotation_flag(image) in _TURNED
        return image.size[::-1] if turned else image.size


def image_fault(source: ImageSource) -> Fault | None:
    """Fault of a picture that cannot be decoded to its end; None for a whole one."""
    try:
        load_image(source)
    except DataError as error:
        return fault_of(source, error)
    return None


def fault_of(source: ImageSource, error: DataError) -> Fault:
    """Fault of a picture that `load_image` refuses."""
    return Fault(str(source) if isinstance(source, ArrayImage) else source, error.expected, error.found)


def array_row(source: ArrayImage) -> np.ndarray:
    """Pixels of one picture of an array, (height, width, 3) or (height, width) uint8. Raises DataError."""
    array = _array_of(source)
    if not 0 <= source.row < len(array):
        raise DataError(
            source,
            expected=f"a row from 0 to {len(array) - 1}",
            found=str(source.row),
            remedy="correct the row, or name the file that has it",
        )
    try:
        return np.ascontiguousarray(array[source.row : source.row + 1][0])
    except (FeatcacheError, MemoryError):
        raise
    except Exception as error:  # NumPy, h5py and their decompressors raise anything on broken files
        raise _unreadable_array(source, error) from error


def picture_count(path: Path, array: str = "") -> int:
    """Number of pictures in an array of a file. Raises DataError for what is no array of 8-bit pictures."""
    return len(_array_of(ArrayImage(path, array, 0)))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file, open. Whatever Pillow raises on it becomes a DataError."""
    try:
        regular_status(path)  # opening a pipe would wait for ever
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(path, expected="an image", found="no such file", remedy="put it back") from error
    except (FeatcacheError, MemoryError):
        raise
    except Exception as error:  # decoders of broken files raise anything: struct.error, TypeError, zlib.error
        raise DataError(
            path,
            expected="a whole PNG or JPEG image",
            found=f"one that cannot be decoded ({first_line(error)})",
            remedy="copy the file again",
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image that Pillow opened or made; see `load_image`. Raises ValueError where it cannot be."""
    image.load()
    turn = _TURNS.get(_rotation_flag(image))
    return _flattened(image if turn is None else image.transpose(turn))


def _rotation_flag(image: Image.Image) -> int:
    """The rotation flag that a camera wrote beside the pixels, 1 to 8; 1, upright, where it wrote none.

    No other tag is read: `ImageOps.exif_transpose` writes all of them anew, and fails where one is of an odd type.
    """
    flag = image.getexif().get(ExifTags.Base.Orientation)
    return flag if isinstance(flag, int) and flag in _TURNS else 1


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255 instead of scaling them
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # Pillow would clip fractions to black
        raise ValueError("its pixels are not integers")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (128, 128, 128, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _array_of(source: ArrayImage) -> Array:
    """The array that a picture is a row of, open. Raises DataError where it is not one of 8-bit pictures."""
    try:
        status = regular_status(source.path)
        array = _open_once(os.getpid(), source.path, source.array, status.st_size, status.st_mtime_ns)
    except (FeatcacheError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable_array(source, error) from error
    shape = tuple(array.shape)
    if array.dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)) or 0 in shape[1:3]:
        raise DataError(
            source,
            expected="an array of 8-bit pictures, (n, height, width, 3) or (n, height, width)",
            found=f"shape {shape} of {array.dtype}",
            remedy="store the pictures as 8-bit RGB or grey",
        )
    return array


def _unreadable_array(source: ArrayImage, error: Exception) -> DataError:
    return DataError(
        source,
        expected="a whole .npy or HDF5 file with this array",
        found=f"one that cannot be read ({first_line(error)})",
        remedy="copy the file again, or correct the name of the array",
    )


@lru_cache(maxsize=_OPEN_ARRAYS)
def _open_once(process: int, path: Path, name: str, size: int, time: int) -> Array:
    """The array, opened once.

    process : its number, because HDF5 files that were opened before a fork must not be read after it
    size, time : of the file: one that was written again is opened again
    """
    return open_array(Place(path, name))


# Another package in the process may have asked Pillow to fill up truncated files with grey. They must be errors here.
ImageFile.LOAD_TRUNCATED_IMAGES = False
