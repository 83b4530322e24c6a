"""What a picture looks like, as numbers: which pictures are equal, and which are nearly so.

Two files are one picture where their decoded pixels are equal. They are near copies where one was made of the other:
compressed again, resized, cut a little at the borders, blurred or changed in a part.

A perceptual hash finds candidates among all pictures, and thumbnails confirm them. On 8,098 pictures that were shown to
animals (32.8 million pairs), `NEAR` and `ALIKE` find 308 pairs. 297 are of one recording that is known to have copies
with blurred parts, and the other 11 show one scene. Of copies of 700 of these pictures, they find all JPEGs of
quality 50 to 95; 99 in 100 of those of half to double size, or whose width and height are cut by 2 %; 97 in 100 where
they are cut by 4 %, and 92 in 100 where half of the picture is blurred. Cut by 10 % it is 28 in 100; mirrored, none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NEAR = 10  # of 64 bits in which perceptual hashes of near copies may differ
ALIKE = 0.9  # correlation of the thumbnails of near copies, at least
SIDE = 16  # pixels of a thumbnail

_FLAT = 2.0  # grey levels: a thumbnail that deviates less from its mean has no structure to compare
_BANDS = 4  # parts of a hash that are looked up: two hashes that differ in 10 bits differ in 2 of some part at most
_BAND_BITS = 16
_AT_ONCE = 1 << 21  # candidate pairs in memory
_COMPARED_AT_ONCE = 1 << 14  # pairs whose thumbnails are in memory, 1 kB each, several times
_HASHED = 2 * SIDE  # pixels of the square whose frequencies are hashed
_COSINES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(_HASHED) + 1) / (2 * _HASHED))


@dataclass(frozen=True)
class Picture:
    """What is kept of a picture that was looked at.

    id : see `picture_id`
    hash : see `perceptual_hash`
    thumbnail : (16, 16) uint8, the luminance of the whole picture
    """

    id: int
    hash: int
    thumbnail: NDArray[np.uint8]


def look_at(image: Image.Image) -> Picture:
    """What is kept of a picture. image : RGB, as `load_image` gives it"""
    grey = _luminance(image)
    thumbnail = grey.reshape(SIDE, 2, SIDE, 2).mean((1, 3)).round().astype(np.uint8)
    return Picture(picture_id(image), _hash_of(grey), thumbnail)


def picture_id(image: Image.Image) -> int:
    """Number of a picture from its size and its pixels, in [0, 2**63): the same for all files that decode to them."""
    digest = blake2b(repr((image.size, image.mode)).encode(), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of which few change where a picture is resized, compressed or cut a little, in [0, 2**64).

    Signs of the 8 x 8 lowest frequencies (discrete cosine transform) of the luminance at 32 x 32 pixels, around their
    median. Source: Zauner, Implementation and benchmarking of perceptual image hash functions (2010), section 3.2.
    """
    return _hash_of(_luminance(image))


