"""Small good datasets that faults are planted in, and what a case is."""

import csv
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

N_IMAGES, N_TEST, N_VERTICES = 12, 3, 6
NETWORK = ("--backbone", "test_resnet", "--weights", "none", "--size", "48", "--layers", "pooled", "--workers", "1")
Line = Sequence[str]


@dataclass(frozen=True)
class Good:
    """Folders with nothing wrong. tree : of the challenge. lab : photos and tables. work, imported : with features."""

    tree: Path
    work: Path
    lab: Path
    imported: Path


@dataclass(frozen=True)
class Case:
    """One fault. make : plants it in a new folder; the command lines to run then.

    refused : whether commands must refuse it, else they must do what was asked
    words : that the line of the refusal has
    """

    make: Callable[[Good, Path], Sequence[Line]]
    refused: bool
    words: tuple[str, ...] = ()


def build(folder: Path, run: Callable[[Line], tuple[Any, ...]]) -> Good:
    """Make all good datasets. Raises RuntimeError where a command refuses one."""
    from featcache.simulate import SimulateConfig, simulate

    def must(*line: str) -> None:
        if (done := run(line))[0]:
            raise RuntimeError(f"{' '.join(line)}: {done[1]}")

    folder.mkdir()
    good = Good(folder / "tree", folder / "work", folder / "lab", folder / "imported")
    small = SimulateConfig(
        n_subjects=2, n_train=(N_IMAGES, N_IMAGES + 1), n_test=N_TEST, n_shared=5, n_vertices=(40, 44), n_dead=2,
        image_size=32, n_reference=50, workers=1,
    )  # fmt: skip
    simulate(small, good.tree)
    shutil.rmtree(good.tree / "truth")
    must("extract", *NETWORK, "--data", str(good.tree), "--work", str(good.work))
    _write_lab(good.lab)
    must("import", *import_options(good.lab), "--work", str(good.imported), "--workers", "1")
    must("extract", *NETWORK, "--work", str(good.imported))
    return good


def _write_lab(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for name in photo_names():
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / "photos" / name)
    np.save(folder / "responses.npy", rng.normal(size=(N_IMAGES + N_TEST, N_VERTICES)).astype(np.float32))
    np.save(folder / "ceiling.npy", np.linspace(0, 80, N_VERTICES))
    np.save(folder / "roi.npy", np.arange(N_VERTICES) % 3)
    split = ["train"] * N_IMAGES + ["test"] * N_TEST
    columns = {"image": photo_names(), "key": range(N_IMAGES + N_TEST), "part": split, "run": [1] * 8 + [2] * 7}
    with (folder / "trials.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


def photo_names() -> list[str]:
    """Names of the photos of the lab, in order."""
    return [f"photo{number:02d}.png" for number in range(N_IMAGES + N_TEST)]


def import_options(lab: Path) -> list[str]:
    """Options of an import of the lab."""
    table = ("--table", str(lab / "trials.csv"), "--split-column", "part", "--id-column", "key")
    files = ("--responses", str(lab / "responses.npy"), "--ceiling", str(lab / "ceiling.npy"))
    return ["--images", str(lab / "photos"), *table, *files, "--roi", str(lab / "roi.npy")]


def copied(source: Path, target: Path) -> Path:
    """A copy whose files are links: what is changed in it must be replaced."""
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)
    return target


def written(path: Path, content: bytes | str) -> None:
    """Put a file in the place of another."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def array(path: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Put a changed array in the place of another."""
    values = change(np.load(path).copy())
    path.unlink()
    np.save(path, values)


def at(place: Any, value: Any, dtype: type | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A change of one value of an array."""

    def change(values: np.ndarray) -> np.ndarray:
        values = values if dtype is None else values.astype(dtype)
        values[place] = value
        return values

    return change


def special(path: Path, kind: str) -> None:
    """Put what is no regular file in the place of one: a pipe, a socket, a device, a folder, a link to nowhere."""
    import socket

    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else path.with_name("nowhere"))


KINDS = ("pipe", "socket", "device", "folder", "link to nowhere", "loop")
BROKEN_ARRAYS: dict[str, bytes] = {
    "empty": b"",
    "text": b"no array\n",
    "zip": b"PK\x03\x04" + bytes(60),
    "magic alone": b"\x93NUMPY\x01\x00",
    "version 9": b"\x93NUMPY\x09\x00v\x00" + bytes(120),
    "header cut off": b"\x93NUMPY\x01\x00v\x00{'descr': ('<f4', (" + b" " * 40,
    "header of other keys": b"\x93NUMPY\x01\x00\x36\x00{'descr': '<f4', 'shape': (2, 2)}"
    + b" " * 20
    + b"\n"
    + bytes(16),
}


def headed(shape: str, descr: str = "'<f4'") -> bytes:
    """A .npy file whose header says this shape and type, with 64 bytes of zeros behind it."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (117 - len(header) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
