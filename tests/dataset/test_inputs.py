"""Pictures of every kind and mode are what `load_image` makes of the file, in the order in which they were given."""

import io
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from featcache.dataset.images import load_image
from featcache.dataset.inputs import decoded, name_of, pictures_of
from featcache.dataset.subject import ArrayImage
from featcache.errors import DataError
from support.pictures import scene

SIZE = (9, 7)  # width, height


def pixels_of(seed: int, *more: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*more, SIZE[1], SIZE[0], 3), dtype=np.uint8)


def shown(pictures) -> list[np.ndarray]:
    return [np.asarray(decoded(picture)) for picture in pictures]


@pytest.fixture
def folder(tmp_path):
    """Three pictures, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("c.png", "a.png", "b.PNG")):
        Image.fromarray(pixels_of(number)).save(folder / name)
    (folder / "notes.txt").write_text("none")
    return folder


def test_pictures_come_in_the_order_given_and_those_of_a_folder_by_name(folder):
    given = [folder / "c.png", str(folder), pixels_of(7), [folder / "a.png", (str(folder / "c.png"),)]]
    found = pictures_of(given)
    assert [name_of(one, number) for number, one in enumerate(found)] == [
        *("c.png", "a.png", "b.PNG", "c.png"),
        "image 4",
        *("a.png", "c.png"),
    ]
    for one, seed in zip(shown(found), (0, 1, 2, 0, 7, 1, 0), strict=True):
        np.testing.assert_array_equal(one, pixels_of(seed))


@pytest.mark.parametrize("grey", [False, True])
def test_files_of_many_pictures_are_their_rows(tmp_path, grey):
    many = pixels_of(3, 4)[..., 0] if grey else pixels_of(3, 4)
    expected = np.repeat(many[..., None], 3, -1) if grey else many
    np.save(tmp_path / "stimuli.npy", many)
    with h5py.File(tmp_path / "stimuli.hdf5", "w") as file:
        file["imgBrick"], file["other"] = many, many[:1]
    for place in (tmp_path / "stimuli.npy", f"{tmp_path}/stimuli.hdf5:imgBrick"):
        found = pictures_of(place)
        np.testing.assert_array_equal(shown(found), expected)
        names = [name_of(picture, 0) for picture in found]
        assert len(set(names)) == 4 and all(str(row) in name for row, name in enumerate(names))
    row = ArrayImage(tmp_path / "stimuli.npy", "", 2)
    np.testing.assert_array_equal(shown(pictures_of(row))[0], expected[2])


def test_arrays_and_tensors_of_every_layout_are_the_same_pictures():
    many = pixels_of(0, 4)
    tensor = torch.from_numpy(many)
    for given in (
        many,
        list(many),
        many.transpose(0, 3, 1, 2),
        tensor,
        tensor.permute(0, 3, 1, 2),
        (one for one in tensor),
        (many / 255),
        (many / 255).astype(np.float32),
        tensor.double() / 255,
        many[:, ::-1][:, ::-1],
        (tensor / 255).requires_grad_(),
    ):
        np.testing.assert_array_equal(shown(pictures_of(given)), many)
    grey = many[..., 0]
    for given in (grey[0], grey[0][..., None], grey[0][None], torch.from_numpy(grey[0]), grey[:1, ..., None]):
        np.testing.assert_array_equal(shown(pictures_of(given)), np.repeat(grey[:1, ..., None], 3, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fractions_of_few_bits_are_pictures(dtype):
    """NumPy has no bfloat16."""
    values = torch.tensor([0, 0.25, 0.5, 1], dtype=dtype).expand(3, 5, 4)
    found = shown(pictures_of(values))[0]
    assert found.shape == (5, 4, 3)
    assert found[0, :, 0].tolist() == [0, 64, 128, 255]


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 63).astype(np.uint16).reshape(7, 9))


def turned() -> Image.Image:
    """A picture with a camera's rotation flag."""
    image = Image.fromarray(pixels_of(1))
    image.getexif()[0x0112] = 6
    return image


def half_seen(mode: str) -> Image.Image:
    image = scene(2, 16).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((16, 16)))
    return image.convert(mode)


def palette_with_a_clear_colour() -> Image.Image:
    image = scene(3, 16).quantize(8)
    image.info["transparency"] = 2
    return image


@pytest.mark.parametrize(
    "make",
    [
        sixteen_bits,
        turned,
        lambda: half_seen("RGBA"),
        lambda: half_seen("LA"),
        palette_with_a_clear_colour,
        lambda: scene(4, 16).convert("L"),
        lambda: scene(4, 16).convert("1"),
        lambda: scene(4, 16).quantize(16),
    ],
    ids=["16 bits", "turned", "alpha", "grey with alpha", "clear colour", "grey", "black or white", "palette"],
)
def test_images_of_every_mode_are_what_their_file_is(tmp_path, make):
    image = make()
    more = {"exif": image.getexif()} if image.getexif() else {}
    image.save(tmp_path / "one.png", **more)
    expected = load_image(tmp_path / "one.png")
    file = io.BytesIO((tmp_path / "one.png").read_bytes())
    for given in (image, Image.open(tmp_path / "one.png"), Image.open(file)):
        found = decoded(pictures_of(given)[0])
        assert (found.mode, found.size) == ("RGB", expected.size)
        np.testing.assert_array_equal(found, expected)
    if make is turned:
        assert expected.size == SIZE[::-1]
    with Image.open(tmp_path / "one.png") as opened:
        assert name_of(opened, 3) == "one.png" and name_of(image, 3) == "image 3"


def test_one_image_that_is_given_often_is_decoded_by_many_threads_at_once(tmp_path):
    """An image that Pillow has opened and not read yet is one file handle."""
    scene(1, 900).save(tmp_path / "one.png")
    expected = np.asarray(load_image(tmp_path / "one.png"))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found in pool.map(decoded, pictures_of([Image.open(tmp_path / "one.png")] * 8)):
                np.testing.assert_array_equal(found, expected)


def closed(path) -> Image.Image:
    with Image.open(path) as image:
        return image


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda _: None, "of type NoneType"),
        (lambda _: {"a": 1}, "of type dict"),
        (lambda _: [b"bytes"], "of type bytes"),
        (lambda _: [[], ()], "none"),
        (lambda _: np.zeros(4, np.uint8), r"shape \(4,\)"),
        (lambda _: np.uint8(4), "of type uint8"),
        (lambda _: np.zeros((2, 3, 4, 5, 6), np.uint8), r"shape \(2, 3, 4, 5, 6\)"),
        (lambda _: np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (lambda _: np.zeros((2, 4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (lambda _: -np.ones((4, 4)), "-1 to -1"),
        (lambda _: np.zeros((4, 4), bool), "no numbers"),
        (lambda _: np.full((4, 4), None), "no numbers"),
        (lambda _: torch.zeros(4, 4, 3, dtype=torch.complex64), "complex64"),
        (lambda folder: folder / "notes.txt", r"expected an image, a folder .*found another, '\.txt'"),
        (lambda folder: folder / "gone.png", "no such file"),
        (lambda folder: f"{folder}/gone.hdf5:a", "no such file"),
        (lambda folder: folder / "empty", "an empty folder"),
        (lambda folder: closed(folder / "a.png"), "mode RGB"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(folder, make, found):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=found) as caught:
        shown(pictures_of(make(folder)))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_an_error_when_it_is_decoded(folder):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    whole, damaged = pictures_of([folder / "b.PNG", folder / "a.png"])
    assert decoded(whole).size == SIZE
    with pytest.raises(DataError, match=r"a\.png: expected a whole PNG"):
        decoded(damaged)
