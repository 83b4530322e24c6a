"""Any image that Pillow reads becomes 8-bit RGB, and a damaged one is refused."""

import multiprocessing
import os
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from featcache.dataset.images import image_fault, image_shape, load_image
from featcache.dataset.inputs import as_rgb
from featcache.dataset.subject import ArrayImage
from featcache.errors import ConfigError, DataError


def save(path: Path, array: np.ndarray, **options) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


GREY = (np.arange(64).reshape(8, 8) * 3).astype(np.uint8)


def test_rgb_png_is_read_exactly(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = load_image(save(tmp_path / "a.png", rgb))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), rgb)


def test_grey_becomes_three_equal_channels(tmp_path):
    assert np.array_equal(np.asarray(load_image(save(tmp_path / "a.png", GREY))), np.stack([GREY] * 3, -1))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    loaded = np.asarray(load_image(save(tmp_path / "a.png", GREY.astype(np.uint16) * 257)))
    assert np.array_equal(loaded[..., 0], GREY)


def test_transparency_lies_over_mid_grey(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    loaded = np.asarray(load_image(save(tmp_path / "a.png", rgba)))
    assert loaded[0, 0].tolist() == [255, 0, 0] and loaded[1, 1].tolist() == [128, 128, 128]


def test_palette_cmyk_and_one_bit_are_converted(tmp_path):
    Image.fromarray(GREY).convert("P").save(tmp_path / "p.png")
    Image.fromarray(GREY).convert("1").save(tmp_path / "1.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert {load_image(tmp_path / name).mode for name in ("p.png", "1.png", "c.jpg")} == {"RGB"}
    red = np.asarray(load_image(tmp_path / "c.jpg"))[4, 4]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


def test_rotation_flag_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter to view
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (4, 8)


@pytest.mark.parametrize("flag", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_shape_in_a_header_is_that_of_the_image_as_it_is_loaded(tmp_path, name, flag):
    exif = Image.Exif()
    exif[0x0112] = flag
    for shape in ((8, 4), (6, 6), (3, 9)):
        Image.new("RGB", shape).save(tmp_path / name, exif=exif)
        assert image_shape(tmp_path / name) == load_image(tmp_path / name).size


def test_a_file_without_a_header_has_no_shape_and_is_named(tmp_path):
    (path := tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"a.png: expected a whole PNG or JPEG image"):
        image_shape(path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image_is_refused_with_its_name(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a.{suffix}", noise)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=f"a.{suffix}: expected a whole PNG or JPEG"):
        load_image(path)
    fault = image_fault(path)
    assert fault is not None and fault.where == path and fault.expected == "a whole PNG or JPEG image"


def test_a_whole_image_has_no_fault(tmp_path):
    assert image_fault(save(tmp_path / "a.png", GREY)) is None


def test_the_first_picture_of_an_animation_is_taken(tmp_path):
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    frames = [Image.new("RGB", (8, 6), colour) for colour in colours]
    for name in ("a.gif", "a.png", "a.webp"):
        path = tmp_path / name
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        with Image.open(path) as image:
            assert image.n_frames == 3
        loaded = load_image(path)
        assert loaded.size == image_shape(path) == (8, 6) and loaded.getpixel((4, 3)) == colours[0]


def test_fractions_are_refused_and_not_clipped_to_black(tmp_path):
    path = save(tmp_path / "a.tiff", np.full((4, 4), 0.5, dtype=np.float32))
    with pytest.raises(DataError, match=r"a.tiff: .* \(its pixels are not integers\)"):
        load_image(path)


def test_a_pipe_or_a_folder_under_the_name_of_an_image_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.npy")
    (tmp_path / "b.png").mkdir()
    for source in (tmp_path / "a.png", tmp_path / "b.png", ArrayImage(tmp_path / "a.npy", "", 0)):
        with pytest.raises(DataError, match="no regular file"):
            load_image(source)


# --- rows of arrays

RGB = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


def stored(path: Path, array: np.ndarray) -> tuple[Path, str]:
    """An array in a file of either kind, and its name there."""
    if path.suffix == ".npy":
        np.save(path, array)
        return path, ""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("pictures/all", data=array)
    return path, "pictures/all"


@pytest.fixture(params=["a.npy", "a.hdf5", "a.h5"])
def path(request, tmp_path):
    return tmp_path / request.param


def test_rows_of_an_array_are_pictures(path):
    place = stored(path, RGB)
    for row in (3, 0, 4):
        source = ArrayImage(*place, row)
        image = load_image(source)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), RGB[row])
        assert image_shape(source) == image.size == (7, 6) and image_fault(source) is None


def test_rows_of_grey_pictures_become_three_equal_channels(path):
    source = ArrayImage(*stored(path, RGB[..., 0]), 2)
    assert np.array_equal(np.asarray(load_image(source)), np.stack([RGB[2, ..., 0]] * 3, -1))


@pytest.mark.parametrize(
    "array", [RGB.astype(np.uint16), RGB.astype(np.float32), RGB[..., :2], RGB[0, 0], np.zeros((2, 0, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(path, array):
    source = ArrayImage(*stored(path, array), 0)
    for read in (load_image, image_shape):
        with pytest.raises(DataError, match=r"expected an array of 8-bit pictures, .* found shape"):
            read(source)


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_outside_the_array_is_refused_with_its_name(path, row):
    source = ArrayImage(*stored(path, RGB), row)
    with pytest.raises(DataError, match=rf"\[{row}\]: expected a row from 0 to 4; found {row}"):
        load_image(source)
    assert image_fault(source).where == str(source)


def test_a_damaged_or_missing_array_is_refused(path):
    whole, name = stored(path, RGB)
    with pytest.raises(DataError, match="cannot be read"):
        load_image(ArrayImage(path.with_name("none" + path.suffix), name, 0))
    whole.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(DataError, match="that can be read; found one that cannot"):
        load_image(ArrayImage(whole, name, 0))


def test_an_array_that_is_not_in_the_file_is_refused(tmp_path):
    path, _ = stored(tmp_path / "a.h5", RGB)
    for name in ("other", "pictures"):
        with pytest.raises(DataError, match="name an array of the file"):
            load_image(ArrayImage(path, name, 0))


def test_an_array_that_was_written_again_is_read_again(path):
    source = ArrayImage(*stored(path, RGB), 1)
    load_image(source)
    path.unlink()
    stored(path, 255 - RGB[:4])
    os.utime(path, ns=(1, 1))
    assert np.array_equal(np.asarray(load_image(source)), 255 - RGB[1])


def test_threads_and_forked_processes_read_the_same_rows(path):
    place = stored(path, RGB)
    sources = [ArrayImage(*place, row) for row in range(5)] * 8
    with ThreadPoolExecutor(4) as pool:
        rows = [np.asarray(image) for image in pool.map(load_image, sources)]
    assert np.array_equal(rows, np.concatenate([RGB] * 8))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        rows = [np.asarray(image) for image in pool.map(load_image, sources)]
    assert np.array_equal(rows, np.concatenate([RGB] * 8))


def test_without_h5py_the_way_to_get_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"anything")
    with pytest.raises(ConfigError, match=r"the library h5py.* pip install 'featcache\[formats\]'"):
        load_image(ArrayImage(tmp_path / "a.h5", "pictures", 0))


def with_exif(path: Path, entries: bytes, n_entries: int) -> Path:
    """A JPEG, 8 by 4, that has to be turned by a quarter, with other tags beside the rotation flag."""
    Image.new("RGB", (8, 4), (200, 0, 0)).save(path)
    flag = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", n_entries + 1) + flag + entries + bytes(4)
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:])
    return path


ODD_TAGS = {  # tag, type and value: types that the tags should not have
    "XMP as ASCII": struct.pack("<HHI4s", 0x02BC, 2, 3, b"ab\0\0"),
    "ResolutionUnit as BYTE": struct.pack("<HHI4s", 0x0128, 1, 1, b"\x02\0\0\0"),
    "XResolution as SHORT": struct.pack("<HHIHH", 0x011A, 3, 1, 72, 0),
    "Artist as SLONG": struct.pack("<HHIi", 0x013B, 9, 1, -5),
    "an IFD that is not there": struct.pack("<HHII", 0x8769, 4, 1, 60_000),
    "an unknown type": struct.pack("<HHII", 0x9999, 77, 1, 0),
}


@pytest.mark.parametrize("tag", ODD_TAGS)
def test_the_rotation_flag_is_read_whatever_the_tags_beside_it_are(tmp_path, tag):
    path = with_exif(tmp_path / "a.jpg", ODD_TAGS[tag], 1)
    assert load_image(path).size == image_shape(path) == (4, 8)
    with Image.open(path) as image:
        assert as_rgb(image).size == (4, 8)


def test_pictures_are_turned_as_pillow_turns_them(tmp_path):
    for flag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = flag
        Image.fromarray(RGB[0]).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(expected))


@pytest.mark.parametrize("error", [struct.error("short"), TypeError("odd"), IndexError("no"), zlib.error("bad")])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")

    def fail(*_):
        raise error

    for step in ("load", "getexif"):
        with monkeypatch.context() as patch:
            patch.setattr(PngImageFile, step, fail)
            with pytest.raises(DataError, match=r"a\.png: expected a whole PNG or JPEG.*cannot be decoded"):
                load_image(tmp_path / "a.png")
