"""Faults of the challenge's tree: its names, images, responses, masks and ceilings."""

import io
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from good_files import BROKEN_ARRAYS, KINDS, NETWORK, Case, Good, array, at, copied, headed, special, written
from PIL import Image

TRAIN, TEST = "subj01/training_split/training_images", "subj01/test_split/test_images"
RESPONSES = "subj01/training_split/training_fmri/rh_training_fmri.npy"
MASKS, CEILING = "subj01/roi_masks", "noise_ceiling/subj01/lh.npy"
Plant = Callable[[Path], object]
TREES: dict[tuple[str, str], Case] = {}
_EXTRACT = ("extract", *NETWORK)
_FIT = ("fit-heads", "--quiet")


def add(
    kind: str, name: str, plant: Plant, words: str | None, commands: Sequence[Sequence[str]] = (_FIT,), data: str = ""
) -> None:
    """Add a case: `check`, then other commands, on a tree with a fault.

    words : of the refusal, with spaces between them; None where all commands must do their work
    data : folder under the tree to give as --data
    """

    def make(good: Good, here: Path) -> list[list[str]]:
        tree, work = copied(good.tree, here / "tree"), here / "work"
        shutil.copytree(good.work, work)
        plant(tree)
        where = ("--data", str(tree / data), "--work", str(work))
        return [[*line, *where] for line in (("check", "--quiet"), *commands)]

    TREES[kind, name] = Case(make, words is not None, tuple((words or "").split()))


def image(root: Path, row: int = 3, folder: str = TRAIN) -> Path:
    """One of the images of a tree."""
    return sorted((root / folder).iterdir())[row]


def renamed(name: str, row: int = -1, folder: str = TRAIN) -> Plant:
    return lambda root: image(root, row, folder).rename(root / folder / name)


def png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def head(width: int, height: int, bits: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def put(content: bytes | Callable[[bytes], bytes]) -> Plant:
    """Put other bytes in the place of an image."""

    def plant(root: Path) -> None:
        path = image(root)
        written(path, content(path.read_bytes()) if callable(content) else content)

    return plant


def with_exif(tag: bytes) -> bytes:
    """A JPEG with a rotation flag and one more tag."""
    plain = saved(Image.new("RGB", (32, 24), (9, 99, 200)), "JPEG")
    flag = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + flag + tag + bytes(4)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


SEEN = (_EXTRACT,)
rgb = Image.fromarray(np.random.default_rng(9).integers(0, 255, (32, 32, 3), np.uint8))
PIXELS = (b"IDAT", zlib.compress(bytes(32 * 97)))
for what, content in {
    "cut off": lambda old: old[:-60],
    "empty": b"",
    "text": b"no image",
    "header alone": png([head(32, 32)]),
    "no pixels": png([head(32, 32), (b"IEND", b"")]),
    "pixels that are no zlib": png([head(32, 32), (b"IDAT", b"garbage"), (b"IEND", b"")]),
    "sides of zero": png([head(0, 0), PIXELS, (b"IEND", b"")]),
    "10^10 pixels claimed": png([head(100_000, 100_000), PIXELS, (b"IEND", b"")]),
    "2^62 pixels claimed": png([head(2**31 - 1, 2**31 - 1), PIXELS, (b"IEND", b"")]),
    "a wrong checksum": lambda old: old[:40] + bytes([old[40] ^ 1]) + old[41:],
    "colour type 9": png([head(32, 32, colour=9), PIXELS, (b"IEND", b"")]),
    "fractions": saved(Image.fromarray(np.random.default_rng(1).random((32, 32), np.float32)), "TIFF"),
    "half a JPEG": saved(rgb, "JPEG")[:300],
    "an archive": b"PK\x03\x04" + bytes(99),
    "a HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}.items():
    add("images", what, put(content), "train-0004 decoded", SEEN)
for what, content in {
    "JPEG called PNG": saved(rgb, "JPEG"),
    "16 bits": saved(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60), "PNG"),
    "RGBA": saved(rgb.convert("RGBA"), "PNG"),
    "palette": saved(rgb.convert("P"), "PNG"),
    "CMYK": saved(rgb.convert("CMYK"), "JPEG"),
    "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"),
    "1 x 3000": saved(Image.new("RGB", (1, 3000), (3, 4, 5)), "PNG"),
    "animation": saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
    "XMP as ASCII": with_exif(struct.pack("<HHI4s", 0x02BC, 2, 3, b"ab\0\0")),
    "ResolutionUnit as BYTE": with_exif(struct.pack("<HHI4s", 0x0128, 1, 1, b"\x02\0\0\0")),
    "an IFD that is not there": with_exif(struct.pack("<HHII", 0x8769, 4, 1, 60_000)),
}.items():
    add("images", what, put(content), None, SEEN)