def _luminance(image: Image.Image) -> NDArray[np.float64]:
    small = image.convert("L").resize((_HASHED, _HASHED), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def _hash_of(grey: NDArray[np.float64]) -> int:
    frequencies = (_COSINES @ grey @ _COSINES.T).round(3).ravel()  # a flat picture must not have the signs of errors
    return int.from_bytes(np.packbits(frequencies > np.median(frequencies)).tobytes(), "big")


def near_copies(
    hashes: NDArray[np.uint64], distance: int = NEAR, thumbnails: NDArray[np.uint8] | None = None
) -> NDArray[np.int64]:
    """All pairs of pictures whose hashes differ in `distance` bits at most, (n_pairs, 2), in rising order.

    Hashes are looked up by each of 4 parts of 16 bits: of hashes that differ in d bits, one part differs in d // 4 at
    most. So not every pair is compared.

    Parameters
    ----------
    hashes : (n_pictures,)
    distance : in [0, 15]
    thumbnails : (n_pictures, 16, 16); given, only pairs that are `alike` are returned, and none with a flat picture

    Source: Norouzi, Punjani and Fleet, Fast search in Hamming space with multi-index hashing (2012).
    """
    rows = np.arange(len(hashes))
    if thumbnails is not None:
        rows = np.flatnonzero(thumbnails.reshape(len(hashes), SIDE * SIDE).std(1, dtype=np.float32) >= _FLAT)
    kept = []
    for pairs in _candidates(hashes[rows], distance // _BANDS):
        pairs = rows[pairs]
        pairs = _unique(pairs[n_different_bits(hashes[pairs[:, 0]], hashes[pairs[:, 1]]) <= distance], len(hashes))
        if thumbnails is not None:
            some = np.array_split(pairs, len(pairs) // _COMPARED_AT_ONCE + 1)
            pairs = pairs[np.concatenate([alike(thumbnails[one[:, 0]], thumbnails[one[:, 1]]) for one in some])]
        kept.append(pairs)
    return _unique(np.concatenate([np.empty((0, 2), dtype=np.int64), *kept]), len(hashes))


def n_different_bits(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number of bits in which hashes differ, each with its partner: (n,) and (n,) give (n,)."""
    different = np.ascontiguousarray(a ^ b).view(np.uint16).reshape(-1, _BANDS)
    bits: NDArray[np.int64] = _N_BITS[different].sum(1, dtype=np.int64)
    return bits


def alike(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether thumbnails, (n, 16, 16), correlate as near copies do with their partners, or are equal but for noise."""
    x, y = (thumbnails.reshape(len(a), SIDE * SIDE).astype(np.float32) for thumbnails in (a, b))
    equal = np.abs(x - y).max(1, initial=0) <= _FLAT
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.asarray(equal | ((x * y).sum(1) >= ALIKE * np.maximum(scale, 1e-6)))


def _candidates(hashes: NDArray[np.uint64], radius: int) -> Iterator[NDArray[np.int64]]:
    """Pairs, (n, 2), of which one of the four parts differs in `radius` bits at most; a pair may come several times."""
    for part in np.ascontiguousarray(hashes).view(np.uint16).reshape(-1, _BANDS).T:
        order = np.argsort(part, kind="stable")
        values = part[order].astype(np.int64)
        starts = np.searchsorted(values, np.arange(len(_N_BITS) + 1))  # of the rows of each value, in `order`
        for mask in np.flatnonzero(radius >= _N_BITS):
            partners = values ^ mask
            once = values <= partners  # the other way round, it would be the same pairs
            yield from _products(order[once], order, starts[partners[once]], starts[partners[once] + 1])


def _products(
    rows: NDArray[np.int64], order: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Pairs of rows[k] and each of order[starts[k] : stops[k]], some at a time, without those of a row and itself."""
    ends = np.cumsum(stops - starts)
    total = int(ends[-1]) if len(ends) else 0
    for begin in range(0, total, _AT_ONCE):
        numbers = np.arange(begin, min(begin + _AT_ONCE, total))
        which = np.searchsorted(ends, numbers, side="right")
        pairs = np.stack([rows[which], order[stops[which] - (ends[which] - numbers)]], 1)
        yield np.sort(pairs[pairs[:, 0] != pairs[:, 1]], 1)


def _unique(pairs: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Pairs (i, j) of numbers below n, each once, in rising order."""
    numbers = np.unique(pairs[:, 0] * n + pairs[:, 1])
    return np.stack([numbers // max(n, 1), numbers % max(n, 1)], 1)


def _bits_of_all() -> NDArray[np.uint8]:
    """Number of ones in each 16-bit number."""
    numbers = np.arange(1 << _BAND_BITS, dtype=np.uint16)
    bits: NDArray[np.uint8] = np.unpackbits(numbers.view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)
    return bits


_N_BITS = _bits_of_all()
