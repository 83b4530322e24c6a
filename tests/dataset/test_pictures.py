"""Equal pixels are one picture, copies are found among many pictures, and other pictures are not."""

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from featcache.dataset.pictures import (
    NEAR,
    alike,
    look_at,
    n_different_bits,
    near_copies,
    perceptual_hash,
    picture_id,
)
from support.pictures import scene


def encoded(image: Image.Image, kind: str, **options) -> Image.Image:
    """The image as a file of another kind decodes to."""
    image.save(file := io.BytesIO(), kind, **options)
    return Image.open(file).convert("RGB")


def half_blurred(image: Image.Image) -> Image.Image:
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, image.width // 2, image.height))
    return Image.composite(image.filter(ImageFilter.GaussianBlur(5)), image, mask)


COPIES = {
    **{f"quality {q}": lambda image, q=q: encoded(image, "JPEG", quality=q) for q in (50, 75, 95)},
    **{f"scale {s}": lambda image, s=s: image.resize((round(image.width * s),) * 2) for s in (0.5, 0.8, 2)},
    "cut by 2 %": lambda image: image.crop((1, 1, image.width - 1, image.height - 1)),
    "half blurred": half_blurred,
    "brighter": lambda image: image.point(lambda value: min(value * 1.1, 255)),
}


def test_the_number_of_a_picture_is_that_of_its_pixels_alone():
    image = scene(0)
    same = [encoded(image, "PNG"), encoded(image, "PNG", compress_level=0), encoded(image, "WEBP", lossless=True)]
    assert {picture_id(one) for one in same} == {picture_id(image)} and 0 <= picture_id(image) < 2**63
    changed = np.asarray(image).copy()
    changed[-1, -1, -1] ^= 1
    others = [Image.fromarray(changed), encoded(image, "JPEG"), image.resize((95, 96))]
    assert picture_id(image) not in {picture_id(one) for one in others}


def test_pictures_of_the_same_bytes_and_another_shape_differ():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert picture_id(Image.fromarray(pixels)) != picture_id(Image.fromarray(pixels.reshape(6, 4, 3)))


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found_among_other_pictures(kind):
    scenes = [scene(seed) for seed in range(12)]
    seen = [look_at(image) for image in [*scenes, *map(COPIES[kind], scenes)]]
    hashes = np.array([one.hash for one in seen], dtype=np.uint64)
    found = near_copies(hashes, thumbnails=np.stack([one.thumbnail for one in seen]))
    assert found.tolist() == [[i, i + 12] for i in range(12)]


def test_what_is_kept_of_a_picture_agrees_with_its_parts():
    image = scene(1)
    seen = look_at(image)
    assert (seen.id, seen.hash) == (picture_id(image), perceptual_hash(image)) and seen.thumbnail.shape == (16, 16)
    blocks = np.asarray(image.convert("L"), dtype=float).reshape(16, 6, 16, 6).mean((1, 3))
    assert np.abs(seen.thumbnail - blocks).max() <= 1


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_pictures_are_no_copies_of_each_other(value):
    flat = look_at(Image.new("RGB", (20, 20), (value,) * 3))
    other = look_at(Image.new("RGB", (20, 20), (value ^ 1,) * 3))
    assert near_copies(np.array([flat.hash, other.hash], np.uint64)).tolist() == [[0, 1]]  # no structure to hash
    assert not len(
        near_copies(np.full(2, flat.hash, np.uint64), thumbnails=np.stack([flat.thumbnail, other.thumbnail]))
    )


def compared_one_by_one(hashes: np.ndarray, distance: int) -> list[list[int]]:
    return [
        [i, j]
        for i, j in combinations(range(len(hashes)), 2)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance
    ]


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, NEAR, 12])
def test_every_near_pair_is_found_once(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 120, dtype=np.uint64)
    for i in range(60):  # copies with 0 to 14 other bits, wherever they are
        bits = rng.choice(64, i % 15, replace=False)
        hashes[60 + i] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0))
    expected = compared_one_by_one(hashes, distance)
    assert near_copies(hashes, distance).tolist() == expected and len(expected) >= 4 * (distance + 1)


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_many_equal_hashes_are_all_pairs_however_few_fit_into_memory(monkeypatch, at_once):
    monkeypatch.setattr("featcache.dataset.pictures._AT_ONCE", at_once)
    hashes = np.array([5, 9, 5, 5, 2**63 + 5], dtype=np.uint64)
    assert near_copies(hashes, 1).tolist() == compared_one_by_one(hashes, 1)
    monkeypatch.setattr("featcache.dataset.pictures._COMPARED_AT_ONCE", at_once)
    seen = np.random.default_rng(0).integers(0, 255, (2, 16, 16)).astype(np.uint8)
    thumbnails = seen[[0, 1, 0, 1, 0]]  # of the equal hashes, the first and the third are alike
    assert near_copies(hashes, 1, thumbnails).tolist() == [[0, 2], [0, 4], [2, 4]]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_pictures_have_no_pairs(n):
    assert near_copies(np.zeros(n, np.uint64), thumbnails=np.zeros((n, 16, 16), np.uint8)).shape == (0, 2)


def test_bits_are_counted_as_python_counts_them():
    a, b = np.random.default_rng(0).integers(0, 2**64, (2, 50), dtype=np.uint64)
    assert n_different_bits(a, b).tolist() == [(int(x) ^ int(y)).bit_count() for x, y in zip(a, b, strict=True)]


def test_thumbnails_are_alike_whatever_their_brightness_and_contrast():
    thumbnail = look_at(scene(3)).thumbnail
    others = np.stack([thumbnail // 2, 255 - thumbnail, look_at(scene(4)).thumbnail, thumbnail.T])
    assert alike(np.stack([thumbnail] * 4), others).tolist() == [True, False, False, False]
    flat = np.full((1, 16, 16), 100, np.uint8)
    assert alike(flat, flat + 2).all() and not alike(flat, flat + 9).any() and not alike(flat, thumbnail[None]).any()
