"""Any image that Pillow reads becomes 8-bit RGB, and a damaged one is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.dataset.images import image_fault, image_shape, load_image
from featcache.errors import ChallengeError


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
    with pytest.raises(ChallengeError, match=r"a.png: expected a whole PNG or JPEG image"):
        image_shape(path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image_is_refused_with_its_name(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a.{suffix}", noise)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ChallengeError, match=f"a.{suffix}: expected a whole PNG or JPEG"):
        load_image(path)
    fault = image_fault(path)
    assert fault is not None and fault.path == path and fault.expected == "a whole PNG or JPEG image"


def test_a_whole_image_has_no_fault(tmp_path):
    assert image_fault(save(tmp_path / "a.png", GREY)) is None
