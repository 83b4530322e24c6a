"""A subject, its images, its responses; nothing here knows a folder layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.errors import ChallengeError


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a tree."""

    path: Path
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}; found {self.found}"


@dataclass(frozen=True)
class ImageFiles:
    """The images of one split, in the order of the response rows.

    paths : (n_images,) files
    ids : (n_images,) int64, ids of the pictures, the same for every subject that saw them
    """

    paths: tuple[Path, ...]
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)  # a subject is one thing, and arrays have no truth value to compare by
class Subject:
    """One subject: the images that it saw, and the responses of each surface.

    A surface is a set of vertices that are measured and fitted together, such as the hemispheres 'lh' and 'rh'.
    Every dict has the surfaces as keys, in one order.

    Parameters
    ----------
    train, test : images whose responses are given, and images whose responses are to be predicted
    response_paths : .npy files of numbers, (n_train, n_vertices)
    n_vertices : number of vertices
    rois : {ROI name: (n_vertices,) bool}; empty ROIs are kept; an empty dict where no ROIs are known
    noise_ceiling : (n_vertices,) float32, fraction of variance in [0, 1]; None where not given
    fsaverage : (163842,) bool, the fsaverage vertices that the columns stand for, in order; None where not given
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
        """Names of the surfaces, in the order of every result."""
        return tuple(self.n_vertices)

    def responses(self, surface: str) -> np.ndarray:
        """Responses of one surface, (n_train, n_vertices), memory-mapped: slice them, then cast to float32."""
        return np.load(self.response_paths[surface], mmap_mode="r")

    @property
    def image_ids(self) -> np.ndarray:
        """Ids of the images, (n_train + n_test,) int64: training rows, then test rows. The row order of every store."""
        return np.concatenate([self.train.ids, self.test.ids])

    @property
    def image_paths(self) -> tuple[Path, ...]:
        """Files of the images, in the same order."""
        return self.train.paths + self.test.paths


@dataclass(frozen=True)
class Challenge:
    """A tree without faults in what can be seen cheaply; `notes` is what its user should know of it."""

    root: Path
    subjects: tuple[Subject, ...]
    notes: tuple[str, ...] = ()

    def select(self, names: str) -> tuple[Subject, ...]:
        """The subjects of '--subject': 'all', or numbers or names separated by commas ('1,3' or 'subj01')."""
        by_name = {subject.name: subject for subject in self.subjects}
        return tuple(by_name[name] for name in names_in(names, list(by_name)))


def names_in(names: str, known: Sequence[str]) -> list[str]:
    """Names of the subjects that '--subject' chooses. Raises ChallengeError for one that is not known."""
    if names == "all":
        return list(known)
    wanted = [f"subj{int(part):02d}" if part.isdigit() else part for part in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ChallengeError(
                "--subject", expected=f"one of {', '.join(known)}", found=f"{name!r}", remedy="choose from those"
            )
    return list(dict.fromkeys(wanted))
