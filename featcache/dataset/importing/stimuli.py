"""Which pictures were shown, and in which trial: from a folder, an array of pictures, or a table of trials."""

import hashlib
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featcache.dataset.folder import OWN_COLUMNS
from featcache.dataset.images import image_endings, images_in, picture_count
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.material import Stimuli
from featcache.dataset.subject import SESSION, SESSIONS_JOINED_BY, ArrayImage, ImageSource, listed
from featcache.errors import ConfigError, DataError
from featcache.formats.lazy import Place
from featcache.formats.tables import Table, read_table

TEST_SESSION = "the test images"  # what the session of their own responses is called
_SPLITS = {"train": False, "training": False, "test": True}
LARGEST_ID = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures, and the trials in which they were shown.

    stimulus : (n_trials,) number of the picture of each row of the responses; pictures to predict, without responses,
        have none
    sessions : texts, one for each trial of the training images; None where not known
    """

    stimuli: Stimuli
    stimulus: np.ndarray
    sessions: tuple[str, ...] | None = None
    notes: tuple[str, ...] = field(default=())


def read_shown(config: ImportConfig, n_rows: int, n_test_rows: int, n_columns: int) -> Shown:
    """Pictures and trials of an import.

    n_rows, n_test_rows : of the responses, and of those to the test images; the second is 0 where there are none
    n_columns : of the responses, to tell where they are transposed

    Raises DataError or ConfigError where rows cannot be matched with pictures.
    """
    if config.table is not None:
        shown = _from_table(config, read_table(config.table), n_rows, n_columns)
    else:
        _refuse_columns(config)
        shown = _in_order(config.images, "--images", n_rows, n_columns, test=False)
    if config.test_images is not None:
        return _with_test(shown, _in_order(config.test_images, "--test-images", n_test_rows, n_columns, test=True))
    if n_test_rows:
        raise ConfigError(
            "--test-responses",
            expected="the images that these are responses to",
            found="no --test-images",
            remedy="give them, or these rows as --responses, with --table and --split-column",
        )
    return shown


def _refuse_columns(config: ImportConfig) -> None:
    for name in ("id_column", "split_column", "session_column"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}",
                expected="a --table that has the column",
                found="no --table",
                remedy="give the table",
            )


def _in_order(images: str | None, option: str, n_rows: int, n_columns: int, test: bool) -> Shown:
    """One picture for each row of the responses, in the order of their names or in an array."""
    if images is None:
        raise ConfigError(option, expected="a folder of images", found="none", remedy="give it, or a --table")
    sources, notes = _list_sources(images, option)
    if n_rows != len(sources) and (n_rows or not test):
        raise DataError(
            option,
            expected=f"an image for each of {n_rows:,} rows of {'--test-responses' if test else 'the responses'}",
            found=f"{len(sources):,} in {images}",
            remedy=_if_transposed(len(sources), n_columns)
            or ("give the files that belong together" if test else "give a --table with the image of each row"),
        )
    stimuli = Stimuli(sources, None, np.full(len(sources), test))
    return Shown(stimuli, np.arange(n_rows), notes=notes)


def _list_sources(images: str, option: str) -> tuple[tuple[ImageSource, ...], tuple[str, ...]]:
    path = Path(images)
    if path.is_dir():
        return _list_folder(path, option)
    place = Place.of(images)
    if not place.path.exists():
        raise DataError(option, expected="a folder, or a file with pictures", found=f"no {images}", remedy="correct it")
    if path.suffix.lower() in image_endings():
        raise DataError(
            option,
            expected="a folder of images, or a file with an array of pictures",
            found=f"one image, {images}",
            remedy="name its folder, or give a --table",
        )
    n_pictures = picture_count(place.path, place.array)
    return tuple(ArrayImage(place.path, place.array, row) for row in range(n_pictures)), ()


def _list_folder(folder: Path, option: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Images of a folder in the order of their names; what else is in it is said."""
    images, notes = images_in(folder, "name the folder that holds them, or give a --table with their paths")
    _refuse_two_orders(images, option)
    return images, notes


def _refuse_two_orders(images: Sequence[Path], option: str) -> None:
    """Raise DataError where names are in another order as texts than as numbers: rows could mean either."""
    by_number = sorted(images, key=lambda path: [(int(d or 0), t) for d, t in re.findall(r"(\d*)(\D*)", path.name)])
    if by_number == list(images):
        return
    text, number = next((a.name, b.name) for a, b in zip(images, by_number, strict=True) if a != b)
    raise DataError(
        option,
        expected="names whose order is the same as texts and as numbers, such as 01 and 10",
        found=f"{text}, which as numbers come after {number}",
        remedy="give a --table with the image of each row, or rename them with leading zeros",
    )


