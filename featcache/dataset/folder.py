"""The project's own form of a dataset: a folder for each subject, with the arrays of each surface in .npy files.

    subj01/
        subject.json                  name, surfaces with their ROIs and grid of voxels, how it was made
        images.csv                    a row for each image: split, id, file, array, row, and any other columns
        responses/V4.npy              (n_train, n_vertices) float32
        test_responses/V4.npy         (n_test, n_vertices) float32
        noise_ceiling/V4.npy          (n_vertices,) float32, fractions of variance
        test_noise_ceiling/V4.npy
        rois/V4.npy                   (n_rois, n_vertices) bool, in the order of subject.json
        positions/V4.npy              (n_vertices, 3) float32, mm
        fsaverage/lh.npy              (163842,) bool, at the fsaverage vertices that the columns stand for, in order

All but the first three may be missing. Images stay where they are: `file` is an absolute path, and of a picture inside
a file of many, `array` and `row` say which. docs/data.md describes the format for users.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from featcache.dataset.rois import FSAVERAGE_VERTICES
from featcache.dataset.subject import ArrayImage, Dataset, Fault, Images, ImageSource, Subject, listed
from featcache.errors import DataError, first_line
from featcache.formats.npy import open_npy
from featcache.formats.volumes import Grid
from featcache.machine.documents import DocumentError, read_document, write_document
from featcache.machine.files import file_checksum, only_writer, regular_status
from featcache.machine.folders import replace_folder, restore_folder, staged_folder
from featcache.workdir import is_file_name

FORMAT = 1
_RECORD, _IMAGES = "subject.json", "images.csv"
OWN_COLUMNS = ("split", "id", "file", "array", "row")  # of images.csv, before any others
_NAME = re.compile(r"[^\W_][\w .+()-]{0,63}")  # of subjects and surfaces, which become names of files
_SPLITS = ("train", "test")
RESPONSES = {"train": "responses", "test": "test_responses"}
CEILINGS = {"train": "noise_ceiling", "test": "test_noise_ceiling"}


def check_name(name: str, what: str) -> str:
    """A name of a subject or a surface that can be the name of a file. Raises DataError for any other."""
    if not _NAME.fullmatch(name) or name.endswith((" ", ".")):
        raise DataError(
            what,
            expected="at most 64 letters, digits, spaces and . _ + - ( ), of which the first is a letter or a digit",
            found=repr(name),
            remedy="give it another name",
        )
    return name


class _Surface(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the record of a subject says of one surface: names of its ROIs, and the grid of its volume."""

    rois: list[str]
    grid: dict[str, Any] | None = None