for what in KINDS:
    add("images", what, lambda root, what=what: special(image(root), what), "train-0004", SEEN)


def swap_ids(root: Path) -> None:
    """Give one picture of subject 2 the id of another picture of subject 1."""
    mine = image(root, 0, "subj02/training_split/training_images")
    other = next(p for p in sorted((root / TRAIN).iterdir()) if not list(root.glob(f"subj02/*/*/*{p.name[-9:]}")))
    mine.rename(mine.with_name(mine.name[:15] + other.name[15:]))


def copy_into_test(root: Path) -> None:
    path = image(root, 0, TEST)
    written(path, image(root, 2).read_bytes())


def test_id_of_train(root: Path) -> None:
    trained, tested = image(root, 0), image(root, 0, TEST)
    written(tested, trained.read_bytes())
    tested.rename(tested.with_name(tested.name[:14] + trained.name[15:]))


for what, plant, words in (
    ("a number of 11 digits", renamed("train-20230001000_nsd-00013.png"), "training_images missing"),
    ("a number of 30 digits", renamed(f"train-{10**30}_nsd-00013.png"), f"train-{10**30}"),
    ("an id of 25 digits", renamed(f"train-0012_nsd-{10**24}.png"), f"nsd-{10**24} name"),
    ("number 0", renamed("train-0000_nsd-00013.png"), "training_images numbered from"),
    ("a gap", lambda root: image(root, 5).unlink(), "training_images 1 missing: 6"),
    ("two images of one number", renamed("train-0001_nsd-70001.png"), "number 1 in"),
    ("two images of one id", lambda root: renamed(f"train-0012{image(root, 0).name[10:]}")(root), "id once 1 more"),
    ("an id in training and test", test_id_of_train, "subj01 training or test 1 in both"),
    ("a picture in training and test", copy_into_test, "subj01 picture training or test 1"),
    ("one id of two pictures", swap_ids, "one picture for each image id"),
    ("digits of another script", renamed("train-\u0661\u0662_nsd-00013.png"), "training_images name"),
    ("digits of full width", renamed("train-0012_nsd-\uff11\uff13.png"), "training_images name"),
    ("another name", renamed("photo.png"), "photo.png name such as"),
    ("another ending", renamed("train-0012_nsd-00013.bmp"), "train-0012_nsd-00013.bmp name"),
    ("test among training", renamed("test-0012_nsd-00013.png"), "test-0012 name"),
    ("a line break", renamed("train-0012_nsd-00013\n.png"), "training_images name"),
    ("bytes that are no UTF-8", lambda root: os.rename(
        os.fsencode(image(root, -1)), os.fsencode(root / TRAIN) + b"/train-\xff.png"), "training_images name"),
    ("a minus", renamed("train--012_nsd-00013.png"), "train--012 name"),
    ("a folder among images", lambda root: (root / TRAIN / "more").mkdir(), "more name such as"),
    ("no folder of training images", lambda root: shutil.rmtree(root / TRAIN), "training_images folder none"),
    ("no folder of test images", lambda root: shutil.rmtree(root / TEST), "test_images folder none"),
    ("no training images", lambda root: [p.unlink() for p in (root / TRAIN).iterdir()], "training_images empty"),
    ("no test images", lambda root: [p.unlink() for p in (root / TEST).iterdir()], "test_images empty"),
    ("the last image missing", lambda root: image(root, -1).unlink(), "training_fmri a row for each of 11"),
    ("an image more", lambda root: shutil.copy(image(root), root / TRAIN / "train-0013_nsd-70001.png"), "13 12 rows"),
):  # fmt: skip
    add("names of images", what, plant, words, () if "picture in training" in what else (_FIT,))
for what in ("Thumbs.db", ".DS_Store", "desktop.ini", "._train-0001_nsd-00001.png"):
    add("names of images", what, lambda root, what=what: written(root / TRAIN / what, b"x"), None)
add(
    "names of images", "capital letters", lambda root: renamed(image(root, -1).name.replace(".png", ".PNG"))(root), None
)

