"""Input that cannot be imported: one line on where, what was expected and what was found, and nothing written."""

import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from scipy import io

import cli
from support.commands import fails
from support.lab import N_IMAGES, N_TEST, N_VERTICES, Lab

N = N_IMAGES + N_TEST
PLAIN = np.random.default_rng(0).normal(size=(N, N_VERTICES)).astype(np.float32)


@dataclass(frozen=True)
class Desk:
    """Where the files of one case are made, from those of a lab."""

    lab: Lab
    here: Path

    @property
    def photos(self) -> str:
        return str(self.lab.photos)

    @property
    def plain(self) -> tuple[str, ...]:
        """Options of an import that works."""
        return "--images", self.photos, "--responses", self.npy(PLAIN)

    def npy(self, values: object, name: str = "responses.npy") -> str:
        np.save(self.here / name, values)
        return str(self.here / name)

    def text(self, name: str, text: str | bytes) -> str:
        path = self.here / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    def table(self, **columns: Sequence[object]) -> str:
        return str(Lab(self.here, self.lab.signal).table("trials.csv", **columns))

    def trials(self, **columns: Sequence[object]) -> tuple[str, ...]:
        """Options of an import by a table of all photos, with these columns beside their names."""
        columns = {"image": self.lab.names} | columns
        return "--images", self.photos, "--table", self.table(**columns), "--responses", self.npy(PLAIN)

    def folder(self, names: Sequence[str]) -> str:
        """A folder with photos of the lab under these names."""
        folder = self.here / "few"
        folder.mkdir()
        for name, photo in zip(names, self.lab.names, strict=False):
            shutil.copy(self.lab.photos / photo, folder / name)
        return str(folder)

    def hdf5(self, name: str = "file.h5", **datasets: np.ndarray) -> str:
        with h5py.File(self.here / name, "w") as file:
            for dataset, values in datasets.items():
                file[dataset.replace("__", "/")] = values
        return str(self.here / name)

    def npz(self, **arrays: np.ndarray) -> str:
        np.savez(self.here / "x.npz", **arrays)
        return str(self.here / "x.npz")

    def mat(self, **arrays: np.ndarray) -> str:
        io.savemat(self.here / "x.mat", arrays)
        return str(self.here / "x.mat")

    def empty_folder(self, name: str) -> str:
        (self.here / name).mkdir()
        return str(self.here / name)

    def pictures(self, n: int = N, dtype: type = np.uint8) -> str:
        """A file with an array of pictures."""
        pixels = np.random.default_rng(1).integers(0, 255, (n, 8, 8, 3))
        return self.npy(pixels.astype(dtype), "pictures.npy")

    def volume(self, n: int | None = N, shape: Sequence[int] = (2, 3, 4), name: str = "bold.nii.gz") -> str:
        rng = np.random.default_rng(2)
        values = rng.normal(size=(*shape, n) if n else tuple(shape)).astype(np.float32)
        return self.nifti(values, name)

    def nifti(self, values: np.ndarray, name: str) -> str:
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), self.here / name)
        return str(self.here / name)

    def fifo(self, name: str) -> str:
        os.mkfifo(self.here / name)
        return str(self.here / name)

    def changed(self, place: tuple[int, int], value: float, dtype: type = np.float32) -> str:
        values = PLAIN.astype(dtype)
        values[place] = value
        return self.npy(values)


def one_nan() -> np.ndarray:
    """Volumes of which one has no number at a voxel."""
    values = np.random.default_rng(3).normal(size=(2, 3, 4, N)).astype(np.float32)
    values[1, 0, 1, 4] = np.nan
    return values


