"""Which images are one picture: decided by their pixels, whatever their names and ids say.

Folds go by image id. So one picture under two ids could be trained on and scored; `identified` gives it one id.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from featcache.dataset.digests import FileTimes, source_key
from featcache.dataset.images import fault_of, load_image
from featcache.dataset.pictures import SIDE, Picture, alike, look_at, near_copies
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Dataset, Fault, Images, ImageSource, Subject, listed
from featcache.errors import DataError
from featcache.machine.documents import DAMAGED_NPZ, parse_json
from featcache.machine.files import only_writer, open_regular, whole_file
from featcache.machine.prefetch import prefetch
from featcache.workdir import Workdir

UNSEEN = -1  # in place of the number of a picture that was not decoded
# Another release of Pillow, or of its JPEG library, may decode a file to other pixels.
_FORMAT = f"1, Pillow {PIL.__version__}, JPEG {features.version('jpg')}"
_AHEAD = 4  # images for each thread that are decoded before their turn


@dataclass(frozen=True, eq=False)
class Looked:
    """What was seen of a subject's images, in the order of `Subject.image_ids`; see `pictures.Picture`.

    pictures : (n_images,) int64, the number of each picture, equal for equal pixels; -1 where it was not decoded
    hashes : (n_images,) uint64, perceptual hashes; 0 there
    thumbnails : (n_images, 16, 16) uint8; 0 there
    faults : of images that cannot be decoded
    """

    pictures: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]
    faults: tuple[Fault, ...] = ()

    @classmethod
    def nothing(cls, n_images: int) -> "Looked":
        """Of images that nobody has looked at."""
        thumbnails = np.zeros((n_images, SIDE, SIDE), dtype=np.uint8)
        return cls(np.full(n_images, UNSEEN), np.zeros(n_images, dtype=np.uint64), thumbnails)

    @property
    def unseen(self) -> NDArray[np.int64]:
        """Rows of images that were not decoded."""
        return np.flatnonzero(self.pictures == UNSEEN)


def remembered(subject: Subject, work: Path) -> Looked:
    """What an earlier `look` saw of the images whose files have not changed since; the others are unseen."""
    return _Index(subject, work).looked


def look(subject: Subject, work: Path, workers: int, advance: Callable[[int], object] = lambda n: None) -> Looked:
    """Decode each image once, in threads, and remember what was seen under `work`.

    workers : threads that decode images
    advance : called with the number of images just looked at, or remembered
    """
    looked = remembered(subject, work)
    if not len(looked.unseen):
        advance(len(looked.pictures))
        return looked
    with only_writer(Workdir(work).index, wait=True):  # of processes that train together, one looks
        index = _Index(subject, work)
        looked, rows = index.looked, index.looked.unseen
        advance(len(looked.pictures) - len(rows))
        pictures, hashes, thumbnails = looked.pictures.copy(), looked.hashes.copy(), looked.thumbnails.copy()
        faults = []
        seen = prefetch(_look_or_fault, [subject.image_sources[row] for row in rows], _AHEAD * workers, workers)
        for row, picture in zip(rows, seen, strict=True):
            if isinstance(picture, Fault):
                faults.append(picture)
            else:
                pictures[row], hashes[row], thumbnails[row] = picture.id, picture.hash, picture.thumbnail
            advance(1)
        looked = Looked(pictures, hashes, thumbnails, tuple(faults))
        if len(faults) < len(rows):
            index.keep(looked)
    return looked


def _look_or_fault(source: ImageSource) -> Picture | Fault:
    try:
        return look_at(load_image(source))
    except DataError as error:
        return fault_of(source, error)


class _Index:
    """What is remembered of a subject's images, as long as their files keep their sizes and modification times.

    Without the index, or with a damaged one, the images are looked at again. It is a .npz file.
    """

    def __init__(self, subject: Subject, work: Path) -> None:
        self._path, times = Workdir(work).picture_index(subject.name), FileTimes()
        self._keys = [_key(source, times) for source in subject.image_sources]
        self.looked = self._read()

    def _read(self) -> Looked:
        looked = Looked.nothing(len(self._keys))
        try:
            with open_regular(self._path) as opened, np.load(opened, allow_pickle=False) as file:
                described = parse_json(file["keys"].tobytes())
                pictures, hashes, thumbnails = (file[name] for name in ("pictures", "hashes", "thumbnails"))
            if described["format"] != _FORMAT:
                return looked
            row_of = {tuple(key): row for row, key in enumerate(described["keys"])}
            rows = np.array([row_of.get(key, UNSEEN) for key in self._keys], dtype=np.int64)
            known, at = rows != UNSEEN, rows[rows != UNSEEN]
            looked.pictures[known], looked.hashes[known], looked.thumbnails[known] = (
                pictures[at],
                hashes[at],
                thumbnails[at],
            )
        except DAMAGED_NPZ:
            return Looked.nothing(len(self._keys))
        return looked

    def keep(self, looked: Looked) -> None:
        """Write the index anew, of these images alone."""
        seen = np.flatnonzero(looked.pictures != UNSEEN)
        described = {"format": _FORMAT, "keys": [self._keys[row] for row in seen]}
        with whole_file(self._path) as partial:
            np.savez_compressed(
                partial,
                keys=np.frombuffer(json.dumps(described).encode(), dtype=np.uint8),
                pictures=looked.pictures[seen],
                hashes=looked.hashes[seen],
                thumbnails=looked.thumbnails[seen],
            )


def _key(source: ImageSource, times: FileTimes) -> tuple[str, int, int]:
    """Where a picture is, and the size and time of its file; zeros where there is none."""
    try:
        return (source_key(source), *times.of(source))
    except OSError:
        return (source_key(source), 0, 0)


@dataclass(frozen=True, eq=False)
class _Table:
    """Every image of a dataset that was looked at, in the order of subjects and their `image_ids`.

    subjects, rows : number of the subject, and row among its images
    tested : whether it is a test image
    """

    sources: Sequence[ImageSource]
    subjects: NDArray[np.int64]
    rows: NDArray[np.int64]
    tested: NDArray[np.bool_]
    ids: NDArray[np.int64]
    pictures: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]

    @classmethod
    def of(cls, dataset: Dataset, looked: Mapping[str, Looked]) -> "_Table":
        people = dataset.subjects
        counts = [len(subject.image_ids) for subject in people]
        seen = [looked.get(subject.name, Looked.nothing(n)) for subject, n in zip(people, counts, strict=True)]
        rows = np.concatenate([np.arange(0), *map(np.arange, counts)])
        n_train = np.repeat([len(subject.train) for subject in people], counts).astype(np.int64)
        nothing = Looked.nothing(0)
        pictures = np.concatenate([nothing.pictures, *(each.pictures for each in seen)])
        known = np.flatnonzero(pictures != UNSEEN)
        sources = [source for subject in people for source in subject.image_sources]
        return cls(
            sources=[sources[i] for i in known],
            subjects=np.repeat(np.arange(len(people)), counts)[known],
            rows=rows[known],
            tested=(rows >= n_train)[known],
            ids=np.concatenate([np.arange(0), *(subject.image_ids for subject in people)])[known],
            pictures=pictures[known],
            hashes=np.concatenate([nothing.hashes, *(each.hashes for each in seen)])[known],
            thumbnails=np.concatenate([nothing.thumbnails, *(each.thumbnails for each in seen)])[known],
        )

    def pair(self, i: int, j: int) -> str:
        return f"{self.sources[i]} and {self.sources[j]}"


def same_pictures(dataset: Dataset, looked: Mapping[str, Looked]) -> list[tuple[int, ...]]:
    """Ids that mean one picture, in rising order, for each picture with more than one id."""
    return [ids for ids, _ in _same(_Table.of(dataset, looked))]


def _same(table: _Table) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
    """(ids of one picture, two rows of the table with different ones of them), for each picture of several ids."""
    firsts = np.sort(np.unique(np.stack([table.pictures, table.ids], 1), axis=0, return_index=True)[1])
    rows_of: dict[int, list[int]] = {}
    for row in firsts.tolist():
        rows_of.setdefault(int(table.pictures[row]), []).append(row)
    groups: dict[int, tuple[set[int], tuple[int, int]]] = {}  # by each id that is in them
    for rows in rows_of.values():
        if len(rows) > 1:  # an id that is in a group already, as of another file format, joins the groups
            ids = {int(table.ids[row]) for row in rows}
            ids = ids.union(*(groups[one][0] for one in ids if one in groups))
            groups |= dict.fromkeys(ids, (ids, (rows[0], rows[1])))
    distinct = {min(ids): (tuple(sorted(ids)), pair) for ids, pair in groups.values()}
    return [distinct[smallest] for smallest in sorted(distinct)]


def two_pictures(dataset: Dataset, looked: Mapping[str, Looked]) -> list[Fault]:
    """Fault of ids that mean two different pictures, of one subject or of several.

    Two files of one scene, such as a PNG and a JPEG, or of two sizes, are no fault.
    """
    table = _Table.of(dataset, looked)
    order = np.lexsort((np.arange(len(table.ids)), table.ids))
    first = order[np.searchsorted(table.ids[order], table.ids)]  # the first row of each row's id
    other = np.flatnonzero(table.pictures != table.pictures[first])
    other = other[~alike(table.thumbnails[other], table.thumbnails[first[other]])]
    ids, rows = np.unique(table.ids[other], return_index=True)
    if not len(ids):
        return []
    i, j = first[other[rows[0]]], other[rows[0]]
    some = "an id means" if len(ids) == 1 else f"{len(ids)} ids mean"
    found = f"{some} two: {listed(ids.tolist())}; {ids[0]} is {table.pair(i, j)}"
    return [Fault(dataset.root, "one picture for each image id", found)]


def identified(dataset: Dataset, looked: Mapping[str, Looked]) -> Dataset:
    """The dataset with one id for each picture: the smallest of those that it has.

    So whatever goes by id, such as folds, takes equal pictures for one. A test image whose picture its own subject
    trains on keeps apart from it, under an id that no other picture has. Notes say what was renamed.
    """
    table = _Table.of(dataset, looked)
    if not (groups := _same(table)):
        return dataset
    smallest = {one: ids[0] for ids, _ in groups for one in ids}
    apart = dict(zip(table.ids.tolist(), (table.pictures ^ 1).tolist(), strict=True))  # ^ 1: the number may be an id
    subjects = tuple(_renamed(subject, smallest, apart) for subject in dataset.subjects)
    return replace(dataset, subjects=subjects, notes=dataset.notes + tuple(_notes_on_same(table, groups)))


def _renamed(subject: Subject, smallest: Mapping[int, int], apart: Mapping[int, int]) -> Subject:
    """A subject whose images go by the smallest id; a test image that it trains on goes by its id in `apart`."""
    train = [smallest.get(one, one) for one in subject.train.ids.tolist()]
    trained, before = set(train), set(subject.train.ids.tolist())
    test = []
    for one in subject.test.ids.tolist():
        name = smallest.get(one, one)
        test.append(apart[one] if name in trained and one not in before and one in smallest else name)
    return replace(subject, train=_with_ids(subject.train, train), test=_with_ids(subject.test, test))


def _with_ids(images: Images, ids: list[int]) -> Images:
    return replace(images, ids=np.array(ids, dtype=np.int64))


def _notes_on_same(table: _Table, groups: Sequence[tuple[tuple[int, ...], tuple[int, int]]]) -> list[str]:
    ids, pair = groups[0]
    some = "1 picture has several ids" if len(groups) == 1 else f"{len(groups)} pictures have several ids"
    notes = [f"{some}, such as {ids[0]} and {ids[1]} ({table.pair(*pair)}): each goes by its smallest id"]
    shared = 0
    for ids, _ in groups:
        of_group = np.isin(table.ids, ids)
        trained, tested = (set(table.subjects[of_group & which].tolist()) for which in (~table.tested, table.tested))
        shared += any(one != other for one in trained for other in tested)
    if shared:
        both = "test images of one subject and training images of another"
        notes.append(f"{shared} of them are {both}: mind them in joint training")
    return notes


def in_both_splits(dataset: Dataset, looked: Mapping[str, Looked]) -> list[Fault]:
    """Fault of each subject that trains on a picture and is tested on it, under two ids."""
    table, faults = _Table.of(dataset, looked), []
    for number, subject in enumerate(dataset.subjects):
        trained, tested = (np.flatnonzero((table.subjects == number) & one) for one in (~table.tested, table.tested))
        _, at, where = np.intersect1d(table.pictures[trained], table.pictures[tested], return_indices=True)
        pairs = [(i, j) for i, j in zip(trained[at], tested[where], strict=True) if table.ids[i] != table.ids[j]]
        if pairs:
            found = f"{len(pairs)} in both, such as {table.pair(*pairs[0])}"
            faults.append(Fault(subject.name, "each picture in training or in test", found))
    return faults


def near_copy_notes(dataset: Dataset, looked: Mapping[str, Looked], n_folds: int = 5, seed: int = 0) -> list[str]:
    """Sentences on pictures that are near copies of each other: for each subject, and between subjects.

    dataset : as `identified` returns it
    n_folds, seed : of the folds that may have one picture of a pair and not the other
    """
    table = _Table.of(dataset, looked)
    shown = _Shown.of(table, len(dataset.subjects))
    firsts = shown.firsts
    pairs = near_copies(table.hashes[firsts], thumbnails=table.thumbnails[firsts])
    pairs = pairs[table.ids[firsts[pairs[:, 0]]] != table.ids[firsts[pairs[:, 1]]]]  # else a picture in two formats
    folds = assign_folds(table.ids[firsts], n_folds, seed)
    apart = folds[pairs[:, 0]] != folds[pairs[:, 1]]
    trained, tested = (each[pairs] for each in (shown.trained, shown.tested))  # (n_pairs, 2, n_subjects)
    of_subject = (trained | tested).all(1)
    mixed = (trained[:, 0] & tested[:, 1]) | (tested[:, 0] & trained[:, 1])
    notes = []
    for number, subject in enumerate(dataset.subjects):
        which = of_subject[:, number]
        counts = {
            f"in different folds of {n_folds}": which & apart & trained[:, :, number].all(1),
            "in training and test": which & mixed[:, number],
        }
        notes += _note_on_pairs(subject.name, table, firsts[pairs], which, counts)
    return notes + _note_on_pairs("between subjects", table, firsts[pairs], ~of_subject.any(1), {})


def _note_on_pairs(
    where: str,
    table: _Table,
    pairs: NDArray[np.int64],
    which: NDArray[np.bool_],
    counts: Mapping[str, NDArray[np.bool_]],
) -> list[str]:
    """'subj06: 3 pairs of near copies, such as a.png and b.png; 2 of them in different folds of 5'; none of no pair."""
    if not (n := int(which.sum())):
        return []
    some = f"{n} pair{'s' * (n != 1)} of near copies, such as {table.pair(*pairs[which][0])}"
    parts = [f"{count} of them {what}" for what, mask in counts.items() if (count := int(mask.sum()))]
    return ["; ".join([f"{where}: {some}", *parts])]


@dataclass(frozen=True, eq=False)
class _Shown:
    """To whom each picture was shown.

    firsts : (n_pictures,) the first row of each picture in the table, in rising order
    trained, tested : (n_pictures, n_subjects) whether it is among the training and test images of each subject
    """

    firsts: NDArray[np.int64]
    trained: NDArray[np.bool_]
    tested: NDArray[np.bool_]

    @classmethod
    def of(cls, table: _Table, n_subjects: int) -> "_Shown":
        _, firsts, number = np.unique(table.pictures, return_index=True, return_inverse=True)
        order = np.argsort(firsts)
        place = np.argsort(order)[number]  # of each row's picture, in the order of `firsts`
        trained, tested = (np.zeros((len(firsts), n_subjects), dtype=bool) for _ in range(2))
        trained[place[~table.tested], table.subjects[~table.tested]] = True
        tested[place[table.tested], table.subjects[table.tested]] = True
        return cls(firsts[order], trained, tested)