for what, plant, words, data in (
    ("subj1 beside subj01", lambda root: (root / "subj1").symlink_to(root / "subj01"), "subj1 that number", ""),
    ("subj001 beside subj01", lambda root: copied(root / "subj01", root / "subj001"), "one more of that number", ""),
    ("digits of another script", lambda root: copied(root / "subj01", root / "subj\u0660\u0663"), "digits from 0", ""),
    ("digits of full width", lambda root: copied(root / "subj01", root / "subj\uff10\uff13"), "digits from 0", ""),
    ("a number of 20 digits", lambda root: copied(root / "subj01", root / f"subj{10**20}"), "digits from 0", ""),
    ("an empty third subject", lambda root: (root / "subj03").mkdir(), "subj03 none", ""),
    ("no training split", lambda root: shutil.rmtree(root / "subj02/training_split"), "subj02 training_images", ""),
    ("no subjects", lambda root: [shutil.rmtree(p) for p in root.glob("subj*")], "folders subj01 found none", ""),
    ("the folder of one subject", lambda root: None, "the folder of one subject", "subj01"),
    ("a folder that is not there", lambda root: None, "nowhere", "nowhere"),
    ("a file for a folder", lambda root: written(root / "file", b"x"), "file", "file"),
    ("a pipe for a folder", lambda root: os.mkfifo(root / "pipe"), "pipe", "pipe"),
    ("no name of a device", lambda root: (root / "zero").symlink_to("/dev/zero"), "zero", "zero"),
):
    add("subjects", what, plant, words, data=data)
for what in ("a file called subj03", "a link to nowhere", "a link to itself"):
    kind = {"a link to itself": "loop", "a link to nowhere": "nowhere"}.get(what)
    make = lambda root, kind=kind: special(root / "subj03", kind) if kind else written(root / "subj03", b"")  # noqa: E731  # noqa: E501
    add("subjects", what, make, None)
add("subjects", "another folder", lambda root: copied(root / "subj01", root / "subj01_old"), None)

for what, content in BROKEN_ARRAYS.items():
    add("responses", what, lambda root, content=content: written(root / RESPONSES, content), "rh_training_fmri .npy")
for shape in (
    "(-12, 44)",
    "(2**63, 44)",
    f"({2**63}, 44)",
    "(12, 10**9)",
    f"({10**12}, {10**12})",
    "(12, 44.0)",
    "'x'",
    "()",
):
    add(
        "responses",
        f"shape {shape}",
        lambda root, shape=shape: written(root / RESPONSES, headed(shape)),
        "rh_training_fmri",
    )
for descr in ("'O'", "'<M8[D]'", "'<c8'", "'<U3'", "[('a', '<f4')]", "'<f3'", "'V4'", "'<f4' * 10**9"):
    add(
        "responses",
        f"type {descr}",
        lambda root, descr=descr: written(root / RESPONSES, headed("(4, 4)", descr)),
        "rh_training",
    )
for what in KINDS:
    add("responses", what, lambda root, what=what: special(root / RESPONSES, what), "rh_training_fmri")
for what, change, words in (
    ("one dimension", lambda a: a[:, 0], "rh_training_fmri 2 dimension"),
    ("three dimensions", lambda a: a[..., None], "rh_training_fmri 2 dimension"),
    ("a row fewer", lambda a: a[:-1], "a row for each of 12 11"),
    ("a row more", lambda a: np.vstack([a, a[:1]]), "a row for each of 12 13"),
    ("transposed", lambda a: a.T, "a row for each of 12 44"),
    ("no vertices", lambda a: a[:, :0], "subj01/roi_masks"),
    ("NaN", at((3, 4), np.nan), "rh_training_fmri nan row 3, vertex 4"),
    ("infinity", at((11, 0), np.inf), "rh_training_fmri inf row 11, vertex 0"),
    ("minus infinity", at((0, 0), -np.inf), "rh_training_fmri -inf row 0, vertex 0"),
    ("10^16", at((5, 6), 1e16), "rh_training_fmri row 5, vertex 6"),
    ("10^37", at((5, 6), -1e37), "rh_training_fmri row 5, vertex 6"),
    ("10^300", at((5, 6), 1e300, np.float64), "rh_training_fmri row 5, vertex 6"),
    ("2^63", lambda a: at((5, 6), 2**63)(np.abs(a * 9).astype(np.uint64)), "rh_training_fmri row 5, vertex 6"),
    ("-2^63", at((5, 6), -(2**63), np.int64), "rh_training_fmri row 5, vertex 6"),
    ("a column of NaN", at((slice(None), 4), np.nan), "rh_training_fmri nan row 0, vertex 4"),
    ("a row of NaN", at(7, np.nan), "rh_training_fmri nan row 7, vertex 0"),
    ("all NaN", lambda a: a * np.nan, "rh_training_fmri nan row 0, vertex 0"),
    ("float16 infinity", at((1, 1), np.inf, np.float16), "rh_training_fmri inf row 1, vertex 1"),
):
    add("responses", what, lambda root, change=change: array(root / RESPONSES, change), words)