def _if_transposed(n_rows: int, n_columns: int) -> str:
    """What to do where responses have as many columns as they should have rows; '' where they do not."""
    return f"the responses have {n_columns:,} columns: transpose them" if n_rows == n_columns else ""


def _from_table(config: ImportConfig, table: Table, n_rows: int, n_columns: int) -> Shown:
    """Pictures in the order in which the table first has them.

    Rows of the test split may have no responses, if none of them has.
    """
    test = _is_test(config, table)
    without = test if n_rows == len(table) - test.sum() else np.full(len(table), False)
    if len(table) - without.sum() != n_rows:
        raise DataError(
            table.path,
            expected=f"a row for each of {n_rows:,} rows of the responses",
            found=f"{len(table):,} rows{f', {test.sum():,} of them of the test split' if test.any() else ''}",
            remedy=_if_transposed(len(table), n_columns) or "give the table and the responses that belong together",
        )
    sources = _sources_of(config, table)
    ids = None if config.id_column is None else ids_of(table.column(config.id_column), table.path, config.id_column)
    # pictures that differ in either stay apart until they are looked at
    stimulus, first = told_apart(sources, [None] * len(table) if ids is None else ids.tolist(), test.tolist())
    sessions = None if config.session_column is None else table.column(config.session_column)
    _refuse_empty(sessions, table.path, config.session_column)
    columns, notes = _columns(config, table, stimulus, first)
    if sessions is not None:
        columns = {SESSION: sessions_of_pictures(sessions, stimulus)} | columns
    stimuli = Stimuli(tuple(sources[row] for row in first), None if ids is None else ids[first], test[first], columns)
    if sessions is not None:
        sessions = tuple(session for session, none in zip(sessions, without, strict=True) if not none)
    return Shown(stimuli, stimulus[~without], sessions, notes)


def _sources_of(config: ImportConfig, table: Table) -> list[ImageSource]:
    values = table.column(config.image_column)
    _refuse_empty(values, table.path, config.image_column)
    if config.images is not None and not Path(config.images).is_dir():
        return _rows_of_array(config.images, values, table.path, config.image_column)
    folder = _folder_of(config, table)
    paths = [folder / value for value in values]
    missing = [value for value, path in zip(values, paths, strict=True) if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{table.path}, column {config.image_column}",
            expected=f"image files in {folder}",
            found=f"{len(set(missing)):,} that are not there: {listed(dict.fromkeys(missing))}",
            remedy="correct the names, or say with --images where they are",
        )
    return list(paths)


def _folder_of(config: ImportConfig, table: Table) -> Path:
    """Folder in which the table's images are."""
    return table.path.parent if config.images is None else Path(config.images)


def images_of_table(config: ImportConfig) -> list[Path]:
    """Image files that the table names, each once; none where it names rows of an array. Raises DataError."""
    if config.table is None or (config.images is not None and not Path(config.images).is_dir()):
        return []
    table = read_table(config.table)
    paths = [_folder_of(config, table) / value for value in dict.fromkeys(table.column(config.image_column))]
    return [path for path in paths if os.path.isfile(path)]


def _rows_of_array(images: str, values: Sequence[str], path: Path, column: str) -> list[ImageSource]:
    place = Place.of(images)
    n_pictures = picture_count(place.path, place.array)
    bad = [value for value in values if not value.isdecimal() or int(value) >= n_pictures]
    if bad:
        raise DataError(
            f"{path}, column {column}",
            expected=f"rows of {images}, from 0 to {n_pictures - 1}",
            found=listed(dict.fromkeys(bad)),
            remedy="correct them; the first row is 0",
        )
    return [ArrayImage(place.path, place.array, int(value)) for value in values]


def _refuse_empty(values: Sequence[str] | None, path: Path, column: str | None) -> None:
    if values is not None and "" in values:
        raise DataError(
            f"{path}, column {column}",
            expected="a value in every row",
            found=f"none in row {values.index('') + 1}",
            remedy="fill it in",
        )


