"""Faults of what `import` reads, and of the subjects that it wrote."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from good_files import (
    BROKEN_ARRAYS,
    KINDS,
    N_IMAGES,
    N_TEST,
    Case,
    Good,
    array,
    at,
    copied,
    headed,
    import_options,
    special,
    written,
)

N = N_IMAGES + N_TEST
Plant = Callable[[Path], object]
IMPORTS: dict[tuple[str, str], Case] = {}


def add(kind: str, name: str, plant: Plant, words: str | None, *more: str) -> None:
    """Add an import of a lab with a fault.

    more : options that take the place of those of their names; LAB stands for the folder of the lab
    """

    def make(good: Good, here: Path) -> list[list[str]]:
        lab = copied(good.lab, here / "lab")
        plant(lab)
        said = [one.replace("LAB", str(lab)) for one in more]
        usual = import_options(lab)
        pairs = [usual[k : k + 2] for k in range(0, len(usual), 2) if usual[k] not in said]
        return [
            ["import", *(one for pair in pairs for one in pair), *said, "--work", str(here / "work"), "--workers", "1"]
        ]

    IMPORTS[kind, name] = Case(make, words is not None, tuple((words or "").split()))


def cells(change: Callable[[list[list[str]]], object]) -> Plant:
    """Change the rows of the table of trials, of which the first has the names."""

    def plant(lab: Path) -> None:
        with (lab / "trials.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        change(rows)
        written(lab / "trials.csv", "\n".join(map(",".join, rows)))

    return plant


def cell(row: int, column: int, value: str) -> Plant:
    return cells(lambda rows: rows[row].__setitem__(column, value))


def text(change: Callable[[bytes], bytes]) -> Plant:
    return lambda lab: written(lab / "trials.csv", change((lab / "trials.csv").read_bytes()))


for what, plant, words in (
    ("empty", text(lambda t: b""), "trials.csv 0 bytes"),
    ("names alone", text(lambda t: t.splitlines()[0]), "trials.csv none"),
    ("no names", cells(lambda rows: rows.pop(0)), "trials.csv column"),
    ("another name", cell(0, 0, "picture"), "trials.csv 'image'"),
    ("two columns of one name", cell(0, 1, "image"), "trials.csv two of the name"),
    ("a column without a name", cell(0, 3, ""), "trials.csv column 4"),
    ("a cell too few", cells(lambda rows: rows[4].pop()), "trials.csv line 5"),
    ("a cell too many", cells(lambda rows: rows[4].append("9")), "trials.csv line 5"),
    ("a row too few", cells(lambda rows: rows.pop()), "trials.csv 15 14"),
    ("a row too many", cells(lambda rows: rows.append(rows[-1])), "trials.csv 15 16"),
    ("an open quote", cell(3, 0, '"photo02.png'), "trials.csv"),
    ("a NUL", cell(3, 0, "photo\0.png"), "trials.csv"),
    ("Latin-1", text(lambda t: "image\né\n".encode("latin-1")), "trials.csv UTF-8"),
    ("UTF-16", text(lambda t: t.decode().encode("utf-16")), "trials.csv"),
    ("a cell of 10 MB", cell(3, 3, "9" * 10_000_000), "trials.csv"),
    ("no image in a row", cell(5, 0, ""), "column image row 5"),
    ("an image that is not there", cell(5, 0, "no.png"), "column image no.png"),
    ("an image above the folder", cell(5, 0, "../../../../etc/passwd"), "passwd"),
    ("a name too long", cell(5, 0, "x" * 5000), "trials.csv column image"),
    ("no id in a row", cell(5, 1, ""), "column key row 5"),
    ("an id of 20 digits", cell(5, 1, str(2**63)), f"column key {2**63}"),
    ("an id of 5,000 digits", cell(5, 1, "9" * 5000), "column key 5000"),
    ("one id of two pictures", cell(5, 1, "0"), "id of two pictures"),
    ("another split", cell(5, 2, "dev"), "column part 'dev'"),
    ("no split in a row", cell(5, 2, ""), "column part ''"),
    ("all in test", cells(lambda rows: [row.__setitem__(2, "test") for row in rows[1:]]), "training images"),
    ("one image alone", cells(lambda rows: [r.__setitem__(slice(3), rows[1][:3]) for r in rows[2:]]), "training images"),  # noqa: E501
    ("a picture in both splits", cells(lambda rows: rows[-1].__setitem__(slice(0, 2), rows[1][:2])), "1 in both"),
    ("another ending", lambda lab: (lab / "trials.csv").rename(lab / "trials.xlsx"), "trials.csv"),
):  # fmt: skip
    add("tables", what, plant, words)
for what in KINDS:
    add("tables", what, lambda lab, what=what: special(lab / "trials.csv", what), "trials.csv")
for what, plant, more in (
    ("byte order mark", text(lambda t: b"\xef\xbb\xbf" + t), ()),
    ("semicolons", text(lambda t: t.replace(b",", b";")), ()),
    ("blank lines", text(lambda t: t.replace(b"\n", b"\n\n")), ()),
    ("line ends of Windows", text(lambda t: t.replace(b"\r", b"").replace(b"\n", b"\r\n")), ()),
    ("ids with a fraction of zero", cells(lambda rows: [r.__setitem__(1, r[1] + ".0") for r in rows[1:]]), ()),
    ("ids that are names", cells(lambda rows: [r.__setitem__(1, "n" + r[1]) for r in rows[1:]]), ()),
    ("digits of another script as names", cell(5, 1, "\u0661\u0662"), ()),
    ("ids below 0 as names", cell(5, 1, "-5"), ()),
    ("capital words of the split", text(lambda t: t.replace(b"train", b"TRAIN")), ()),
    ("sessions", lambda lab: None, ("--session-column", "run")),
):
    add("tables", what, plant, None, *more)
add("tables", "a session of one trial", cell(1, 3, "9"), "session", "--session-column", "run")
add("tables", "a session that is empty", cell(2, 3, ""), "column run row 2", "--session-column", "run")
add("tables", "an unknown column", lambda lab: None, "trials.csv 'runs'", "--session-column", "runs")
add("tables", "missing", lambda lab: None, "none.csv", "--table", "LAB/none.csv")

RESPONSES = "responses.npy"
for what, content in BROKEN_ARRAYS.items():
    for name in (RESPONSES, "ceiling.npy", "roi.npy"):
        add("arrays", f"{what} for {name}", lambda lab, c=content, name=name: written(lab / name, c), name)
for what in KINDS:
    for name in (RESPONSES, "ceiling.npy", "roi.npy"):
        add("arrays", f"{what} for {name}", lambda lab, what=what, name=name: special(lab / name, what), name)
for shape in ("(-15, 6)", f"({2**63}, 6)", "(15, 10**9)", f"({10**12}, {10**12})"):
    add("arrays", f"shape {shape}", lambda lab, shape=shape: written(lab / RESPONSES, headed(shape)), RESPONSES)
for what, change, words in (
    ("one dimension", lambda a: a[:, 0], "responses.npy 2 dimension"),
    ("three dimensions", lambda a: a[..., None], "responses.npy 2 dimension"),
    ("transposed", lambda a: a.T, "trials.csv 6 rows 15"),
    ("NaN", at((3, 4), np.nan), "responses nan trial 3, vertex 4"),
    ("infinity", at((3, 4), np.inf), "responses inf trial 3, vertex 4"),
    ("10^300", at((3, 4), 1e300, np.float64), "responses trial 3, vertex 4"),
    ("10^37", at((3, 4), 1e37), "responses trial 3, vertex 4"),
    ("complex", lambda a: a * 1j, "responses.npy complex"),
    ("text", lambda a: a.astype(str), "responses.npy text"),
    ("no vertices", lambda a: a[:, :0], "responses.npy"),
    ("no rows", lambda a: a[:0], "responses.npy"),
    ("all alike", lambda a: a * 0 + 3, "responses differ"),
    ("dates", lambda a: a.astype("M8[D]"), "responses.npy dates"),
):
    add("arrays", what, lambda lab, change=change: array(lab / RESPONSES, change), words)
for what, change in {
    "big-endian": lambda a: a.astype(">f8"),
    "columns first": np.asfortranarray,
    "whole numbers": lambda a: (a * 100).astype(np.int32),
    "reversed": lambda a: a[::-1],
    "one constant vertex": at((slice(None), 2), 1.0),
}.items():
    add("arrays", what, lambda lab, change=change: array(lab / RESPONSES, change), None)


def csv_of(values: np.ndarray, header: str = "") -> bytes:
    return (header + "\n".join(",".join(map(str, row)) for row in values.tolist())).encode()


def as_csv(change: Callable[[bytes], bytes], name: str = "r.csv") -> Plant:
    return lambda lab: written(lab / name, change(csv_of(np.load(lab / RESPONSES))))


for what, change, words in (
    ("a word", lambda t: t.replace(b"-", b"minus", 1), "r.csv"),
    ("a row cut off", lambda t: t[: t.rindex(b",")], "r.csv"),
    ("an empty cell", lambda t: t.replace(b",", b",,", 1), "r.csv"),
    ("a NUL", lambda t: t[:50] + b"\0" + t[50:], "r.csv"),
    ("no numbers", lambda t: b"a,b\nc,d\n", "r.csv"),
    ("NaN", lambda t: b"nan" + t[t.index(b",") :], "nan trial 0, vertex 0"),
    ("10^400", lambda t: b"1e400" + t[t.index(b",") :], "inf trial 0, vertex 0"),
    ("a column of ids", lambda t: csv_of(np.ones((N, 3)), "id,a,b\n"), "r.csv column 'id'"),
    ("a row too few", lambda t: t[: t.rindex(b"\n")], "trials.csv 14 15"),
):
    add("arrays", f"CSV, {what}", as_csv(change), words, "--responses", "LAB/r.csv")
add("arrays", "CSV, whole", as_csv(lambda t: t), None, "--responses", "LAB/r.csv")
add("arrays", "TSV, whole", as_csv(lambda t: t.replace(b",", b"\t"), "r.tsv"), None, "--responses", "LAB/r.tsv")


def as_mat(change: Callable[[bytes], bytes], **arrays: Any) -> Plant:
    def plant(lab: Path) -> None:
        from scipy import io

        io.savemat(lab / "r.mat", {"betas": np.load(lab / RESPONSES)} | arrays)
        written(lab / "r.mat", change((lab / "r.mat").read_bytes()))

    return plant


for what, plant, words, name in (
    ("cut off", as_mat(lambda b: b[:200]), "r.mat", "r.mat"),
    ("empty", as_mat(lambda b: b""), "r.mat 0 bytes", "r.mat"),
    ("text", as_mat(lambda b: b"text" * 60), "r.mat", "r.mat"),
    ("two arrays", as_mat(lambda b: b, other=np.ones((3, 3))), "r.mat betas", "r.mat"),
    ("no such array", as_mat(lambda b: b), "r.mat 'beta'", "r.mat:beta"),
    ("an array of text", as_mat(lambda b: b, name="abc"), "r.mat", "r.mat:name"),
):
    add("arrays", f"MATLAB, {what}", plant, words, "--responses", f"LAB/{name}")
add("arrays", "MATLAB, whole", as_mat(lambda b: b), None, "--responses", "LAB/r.mat")

for what, plant, words, more in (
    ("ncsnr by its name", lambda lab: (lab / "ceiling.npy").rename(lab / "ncsnr.npy"), "ncsnr.npy --ncsnr", ("--ceiling", "LAB/ncsnr.npy")),  # noqa: E501
    ("ncsnr by its values", lambda lab: array(lab / "ceiling.npy", lambda a: a / 35), "ceiling.npy ncsnr are no ceilings", ()),  # noqa: E501
    ("NaN", lambda lab: array(lab / "ceiling.npy", at(2, np.nan)), "ceiling.npy nan vertex 2", ()),
    ("above 100", lambda lab: array(lab / "ceiling.npy", at(2, 100.5)), "ceiling.npy 100.5 vertex 2", ()),
    ("below 0", lambda lab: array(lab / "ceiling.npy", at(2, -1)), "ceiling.npy -1 vertex 2", ()),
    ("another length", lambda lab: array(lab / "ceiling.npy", lambda a: a[1:]), "ceiling.npy 6 5", ()),
    ("text", lambda lab: array(lab / "ceiling.npy", lambda a: a.astype(str)), "ceiling.npy text", ()),
    ("an unknown surface", lambda lab: None, "--ceiling NAME=FILE V1", ("--ceiling", "V1=LAB/ceiling.npy")),
    ("ROI of another length", lambda lab: array(lab / "roi.npy", lambda a: a[1:]), "roi.npy 6 5", ()),
    ("ROI of halves", lambda lab: array(lab / "roi.npy", lambda a: a / 2), "roi.npy 0.5", ()),
    ("ROI of NaN", lambda lab: array(lab / "roi.npy", lambda a: a * np.nan), "roi.npy nan", ()),
    ("ROI of 10^300", lambda lab: array(lab / "roi.npy", at(0, 1e300, np.float64)), "roi.npy", ()),
    ("ROI table of another length", lambda lab: written(lab / "roi.csv", "V1,V2\n1,0\n"), "roi.csv 6 1", ("--roi", "LAB/roi.csv")),  # noqa: E501
    ("ROI table of numbers twice", lambda lab: written(lab / "roi.csv", "index,V1\n" + "0,1\n" * 6), "roi.csv", ("--roi", "LAB/roi.csv")),  # noqa: E501
    ("ROI table of huge numbers", lambda lab: written(lab / "roi.csv", "index,V1\n" + "".join(f"{'9' * 5000},1\n" for _ in range(6))),  # noqa: E501
     "roi.csv", ("--roi", "LAB/roi.csv")),
):  # fmt: skip
    add("ceilings and ROIs", what, plant, words, *more)
add("ceilings and ROIs", "fractions", lambda lab: array(lab / "ceiling.npy", lambda a: a / 100), None)
add("ceilings and ROIs", "percent below 1, said", lambda lab: array(lab / "ceiling.npy", lambda a: a / 90), None)

PHOTO = "photos/photo03.png"
for what, plant, words in (
    ("cut off", lambda lab: written(lab / PHOTO, (lab / PHOTO).read_bytes()[:99]), "photo03.png decoded"),
    ("empty", lambda lab: written(lab / PHOTO, b""), "photo03.png decoded"),
    ("text", lambda lab: written(lab / PHOTO, b"x"), "photo03.png decoded"),
    ("no folder", lambda lab: shutil.rmtree(lab / "photos"), "photos"),
    ("two alike under two ids", lambda lab: written(lab / PHOTO, (lab / "photos/photo04.png").read_bytes()), "photo0"),
    *((kind, lambda lab, kind=kind: special(lab / PHOTO, kind), "photo03.png") for kind in KINDS),
):
    add("photos", what, plant, None if "alike" in what else words)
for name in ("../x", "..", ".", "", "a/b", "/tmp/x", "x" * 300, "a\0b", "a\nb", " ", "-", "con:", "subj01/../../x"):
    add("names of subjects", repr(name[:20]), lambda lab: None, "name of a subject", "--subject", name)
for name in ("1", "monkey A", "Zoë", "\u0663", "9" * 30):
    add("names of subjects", repr(name), lambda lab: None, None, "--subject", name)
for surface in ("../lh", "a/b", "x" * 99):
    add("names of surfaces", surface[:9], lambda lab: None, "", "--responses", f"{surface}=LAB/responses.npy")


def imported(kind: str, name: str, plant: Plant, words: str | None) -> None:
    """Add a case of a subject that was imported, with a fault since.

    It has no checksums, as of an earlier version: with them, every other file is refused for being another.
    """

    def make(good: Good, here: Path) -> list[list[str]]:
        work = here / "work"
        shutil.copytree(good.imported, work)
        without_checksums(work / "dataset/subj01/subject.json")
        plant(work / "dataset/subj01")
        return [[*line, "--quiet", "--work", str(work)] for line in (("check",), ("fit-heads", "--folds", "2"))]

    IMPORTS[kind, name] = Case(make, words is not None, tuple((words or "").split()))


def without_checksums(path: Path) -> None:
    """Make the record of a subject one of an earlier version."""
    said = json.loads(path.read_text())
    del said["files"], said["digest"]
    written(path, json.dumps(said))


def record(change: Callable[[dict[str, Any]], object]) -> Plant:
    def plant(folder: Path) -> None:
        said = json.loads((folder / "subject.json").read_text())
        change(said)
        written(folder / "subject.json", json.dumps(said))

    return plant


def listed(change: Callable[[list[list[str]]], object]) -> Plant:
    def plant(folder: Path) -> None:
        with (folder / "images.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        change(rows)
        written(folder / "images.csv", "\n".join(map(",".join, rows)))

    return plant


def set_to(row: int, column: int, value: str) -> Plant:
    return listed(lambda rows: rows[row].__setitem__(column, value))


for what, plant in {
    "empty": lambda f: written(f / "subject.json", b""),
    "text": lambda f: written(f / "subject.json", b"x"),
    "a list": lambda f: written(f / "subject.json", b"[]"),
    "40,000 levels": lambda f: written(f / "subject.json", b"[" * 40_000),
    "bytes": lambda f: written(f / "subject.json", b"\xff\xfe\x00"),
    "another format": record(lambda r: r.update(format=2)),
    "another name": record(lambda r: r.update(name="subj02")),
    "no surfaces": record(lambda r: r.update(surfaces={})),
    "surfaces as a list": record(lambda r: r.update(surfaces=["all"])),
    "a surface above the folder": record(lambda r: r.update(surfaces={"../all": {"rois": []}})),
    "ROIs as a number": record(lambda r: r["surfaces"]["all"].update(rois=3)),
    "ROIs as numbers": record(lambda r: r["surfaces"]["all"].update(rois=[3])),
    "a grid of text": record(lambda r: r["surfaces"]["all"].update(grid="x")),
    "a grid of zeros": record(
        lambda r: r["surfaces"]["all"].update(grid={"shape": [2, 2, 2], "affine": [[0] * 4] * 4})
    ),
    **{kind: (lambda f, kind=kind: special(f / "subject.json", kind)) for kind in ("pipe", "device", "folder")},
}.items():
    imported("subject.json", what, plant, "subject.json")
for what, plant, words in (
    ("empty", lambda f: written(f / "images.csv", b""), "images.csv"),
    ("missing", lambda f: (f / "images.csv").unlink(), "images.csv"),
    ("another name of a column", set_to(0, 1, "key"), "images.csv"),
    ("a cell too few", listed(lambda rows: rows[3].pop()), "images.csv"),
    ("a NUL", set_to(3, 2, "a\0b"), ""),
    ("bytes", lambda f: written(f / "images.csv", b"\xff\xfe\x00"), "images.csv"),
    ("an id below 0", set_to(3, 1, "-1"), "images.csv -1"),
    ("an id of 20 digits", set_to(3, 1, str(10**19)), "images.csv"),
    ("an id of 5,000 digits", set_to(3, 1, "9" * 5000), "images.csv"),
    ("an id that is text", set_to(3, 1, "x"), "images.csv"),
    ("an id twice", listed(lambda rows: rows[3].__setitem__(1, rows[2][1])), "images.csv more than once"),
    ("an id in both splits", listed(lambda rows: rows[-1].__setitem__(1, rows[2][1])), "images.csv 1 in both"),
    ("another split", set_to(3, 0, "dev"), "images.csv"),
    ("a row too few", listed(lambda rows: rows.pop(3)), "all.npy 11"),
    ("a file that is not there", set_to(3, 2, "/nowhere/a.png"), "subj01 /nowhere/a.png"),
    ("a row of an array that is text", set_to(3, 4, "x"), "images.csv"),
    ("a row of an array that is none", set_to(3, 4, "5"), "photo"),
    *((kind, lambda f, kind=kind: special(f / "images.csv", kind), "images.csv") for kind in ("pipe", "device")),
):
    imported("images.csv", what, plant, words)
for part, name in (("responses", "responses/all.npy"), ("test", "test_responses/all.npy"), ("rois", "rois/all.npy"),
                   ("ceiling", "noise_ceiling/all.npy")):  # fmt: skip
    for what, plant in {
        "empty": lambda f, name=name: written(f / name, b""),
        "cut off": lambda f, name=name: written(f / name, (f / name).read_bytes()[:-3]),
        "another shape": lambda f, name=name: array(f / name, lambda a: a[..., :-1]),
        "another type": lambda f, name=name: array(f / name, lambda a: a.astype("U4")),
        "pipe": lambda f, name=name: special(f / name, "pipe"),
        "a header of another size": lambda f, name=name: written(f / name, headed(f"({2**63}, 6)")),
    }.items():
        if part != "test":
            imported(
                "arrays of a subject",
                f"{what} for {name}",
                plant,
                f"{name}" if (part, what) != ("responses", "another shape") else "all",
            )
for what, name, change, words in (
    ("NaN", "responses/all.npy", at((3, 4), np.nan), "responses/all.npy nan row 3, vertex 4"),
    ("infinity", "responses/all.npy", at((3, 4), np.inf), "responses/all.npy inf row 3, vertex 4"),
    ("10^20", "responses/all.npy", at((3, 4), 1e20), "responses/all.npy row 3, vertex 4"),
    ("a ceiling of NaN", "noise_ceiling/all.npy", at(1, np.nan), "noise_ceiling/all.npy nan"),
    ("a ceiling in percent", "noise_ceiling/all.npy", lambda a: a * 100, "noise_ceiling/all.npy 0 to 1"),
):
    imported("arrays of a subject", what, lambda f, name=name, change=change: array(f / name, change), words)
imported("arrays of a subject", "no responses", lambda f: (f / "responses/all.npy").unlink(), "all.npy none")
imported("arrays of a subject", "no ceilings", lambda f: (f / "noise_ceiling/all.npy").unlink(), None)
imported(
    "images.csv",
    "a link in its place",
    lambda f: (f / "images.csv").rename(f / "i") and os.symlink(f / "i", f / "images.csv"),
    None,
)