for what, change in {
    "big-endian": lambda a: a.astype(">f4"),
    "columns first": np.asfortranarray,
    "float64": lambda a: a.astype(np.float64),
    "float16": lambda a: a.astype(np.float16),
    "whole numbers": lambda a: (a * 100).astype(np.int16),
    "true and false": lambda a: a > 0,
    "one constant vertex": at((slice(None), 4), 7.0),
    "10^5 at one": at((2, 2), 1e5),
}.items():
    add("responses", what, lambda root, change=change: array(root / RESPONSES, change), None)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/opened-by-a-pickle",)


def mapping(value: object) -> Plant:
    """Put another object where names of labels are pickled."""
    return lambda root: np.save(
        _gone(root / MASKS / "mapping_streams.npy"), np.array(value, dtype=object), allow_pickle=True
    )


def _gone(path: Path) -> Path:
    path.unlink()
    return path


def deep() -> bytes:
    """A 0-d object array whose pickle is 20,000 lists inside each other."""
    return headed("()", "'|O'")[:-64] + b"]" * 20_000 + b"a" * 19_999 + b"."


LABELS = f"{MASKS}/lh.streams_challenge_space.npy"
ALL, OTHER = f"{MASKS}/lh.all-vertices_fsaverage_space.npy", f"{MASKS}/lh.streams_fsaverage_space.npy"
for what, plant, words in (
    ("mask of other vertices", lambda root: array(root / ALL, lambda a: np.zeros_like(a)), "all-vertices 40 ones"),
    ("mask of another length", lambda root: array(root / ALL, lambda a: a[:-1]), "all-vertices 163842"),
    ("mask with a 2", lambda root: array(root / ALL, at(0, 2)), "all-vertices zeros and ones"),
    ("mask with NaN", lambda root: array(root / ALL, at(0, np.nan, np.float32)), "all-vertices zeros and ones"),
    ("mask of two dimensions", lambda root: array(root / ALL, lambda a: a[None]), "all-vertices 1 dimension"),
    ("empty mask", lambda root: written(root / ALL, b""), "all-vertices"),
    ("labels too few", lambda root: array(root / LABELS, lambda a: a[:-1]), "lh.streams 40 39"),
    ("labels of two dimensions", lambda root: array(root / LABELS, lambda a: a[None]), "lh.streams 1 dimension"),
    ("a label without a name", lambda root: array(root / LABELS, at(0, 99)), "lh.streams mapping_streams.npy 99"),
    ("a negative label", lambda root: array(root / LABELS, at(0, -1, np.int32)), "lh.streams -1"),
    ("a label of NaN", lambda root: array(root / LABELS, at(0, np.nan, np.float32)), "lh.streams nan"),
    ("a label and a half", lambda root: array(root / LABELS, at(0, 1.5, np.float32)), "lh.streams 1.5"),
    ("labels as text", lambda root: array(root / LABELS, lambda a: a.astype(str)), "lh.streams"),
    ("labels of fsaverage too few", lambda root: array(root / OTHER, lambda a: a[:-1]), "lh.streams 163841"),
    ("no names", lambda root: _gone(root / MASKS / "mapping_streams.npy"), "mapping_streams no file"),
    ("names as text", lambda root: written(root / MASKS / "mapping_streams.npy", b"x"), "mapping_streams else"),
    ("names as a list", mapping(["early"]), "mapping_streams else"),
    ("names as numbers", mapping({1: 2}), "mapping_streams else"),
    ("labels that are text", mapping({"1": "early"}), "mapping_streams else"),
    ("names of a trap", mapping({1: _Trap()}), "mapping_streams never needs"),
    ("names of one label missing", mapping({0: "Unknown", 1: "early"}), "streams labels"),
    ("two labels of one name", mapping({i: "early" for i in range(1, 8)}), "mapping_streams a name once"),
    ("names without an end", lambda root: written(root / MASKS / "mapping_streams.npy", deep()), "streams else"),
    ("too many names", mapping({i: f"{i}" * 30 for i in range(5000)}), "mapping_streams bytes"),
    ("names cut off", lambda root: written(root / MASKS / "mapping_streams.npy",
        (root / MASKS / "mapping_streams.npy").read_bytes()[:-9]), "mapping_streams else"),
    ("a pickle alone", lambda root: written(root / MASKS / "mapping_streams.npy", pickle.dumps({1: "early"})), "else"),
    ("an ROI in two classes", mapping({i: f"V{i}v" for i in range(8)}), "roi_masks in one class"),
):  # fmt: skip
    add("masks", what, plant, words)
