"""The split that --split names: its groups over all subjects of a dataset, and how the work folder remembers them."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from featcache.config import check_split, split_name
from featcache.dataset.looks import cluster_images
from featcache.dataset.split_files import read_split
from featcache.dataset.splits import BY_ID, Split, SplitKey
from featcache.dataset.subject import SESSION, SESSIONS_JOINED_BY, Subject
from featcache.errors import DataError, StoreError
from featcache.machine.documents import read_json
from featcache.machine.files import replace_json
from featcache.machine.progress import say
from featcache.workdir import Workdir


def split_of(value: str, subjects: Sequence[Subject], work: Path | str) -> Split:
    """The split that a value of --split names, remembered under `work`.

    subjects : all of the dataset, whichever a command works on: its groups are those of their training images

    Raises ConfigError for a value that names no split, and DataError for a column or file that is not there, or says
    nothing of these images, or where all images are one group.
    """
    check_split(value)
    if value == "id":
        return BY_ID
    kind, _, rest = value.partition(":")
    if kind == "file":
        split = read_split(Path(rest), subjects)
    elif kind == "cluster":
        split = Split(split_name(value), cluster_images(subjects, Path(work)))
    else:
        split = Split(split_name(value), _column_groups(subjects, rest or kind))
    _refuse_one_group(split, subjects)
    path = Workdir(Path(work)).split(split.digest)
    if not path.exists() or _read(path, path.stat().st_mtime_ns) is None:
        replace_json(path, split.to_json())
    return split


def recall(key: SplitKey, work: Path | str) -> Split:
    """The split that a key names, as `split_of` remembered it. Raises StoreError where it is missing or damaged."""
    if key == BY_ID.key:
        return BY_ID
    path = Workdir(Path(work)).split(key.digest)
    split = _read(path, path.stat().st_mtime_ns) if path.exists() else None
    if split is None:
        raise StoreError(
            path,
            expected=f"the groups of --split {key.name}",
            found="a damaged file" if path.exists() else "no such file",
            remedy=f"run 'fit-heads --split {key.name}' again, which writes it",
        )
    return Split(key.name, split.groups, split.numbers, split.alone)


@lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int) -> Split | None:
    """The split in a file, as it was at that time; None for a damaged one."""
    try:
        split = Split.from_json(read_json(path))
        return split if split.digest == path.stem else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _refuse_one_group(split: Split, subjects: Sequence[Subject]) -> None:
    """Raise DataError where there are no two sides, because all training images are of one group."""
    ids = {int(image_id) for subject in subjects for image_id in subject.train.ids}
    if len({split.groups.get(image_id, image_id) for image_id in ids}) < 2:
        raise DataError(
            f"--split {split.name}",
            expected="two or more groups of images",
            found=f"one group of all {len(ids)} training images, counting groups that share an image as one",
            remedy="choose another split",
        )


def _column_groups(subjects: Sequence[Subject], column: str) -> dict[int, str]:
    """{image id: its group} of the training images; images of one value, of whichever subject, are of one group.

    An image that has several values, such as the sessions of its trials, or those in which two subjects saw it, makes
    one group of them.
    """
    _refuse_missing(subjects, column)
    groups, unknown = _Union(), set()
    of_images: dict[int, str] = {}
    for image_id, value in _values(subjects, column):
        # trials of an image may be of several sessions, '1+5'
        for one in value.split(SESSIONS_JOINED_BY) if column == SESSION else [value]:
            if one:
                groups.unite(one, of_images.setdefault(image_id, one))
            else:
                unknown.add(image_id)
    if alone := unknown - of_images.keys():
        say(f"--split {column}: {len(alone)} training images have no value there; they are drawn by image id")
    return {image_id: groups.find(value) for image_id, value in of_images.items()}


def _values(subjects: Sequence[Subject], column: str) -> Iterator[tuple[int, str]]:
    """The training images and their values in a column."""
    for subject in subjects:
        yield from zip(subject.train.ids.tolist(), subject.columns[column], strict=False)  # then come test images


def _refuse_missing(subjects: Sequence[Subject], column: str) -> None:
    """Raise DataError where a subject does not have the column; the line lists those that all have."""
    without = [subject.name for subject in subjects if column not in subject.columns]
    if not without:
        return
    known = [name for name in subjects[0].columns if all(name in subject.columns for subject in subjects)]
    few = len(without) < len(subjects)
    raise DataError(
        f"--split column:{column}",
        expected=f"a column of images that every subject has: {', '.join(known) or 'this dataset has none'}",
        found=f"{column!r}, which {', '.join(without)} {'has' if len(without) == 1 else 'have'} not"
        if few
        else repr(column),
        remedy="choose one of those" if known else "use --split id, cluster or file:PATH",
    )


class _Union:
    """Groups that become one where something belongs to two of them. A group goes by the smallest of its names."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def find(self, name: str) -> str:
        """The name that the group of this name goes by."""
        path = [name]
        while (above := self._above.setdefault(path[-1], path[-1])) != path[-1]:
            path.append(above)
        for below in path:
            self._above[below] = path[-1]
        return path[-1]

    def unite(self, one: str, other: str) -> None:
        """Make one group of the groups of two names."""
        first, second = sorted((self.find(one), self.find(other)))
        self._above[second] = first
