"""Subjects of a dataset, their images and responses; a subject knows no folder layout."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError
from featcache.formats.volumes import Grid
from featcache.machine.files import file_checksum

SESSION, SESSIONS_JOINED_BY = "session", "+"  # the column of images with the sessions of their trials, '1' or '1+5'
_N_SHOWN = 5  # enough to look them up, few enough for one line


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a dataset."""

    where: Path | str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}; found {self.found}"


@lru_cache(maxsize=1024)
def _checksum(path: Path, _n_bytes: int, _time: int) -> str:
    """Checksum of a file, which is read once in a process as long as it keeps its size and time."""
    return file_checksum(path)


def refuse_faults(faults: Sequence[Fault]) -> None:
    """Raise DataError for the first of some faults, if there is one."""
    if faults:
        first, more = faults[0], f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DataError(
            first.where,
            expected=first.expected,
            found=f"{first.found}{more}",
            remedy="run 'check' to see every fault of the dataset",
        )


def listed(values: Iterable[object]) -> str:
    """First few values of a list, for an error line: '1, 2, 3, 4, 5, ...'."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:_N_SHOWN]) + (", ..." if len(texts) > _N_SHOWN else "")


@dataclass(frozen=True)
class ArrayImage:
    """One picture inside a file that holds many: row `row` of an array, (n_pictures, height, width, 3) of 8 bits.

    array : name of the array within the file; '' where the file is one array
    """

    path: Path
    array: str
    row: int

    @property
    def name(self) -> str:
        """Name for messages: 'nsd_stimuli.hdf5:imgBrick[13]'."""
        return f"{self.path.name}{':' if self.array else ''}{self.array}[{self.row}]"

    def __str__(self) -> str:
        return str(self.path.parent / self.name)


ImageSource = Path | ArrayImage


@dataclass(frozen=True)
class Images:
    """Images of one split, in the order of the response rows.

    sources : (n_images,) where each picture is: an image file, or a row of an array
    ids : (n_images,) int64, 0 or larger; a picture has the same id for every subject that saw it
    """

    sources: tuple[ImageSource, ...]
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        return f"<{len(self)} images>"

    @classmethod
    def none(cls) -> "Images":
        """No images: the test images of a subject that has none."""
        return cls((), np.array([], dtype=np.int64))


@dataclass(frozen=True, eq=False)  # two subjects are never compared by their arrays, and a subject can be hashed
class Subject:
    """One person or animal: the images that were shown, and the responses of each surface.

    A surface is a set of vertices (or voxels, or neurons) that are measured and fitted together, such as the
    hemispheres 'lh' and 'rh', or 'V4'. Every dict by surface has the surfaces as keys, in the same order.

    Parameters
    ----------
    train : images with responses to fit to
    test : images whose responses are predicted; may be none
    response_paths : .npy files of the training responses, (n_train, n_vertices)
    n_vertices : number of vertices of each surface
    rois : {ROI name: (n_vertices,) bool}; ROIs without a vertex are kept; an empty dict where no ROIs are known
    noise_ceiling : (n_vertices,) float32, fraction of variance in [0, 1] that a perfect model could explain of the
        training responses; None where not given
    fsaverage : (163842,) bool, true at the fsaverage vertices that the columns stand for, in rising order; None where
        not given
    test_response_paths : .npy files of the test responses, (n_test, n_vertices); an empty dict where they are withheld
    test_noise_ceiling : as noise_ceiling, of the test responses; an empty dict where they are withheld
    positions : (n_vertices, 3) float32, where each vertex is, in mm; an empty dict where not known
    grids : the grid of voxels that the positions are of; an empty dict where not known
    columns : what else is known of each image, such as its session: {name: (n_train + n_test,) texts}
    checksums : of its files as they were written, which files of responses are held against when they are opened; none
        of a dataset that somebody else wrote
    """

    name: str
    train: Images
    test: Images
    response_paths: dict[str, Path]
    n_vertices: dict[str, int]
    rois: dict[str, dict[str, np.ndarray]]
    noise_ceiling: dict[str, np.ndarray | None]
    fsaverage: dict[str, np.ndarray | None]
    test_response_paths: dict[str, Path] = field(default_factory=dict)
    test_noise_ceiling: dict[str, np.ndarray | None] = field(default_factory=dict)
    positions: dict[str, np.ndarray] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    checksums: dict[Path, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        vertices = ", ".join(f"{n} vertices of {surface}" for surface, n in self.n_vertices.items())
        return f"<{self.name}: {len(self.train)} training images, {len(self.test)} test images, {vertices}>"

    @property
    def surfaces(self) -> tuple[str, ...]:
        """Names of the surfaces, in the order that every result keeps."""
        return tuple(self.n_vertices)

    @property
    def has_rois(self) -> bool:
        """Whether any ROI has a vertex."""
        return any(bool(mask.any()) for rois in self.rois.values() for mask in rois.values())

    def responses(self, surface: str) -> np.ndarray:
        """Training responses, (n_train, n_vertices), as a memory map: slice it, then cast to float32."""
        return self._opened(self.response_paths[surface])

    @property
    def has_test_responses(self) -> bool:
        """Whether the responses to the test images are given, so that predictions of them can be scored."""
        return bool(self.test_response_paths)

    def test_responses(self, surface: str) -> np.ndarray:
        """Test responses, (n_test, n_vertices), as a memory map. Only where `has_test_responses`."""
        return self._opened(self.test_response_paths[surface])

    def _opened(self, path: Path) -> np.ndarray:
        """A file of responses as a memory map. Raises DataError for one that is not what was written."""
        known = self.checksums.get(path)
        if known is not None:
            status = path.stat()
            if _checksum(path, status.st_size, status.st_mtime_ns) != known:
                raise DataError(
                    path, expected="the responses that were imported", found="others", remedy="run 'import' again"
                )
        responses: np.ndarray = np.load(path, mmap_mode="r")
        return responses

    @property
    def image_ids(self) -> np.ndarray:
        """Image ids, (n_train + n_test,) int64: training images, then test images, as in the rows of every store."""
        return np.concatenate([self.train.ids, self.test.ids])

    @property
    def image_sources(self) -> tuple[ImageSource, ...]:
        """Where each picture is, (n_train + n_test,), in the order of `image_ids`."""
        return self.train.sources + self.test.sources


@dataclass(frozen=True)
class Dataset:
    """Subjects of one dataset.

    root : folder that they were read from
    notes : sentences that its user should read, such as on what is not given
    challenge : whether this is the Algonauts 2023 challenge, whose predictions are handed in as a zip
    """

    root: Path
    subjects: tuple[Subject, ...]
    notes: tuple[str, ...] = ()
    challenge: bool = False

    @classmethod
    def from_algonauts(
        cls, folder: Path | str, noise_ceiling: Path | str | None = None, *, work: Path | str | None = None
    ) -> "Dataset":
        """Subjects of the challenge's tree, used where it lies.

        noise_ceiling : folder with {subject}/{lh,rh}.npy; None for `folder/noise_ceiling`, where it exists
        work : work folder, in which is remembered what pictures look like, so that a picture of two ids has one, as on
            the command line: each is decoded once. None: ids are taken as they are

        Raises DataError for the first fault of the tree.
        """
        from featcache.config import usual_workers
        from featcache.dataset.algonauts import open_challenge
        from featcache.dataset.open import with_known_pictures

        opened = open_challenge(folder, noise_ceiling)
        return opened if work is None else with_known_pictures(opened, Path(work), usual_workers())

    @classmethod
    def from_arrays(
        cls,
        images: Sequence[str | Path] | str | Path,
        responses: Any,
        *,
        work: Path | str = "work",
        zscore: bool | None = None,
        subject: str = "subj01",
        **more: Any,
    ) -> "Dataset":
        """One subject of images and responses that a program has at hand, written to `<work>/dataset`.

        Trials of one picture are averaged, and noise ceilings are estimated from them where none are given. The result
        has every subject of `<work>/dataset`.

        Parameters
        ----------
        images : (n_trials,) image files, or 'file:array' of pictures, (n_trials, height, width, 3) of 8 bits
        responses : (n_trials, n_vertices) array, or where one is ('betas.h5:betas'), or {surface: either}
        rois : {ROI: (n_vertices,) bool}, or {surface: such a dict}
        sessions : (n_trials,) session of each trial
        ids : (n_trials,) integers, the same for a picture that several subjects saw; None: made from the pixels
        noise_ceiling : (n_vertices,) percent or fraction of variance, or {surface: such}
        ncsnr : (n_vertices,) noise-ceiling signal-to-noise ratio, or {surface: such}
        test_images, test_responses : as images and responses, of images to predict and not to fit to
        test_trials : trials that each row of test_responses is the mean of, for their noise ceiling
        columns : {name: (n_trials,)} what else is known, such as for --split; one value for all trials of a picture
        zscore : whether each vertex is z-scored within each session; None: where sessions are given
        subject : name

        Raises DataError for arguments that do not fit together, or that no head could be fitted to.
        """
        from featcache.config import usual_workers
        from featcache.dataset.importing.arrays import material_of
        from featcache.dataset.importing.run import import_into
        from featcache.dataset.open import open_imported
        from featcache.machine.progress import say

        material = material_of(images, responses, subject=subject, **more)
        for note in import_into(material, Path(work), usual_workers(), zscore).notes:
            say(note)
        return open_imported(Path(work))

    @classmethod
    def from_nsd(cls, root: Path | str, subject: int = 1, *, work: Path | str = "work", **more: Any) -> "Dataset":
        """One subject of the Natural Scenes Dataset, as it is published, written to `<work>/dataset`.

        more : other fields of `featcache.dataset.importing.config.ImportConfig`, such as betas

        Raises DataError for files that are missing or broken.
        """
        from featcache.config import usual_workers
        from featcache.dataset.importing.config import ImportConfig
        from featcache.dataset.importing.run import import_files
        from featcache.dataset.open import open_imported

        config = ImportConfig(nsd=Path(root), subject=str(subject), **more)
        import_files(config, Path(work), usual_workers())
        return open_imported(Path(work))

    def select(self, names: str) -> tuple[Subject, ...]:
        """Subjects for the option --subject: 'all', or numbers or names separated by commas ('1,3' or 'subj01').

        Raises DataError for a name that is not in the dataset.
        """
        by_name = {subject.name: subject for subject in self.subjects}
        return tuple(by_name[name] for name in names_in(names, list(by_name)))


def names_in(names: str, known: Sequence[str]) -> list[str]:
    """Names of the subjects that '--subject' chooses; 1 stands for 'subj01'. Raises DataError for others."""
    if names == "all":
        return list(known)
    wanted = [f"subj{int(part):02d}" if part.isdigit() and part not in known else part for part in names.split(",")]
    for name in wanted:
        if name not in known:
            raise DataError(
                "--subject", expected=f"one of {', '.join(known)}", found=f"{name!r}", remedy="choose from those"
            )
    return list(dict.fromkeys(wanted))
