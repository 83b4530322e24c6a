"""The challenge's tree: what is in it, what is wrong with it, and the one place where percent become fractions.

Layout of Algonauts 2023 (Gifford et al. 2023, https://arxiv.org/abs/2301.03198).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from tokenize import TokenError

import numpy as np

from featcache.dataset.images import image_fault, list_images
from featcache.dataset.rois import FSAVERAGE_VERTICES, HEMISPHERES, class_order, read_mapping
from featcache.dataset.subject import Challenge, Fault, ImageFiles, Subject
from featcache.errors import ChallengeError

_SURELY_PERCENT = 2  # a largest ceiling just above 1 is a fraction out of range, and no whole folder ends at 2 %
_ROWS_PER_SCAN = 256  # response rows looked at in one go: bounds the memory of a scan


@dataclass
class _Scan:
    """What one subject's folder holds, gathered while its faults are."""

    folder: Path
    faults: list[Fault] = field(default_factory=list)

    def fault(self, path: Path, expected: str, found: str) -> None:
        self.faults.append(Fault(path, expected, found))

    def array(self, path: Path, n_dimensions: int) -> np.ndarray | None:
        """Map a numeric .npy file of so many dimensions, or note why it cannot be."""
        try:
            array = np.lib.format.open_memmap(path, mode="r")  # np.load would open a zip or a pickle of that name
        except FileNotFoundError:
            self.fault(path, "a .npy file", "none")
        except (ValueError, OSError, EOFError, SyntaxError, TokenError) as error:
            self.fault(path, "a whole .npy file of numbers", f"one that cannot be read ({error})")
        else:
            if array.ndim == n_dimensions and array.dtype.kind in "fiub":
                return array
            self.fault(path, f"{n_dimensions} dimension(s) of numbers", f"shape {array.shape} of {array.dtype}")
        return None


def scan_tree(root: Path, noise_ceiling: Path | None = None) -> tuple[Challenge, list[Fault]]:
    """Everything that can be said of a tree without decoding an image or reading the responses."""
    folders = sorted(path for path in root.glob("subj*") if re.fullmatch(r"subj\d+", path.name) and path.is_dir())
    if not folders:
        return Challenge(root, ()), [Fault(root, "folders subj01, subj02, ...", "none")]
    scans = [_Scan(folder) for folder in folders]
    subjects = [_scan_subject(scan) for scan in scans]
    notes = _read_ceilings(scans, subjects, _ceiling_folder(root, noise_ceiling))
    notes += _absences(subjects) + _shared_notes(subjects)
    return Challenge(root, tuple(subjects), tuple(notes)), [fault for scan in scans for fault in scan.faults]


def open_challenge(root: Path, noise_ceiling: Path | None = None) -> Challenge:
    """The tree under `root`, checked for what can be seen cheaply. Raises ChallengeError for the first fault."""
    challenge, faults = scan_tree(root, noise_ceiling)
    if faults:
        first, more = faults[0], f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ChallengeError(
            first.path,
            expected=first.expected,
            found=f"{first.found}{more}",
            remedy="run 'check' to see every fault of the tree",
        )
    return challenge


def deep_faults(
    challenge: Challenge, workers: int = 2, advance: Callable[[int], object] = lambda n: None
) -> Iterator[Fault]:
    """Decode every image and read every response: the part of `check` that takes time."""
    paths = [path for subject in challenge.subjects for path in subject.image_paths]
    with ThreadPoolExecutor(workers) as pool:
        for fault in pool.map(image_fault, paths):
            advance(1)
            if fault:
                yield fault
    for subject in challenge.subjects:
        for hemisphere in HEMISPHERES:
            yield from _response_faults(subject, hemisphere)


def _response_faults(subject: Subject, hemisphere: str) -> Iterator[Fault]:
    path = subject.response_paths[hemisphere]
    if not path.exists() or hemisphere not in subject.n_vertices:
        return  # the cheap part has said so
    responses = np.load(path, mmap_mode="r")
    for start in range(0, len(responses), _ROWS_PER_SCAN):
        bad = np.argwhere(~np.isfinite(responses[start : start + _ROWS_PER_SCAN]))
        if len(bad):
            row, vertex = bad[0]
            where = f"row {start + row}, vertex {vertex}" + (f" and {len(bad) - 1} more nearby" if len(bad) > 1 else "")
            yield Fault(path, "finite responses", f"NaN or infinity at {where}")
            return


def response_files(folder: Path) -> dict[str, Path]:
    """{hemisphere: file of the training responses} of one subject's folder, whether or not the files exist."""
    return {hemisphere: _response_path(folder, hemisphere) for hemisphere in HEMISPHERES}


def _response_path(folder: Path, hemisphere: str) -> Path:
    return folder / "training_split" / "training_fmri" / f"{hemisphere}_training_fmri.npy"


def _scan_subject(scan: _Scan) -> Subject:
    train = _scan_images(scan, "training_split/training_images", "train")
    test = _scan_images(scan, "test_split/test_images", "test")
    if both := sorted(set(train.ids.tolist()) & set(test.ids.tolist())):
        shown = ", ".join(map(str, both[:5])) + (", ..." if len(both) > 5 else "")
        scan.fault(scan.folder, "each image id in training or in test", f"{len(both)} in both: {shown}")
    n_vertices = {}
    for hemisphere in HEMISPHERES:
        path = _response_path(scan.folder, hemisphere)
        if (responses := scan.array(path, 2)) is not None:
            n_vertices[hemisphere] = responses.shape[1]
            if len(responses) != len(train):
                scan.fault(path, f"a row for each of {len(train)} training images", f"{len(responses)} rows")
    fsaverage = {h: _scan_fsaverage(scan, h, n_vertices.get(h)) for h in HEMISPHERES}
    rois = _scan_rois(scan, n_vertices)
    return Subject(
        scan.folder.name,
        train,
        test,
        response_files(scan.folder),
        n_vertices,
        rois,
        dict.fromkeys(HEMISPHERES),
        fsaverage,
    )


