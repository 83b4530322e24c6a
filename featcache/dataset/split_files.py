"""Splits that files say: published training and test images, folds, or groups; JSON, CSV or TSV.

JSON is one of: {image: group}; {group: [images]}; [[images of a group], ...] or {"groups": [[...], ...]};
{"train": [images], "test": [images]}, also as "train_ids" and "test_ids"; or the last inside {"variants": [one]}, as
LAION-fMRI publishes its splits. CSV and TSV have a header with `id` (or image, or name) and `group`, `fold` or `split`.

An image goes by the name of its file, with or without the ending, by its id, or by its text in one of the dataset's
columns image, name, label, file and stimulus.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.config import split_name
from featcache.dataset.splits import Split
from featcache.dataset.subject import Subject, listed
from featcache.errors import DataError
from featcache.formats.files import reading
from featcache.machine.documents import DocumentError, parse_json
from featcache.machine.files import small_bytes
from featcache.machine.progress import say

_IDS, _GROUPS = ("id", "image", "name"), ("group", "fold", "split")  # columns of a table
_NAMES = ("image", "name", "label", "file", "stimulus")  # columns of a dataset that may name images
_TRAIN, _TEST = "train", "test"
_MOST_BYTES = 200_000_000  # twenty times those of a split of all images of NSD by their names
_FORMS = "{image: group}, lists of images by group, or lists 'train' and 'test'"


def read_split(path: Path, subjects: Sequence[Subject]) -> Split:
    """The split that a file says of the training images of these subjects.

    Of a file of training and test images, the test images are a group that has a fold for itself, fold 0: without it,
    exactly the other images are trained on. Where it says folds, they are the folds. Images that it does not name are
    drawn by image id; a line says how many.

    Raises DataError for a file that is not there or of another form, and for one that names none of the images.
    """
    listed_groups, folds = _listed(path)
    groups = _of_images(path, listed_groups, subjects)
    name = split_name(f"file:{path}")
    if set(listed_groups.values()) == {_TRAIN, _TEST}:
        tested = {image_id: path.stem for image_id, group in groups.items() if group == _TEST}
        if not tested or len(tested) == len(groups):
            raise DataError(
                path,
                expected="training images of this dataset both in its training and in its test images",
                found=f"{len(groups) - len(tested)} and {len(tested)}",
                remedy="choose the file for these images",
            )
        return Split(name, tested, alone=path.stem)
    return Split(name, groups, {group: int(group) for group in set(groups.values())} if folds else {})


def _of_images(path: Path, listed_groups: Mapping[str, str], subjects: Sequence[Subject]) -> dict[int, str]:
    """{id of a training image: its group}. Says how many images the file does not name, and the reverse."""
    find, groups, strangers = _Finder(path, subjects), dict[int, str](), 0
    for name, group in listed_groups.items():
        image_id = find(name)
        if image_id is None:
            strangers += 1
        elif groups.setdefault(image_id, group) != group:
            raise DataError(
                path,
                expected="one group for an image",
                found=f"{groups[image_id]!r} and {group!r} for the image {name!r} (id {image_id})",
                remedy="correct it",
            )
    trained = {int(image_id) for subject in subjects for image_id in subject.train.ids}
    of_trained = {image_id: group for image_id, group in groups.items() if image_id in trained}
    if not of_trained:
        raise DataError(
            path,
            expected=f"training images of this dataset, by id or name such as {next(iter(find.names), '')!r}",
            found=f"none among {len(listed_groups)}, such as {listed(list(listed_groups)[:2])}"
            + (f"; {len(groups)} are its test images" if groups else ""),
            remedy="choose the file for these images",
        )
    if missing := len(trained) - len(of_trained):
        say(f"{path.name} does not name {missing} of {len(trained)} training images; they are drawn by image id")
    if strangers:
        say(f"{path.name} names {strangers} images that are not in this dataset")
    return of_trained


class _Finder:
    """Finds the id of an image by one of its names.

    names : {name of a file: ids of its images}
    """

    def __init__(self, path: Path, subjects: Sequence[Subject]) -> None:
        self._path = path
        self.names: dict[str, set[int]] = {}
        ids, stems, texts = dict[str, set[int]](), dict[str, set[int]](), dict[str, set[int]]()
        for subject in subjects:
            for row, (image_id, source) in enumerate(
                zip(subject.image_ids.tolist(), subject.image_sources, strict=True)
            ):
                self.names.setdefault(source.name, set()).add(image_id)
                stems.setdefault(Path(source.name).stem, set()).add(image_id)
                ids.setdefault(str(image_id), set()).add(image_id)
                for column in _NAMES:
                    if column in subject.columns:
                        texts.setdefault(Path(subject.columns[column][row]).name, set()).add(image_id)
        self._by = (self.names, ids, stems, texts)

    def __call__(self, name: str) -> int | None:
        """The id; None where no image has that name. Raises DataError where several have."""
        base = name.strip().replace("\\", "/").rpartition("/")[2]
        number = base.lstrip("0") or "0" if re.fullmatch("[0-9]+", base) else base
        whole, by_id, stems, texts = self._by
        for ids, remedy in (
            (whole.get(base), "name them by id"),
            # a number may be the id of one image, and the name of another
            (by_id.get(number, set()) | (stems.get(base) or stems.get(number, set())), "name files with their ending"),
            (texts.get(base) or texts.get(number), "name them by id"),
        ):
            if ids and len(ids) > 1:
                raise DataError(
                    self._path,
                    expected="a name of one image",
                    found=f"{name!r}, which images {listed(sorted(ids))} have",
                    remedy=remedy,
                )
            if ids:
                return next(iter(ids))
        return None


def _listed(path: Path) -> tuple[dict[str, str], bool]:
    """{name: group} as a file says it, and whether the groups are numbers of folds. Raises DataError."""
    try:
        text = small_bytes(path, _MOST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            path,
            expected="a JSON, CSV or TSV file of a split",
            found="no such file" if isinstance(error, FileNotFoundError) else f"one that cannot be read ({error})",
            remedy="correct --split file:PATH",
        ) from error
    if path.suffix.lower() == ".json":
        return _once(path, _from_json(path, text)), False
    return _from_table(path, text)


def _once(path: Path, pairs: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Pairs of name and group as a dict. Raises DataError for a name in two groups, and for no pairs."""
    groups: dict[str, str] = {}
    for name, group in pairs:
        if groups.setdefault(name, group) != group:
            raise DataError(
                path, expected="one group for an image", found=f"{name!r} in {groups[name]!r} and {group!r}",
                remedy="correct it",
            )  # fmt: skip
    if not groups:
        raise DataError(path, expected=_FORMS, found="no images", remedy="correct it")
    return groups