def ids_of(values: Sequence[str], path: Path, column: str) -> np.ndarray:
    """Ids of pictures, int64: numbers as they are, and of any other names 63 bits of their digest."""
    _refuse_empty(values, path, column)
    if all(re.fullmatch(r"\d+(\.0*)?", value) for value in values):  # 13.0 is what a column with gaps becomes
        numbers = [int(value.partition(".")[0]) for value in values]
        if max(numbers, default=0) > LARGEST_ID:
            raise DataError(
                f"{path}, column {column}",
                expected=f"ids up to {LARGEST_ID}",
                found=str(max(numbers)),
                remedy="use smaller ones, or names",
            )
        return np.array(numbers, dtype=np.int64)
    digests = {value: hashlib.blake2b(value.encode(), digest_size=8).digest() for value in set(values)}
    return np.array([int.from_bytes(digests[value], "little") >> 1 for value in values], dtype=np.int64)


def _is_test(config: ImportConfig, table: Table) -> np.ndarray:
    if config.split_column is None:
        return np.full(len(table), False)
    values = table.column(config.split_column)
    if unknown := sorted({value for value in values if value.lower() not in _SPLITS}):
        raise DataError(
            f"{table.path}, column {config.split_column}",
            expected="train or test in every row",
            found=listed(map(repr, unknown)),
            remedy="correct it, or leave --split-column out",
        )
    return np.array([_SPLITS[value.lower()] for value in values])


def _columns(
    config: ImportConfig, table: Table, stimulus: np.ndarray, first: np.ndarray
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Other columns of the table, where all trials of a picture have one value; sentences on those left out."""
    used = {config.image_column, config.id_column, config.split_column, config.session_column}
    others = {name: values for name, values in table.columns.items() if name not in used}
    taken = [name for name in others if name in OWN_COLUMNS or (name == SESSION and config.session_column is not None)]
    columns = constant_columns({name: others[name] for name in others if name not in taken}, stimulus, first)
    varying = [name for name in others if name not in (*columns, *taken)]
    left_out = {"that differ between trials of one picture": varying, "whose names mean something else here": taken}
    notes = (f"{table.path}: left out columns {why}: {listed(names)}" for why, names in left_out.items() if names)
    return columns, tuple(notes)


def told_apart(*facts: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Number of the stimulus of each trial, and the first trial of each stimulus; trials of equal facts have one."""
    numbers: dict[tuple[Hashable, ...], int] = {}
    stimulus = np.array([numbers.setdefault(key, len(numbers)) for key in zip(*facts, strict=True)], dtype=np.int64)
    return stimulus, np.unique(stimulus, return_index=True)[1]


def constant_columns(
    columns: Mapping[str, Sequence[str]], stimulus: np.ndarray, first: np.ndarray
) -> dict[str, tuple[str, ...]]:
    """{name: (n_stimuli,) texts} of those columns in which all trials of a stimulus have one value."""
    of_stimuli = {name: tuple(values[row] for row in first) for name, values in columns.items()}
    return {
        name: values
        for name, values in of_stimuli.items()
        if all(values[number] == value for number, value in zip(stimulus, columns[name], strict=True))
    }


def sessions_of_pictures(sessions: Sequence[str], stimulus: np.ndarray) -> tuple[str, ...]:
    """Sessions in which each picture was shown, '1' or '1+5'."""
    shown: dict[int, dict[str, None]] = {}
    for session, number in zip(sessions, stimulus.tolist(), strict=True):
        shown.setdefault(number, {})[session] = None
    return tuple(SESSIONS_JOINED_BY.join(shown[number]) for number in sorted(shown))


def _with_test(shown: Shown, test: Shown) -> Shown:
    """Pictures to fit to, and those to predict behind them."""
    n_stimuli, n_test = len(shown.stimuli.sources), len(test.stimuli.sources)
    ids = shown.stimuli.ids
    if ids is not None:
        raise ConfigError(
            "--test-images",
            expected="images that --table lists too, for --id-column names them",
            found="images of their own",
            remedy="list them in the table, with --split-column",
        )
    columns: Mapping[str, Sequence[str]] = {
        name: (*values, *[""] * n_test) for name, values in shown.stimuli.columns.items()
    }
    stimuli = Stimuli(
        shown.stimuli.sources + test.stimuli.sources, None, np.append(shown.stimuli.test, test.stimuli.test), columns
    )
    stimulus = np.append(shown.stimulus, n_stimuli + test.stimulus)
    return Shown(stimuli, stimulus, shown.sessions, (*shown.notes, *test.notes))


def numbered_sessions(sessions: Sequence[str], n_test: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number of each trial's session, (n_trials + n_test,) int64, and the name of each session.

    n_test : trials of test images, which come last and are a session of their own
    """
    names, number = np.unique(np.asarray(sessions), return_inverse=True)
    numbers = np.append(number.reshape(-1), np.full(n_test, len(names))).astype(np.int64)
    return numbers, (*names.tolist(), *([TEST_SESSION] if n_test else []))