def _scan_images(scan: _Scan, folder: str, split: str) -> ImageFiles:
    images, faults = list_images(scan.folder / folder, split)
    scan.faults += faults
    if not len(images) and not faults:
        scan.fault(scan.folder / folder, "images", "an empty folder")
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
    names = {p.name[len("lh.") : -len("_challenge_space.npy")] for p in folder.glob("?h.*_challenge_space.npy")}
    for roi_class in sorted(names, key=class_order):
        try:
            mapping = read_mapping(folder / f"mapping_{roi_class}.npy")
        except ChallengeError as error:
            scan.fault(folder / f"mapping_{roi_class}.npy", error.expected, error.found)
            continue
        for hemisphere in HEMISPHERES:
            if hemisphere in n_vertices:
                found = _scan_class(scan, hemisphere, roi_class, mapping, n_vertices[hemisphere])
                if twice := sorted(found.keys() & rois[hemisphere].keys()):
                    scan.fault(folder, "an ROI in one class", f"{twice[0]} in {roi_class} and another")
                rois[hemisphere] |= found
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
    if noise_ceiling is not None and not noise_ceiling.is_dir():
        raise ChallengeError(
            "--noise-ceiling",
            expected="a folder of subj01/lh.npy and so on",
            found=f"none at {noise_ceiling}",
            remedy="correct it",
        )
    if noise_ceiling is not None and not any(noise_ceiling.glob("subj*/?h.npy")):
        raise ChallengeError(
            "--noise-ceiling",
            expected="subj01/lh.npy and so on",
            found=f"none in {noise_ceiling}",
            remedy="name their folder",
        )
    beside = root / "noise_ceiling"
    return noise_ceiling or (beside if beside.is_dir() else None)


def _read_ceilings(scans: list[_Scan], subjects: list[Subject], folder: Path | None) -> list[str]:
    """Give the subjects their ceilings as fractions; what to say of them.

    The unit is decided once, for the whole folder, by its largest value; a file of the other unit is a fault.
    """
    if folder is None:
        return ["no noise ceilings: scores are mean r and mean r^2"]
    raw: dict[tuple[int, str], np.ndarray] = {}
    for number, (scan, subject) in enumerate(zip(scans, subjects, strict=True)):
        for hemisphere in HEMISPHERES:
            path = folder / subject.name / f"{hemisphere}.npy"
            if path.exists() and (ceiling := scan.array(path, 1)) is not None:
                raw[number, hemisphere] = np.array(ceiling, dtype=np.float32)
    if not raw:
        return ["no noise ceilings: scores are mean r and mean r^2"]
    largest = max(np.nanmax(ceiling, initial=0) for ceiling in raw.values())
    unit, name = (100, "percent") if largest > _SURELY_PERCENT else (1, "fractions")
    for (number, hemisphere), ceiling in raw.items():
        path = folder / subjects[number].name / f"{hemisphere}.npy"
        if _check_ceiling(scans[number], path, ceiling, subjects[number].n_vertices.get(hemisphere), unit):
            both = subjects[number].noise_ceiling | {hemisphere: ceiling / np.float32(unit)}
            subjects[number] = replace(subjects[number], noise_ceiling=both)
    return [f"noise ceilings from {folder}, read as {name} (largest {largest:.4g})"]


def _check_ceiling(scan: _Scan, path: Path, ceiling: np.ndarray, n_vertices: int | None, unit: int) -> bool:
    bad = np.flatnonzero(~((ceiling >= 0) & (ceiling <= unit)))  # NaN is bad too
    if n_vertices is not None and len(ceiling) != n_vertices:
        scan.fault(path, f"a ceiling for each of {n_vertices} vertices", str(len(ceiling)))
    elif unit > 1 and 0 < np.nanmax(ceiling, initial=0) <= 1:
        scan.fault(path, "percent, as other ceilings of the folder", f"fractions up to {ceiling.max():.4g}")
    elif len(bad):
        scan.fault(path, f"ceilings from 0 to {unit}", f"{ceiling[bad[0]]} at vertex {bad[0]}")
    else:
        return True
    return False


def _absences(subjects: Sequence[Subject]) -> list[str]:
    """What some subjects lack, and what that means."""

    def lacking(missing: Callable[[Subject, str], bool]) -> str:
        names = [subject.name for subject in subjects if any(missing(subject, h) for h in HEMISPHERES)]
        return "all subjects" if len(names) == len(subjects) else ", ".join(names)

    notes = []
    if who := lacking(lambda s, h: s.fsaverage[h] is None):
        notes.append(f"no fsaverage masks ({who}): columns of different subjects cannot be aligned")
    if who := lacking(lambda s, h: not s.rois[h]):
        notes.append(f"no ROI masks ({who}): scores are per hemisphere only, and --head roi has no ROI")
    some = any(ceiling is not None for subject in subjects for ceiling in subject.noise_ceiling.values())
    if some and (who := lacking(lambda s, h: s.noise_ceiling[h] is None)):
        notes.append(f"no noise ceiling ({who}): left out of noise-normalised scores")
    return notes


def _shared_notes(subjects: Sequence[Subject]) -> list[str]:
    """Test images that another subject trains on: legal, and a leak for whatever is trained on several subjects."""
    trained = {image_id for subject in subjects for image_id in subject.train.ids.tolist()}
    tested = {image_id for subject in subjects for image_id in subject.test.ids.tolist()}
    both = trained & tested
    if not both:
        return []
    return [f"{len(both)} test images of one subject are training images of another: mind them in joint training"]