def _from_json(path: Path, text: str) -> Iterator[tuple[str, str]]:
    try:
        said = parse_json(text)
    except DocumentError as error:
        raise DataError(path, expected="JSON", found=f"a mistake in it: {error}", remedy="correct it") from error
    if isinstance(said, dict) and isinstance(variants := said.get("variants"), list):
        if len(variants) != 1:
            raise DataError(
                path, expected="one variant of a split", found=len(variants), remedy="write one of them into a file"
            )
        said = variants[0]
    if isinstance(said, dict) and isinstance(said.get("groups"), (list, dict)):
        said = said["groups"]
    if isinstance(said, dict):
        yield from _from_mapping(path, said)
    elif isinstance(said, list) and all(isinstance(images, list) for images in said):
        for number, images in enumerate(said):
            yield from ((str(image), f"group {number}") for image in images)
    else:
        raise DataError(path, expected=_FORMS, found=f"{type(said).__name__} of something else", remedy="correct it")


def _from_mapping(path: Path, said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for train, test in (("train_ids", "test_ids"), (_TRAIN, _TEST)):
        if isinstance(said.get(train), list) and isinstance(said.get(test), list):
            yield from ((str(image), _TRAIN) for image in said[train])
            yield from ((str(image), _TEST) for image in said[test])
            return
    if all(isinstance(images, list) for images in said.values()):
        for group, images in said.items():
            yield from ((str(image), group) for image in images)
    elif all(isinstance(group, (str, int)) for group in said.values()):
        yield from ((image, str(group)) for image, group in said.items())
    else:
        raise DataError(path, expected=_FORMS, found=f"keys {listed(said)}", remedy="correct it")


def _from_table(path: Path, text: str) -> tuple[dict[str, str], bool]:
    """The groups in a table, and whether they are folds: a column `fold` of whole numbers."""
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in header else ",")
    with reading(path, "a table of text"):
        columns = {str(name).strip().lower(): name for name in rows.fieldnames or ()}
    image, group = (next((columns[name] for name in known if name in columns), None) for known in (_IDS, _GROUPS))
    if image is None or group is None:
        raise DataError(
            path,
            expected=f"a header with {' or '.join(_IDS)}, and {' or '.join(_GROUPS)}",
            found=repr(header.strip()),
            remedy="add it",
        )
    pairs = ((str(row[image]).strip(), str(row[group] or "").strip()) for row in rows)
    with reading(path, "a table of text"):
        groups = _once(path, ((name, value) for name, value in pairs if name and value))
    whole = all(re.fullmatch("[0-9]{1,9}", value) for value in groups.values())
    return groups, group.strip().lower() == "fold" and whole