class Explodes:
    """A pickle that leaves a trace where it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def pickled(desk: Desk) -> tuple[str, ...]:
    trap = np.array([Explodes(desk.here / "opened")], dtype=object)
    np.save(desk.here / "trap.npy", trap, allow_pickle=True)
    return "--images", desk.photos, "--responses", str(desk.here / "trap.npy")


def pickle_file(desk: Desk) -> tuple[str, ...]:
    path = desk.text("trap.npy", pickle.dumps(Explodes(desk.here / "opened")))
    return "--images", desk.photos, "--responses", path


def with_photo(desk: Desk, name: str, content: bytes) -> tuple[str, ...]:
    """Options of an import of three photos and a file of this content."""
    folder = Path(desk.folder(["a.png", "b.png", "c.png"]))
    (folder / name).write_bytes(content)
    return "--images", str(folder), "--responses", desk.npy(PLAIN[:4])


def cut(desk: Desk) -> bytes:
    content = (desk.lab.photos / desk.lab.names[3]).read_bytes()
    return content[: len(content) // 2]


def two_broken(desk: Desk) -> tuple[str, ...]:
    options = with_photo(desk, "d.png", b"")
    desk.text("few/e.png", "x")
    return (*options[:2], "--responses", desk.npy(PLAIN[:5]))


def fifo_among_photos(desk: Desk) -> tuple[str, ...]:
    options = with_photo(desk, "d.png", b"")
    desk.fifo("few/e.png")
    return (*options[:2], "--responses", desk.npy(PLAIN))


def fifo_in_table(desk: Desk) -> tuple[str, ...]:
    desk.fifo("p.png")
    table = desk.table(image=["p.png"] * N)
    return "--images", str(desk.here), "--table", table, "--responses", desk.npy(PLAIN)


def responses(desk: Desk, path: str) -> tuple[str, ...]:
    return "--images", desk.photos, "--responses", path


def two(desk: Desk) -> tuple[str, ...]:
    return (
        "--images",
        desk.photos,
        "--responses",
        f"left={desk.npy(PLAIN, 'left.npy')}",
        "--responses",
        f"right={desk.npy(PLAIN[:, :5], 'right.npy')}",
    )


Make = Callable[[Desk], Sequence[str]]
names = [f"photo {n:02d}é.png" for n in range(N)]

# {kind: (options of the import, words of the line)}
CASES: dict[str, tuple[Make, Sequence[str]]] = {
    # what belongs together
    "fewer responses than photos": (
        lambda d: responses(d, d.npy(PLAIN[:-1])),
        ["--images", "29 rows", "found 30 in", "--table"],
    ),
    "transposed responses": (
        lambda d: responses(d, d.npy(np.zeros((N_VERTICES, N), np.float32))),
        ["--images", "12 rows", "columns", "transpose"],
    ),
    "table with fewer rows": (
        lambda d: ("--images", d.photos, "--table", d.table(image=names[:5]), "--responses", d.npy(PLAIN)),
        ["trials.csv", "30 rows of the responses", "found 5 rows"],
    ),
    "table of the columns of transposed responses": (
        lambda d: ("--images", d.photos, "--table", d.table(image=names[:N_VERTICES]), "--responses", d.npy(PLAIN)),
        ["trials.csv", "found 12 rows", "12 columns: transpose"],
    ),
    "surfaces of unequal length": (
        lambda d: (*d.plain, "--responses", f"rh={d.npy(PLAIN[:9], 'rh.npy')}"),
        ["responses of rh", "as many rows as those of all (30)", "found 9"],
    ),
    "sessions of unequal width": (
        lambda d: (*d.plain, "--responses", d.npy(PLAIN[:, :7], "second.npy")),
        ["second.npy", "(12,)", "found (7,)"],
    ),
    "sessions of unequal number": (
        lambda d: (*two(d), "--responses", f"left={d.npy(PLAIN, 'again.npy')}"),
        ["responses of right", "30, 30", "found 30"],
    ),
    "volumes of unequal shape": (
        lambda d: (
            "--images",
            d.photos,
            "--volume",
            d.volume(10),
            "--volume",
            d.volume(20, (2, 3, 5), "other.nii.gz"),
        ),
        ["other.nii.gz", "(2, 3, 4)", "(2, 3, 5)"],
    ),
    "arrays and volumes of one surface": (
        lambda d: (*d.plain, "--volume", d.volume()),
        ["--volume", "other surfaces than --responses", "all"],
    ),
    "no responses": (lambda d: ("--images", d.photos), ["--responses", "found none", "--volume or --nsd"]),
    "no images": (lambda d: ("--responses", d.npy(PLAIN)), ["--images", "found none", "--table"]),
    "nsd beside files": (lambda d: (*d.plain, "--nsd", d.photos), ["--images", "--nsd", "photos"]),
    # tables
    "unknown column": (
        lambda d: (*d.trials(), "--image-column", "imge"),
        ["trials.csv", "a column 'imge'", "did you mean 'image'?"],
    ),
    "unknown session column": (
        lambda d: (*d.trials(sesion=["1"] * N), "--session-column", "session"),
        ["a column 'session'", "did you mean 'sesion'?"],
    ),
    "two columns of one name": (
        lambda d: ("--table", d.text("t.csv", "image,image\na,b\n"), *d.plain),
        ["t.csv", "two of the name 'image'", "rename"],
    ),
    "column without a name": (
        lambda d: ("--table", d.text("t.csv", ",image\n0,a\n"), *d.plain),
        ["t.csv", "column 1 without one"],
    ),
    "ragged row": (
        lambda d: ("--table", d.text("t.csv", "image,x\na,b\nc\n"), *d.plain),
        ["t.csv", "2 cells", "found 1 in line 3"],
    ),
    "table without rows": (lambda d: ("--table", d.text("t.csv", "image,x\n"), *d.plain), ["t.csv", "found none"]),
    "empty table": (lambda d: ("--table", d.text("t.csv", ""), *d.plain), ["t.csv", "0 bytes"]),
    "missing table": (lambda d: ("--table", str(d.here / "t.csv"), *d.plain), ["t.csv", "found none"]),
    "table of another kind": (
        lambda d: ("--table", d.text("t.xlsx", "x"), *d.plain),
        ["t.xlsx", ".csv, .tsv or .parquet", "'.xlsx'"],
    ),
    "table that is not UTF-8": (
        lambda d: ("--table", d.text("t.csv", "image\né\n".encode("latin-1")), *d.plain),
        ["t.csv", "UTF-8", "another encoding"],
    ),
    "empty image": (lambda d: d.trials(image=[*names[:4], "", *names[5:]]), ["column image", "found none in row 5"]),
    "empty id": (
        lambda d: (*d.trials(stimulus=[*"abc", "", *range(4, N)]), "--id-column", "stimulus"),
        ["column stimulus", "found none in row 4"],
    ),
    "empty session": (
        lambda d: (*d.trials(run=[1, "", *[1] * (N - 2)]), "--session-column", "run"),
        ["column run", "found none in row 2"],
    ),
    "id beyond 63 bits": (
        lambda d: (*d.trials(key=[2**63, *range(1, N)]), "--id-column", "key"),
        ["column key", f"up to {2**63 - 1}", f"found {2**63}"],
    ),
    "one id of two pictures": (
        lambda d: (*d.trials(key=[1, 1, *range(2, N)]), "--id-column", "key"),
        ["images of subj01", "1 id of two pictures", "photo 00é.png and photo 01é.png"],
    ),
    "other words in the split": (
        lambda d: (*d.trials(part=["train"] * (N - 1) + ["validation"]), "--split-column", "part"),
        ["column part", "train or test", "'validation'"],
    ),
    "a picture in train and test": (
        lambda d: (
            *d.trials(image=[*names[:-1], names[0]], part=[*["train"] * (N - 1), "test"]),
            "--split-column",
            "part",
        ),
        ["images of subj01", "1 in both", "photo 00é.png"],
    ),
    "all in test": (
        lambda d: (*d.trials(part=["test"] * N), "--split-column", "part"),
        ["2 or more different training images", "found 0 (30 to predict)"],
    ),
    "one image": (
        lambda d: d.trials(image=[names[0]] * N),
        ["2 or more different training images", "found 1 (0 to predict)"],
    ),
    "sessions of one image each": (
        lambda d: (
            *d.trials(image=[names[n // 2] for n in range(N)], run=[n // 2 for n in range(N)]),
            "--session-column",
            "run",
        ),
        ["two or more images in each", "subj01", "found one in 0", "--no-zscore"],
    ),
    "a session of one trial": (
        lambda d: (*d.trials(run=[1] * (N - 1) + [2]), "--session-column", "run"),
        ["two or more images in each", "subj01", "found one in 2"],
    ),
    "z-scoring without sessions": (
        lambda d: (*d.plain, "--zscore"),
        ["subj01", "the session of each trial", "--session-column", "--no-zscore"],
    ),
    "session column without a table": (
        lambda d: (*d.plain, "--session-column", "run"),
        ["--session-column", "no --table", "give the table"],
    ),
    "id column without a table": (lambda d: (*d.plain, "--id-column", "run"), ["--id-column", "no --table"]),
    "table of photos that are not there": (
        lambda d: d.trials(image=[*names[:-2], "no.png", "nor.png"]),
        ["column image", "found 2 that are not there: no.png, nor.png", "--images"],
    ),
    "rows beyond an array of pictures": (
        lambda d: ("--images", d.pictures(9), "--table", d.table(image=range(N)), "--responses", d.npy(PLAIN)),
        ["column image", "from 0 to 8", "found 9, 10"],
    ),
    "names for an array of pictures": (
        lambda d: ("--images", d.pictures(), "--table", d.table(image=names), "--responses", d.npy(PLAIN)),
        ["column image", "from 0 to 29", "photo 00é.png"],
    ),
    "counted from one": (
        lambda d: ("--images", d.pictures(), "--table", d.table(image=range(1, N + 1)), "--responses", d.npy(PLAIN)),
        ["from 0 to 29", "found 30", "the first row is 0"],
    ),
    # pictures
    "missing folder": (lambda d: ("--images", str(d.here / "no"), "--responses", d.npy(PLAIN)), ["--images", "no"]),
    "a photo for a folder": (
        lambda d: ("--images", str(d.lab.photos / names[0]), "--responses", d.npy(PLAIN)),
        ["--images", "a folder", "one image", "photo 00é.png", "--table"],
    ),
    "folder without images": (
        lambda d: ("--images", d.folder([]), "--responses", d.npy(PLAIN)),
        ["few", "an empty folder"],
    ),
    "folder of other files": (
        lambda d: ("--images", d.folder(["a.txt", "b.txt"]), "--responses", d.npy(PLAIN)),
        ["few", "expected images", "none, but a.txt, b.txt"],
    ),
    "names in two orders": (
        lambda d: ("--images", d.folder(["img1.png", "img2.png", "img10.png"]), "--responses", d.npy(PLAIN[:3])),
        ["--images", "found img10.png", "img2.png", "leading zeros"],
    ),
    "photo that is cut off": (
        lambda d: with_photo(d, "d.png", cut(d)),
        ["d.png", "cannot be decoded", "copy it again"],
    ),
    "empty photo": (lambda d: with_photo(d, "d.png", b""), ["d.png", "cannot be decoded"]),
    "text called a photo": (lambda d: with_photo(d, "d.png", b"no picture"), ["d.png", "cannot be decoded"]),
    "two broken photos": (
        two_broken,
        ["d.png", "(and 1 more image)"],
    ),
    "pictures of floats": (
        lambda d: ("--images", d.pictures(dtype=np.float32), "--responses", d.npy(PLAIN)),
        ["pictures.npy", "8-bit", "float32"],
    ),
    "fifo for images": (
        lambda d: ("--images", d.fifo("p.npy"), "--responses", d.npy(PLAIN)),
        ["p.npy", "no regular file"],
    ),
    "fifo among images": (
        fifo_among_photos,
        ["--images", "30 rows", "found 4 in"],
    ),
    "fifo named by the table": (
        fifo_in_table,
        ["column image", "p.png"],
    ),
    # arrays
    "no vertices": (lambda d: responses(d, d.npy(PLAIN[:, :0])), ["responses.npy", "(30, 0)"]),
    "no rows": (lambda d: responses(d, d.npy(PLAIN[:0])), ["responses.npy", "(0, 12)"]),
    "constant responses": (
        lambda d: responses(d, d.npy(np.full((N, N_VERTICES), 3.0))),
        ["responses of all", "differ between trials", "the same in all 30 trials"],
    ),
    "NaN": (lambda d: responses(d, d.changed((4, 5), np.nan)), ["responses of all", "nan in trial 4, vertex 5"]),
    "infinity": (lambda d: responses(d, d.changed((3, 1), np.inf)), ["responses of all", "inf in trial 3, vertex 1"]),
    "beyond float32": (
        lambda d: responses(d, d.changed((2, 0), 1e300, np.float64)),
        ["responses of all", "float32 can hold", "trial 2, vertex 0"],
    ),
    "complex": (lambda d: responses(d, d.npy(PLAIN * 1j)), ["responses.npy", "complex numbers"]),
    "objects": (pickled, ["trap.npy", "found"]),
    "pickle": (pickle_file, ["trap.npy", "found"]),
    "dates": (lambda d: responses(d, d.npy(PLAIN.astype("M8[D]"))), ["responses.npy", "dates"]),
    "strings": (lambda d: responses(d, d.npy(PLAIN.astype(str))), ["responses.npy", "text"]),
    "one dimension": (lambda d: responses(d, d.npy(PLAIN[:, 0])), ["responses.npy", "2 dimension", "(30,)"]),
    "three dimensions": (
        lambda d: responses(d, d.npy(PLAIN[..., None])),
        ["responses.npy", "2 dimension", "(30, 12, 1)"],
    ),
    "no such file": (lambda d: responses(d, str(d.here / "no.npy")), ["no.npy", "found none"]),
    "folder for a file": (lambda d: responses(d, d.photos), ["photos", "endings .csv, .h5"]),
    "folder called .npy": (
        lambda d: responses(d, d.empty_folder("x.npy")),
        ["x.npy", "a folder"],
    ),
    "fifo for responses": (lambda d: responses(d, d.fifo("x.npy")), ["x.npy", "no file"]),
    "empty file": (lambda d: responses(d, d.text("x.npy", "")), ["x.npy", "0 bytes"]),
    "another ending": (lambda d: responses(d, d.text("x.dat", "1")), ["x.dat", ".npy", "'.dat'"]),
    "a file that is cut off": (
        lambda d: responses(d, d.text("x.npy", Path(d.npy(PLAIN)).read_bytes()[:-9])),
        ["x.npy", "cannot"],
    ),
    "HDF5 without the dataset": (
        lambda d: responses(d, d.hdf5(betas=PLAIN) + ":beta"),
        ["file.h5", "no 'beta'", "'betas'"],
    ),
    "HDF5 of several datasets": (
        lambda d: responses(d, d.hdf5(betas=PLAIN, noise=PLAIN)),
        ["file.h5", "'betas', 'noise'", "name one"],
    ),
    "HDF5 group": (lambda d: responses(d, d.hdf5(glm__betas=PLAIN, glm__r2=PLAIN) + ":glm"), ["file.h5", "glm/betas"]),
    "HDF5 cut off": (
        lambda d: responses(d, d.text("x.h5", Path(d.hdf5(betas=PLAIN)).read_bytes()[:900])),
        ["x.h5", "cannot"],
    ),
    "npz of several arrays": (
        lambda d: responses(d, d.npz(a=PLAIN, b=PLAIN)),
        ["x.npz", "'a', 'b'"],
    ),
    "mat without the variable": (
        lambda d: responses(d, d.mat(betas=PLAIN) + ":beta"),
        ["x.mat", "no 'beta'", "'betas'"],
    ),
    "CSV of words": (lambda d: responses(d, d.text("x.csv", "a,b\n1,two\n")), ["x.csv", "cannot"]),
    # volumes, ROIs, ceilings
    "mask of another shape": (
        lambda d: ("--images", d.photos, "--volume", d.volume(), "--mask", d.volume(None, (2, 3, 5), "mask.nii")),
        ["mask.nii", "(2, 3, 4)", "(2, 3, 5)"],
    ),
    "empty mask": (
        lambda d: ("--images", d.photos, "--volume", d.volume(), "--mask", d.nifti(np.zeros((2, 3, 4)), "mask.nii")),
        ["mask.nii", "no voxel inside"],
    ),
    "a voxel inside the mask that is NaN": (
        lambda d: (
            *("--images", d.photos, "--volume", d.nifti(one_nan(), "holes.nii")),
            *("--mask", d.nifti(np.ones((2, 3, 4)), "mask.nii")),
        ),
        ["responses of all", "finite responses", "nan in trial 4, vertex 13"],
    ),
    "mask with NaN": (
        lambda d: (
            "--images",
            d.photos,
            "--volume",
            d.volume(),
            "--mask",
            d.nifti(np.full((2, 3, 4), np.nan), "mask.nii"),
        ),
        ["mask.nii", "NaN"],
    ),
    "mask for arrays": (
        lambda d: (*d.plain, "--mask", d.volume(None, name="mask.nii")),
        ["--mask", "for --responses, which are not volumes"],
    ),
    "two masks": (
        lambda d: ("--images", d.photos, "--volume", d.volume(), "--mask", "a.nii", "--mask", "b.nii"),
        ["--mask", "one mask", "a.nii, b.nii"],
    ),
    "volumes of fewer images": (
        lambda d: ("--images", d.photos, "--volume", d.volume(9)),
        ["--images", "9 rows", "found 30"],
    ),
    "array given as a volume": (
        lambda d: ("--images", d.photos, "--volume", d.npy(PLAIN)),
        ["responses.npy", ".nii", "--responses"],
    ),
    "volume given as an array": (lambda d: responses(d, d.volume()), ["bold.nii.gz", "--volume"]),
    "ROI of another length": (
        lambda d: (*d.plain, "--roi", d.npy(np.ones(7, bool), "V1.npy")),
        ["V1.npy", "12 vertices", "found 7 in V1"],
    ),
    "ROI of fractions": (
        lambda d: (*d.plain, "--roi", d.npy(np.full(N_VERTICES, 0.3), "V1.npy")),
        ["V1.npy", "0 and 1", "0.3"],
    ),
    "ROI twice": (
        lambda d: (*d.plain, "--roi", d.npy(np.ones(N_VERTICES), "V1.npy"), "--roi", d.table(V1=[1] * N_VERTICES)),
        ["trials.csv", "V1 again"],
    ),
    "ROI called all": (
        lambda d: (*d.plain, "--roi", d.npy(np.arange(N_VERTICES) < 4, "all.npy")),
        ["name of an ROI", "'all'", "another name"],
    ),
    "ROI of a surface that is not there": (
        lambda d: (*two(d), "--roi", f"rihgt={d.npy(np.ones(5), 'V1.npy')}"),
        ["--roi", "left, right", "rihgt"],
    ),
    "ROI of no surface": (
        lambda d: (*two(d), "--roi", d.npy(np.ones(5), "V1.npy")),
        ["--roi", "left, right", "no name"],
    ),
    "missing ROI file": (lambda d: (*d.plain, "--roi", str(d.here / "V1.npy")), ["V1.npy", "found none"]),
    "ceilings of another length": (
        lambda d: (*d.plain, "--ceiling", d.npy(np.ones(3), "c.npy")),
        ["--ceiling", "c.npy", "12 vertices", "3 numbers"],
    ),
    "two files of ceilings": (
        lambda d: (*d.plain, *("--ceiling", d.npy(np.ones(N_VERTICES), "c.npy")) * 2),
        ["--ceiling", "2 files"],
    ),
    "negative ceiling": (
        lambda d: (*d.plain, "--ceiling", d.npy(np.linspace(-0.1, 1, N_VERTICES), "c.npy")),
        ["c.npy", "from 0 to 1", "-0.1 at vertex 0"],
    ),
    "ceiling of NaN": (
        lambda d: (*d.plain, "--ceiling", d.npy(np.full(N_VERTICES, np.nan), "c.npy")),
        ["c.npy", "from 0 to 1", "nan at vertex 0"],
    ),
    "ceilings just above 1": (
        lambda d: (*d.plain, "--ceiling", d.npy(np.linspace(0, 1.1, N_VERTICES), "c.npy")),
        ["c.npy", "from 0 to 1", "1.1 at vertex 11"],
    ),
    "ceilings above 100": (
        lambda d: (*d.plain, "--ceiling", d.npy(np.linspace(0, 101, N_VERTICES), "c.npy")),
        ["c.npy", "from 0 to 100", "101 at vertex 11"],
    ),
    "ncsnr below 0": (
        lambda d: (*d.plain, "--ncsnr", d.npy(np.linspace(-1, 1, N_VERTICES), "n.npy")),
        ["n.npy", "0 or more", "-1 at vertex 0"],
    ),
    # test images
    "test responses without test images": (
        lambda d: (*d.plain, "--test-responses", d.npy(PLAIN, "test.npy")),
        ["--test-responses", "--test-images"],
    ),
    "test responses of one surface": (
        lambda d: (*two(d), "--test-images", d.photos, "--test-responses", f"left={d.npy(PLAIN, 'test.npy')}"),
        ["--test-responses", "left, right", "none for right"],
    ),
    "fewer test responses than test images": (
        lambda d: (*d.plain, "--test-images", d.photos, "--test-responses", d.npy(PLAIN[:5], "test.npy")),
        ["--test-images", "5 rows", "30"],
    ),
    "test responses of other vertices": (
        lambda d: (*d.plain, "--test-images", d.photos, "--test-responses", d.npy(PLAIN[:, :5], "test.npy")),
        ["test.npy", "(12,)", "found (5,)"],
    ),
    "volumes for tests of arrays": (
        lambda d: (*d.plain, "--test-images", d.photos, "--test-responses", d.volume()),
        ["bold.nii.gz", "an array", "a brain volume"],
    ),
    "test images that are training images": (
        lambda d: (*d.plain, "--test-images", d.photos),
        ["images of subj01", "30 in both", "photo 00é.png"],
    ),
    "test images beside ids": (
        lambda d: (*d.trials(key=range(N)), "--id-column", "key", "--test-images", d.photos),
        ["--test-images", "--split-column"],
    ),
    # names
    "subject with a slash": (lambda d: (*d.plain, "--subject", "a/b"), ["name of the subject", "'a/b'"]),
    "subject that leads out": (lambda d: (*d.plain, "--subject", ".."), ["name of the subject", "'..'"]),
    "subject without a name": (lambda d: (*d.plain, "--subject", ""), ["name of the subject", "''"]),
    "subject called all": (lambda d: (*d.plain, "--subject", "all"), ["name of a subject", "'all'"]),
    "surface with a slash": (
        lambda d: ("--images", d.photos, "--responses", f"a/b={d.npy(PLAIN)}"),
        ["name of a surface", "'a/b'"],
    ),
    "surface called both": (
        lambda d: ("--images", d.photos, "--responses", f"both={d.npy(PLAIN)}"),
        ["name of a surface", "'both'"],
    ),
    "surface that leads out": (
        lambda d: ("--images", d.photos, "--responses", f"..={d.npy(PLAIN)}"),
        ["name of a surface", "'..'"],
    ),
}


@pytest.fixture(scope="module")
def work(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a subject that was imported before."""
    folder = tmp_path_factory.mktemp("work")
    lab.save("before.npy", lab.signal)
    plain = ("--images", str(lab.photos), "--responses", str(lab.folder / "before.npy"))
    assert cli.run(["import", *plain, "--work", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file of a folder, but for its lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.name != ".writing.lock"]
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in files
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(kind, lab, work, tmp_path, capfd):
    make, words = CASES[kind]
    arguments = make(Desk(lab, tmp_path))
    before = contents(work / "dataset")
    line = fails(capfd, "import", *arguments, "--work", str(work))
    missing = [word for word in words if word not in line]
    assert not missing, line
    assert line.count("; ") >= 2, line  # what was expected, what was found, and what to do
    assert contents(work / "dataset") == before
    assert not (tmp_path / "opened").exists()
    if "--subject" not in arguments:  # where there is no subject yet, none is begun
        fails(capfd, "import", *arguments, "--subject", "2", "--work", str(work))
        assert contents(work / "dataset") == before
