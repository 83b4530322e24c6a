"""Which images a subject has, by content, and which it had when a key was made.

Keys of stores and checkpoints name images by two digests, which change when a single image is added. So lists of images
are remembered by these digests, and an image that is in an old list and in the list of today is found by its content.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from featcache.config import fingerprint
from featcache.dataset.digests import digest_of_ids, image_digests, response_digest, whole_digest
from featcache.dataset.subject import Subject
from featcache.machine.documents import Count, DocumentError, HexDigest, Id, read_document, write_document
from featcache.workdir import Workdir

_GUESSES = 300  # of each kind; each takes about 2 ms where a subject has 10,000 images


class _Remembered(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What is remembered of a list of images."""

    n_train: Count
    ids: tuple[Id, ...]
    digests: tuple[HexDigest, ...]


@dataclass(frozen=True)
class ImageList:
    """Images of one subject at one time, in the order of the rows of every store.

    subject : its name
    ids : (n_images,) training images, then test images
    digests : (n_images,) of each image's content
    n_train : number of training images
    work : the work folder that remembers it
    """

    subject: str
    ids: tuple[int, ...]
    digests: tuple[str, ...]
    n_train: int
    work: Path = field(compare=False, repr=False)

    @classmethod
    def of(cls, subject: Subject, work: Path) -> "ImageList":
        """The images that a subject has now; remembered under `work`."""
        digests = tuple(image_digests(subject, work))
        images = cls(subject.name, tuple(subject.image_ids.tolist()), digests, len(subject.train), work)
        images._remember()
        return images

    @cached_property
    def key(self) -> dict[str, str]:
        """The digests by which keys name these images, {'images': ..., 'image_ids': ...}."""
        return {"images": whole_digest(self.digests), "image_ids": digest_of_ids(self.ids, self.n_train)}

    @property
    def training(self) -> "ImageList":
        """The training images alone."""
        return self._rows(range(self.n_train))

    @property
    def test_ids(self) -> tuple[int, ...]:
        """Ids of the test images."""
        return self.ids[self.n_train :]

    def rows_in(self, earlier: "ImageList", n_rows: int | None = None) -> np.ndarray:
        """For each image, (n_images,), the row of an earlier list that has the same content; -1 where none has.

        n_rows : look among so many first rows of it alone

        The same row is preferred, so that whole chunks of rows stay where they are.
        """
        there = earlier.digests[:n_rows]
        first = {digest: row for row, digest in reversed(list(enumerate(there)))}
        in_place = [row < len(there) and there[row] == digest for row, digest in enumerate(self.digests)]
        found = [row if same else first.get(self.digests[row], -1) for row, same in enumerate(in_place)]
        return np.array(found, dtype=np.int64)

    def earlier(self, key: Mapping[str, Any], ids: np.ndarray | None = None, n_train: int = 0) -> "ImageList | None":
        """The images of this subject that a key names; None where that cannot be told.

        key : with 'images' and 'image_ids'
        ids, n_train : of a store that has the key, where it has a row for each image

        Lists are remembered. Without one, some are tried: the images of today under those ids, and the images of today
        without some of the test images. The digests decide whether one is right.
        """
        wanted = {name: key.get(name) for name in self.key}
        if wanted == self.key:
            return self
        if (known := self._recall(wanted)) is not None:
            return known
        for guess in self._guesses(str(wanted["image_ids"]), ids, n_train):
            if guess.key == wanted:
                guess._remember()
                return guess
        return None

    def trains_as(self, key: Mapping[str, Any]) -> bool:
        """Whether the images that a key names are known to have the same training images, in the same order."""
        before = self.earlier(key)
        return before is not None and before.training == self.training

    def _guesses(self, digest: str, ids: np.ndarray | None, n_train: int) -> Iterator["ImageList"]:
        if ids is not None:
            row_of = {image_id: row for row, image_id in enumerate(self.ids)}
            rows = [row_of.get(image_id, -1) for image_id in ids.tolist()]
            if -1 not in rows:
                yield replace(self._rows(rows), n_train=n_train)
        if digest in self._with_fewer_tests:
            yield self._rows(self._with_fewer_tests[digest])

    @cached_property
    def _with_fewer_tests(self) -> dict[str, list[int]]:
        """{digest of the ids: rows} of the lists without the last test images, and of those without one."""
        rows, n_images = list(range(len(self.ids))), len(self.ids)
        shorter = [rows[:stop] for stop in range(max(self.n_train, n_images - _GUESSES), n_images)]
        without = [rows[:row] + rows[row + 1 :] for row in rows[self.n_train :][-_GUESSES:]]
        return {digest_of_ids([self.ids[row] for row in kept], self.n_train): kept for kept in shorter + without}

    def _rows(self, rows: "range | list[int]") -> "ImageList":
        ids, digests = tuple(self.ids[row] for row in rows), tuple(self.digests[row] for row in rows)
        return replace(self, ids=ids, digests=digests)

    def _path(self, key: Mapping[str, Any]) -> Path:
        return Workdir(self.work).image_list(self.subject, fingerprint(key))

    def _remember(self) -> None:
        path = self._path(self.key)
        if not path.exists():
            write_document(path, {"n_train": self.n_train, "ids": self.ids, "digests": self.digests})

    def _recall(self, key: Mapping[str, Any]) -> "ImageList | None":
        """The remembered list of a key; None where there is none, or a damaged one."""
        try:
            known = read_document(self._path(key), _Remembered)
        except (OSError, DocumentError):
            return None
        images = replace(self, ids=known.ids, digests=known.digests, n_train=known.n_train)
        return images if len(known.ids) == len(known.digests) and images.key == key else None


@dataclass(frozen=True)
class SubjectDigests:
    """Digests by which a subject differs from a subject of the same name in another dataset.

    images : each image's
    responses : of the response files
    """

    images: ImageList
    responses: str

    @classmethod
    def of(cls, subject: Subject, work: Path) -> "SubjectDigests":
        """Those of a subject as it is now; remembered under `work`."""
        return cls(ImageList.of(subject, work), response_digest(subject, work))

    def to_json(self) -> dict[str, str]:
        """The digests as keys of checkpoints have them."""
        return self.images.key | {"responses": self.responses}

    def changed_for_training(self, trained: Mapping[str, Any]) -> list[str]:
        """Names of the digests that differ from those of a training, where what it saw of the subject differs.

        trained : digests of the subject in the key of a checkpoint
        """
        now = self.to_json()
        changed = [name for name in now if trained.get(name) != now[name]]
        return [] if set(changed) <= self.images.key.keys() and self.images.trains_as(trained) else changed
