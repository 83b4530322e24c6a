"""Counts of a simulated tree, and the random streams of its seed."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from featcache.dataset.rois import FSAVERAGE_VERTICES, HEMISPHERES
from featcache.errors import ConfigError

MAX_SUBJECTS = 8  # as in the challenge
FULL_VERTICES = (19_004, 20_544)
# {subject: vertices that it lacks out of FULL_VERTICES}; in a smaller tree it lacks the same fraction, at least one.
DELETED_OF_FULL = {6: (26, 324), 8: (23, 14)}

Counts = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """Counts of a simulated challenge tree.

    Raises ConfigError for counts that no tree can have.
    """

    n_subjects: int = 8  # subj01 onwards, 8 at most
    n_train: Counts = 200  # training images of every subject, or one count per subject
    n_test: Counts = 40  # test images of every subject, or one count per subject
    n_shared: int = 50  # training images that all subjects have in common
    n_vertices: tuple[int, int] = (475, 514)  # left, right, before subjects 6 and 8 lose a few
    n_dead: int = 2  # vertices per hemisphere whose response is constantly 0
    image_size: int = 128  # pixels per side (the challenge's images: 425)
    n_image_ids: int = 73_000  # image ids run from 0 to this, exclusive
    # Images outside the tree, over which every signal has mean 0 and variance 1. More of them make the ceilings more
    # exact: with 300, the mean ceiling is off by about 0.006 of the variance; with 2,400, by 0.002.
    n_reference: int = 600
    seed: int = 0  # equal seeds give equal bytes
    workers: int | None = field(default=None, compare=False)  # processes; None: one per core; the bytes do not change

    def __post_init__(self) -> None:
        _check_range("n_subjects", self.n_subjects, 1, MAX_SUBJECTS)
        # File names have four digits for the number of an image within its split, and five for its id.
        for name in ("n_train", "n_test"):
            for count in self._per_subject(name):
                _check_range(name, count, 2, 9_999)
        _check_range("n_shared", self.n_shared, 0, min(self._per_subject("n_train")))
        _check_range("n_image_ids", self.n_image_ids, self.n_drawn, 100_000)
        _check_vertices(self.n_vertices)
        _check_range("n_dead", self.n_dead, 0, min(self.n_vertices) // 10)
        _check_range("image_size", self.image_size, 16, 1_024)
        _check_range("n_reference", self.n_reference, 50, 100_000)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        if self.workers is not None:
            _check_range("workers", self.workers, 1, 1_024)

    @classmethod
    def full(cls, *, seed: int = 0, workers: int | None = None) -> "SimulateConfig":
        """The counts of the real challenge: all 8 subjects, 39,548 vertices, images of 425 pixels."""
        return cls(
            n_train=(9_841, 9_841, 9_082, 8_779, 9_841, 9_082, 9_841, 8_779),
            n_test=(159, 159, 293, 395, 159, 293, 159, 395),
            n_shared=1_000,
            n_vertices=FULL_VERTICES,
            n_dead=10,
            image_size=425,
            n_reference=4_000,
            seed=seed,
            workers=workers,
        )

    @property
    def subjects(self) -> range:
        """Subject numbers, from 1."""
        return range(1, self.n_subjects + 1)

    @property
    def n_drawn(self) -> int:
        """Number of different images in the whole tree."""
        return self.n_shared + sum(self.train_count(s) - self.n_shared + self.test_count(s) for s in self.subjects)

    @property
    def n_workers(self) -> int:
        """Number of processes to start."""
        return self.workers or os.cpu_count() or 1

    def train_count(self, subject: int) -> int:
        """Number of training images of one subject, shared ones included."""
        return self._per_subject("n_train")[subject - 1]

    def test_count(self, subject: int) -> int:
        """Number of test images of one subject."""
        return self._per_subject("n_test")[subject - 1]

    def n_deleted(self, subject: int, hemisphere: str) -> int:
        """Number of the vertices in `n_vertices` that this subject lacks."""
        side = HEMISPHERES.index(hemisphere)
        n_of_full = DELETED_OF_FULL.get(subject, (0, 0))[side]
        return max(1, round(n_of_full * self.n_vertices[side] / FULL_VERTICES[side])) if n_of_full else 0

    def _per_subject(self, name: str) -> tuple[int, ...]:
        counts = getattr(self, name)
        if not isinstance(counts, tuple):
            return (counts,) * self.n_subjects
        if len(counts) != self.n_subjects:
            raise ConfigError(
                name,
                expected=f"one count, or {self.n_subjects} of them, one for each subject",
                found=len(counts),
                remedy="give one integer, or change n_subjects",
            )
        return counts


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Random stream of one purpose, e.g. ``generator(0, "noise", subject, block)``.

    Each purpose and key has a stream of its own: numbers depend neither on the order of calls nor on the process.
    """
    key = (zlib.crc32(purpose.encode()), *keys)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def blocks(n_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` rows, which together cover ``n_rows``."""
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            name,
            expected=f"a whole number from {low} to {high}",
            found=repr(value),
            remedy=f"change {name}, or the counts that bound it",
        )


def _check_vertices(n_vertices: tuple[int, int]) -> None:
    if not isinstance(n_vertices, tuple) or len(n_vertices) != 2:
        raise ConfigError("n_vertices", expected="two counts, (left, right)", found=repr(n_vertices), remedy="give two")
    for count in n_vertices:
        _check_range("n_vertices", count, 40, FSAVERAGE_VERTICES)
