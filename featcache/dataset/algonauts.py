"""Reader of the challenge's tree: its subjects, its faults, and noise ceilings as fractions.

Layout of Algonauts 2023 (Gifford et al. 2023, https://arxiv.org/abs/2301.03198). Only this file reads it.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import numpy as np

from featcache.dataset.ceilings import NCSNR, is_named_ncsnr, is_percent, note_on_unit, out_of_range
from featcache.dataset.rois import FSAVERAGE_VERTICES, HEMISPHERES, class_order, read_mapping
from featcache.dataset.subject import Dataset, Fault, Images, Subject, listed, refuse_faults
from featcache.errors import DataError
from featcache.formats.npy import open_npy

# [0-9], because \d takes digits of every script; an id of 18 digits fits into int64
_IMAGE_NAME = re.compile(
    r"(?P<split>train|test)-(?P<number>[0-9]{1,18})_nsd-(?P<id>[0-9]{1,18})\.(png|jpg|jpeg)", re.IGNORECASE
)
_SUBJECT_NAME = re.compile("subj[0-9]{1,9}")
_LEFT_BY_FILE_MANAGERS = ("Thumbs.db", "desktop.ini")


@dataclass
class _Scan:
    """Folder of one subject, and the faults found in it so far."""

    folder: Path
    faults: list[Fault] = field(default_factory=list)

    def fault(self, path: Path, expected: str, found: str) -> None:
        self.faults.append(Fault(path, expected, found))

    def array(self, path: Path, n_dimensions: int) -> np.ndarray | None:
        """Memory map of a .npy file of numbers with so many dimensions; None, and a fault, where it is not one."""
        try:
            array = open_npy(path)
        except DataError as error:
            self.fault(path, "a whole .npy file of numbers", error.found)
        else:
            if array.ndim == n_dimensions and array.dtype.kind in "fiub":
                return array
            self.fault(path, f"{n_dimensions} dimension(s) of numbers", f"shape {array.shape} of {array.dtype}")
        return None


def scan_tree(root: Path, noise_ceiling: Path | None = None) -> tuple[Dataset, list[Fault]]:
    """Subjects of the tree under `root`, and every fault that shows without decoding images or reading responses.

    noise_ceiling : folder with {subject}/{lh,rh}.npy; None for `root/noise_ceiling`, where it exists
    """
    folders = sorted(path for path in root.glob("subj*") if _SUBJECT_NAME.fullmatch(path.name) and path.is_dir())
    misnamed = _misnamed(root, folders)
    if not folders:
        found = "the folder of one subject" if _SUBJECT_NAME.fullmatch(root.name) else "none"
        return Dataset(root, ()), [*misnamed, Fault(root, "folders subj01, subj02, ... in it", found)]
    scans = [_Scan(folder) for folder in folders]
    subjects = [_scan_subject(scan) for scan in scans]
    subjects, note = _with_ceilings(scans, subjects, _ceiling_folder(root, noise_ceiling))
    notes = (note, *_notes_on_missing(subjects), *_notes_on_shared_images(subjects))
    faults = [*misnamed, *(fault for scan in scans for fault in scan.faults)]
    return Dataset(root, tuple(subjects), notes, challenge=True), faults


def _misnamed(root: Path, folders: Sequence[Path]) -> list[Fault]:
    """Faults of folders of one number, subj1 and subj01, of other letters, and of digits of other scripts."""
    faults = []
    for path in sorted(root.glob("[sS]*")):
        if re.fullmatch(r"(?i)subj\d+", path.name) and path not in folders and path.is_dir():
            faults.append(Fault(path, "subj and a number of up to nine digits from 0 to 9", repr(path.name)))
    first: dict[int, Path] = {}
    for path in folders:
        if (other := first.setdefault(int(path.name.removeprefix("subj")), path)) is not path:
            faults.append(Fault(path, "one folder a subject", f"one more of that number, {other.name}"))
    return faults


def open_challenge(root: Path | str, noise_ceiling: Path | str | None = None) -> Dataset:
    """Subjects of the tree under `root`. Raises DataError for the first fault that `scan_tree` finds.

    noise_ceiling : as for `scan_tree`
    """
    challenge, faults = scan_tree(Path(root), None if noise_ceiling is None else Path(noise_ceiling))
    refuse_faults(faults)
    return challenge


def response_files(folder: Path) -> dict[str, Path]:
    """{hemisphere: file of the training responses} for the folder of one subject; the files need not exist."""
    return {h: folder / "training_split" / "training_fmri" / f"{h}_training_fmri.npy" for h in HEMISPHERES}


def image_folder(folder: Path, split: str) -> Path:
    """Folder of the images of one split, 'train' or 'test', inside the folder of one subject."""
    name = {"train": "training", "test": "test"}[split]
    return folder / f"{name}_split" / f"{name}_images"


def image_name(split: str, number: int, image_id: int) -> str:
    """File name of an image, with its number within the split, from 1, and its id: 'train-0001_nsd-00013.png'."""
    return f"{split}-{number:04d}_nsd-{image_id:05d}.png"


def list_images(folder: Path, split: str) -> tuple[Images, list[Fault]]:
    """Images of a folder in the order of their numbers, and the faults of its file names; see `image_name`."""
    if not folder.is_dir():
        return Images((), np.array([], dtype=np.int64)), [Fault(folder, "a folder of images", "none")]
    by_number: dict[int, tuple[Path, int]] = {}
    faults = []
    for name in sorted(os.listdir(folder)):
        match, path = _IMAGE_NAME.fullmatch(name), folder / name
        if name.startswith(".") or name in _LEFT_BY_FILE_MANAGERS:
            continue
        if match is None or match["split"].lower() != split:
            faults.append(Fault(path, f"a name such as {image_name(split, 1, 13)}", "another"))
        elif (number := int(match["number"])) in by_number:
            faults.append(Fault(path, "one image a number", f"number {number} in {by_number[number][0].name}"))
        else:
            by_number[number] = (path, int(match["id"]))
    numbers = sorted(by_number)
    faults += _numbering_faults(folder, numbers, by_number[numbers[-1]][0].name if numbers else "")
    faults += _repeated(folder, [by_number[number] for number in numbers])
    ids = np.array([by_number[number][1] for number in numbers], dtype=np.int64)
    return Images(tuple(by_number[number][0] for number in numbers), ids), faults


def _numbering_faults(folder: Path, numbers: list[int], last: str) -> list[Fault]:
    """Faults of the numbers of images, in order; `last` has the largest. One wrong name may have a huge number."""
    if numbers and numbers[0] == 0:
        return [Fault(folder, "images numbered from 1", "number 0")]
    if not (n_missing := max(numbers, default=0) - len(numbers)):
        return []
    there = set(numbers)
    missing = listed(islice((number for number in count(1) if number not in there), min(n_missing, 6)))
    hint = f"; the number of {last} may be wrong" if n_missing > len(numbers) else ""
    return [Fault(folder, f"images numbered 1 to {numbers[-1]}", f"{n_missing} missing: {missing}{hint}")]


def _repeated(folder: Path, images: Sequence[tuple[Path, int]]) -> list[Fault]:
    """Fault of ids that several images of one split have; rows of stores and folds go by id."""
    first: dict[int, str] = {}
    twice = [
        f"{image_id} of {first[image_id]} and {path.name}"
        for path, image_id in images
        if first.setdefault(image_id, path.name) != path.name
    ]
    return [Fault(folder, "an image id once in a split", f"{len(twice)} more than once: {twice[0]}")] if twice else []


def _scan_subject(scan: _Scan) -> Subject:
    train, test = (_scan_images(scan, split) for split in ("train", "test"))
    if both := sorted(set(train.ids.tolist()) & set(test.ids.tolist())):
        scan.fault(scan.folder, "each image id in training or in test", f"{len(both)} in both: {listed(both)}")
    n_vertices, response_paths = {}, response_files(scan.folder)
    for hemisphere, path in response_paths.items():
        if (responses := scan.array(path, 2)) is not None:
            n_vertices[hemisphere] = responses.shape[1]
            if len(responses) != len(train):
                scan.fault(path, f"a row for each of {len(train)} training images", f"{len(responses)} rows")
    fsaverage = {h: _scan_fsaverage(scan, h, n_vertices.get(h)) for h in HEMISPHERES}
    rois = _scan_rois(scan, n_vertices)
    ceilings = dict.fromkeys(HEMISPHERES)  # filled for all subjects together, by `_with_ceilings`
    return Subject(scan.folder.name, train, test, response_paths, n_vertices, rois, ceilings, fsaverage)


def _scan_images(scan: _Scan, split: str) -> Images:
    folder = image_folder(scan.folder, split)
    images, faults = list_images(folder, split)
    scan.faults += faults
    if not len(images) and not faults:
        scan.fault(folder, "images", "an empty folder")
    return images


def _scan_fsaverage(scan: _Scan, hemisphere: str, n_vertices: int | None) -> np.ndarray | None:
    path = scan.folder / "roi_masks" / f"{hemisphere}.all-vertices_fsaverage_space.npy"
    if not path.exists() or n_vertices is None or (mask := scan.array(path, 1)) is None:
        return None
    if len(mask) != FSAVERAGE_VERTICES or np.any((mask != 0) & (mask != 1)):
        scan.fault(path, f"{FSAVERAGE_VERTICES} zeros and ones", f"{len(mask)} up to {mask.max(initial=0)}")
    elif mask.sum(dtype=np.int64) != n_vertices:
        scan.fault(path, f"{n_vertices} ones, the columns of the responses", str(mask.sum(dtype=np.int64)))
    return mask.astype(bool)


def _scan_rois(scan: _Scan, n_vertices: dict[str, int]) -> dict[str, dict[str, np.ndarray]]:
    rois: dict[str, dict[str, np.ndarray]] = {h: {} for h in HEMISPHERES}
    folder = scan.folder / "roi_masks"
    classes = {p.name[len("lh.") : -len("_challenge_space.npy")] for p in folder.glob("?h.*_challenge_space.npy")}
    for roi_class in sorted(classes, key=class_order):
        path = folder / f"mapping_{roi_class}.npy"
        try:
            mapping = read_mapping(path)
        except DataError as error:
            scan.fault(path, error.expected, error.found)
            continue
        names = [name for label, name in mapping.items() if label != 0]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            scan.fault(path, "a name once", f"{repeated[0]!r} for several labels")
        for hemisphere in HEMISPHERES:
            if hemisphere in n_vertices:
                of_class = _scan_class(scan, hemisphere, roi_class, mapping, n_vertices[hemisphere])
                if twice := sorted(of_class.keys() & rois[hemisphere].keys()):
                    scan.fault(folder, "an ROI in one class", f"{twice[0]} in {roi_class} and another")
                rois[hemisphere] |= of_class
    return rois


def _scan_class(
    scan: _Scan, hemisphere: str, roi_class: str, mapping: dict[int, str], n_vertices: int
) -> dict[str, np.ndarray]:
    folder = scan.folder / "roi_masks"
    path = folder / f"{hemisphere}.{roi_class}_challenge_space.npy"
    surface = folder / f"{hemisphere}.{roi_class}_fsaverage_space.npy"
    if surface.exists() and (labels := scan.array(surface, 1)) is not None and len(labels) != FSAVERAGE_VERTICES:
        scan.fault(surface, f"{FSAVERAGE_VERTICES} labels", str(len(labels)))
    if (labels := scan.array(path, 1)) is None:
        return {}
    if len(labels) != n_vertices:
        scan.fault(path, f"a label for each of {n_vertices} vertices", str(len(labels)))
        return {}
    if unknown := sorted(set(np.unique(labels).tolist()) - set(mapping) - {0}):
        scan.fault(path, f"labels named in mapping_{roi_class}.npy", str(unknown[0]))
    return {name: np.asarray(labels == label) for label, name in sorted(mapping.items()) if label != 0}


def _ceiling_folder(root: Path, noise_ceiling: Path | None) -> Path | None:
    if noise_ceiling is None:
        default = root / "noise_ceiling"
        return default if default.is_dir() else None
    if not any(noise_ceiling.glob("subj*/?h.npy")):
        raise DataError(
            "--noise-ceiling",
            expected="a folder of subj01/lh.npy and so on",
            found=f"none of these in {noise_ceiling}" if noise_ceiling.is_dir() else f"no folder {noise_ceiling}",
            remedy="name the folder that holds them",
        )
    if is_named_ncsnr(noise_ceiling.name):
        raise DataError(
            "--noise-ceiling",
            expected="ceilings, in percent or as fractions of variance",
            found=f"ratios of signal to noise, by the name of {noise_ceiling}",
            remedy=f"{NCSNR}; give these, in a folder of another name",
        )
    return noise_ceiling


def _with_ceilings(scans: list[_Scan], subjects: list[Subject], folder: Path | None) -> tuple[list[Subject], str]:
    """Subjects with their noise ceilings as fractions, and a note on the ceilings.

    The largest value of the whole folder decides its unit. A file of the other unit is a fault.
    """
    raw = [_ceiling_arrays(scan, folder / scan.folder.name) for scan in scans] if folder else []
    if folder is None or not any(raw):
        return subjects, "no noise ceilings: scores are mean r and mean r^2"
    given = [array for arrays in raw for array in arrays.values()]
    unit = 100 if is_percent(max(np.nanmax(array, initial=0) for array in given)) else 1
    with_ceilings = []
    for scan, subject, arrays in zip(scans, subjects, raw, strict=True):
        fractions: dict[str, np.ndarray | None] = dict.fromkeys(HEMISPHERES)
        for hemisphere, array in arrays.items():
            path = folder / subject.name / f"{hemisphere}.npy"
            if _check_ceiling(scan, path, array, subject.n_vertices.get(hemisphere), unit):
                fractions[hemisphere] = array / np.float32(unit)
        with_ceilings.append(replace(subject, noise_ceiling=fractions))
    return with_ceilings, f"noise ceilings from {folder}, {note_on_unit(given, unit)}"


def _ceiling_arrays(scan: _Scan, folder: Path) -> dict[str, np.ndarray]:
    paths = {hemisphere: folder / f"{hemisphere}.npy" for hemisphere in HEMISPHERES}
    arrays = {hemisphere: scan.array(path, 1) for hemisphere, path in paths.items() if path.exists()}
    return {h: np.array(array, dtype=np.float32) for h, array in arrays.items() if array is not None}


def _check_ceiling(scan: _Scan, path: Path, ceiling: np.ndarray, n_vertices: int | None, unit: int) -> bool:
    bad = np.flatnonzero(~((ceiling >= 0) & (ceiling <= unit)))  # NaN is bad too
    if n_vertices is not None and len(ceiling) != n_vertices:
        scan.fault(path, f"a ceiling for each of {n_vertices} vertices", str(len(ceiling)))
    elif unit > 1 and 0 < np.nanmax(ceiling, initial=0) <= 1:
        scan.fault(path, "percent, as other ceilings of the folder", f"fractions up to {ceiling.max():.4g}")
    elif len(bad):
        scan.fault(path, f"ceilings from 0 to {unit}", out_of_range(float(ceiling[bad[0]]), bad[0], unit))
    else:
        return True
    return False


def _notes_on_missing(subjects: Sequence[Subject]) -> list[str]:
    """Notes on what some subjects lack, and on what follows from it; not of surfaces whose responses are a fault."""

    def names_where(missing: Callable[[Subject, str], bool]) -> str:
        names = [one.name for one in subjects if any(missing(one, surface) for surface in one.n_vertices)]
        return "all subjects" if len(names) == len(subjects) else ", ".join(names)

    notes = []
    if names := names_where(lambda subject, surface: subject.fsaverage[surface] is None):
        notes.append(f"no fsaverage masks ({names}): vertices of different subjects cannot be matched")
    if names := names_where(lambda subject, surface: not subject.rois[surface]):
        notes.append(f"no ROI masks ({names}): scores are per hemisphere only, and --head roi has no ROI")
    any_ceiling = any(ceiling is not None for subject in subjects for ceiling in subject.noise_ceiling.values())
    if any_ceiling and (names := names_where(lambda subject, surface: subject.noise_ceiling[surface] is None)):
        notes.append(f"no noise ceiling ({names}): left out of noise-normalised scores")
    return notes


def _notes_on_shared_images(subjects: Sequence[Subject]) -> list[str]:
    """Note on test images that another subject trains on: legal, but a leak for a model trained on several subjects."""
    trained = {image_id for subject in subjects for image_id in subject.train.ids.tolist()}
    shared = trained.intersection(image_id for subject in subjects for image_id in subject.test.ids.tolist())
    if not shared:
        return []
    return [f"{len(shared)} test images of one subject are training images of another: mind them in joint training"]
