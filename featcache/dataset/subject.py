"""Subjects of a dataset, their images and responses; nothing here knows a folder layout."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.errors import ChallengeError

_N_SHOWN = 5  # enough to look them up, few enough for one line


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a dataset."""

    path: Path
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}; found {self.found}"


def listed(values: Iterable[object]) -> str:
    """First few values of a list, for an error line: '1, 2, 3, 4, 5, ...'."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:_N_SHOWN]) + (", ..." if len(texts) > _N_SHOWN else "")


@dataclass(frozen=True)
class ImageFiles:
    """Image files of one split, in the order of the response rows.

    paths : (n_images,) files
    ids : (n_images,) int64; a picture has the same id for every subject that saw it
    """

    paths: tuple[Path, ...]
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)  # two subjects are never compared by their arrays, and a subject can be hashed
class Subject:
    """One person: the images that were shown, and the responses of each surface.

    A surface is a set of vertices that are measured and fitted together, such as the hemispheres 'lh' and 'rh'.
    Every dict has the surfaces as keys, in the same order.

    Parameters
    ----------
    train, test : images with given responses, and images whose responses are to be predicted
    response_paths : .npy files of the training responses, (n_train, n_vertices)
    n_vertices : number of vertices of each surface
    rois : {ROI name: (n_vertices,) bool}; ROIs without a vertex are kept; an empty dict where no ROIs are known
    noise_ceiling : (n_vertices,) float32, fraction of variance in [0, 1]; None where not given
    fsaverage : (163842,) bool, true at the fsaverage vertices that the columns stand for, in rising order; None where
        not given
    """

    name: str
    train: ImageFiles
    test: ImageFiles
    response_paths: dict[str, Path]
    n_vertices: dict[str, int]
    rois: dict[str, dict[str, np.ndarray]]
    noise_ceiling: dict[str, np.ndarray | None]
    fsaverage: dict[str, np.ndarray | None]

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
        responses: np.ndarray = np.load(self.response_paths[surface], mmap_mode="r")
        return responses

    @property
    def image_ids(self) -> np.ndarray:
        """Image ids, (n_train + n_test,) int64: training images, then test images, as in the rows of every store."""
        return np.concatenate([self.train.ids, self.test.ids])

    @property
    def image_paths(self) -> tuple[Path, ...]:
        """Image files, (n_train + n_test,), in the order of `image_ids`."""
        return self.train.paths + self.test.paths


@dataclass(frozen=True)
class Challenge:
    """Subjects of one dataset.

    root : folder that they were read from
    notes : sentences that its user should read, such as on what is not given
    """

    root: Path
    subjects: tuple[Subject, ...]
    notes: tuple[str, ...] = ()

    def select(self, names: str) -> tuple[Subject, ...]:
        """Subjects for the option --subject: 'all', or numbers or names separated by commas ('1,3' or 'subj01').

        Raises ChallengeError for a name that is not in the dataset.
        """
        by_name = {subject.name: subject for subject in self.subjects}
        return tuple(by_name[name] for name in names_in(names, list(by_name)))


def names_in(names: str, known: Sequence[str]) -> list[str]:
    """Names of the subjects that '--subject' chooses; 1 stands for 'subj01'. Raises ChallengeError for others."""
    if names == "all":
        return list(known)
    wanted = [f"subj{int(part):02d}" if part.isdigit() else part for part in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ChallengeError(
                "--subject", expected=f"one of {', '.join(known)}", found=f"{name!r}", remedy="choose from those"
            )
    return list(dict.fromkeys(wanted))