class _Described(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the record of a subject has.

    about : how it was made, in plain values
    files : checksum of each of its files, by its path; none in records of earlier versions
    """

    format: int
    name: str
    surfaces: dict[str, _Surface]
    about: dict[str, Any]
    files: dict[str, str] = {}


@dataclass
class SubjectWriter:
    """A subject that is being written: arrays first, in any order, then `finish`.

    folder : that the arrays are written to
    """

    folder: Path
    name: str
    rois: dict[str, tuple[str, ...]] = field(default_factory=dict)
    n_vertices: dict[str, int] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)

    def new_array(self, part: str, surface: str, shape: tuple[int, ...]) -> np.memmap:
        """A new float32 array of one surface on the disk, to be filled."""
        path = self._path(part, surface)
        path.parent.mkdir(exist_ok=True)
        self.n_vertices[surface] = shape[-1]
        array: np.memmap = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        return array

    def save(self, part: str, surface: str, values: np.ndarray) -> None:
        """Write one small array of a surface."""
        path = self._path(part, surface)
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.asarray(values))

    def save_rois(self, surface: str, rois: Mapping[str, np.ndarray]) -> None:
        """Write the masks of a surface's ROIs, {name: (n_vertices,) bool}."""
        self.rois[surface] = tuple(rois)
        if rois:
            self.save("rois", surface, np.stack([np.asarray(mask, dtype=bool) for mask in rois.values()]))

    def finish(
        self, images: Mapping[str, Images], columns: Mapping[str, Sequence[str]], about: Mapping[str, Any]
    ) -> None:
        """Write the list of images, and what the subject is.

        images : {'train' | 'test': images}
        columns : {name: a text for each training image, then for each test image}
        about : how it was made, in plain values
        """
        rows = [
            [split, int(image_id), *_cells(source)]
            for split in _SPLITS
            for source, image_id in zip(images[split].sources, images[split].ids, strict=True)
        ]
        with (self.folder / _IMAGES).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([*OWN_COLUMNS, *columns])
            table.writerows([*row, *more] for row, more in zip(rows, _across(columns, len(rows)), strict=True))
        surfaces = {surface: self._facts(surface) for surface in self.n_vertices}
        written = sorted(path for path in self.folder.rglob("*") if path.is_file())
        checksums = {path.relative_to(self.folder).as_posix(): file_checksum(path) for path in written}
        record = {"format": FORMAT, "name": self.name, "surfaces": surfaces, "about": dict(about), "files": checksums}
        write_document(self.folder / _RECORD, record)

    def _facts(self, surface: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"rois": list(self.rois.get(surface, ()))}
        if (grid := self.grids.get(surface)) is not None:
            facts["grid"] = {"shape": list(map(int, grid.shape)), "affine": np.asarray(grid.affine).tolist()}
        return facts

    def _path(self, part: str, surface: str) -> Path:
        return self.folder / part / f"{check_name(surface, 'the name of a surface')}.npy"


def _cells(source: ImageSource) -> list[str]:
    if isinstance(source, ArrayImage):
        return [str(source.path.absolute()), source.array, str(source.row)]
    return [str(source.absolute()), "", ""]


def _across(columns: Mapping[str, Sequence[str]], n_rows: int) -> list[tuple[str, ...]]:
    return list(zip(*columns.values(), strict=True)) if columns else [()] * n_rows


@contextmanager
def writing(root: Path, name: str) -> Iterator[SubjectWriter]:
    """Write a subject under `root`; it takes the place of one of the same name once the block ends without an error."""
    target = root / check_name(name, "the name of a subject")
    with only_writer(root, wait=True):
        restore_folder(target)
        with staged_folder(target) as staging:
            yield SubjectWriter(staging, name)
            replace_folder(staging, target)


def is_folder(root: Path) -> bool:
    """Whether a folder holds subjects in this form."""
    return any(root.glob(f"*/{_RECORD}"))


def about_subject(root: Path, name: str) -> dict[str, Any]:
    """How a subject was made; empty where it is not there."""
    try:
        return read_document(root / name / _RECORD, _Described).about
    except (OSError, DocumentError):
        return {}


def scan_folder(root: Path) -> tuple[Dataset, list[Fault]]:
    """Subjects under `root`, and every fault that shows without decoding images or reading responses."""
    faults: list[Fault] = []
    subjects = []
    for record in sorted(root.glob(f"*/{_RECORD}")):
        if record.parent.name.startswith("."):  # of an import that was killed
            continue
        try:
            subjects.append(_read_subject(record.parent))
        except DataError as error:
            faults.append(Fault(error.where, error.expected, error.found))
    notes = [note for subject in subjects for note in _notes(subject)]
    return Dataset(root, tuple(subjects), tuple(dict.fromkeys(notes))), faults


def _read_subject(folder: Path) -> Subject:
    record = _record(folder / _RECORD)
    name, surfaces = record.name, record.surfaces
    checksums = {folder / file: known for file, known in record.files.items()}
    for file, known in record.files.items():
        if file.split("/")[0] not in RESPONSES.values():  # large: looked at where they are used
            _refuse_changed(folder, file, known)
    images, columns = _read_images(folder / _IMAGES)
    paths = {split: _paths(folder, RESPONSES[split], surfaces) for split in _SPLITS}
    n_vertices = {s: _responses(paths["train"][s], len(images["train"])) for s in surfaces}
    if paths["test"]:
        for surface in surfaces:
            _responses(paths["test"][surface], len(images["test"]), n_vertices[surface])
    ceilings = {split: {s: _vector(folder, CEILINGS[split], s, n_vertices[s]) for s in surfaces} for split in _SPLITS}
    return Subject(
        name=name,
        train=images["train"],
        test=images["test"],
        response_paths=paths["train"],
        n_vertices=n_vertices,
        rois={surface: _rois(folder, surface, facts.rois, n_vertices[surface]) for surface, facts in surfaces.items()},
        noise_ceiling=ceilings["train"],
        fsaverage={surface: _fsaverage(folder, surface, n) for surface, n in n_vertices.items()},
        test_response_paths=paths["test"],
        test_noise_ceiling=ceilings["test"] if paths["test"] else {},
        positions=_positions(folder, n_vertices),
        grids={
            surface: _grid(folder / _RECORD, facts.grid)
            for surface, facts in surfaces.items()
            if facts.grid is not None
        },
        columns=columns,
        checksums=checksums,
    )


def moved_faults(subjects: Sequence[Subject]) -> list[Fault]:
    """Fault of each subject whose images are no longer where they were imported from."""
    faults = []
    for subject in subjects:
        files = dict.fromkeys(
            source.path if isinstance(source, ArrayImage) else source for source in subject.image_sources
        )
        if missing := [file for file in files if not file.exists()]:
            found = f"{len(missing):,} of {len(files):,} files that are not there, such as {missing[0]}; import again"
            faults.append(Fault(subject.name, "images where they were when they were imported", found))
    return faults


def _record(path: Path) -> _Described:
    try:
        record = read_document(path, _Described)
    except (OSError, DocumentError) as error:
        found = f"another file ({first_line(error)})"
        raise _damaged(path, f"a subject named {path.parent.name}, in format {FORMAT}", found) from error
    named = record.format == FORMAT and record.name == path.parent.name
    if not named or not record.surfaces or not all(_NAME.fullmatch(surface) for surface in record.surfaces):
        raise _damaged(path, f"a subject named {path.parent.name}, in format {FORMAT}", "another file")
    return record


def subject_records(root: Path) -> list[Path]:
    """The file of each subject under `root` that says what there is of it."""
    return sorted(path for path in root.glob(f"*/{_RECORD}") if not path.parent.name.startswith("."))


def record_files(record: Path) -> dict[str, Callable[[], bool]]:
    """{file of a subject: a check of its checksum, which raises DataError}. Raises DataError for a damaged record."""
    folder = record.parent
    return {name: partial(_refuse_changed, folder, name, known) for name, known in _record(record).files.items()}


def _refuse_changed(folder: Path, name: str, checksum: str) -> bool:
    """Raise DataError for a file of a subject that is not what was written, or leads out of its folder; else True."""
    path = folder / name
    parts = name.split("/")
    if not all(map(is_file_name, parts)):
        raise _damaged(folder / _RECORD, "names of files in the folder", repr(name))
    if not path.is_file() or file_checksum(path) != checksum:
        raise _damaged(path, "the file that was written", "another" if path.exists() else "none")
    return True


def _damaged(path: Path, expected: str, found: str) -> DataError:
    return DataError(path, expected=expected, found=found, remedy="run 'import' again")


def _read_images(path: Path) -> tuple[dict[str, Images], dict[str, tuple[str, ...]]]:
    """Images of each split, and the other columns."""
    try:
        regular_status(path)
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        if tuple(header[: len(OWN_COLUMNS)]) != OWN_COLUMNS or any(len(row) != len(header) for row in rows):
            raise ValueError
        rows.sort(key=lambda row: _SPLITS.index(row[0]))  # training images first; the order within a split stays
        ids = np.array([int(row[1]) for row in rows], dtype=np.int64)
        sources = [_source(row) for row in rows]
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise _damaged(path, f"a table with the columns {', '.join(OWN_COLUMNS)}", "another file") from error
    n_train = sum(row[0] == "train" for row in rows)
    parts = {"train": slice(0, n_train), "test": slice(n_train, len(rows))}
    images = {split: Images(tuple(sources[part]), ids[part]) for split, part in parts.items()}
    if not n_train or (ids < 0).any():
        raise _damaged(path, "training images with ids of 0 or more", "none" if not n_train else str(ids.min()))
    for split, of_split in images.items():
        values, counts = np.unique(of_split.ids, return_counts=True)
        if (counts > 1).any():
            raise _damaged(path, f"an id once in the {split} split", f"{listed(values[counts > 1])} more than once")
    if both := sorted(set(images["train"].ids.tolist()) & set(images["test"].ids.tolist())):
        raise _damaged(path, "each image id in train or in test", f"{len(both)} in both: {listed(both)}")
    others = {name: tuple(row[i] for row in rows) for i, name in enumerate(header) if i >= len(OWN_COLUMNS)}
    return images, others


def _source(row: Sequence[str]) -> ImageSource:
    if "\0" in row[2]:
        raise ValueError("no name of a file")
    path = Path(row[2])
    return ArrayImage(path, row[3], int(row[4])) if row[4] else path


def _paths(folder: Path, part: str, surfaces: Mapping[str, Any]) -> dict[str, Path]:
    """File of each surface; empty where the whole part is missing, which only test responses may be."""
    if part == RESPONSES["test"] and not (folder / part).is_dir():
        return {}
    return {surface: folder / part / f"{surface}.npy" for surface in surfaces}


def _responses(path: Path, n_images: int, n_vertices: int | None = None) -> int:
    array = _array(path)
    expected = f"({n_images}, {'vertices' if n_vertices is None else n_vertices}) numbers"
    fits = array.ndim == 2 and len(array) == n_images and n_vertices in (None, array.shape[1]) and array.size
    if not fits or array.dtype != np.float32:
        raise _damaged(path, expected, f"shape {array.shape} of {array.dtype}")
    return int(array.shape[1])


def _array(path: Path) -> np.ndarray:
    try:
        return open_npy(path)
    except DataError as error:
        raise _damaged(path, "a whole .npy file", error.found) from error


def _vector(folder: Path, part: str, surface: str, n_vertices: int) -> np.ndarray | None:
    path = folder / part / f"{surface}.npy"
    if not path.exists():
        return None
    values = _floats(path, (n_vertices,))
    if (bad := values[~((values >= 0) & (values <= 1))]).size:  # NaN is bad too
        raise _damaged(path, "fractions from 0 to 1", f"{bad[0]:.4g}")
    return values


def _floats(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A small array of this shape, float32."""
    array = _array(path)
    if array.shape != shape or array.dtype.kind != "f":
        raise _damaged(path, f"floats of shape {shape}", f"shape {array.shape} of {array.dtype}")
    return np.array(array, dtype=np.float32)


def _rois(folder: Path, surface: str, names: Sequence[str], n_vertices: int) -> dict[str, np.ndarray]:
    if not names:
        return {}
    path = folder / "rois" / f"{surface}.npy"
    masks = np.array(_array(path))
    if masks.shape != (len(names), n_vertices) or masks.dtype != bool:
        expected = f"a mask of {n_vertices} vertices for each of {len(names)} ROIs"
        raise _damaged(path, expected, f"shape {masks.shape} of {masks.dtype}")
    return dict(zip(names, masks, strict=True))


def _positions(folder: Path, n_vertices: Mapping[str, int]) -> dict[str, np.ndarray]:
    positions = {}
    for surface, n in n_vertices.items():
        path = folder / "positions" / f"{surface}.npy"
        if path.exists():
            positions[surface] = _floats(path, (n, 3))
    return positions


def _grid(path: Path, facts: Any) -> Grid:
    try:
        shape, affine = tuple(int(n) for n in facts["shape"]), np.array(facts["affine"], dtype=np.float64)
        if len(shape) == 3 and min(shape) > 0 and affine.shape == (4, 4) and np.linalg.det(affine):
            return Grid(shape, affine)
    except (TypeError, ValueError, KeyError):
        pass
    raise _damaged(path, "the shape of a volume and its affine, 4 by 4", "something else")


def _fsaverage(folder: Path, surface: str, n_vertices: int) -> np.ndarray | None:
    path = folder / "fsaverage" / f"{surface}.npy"
    if not path.exists():
        return None
    mask = np.array(_array(path))
    if mask.shape != (FSAVERAGE_VERTICES,) or mask.dtype != bool or mask.sum() != n_vertices:
        raise _damaged(path, f"{n_vertices} of {FSAVERAGE_VERTICES} vertices", f"shape {mask.shape}, or another number")
    return mask


def _notes(subject: Subject) -> Iterator[str]:
    """What a subject lacks, and what follows from it."""
    if all(ceiling is None for ceiling in subject.noise_ceiling.values()):
        yield f"no noise ceilings ({subject.name}): scores are mean r and mean r^2"
    if not len(subject.test):
        yield f"no test images ({subject.name}): scores are out of fold"