for what in KINDS:
    for name in (LABELS, f"{MASKS}/mapping_streams.npy"):
        words = f"{name.rpartition('/')[2]}"
        add("masks", f"{what} for {words}", lambda root, what=what, name=name: special(root / name, what), words)


def no_vertices(root: Path) -> None:
    """A right hemisphere without a vertex, as of a patient of whom one hemisphere was recorded."""
    array(root / RESPONSES, lambda a: a[:, :0])
    for path in (root / MASKS).glob("rh.*_challenge_space.npy"):
        array(path, lambda a: a[:0])
    for path in (root / MASKS).glob("rh.*fsaverage_space.npy"):
        array(path, np.zeros_like)
    array(root / "noise_ceiling/subj01/rh.npy", lambda a: a[:0])


_ALL = (_FIT, ("blend", "--quiet"), ("scores", "--quiet"))
add("responses", "a hemisphere without vertices", no_vertices, None, _ALL)
add("masks", "none", lambda root: shutil.rmtree(root / MASKS), None)
add("masks", "labels as floats", lambda root: array(root / LABELS, lambda a: a.astype(np.float64)), None)

for what, change, words in (
    ("NaN", at(2, np.nan), "lh.npy ceilings nan vertex 2"),
    ("infinity", at(2, np.inf), "lh.npy ceilings inf vertex 2"),
    ("101", at(2, 101), "lh.npy 0 to 100 101 vertex 2"),
    ("below 0", at(2, -3), "lh.npy 0 to 100 -3 vertex 2"),
    ("fractions beside percent", lambda a: a / 100, "lh.npy percent fractions"),
    ("another length", lambda a: a[:-1], "lh.npy 40 vertices 39"),
    ("two dimensions", lambda a: a[None], "lh.npy 1 dimension"),
    ("text", lambda a: a.astype(str), "lh.npy 1 dimension(s) of numbers"),
    ("complex", lambda a: a * 1j, "lh.npy numbers"),
    ("10^300", at(2, 1e300, np.float64), "lh.npy vertex 2"),
):
    add("ceilings", what, lambda root, change=change: array(root / CEILING, change), words)


def every_ceiling(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    return lambda root: [array(path, change) for path in (root / "noise_ceiling").glob("*/*.npy")]


def ncsnr(values: np.ndarray) -> np.ndarray:
    return np.linspace(0, 2.4, len(values))


add("ceilings", "ncsnr", every_ceiling(ncsnr), "ceilings from 0 to 1 ncsnr are no ceilings")
add("ceilings", "fractions up to 1.02", every_ceiling(lambda a: at(0, 1.02)(a / 100)), "0 to 1 1.02 vertex 0")
add("ceilings", "all NaN", every_ceiling(lambda a: a * np.nan), "ceilings nan")
for what, content in BROKEN_ARRAYS.items():
    add("ceilings", what, lambda root, content=content: written(root / CEILING, content), "lh.npy .npy")
for what in KINDS:
    add(
        "ceilings",
        what,
        lambda root, what=what: special(root / CEILING, what),
        None if "link" in what or what == "loop" else "lh.npy",
    )
add("ceilings", "fractions", every_ceiling(lambda a: a / 100), None)
add("ceilings", "all zero", every_ceiling(np.zeros_like), None)
add("ceilings", "none", lambda root: shutil.rmtree(root / "noise_ceiling"), None)
add(
    "ceilings",
    "of a subject more",
    lambda root: copied(root / "noise_ceiling/subj01", root / "noise_ceiling/subj09"),
    None,
)
