"""Features that were made elsewhere: a file of rows and their images -> a feature store of each subject."""

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.extract import Extracted
from featcache.cache.keys import FeatureFacts, FeatureKey
from featcache.cache.sources import stored_rows
from featcache.cache.store import Store, create_store, open_store, store_path
from featcache.config import MadeConfig, fingerprint
from featcache.dataset.digests import file_digest
from featcache.dataset.image_lists import ImageList
from featcache.dataset.subject import ImageSource, Subject, listed
from featcache.errors import ConfigError, DataError
from featcache.formats.arrays import open_array
from featcache.formats.files import reading, regular_file
from featcache.formats.lazy import Place, numbers, rows_of, vector
from featcache.formats.names import array_names
from featcache.formats.tables import read_table
from featcache.machine.files import partial_path
from featcache.machine.progress import bar, say
from featcache.workdir import Workdir

_LAYER = "features"  # the layer of a file with one array
_TABLES = (".csv", ".tsv", ".parquet")
_ID_COLUMNS = ("id", "image_id", "image", "file", "filename", "name")
_LAYER_NAME = re.compile(r"(?!zarr\.json|committed\.json)[^\W_][\w .+()-]{0,127}")  # it becomes that of a folder
_BLOCK_BYTES = 64e6


@dataclass(frozen=True, eq=False)
class Made:
    """Features of some images.

    arrays : {layer: (n_rows, ...) numbers}, 2 dimensions for vectors, 4 for maps of (height, width, channels)
    ids : (n_rows,) what each row's image is called
    digest : of the files
    """

    arrays: Mapping[str, Any]
    ids: tuple[str, ...]
    digest: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of a row of each layer."""
        return {layer: tuple(map(int, array.shape[1:])) for layer, array in self.arrays.items()}


def read_made(features: str, ids: Path | None) -> Made:
    """Features of a file and the ids of their rows. Raises DataError or ConfigError.

    features : file, or 'file:array'; without a name, each array of the file is a layer. A table has a column 'id'
    ids : table with the id or the file name of each row, in a column 'id', 'image' or 'file', or its only one; or an
        array of ids. None where the features are a table that has them
    """
    place = Place.of(features)
    table_ids: tuple[str, ...] | None = None
    if place.path.suffix.lower() in _TABLES:
        of_table, table_ids = _of_table(place.path)
        arrays: dict[str, Any] = dict(of_table)
    else:
        arrays = _layers(place)
    for array in arrays.values():
        numbers(array, getattr(array, "place", place), (2, 4))
    if ids is not None:
        named = read_ids(ids)
    elif table_ids is not None:
        named = table_ids
    else:
        raise ConfigError(
            "--ids",
            expected="a file with the image of each row of the features",
            found="none",
            remedy="give a CSV file with a column 'id', in the order of the rows",
        )
    _refuse_twice(named, ids or place.path)
    for name, array in arrays.items():
        if len(array) != len(named):
            raise DataError(
                place,
                expected=f"a row for each of {len(named):,} ids",
                found=f"{len(array):,} rows in {name}",
                remedy="give the ids of these features",
            )
    digest = _content(place.path) + (f":{place.array}" if place.array else "")
    return Made(arrays, named, f"{digest}-{fingerprint({'ids': named})}")


def _layers(place: Place) -> dict[str, Any]:
    """{layer: array} of a file; without a vector such as 'id', which says what rows are. Raises DataError."""
    names = [place.array] if place.array else array_names(place.path)
    opened = {name: open_array(Place(place.path, name)) for name in names}
    kept = [name for name, array in opened.items() if place.array or name not in _ID_COLUMNS or array.ndim != 1]
    if not kept:
        raise DataError(place, expected="arrays of features", found=listed(names) or "none", remedy="name another file")
    layers = {name: name.replace("/", ".") or _LAYER for name in kept}
    for name, layer in layers.items():
        if not _LAYER_NAME.fullmatch(layer) or list(layers.values()).count(layer) > 1:
            raise DataError(
                place,
                expected="arrays with names of their own, of letters, digits, spaces and . _ + - ( )",
                found=repr(name),
                remedy="rename it",
            )
    return {layer: opened[name] for name, layer in layers.items()}


def _content(path: Path) -> str:
    """Digest of a file, or of all files of a store."""
    if path.is_file():
        return file_digest(path)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    return fingerprint({str(one.relative_to(path)): file_digest(one) for one in files})


def _refuse_twice(ids: Sequence[str], where: object) -> None:
    seen: set[str] = set()
    for row, image in enumerate(ids):
        if image in seen or not image:
            raise DataError(
                where,
                expected="each image once",
                found=f"{image} again in row {row}" if image else f"none in row {row}",
                remedy="leave one row of each image",
            )
        seen.add(image)


def _of_table(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """Columns of numbers as one array, and the column of ids, if there is one."""
    table = read_table(path)
    id_column = next((name for name in table.columns if name.lower() in _ID_COLUMNS), None)
    columns = {name: values for name, values in table.columns.items() if name != id_column}
    numbers_there = np.empty((len(table), len(columns)), dtype=np.float64)
    for number, (name, values) in enumerate(columns.items()):
        try:
            numbers_there[:, number] = [float(value) for value in values]
        except ValueError as error:
            raise DataError(
                f"{path}, column {name}",
                expected="a number in every row",
                found=str(error).rpartition(": ")[2],
                remedy="leave the column out, or name the column of ids 'id'",
            ) from error
    return {_LAYER: numbers_there}, None if id_column is None else table.columns[id_column]


def read_ids(path: Path) -> tuple[str, ...]:
    """Ids of a table, of lines of text, or of an array of integers or texts, as texts. Raises DataError."""
    if path.suffix.lower() in _TABLES:
        table = read_table(path)
        named = [name for name in table.columns if name.lower() in _ID_COLUMNS]
        if not named and len(table.columns) > 1:
            raise DataError(
                path, expected="a column 'id'", found=listed(table.columns), remedy="rename the column of ids"
            )
        return table.columns[named[0] if named else next(iter(table.columns))]
    if path.suffix.lower() == ".txt":
        with reading(regular_file(path), "lines of text in UTF-8"):
            return tuple(path.read_text(encoding="utf-8").splitlines())
    place = Place.of(str(path))
    array = open_array(place)
    if array.dtype.kind == "U" and array.ndim == 1:
        return tuple(map(str, array[:]))
    values = vector(array, place)
    exact = values.dtype.kind != "f" or np.abs(values) < 2.0 ** min(53, np.finfo(values.dtype).nmant + 1)
    if len(broken := values[(values != np.round(values)) | ~np.asarray(exact)]):  # NaN too, and what floats round
        raise DataError(place, expected="ids that are integers", found=f"{broken[0]}", remedy="give a table of names")
    return tuple(str(int(value)) for value in values)


def rows_for(subject: Subject, made: Made, where: object) -> np.ndarray:
    """The row of the features for each of the subject's images, (n_images,).

    An image is found by its id, or by the name of its file, with or without its ending. Raises DataError, which names
    the images that have no row, and those whose row is not clear.
    """
    rows = {name: row for row, name in enumerate(made.ids)}
    pairs = list(zip(subject.image_ids.tolist(), subject.image_sources, strict=True))
    called = [[name for name in _names_of(*pair) if name in rows] for pair in pairs]
    found = [rows[names[0]] if names else -1 for names in called]
    missing = [source.name for (_, source), names in zip(pairs, called, strict=True) if not names]
    if missing:
        raise DataError(
            where,
            expected=f"a row for each of {len(found):,} images of {subject.name}, by id or by file name",
            found=f"none for {len(missing):,}: {listed(missing)}",
            remedy="add them, or choose other subjects with --subject",
        )
    image_of: dict[int, ImageSource] = {}
    for (image_id, source), names in zip(pairs, called, strict=True):
        other = image_of.setdefault(rows[names[0]], source)
        if other != source or len({rows[name] for name in names}) > 1:
            what = f"{names[0]} for {other} and {source}" if other != source else f"{' and '.join(names)} for {source}"
            raise DataError(
                where,
                expected=f"one row for each image of {subject.name}, by id or by file name",
                found=what,
                remedy=f"name images by id, such as {image_id}, or by the whole path of the file",
            )
    return np.array(found, dtype=np.int64)


def _names_of(image_id: int, source: ImageSource) -> Iterator[str]:
    yield str(image_id)
    yield source.name
    if isinstance(source, Path):
        yield source.stem
        yield str(source)


def add_features(subjects: Sequence[Subject], config: MadeConfig, work: Path | str) -> list[Extracted]:
    """Store features that were made elsewhere, for every subject; heads are fitted to them as to any others.

    Raises DataError or ConfigError for files that do not fit, and for values that are not finite.
    """
    made = read_made(config.features, config.ids)
    rows = {subject: rows_for(subject, made, config.features) for subject in subjects}  # all, before any is written
    return [_store(subject, made, of_subject, config.name, Path(work)) for subject, of_subject in rows.items()]


def _store(subject: Subject, made: Made, rows: np.ndarray, name: str, work: Path) -> Extracted:
    began = time.perf_counter()
    shapes, images = made.shapes, ImageList.of(subject, work).key
    grids = {layer: (shape[0], shape[1]) for layer, shape in shapes.items() if len(shape) == 3}
    key = FeatureKey(
        layers=tuple(made.arrays),
        grids=grids,
        pool="avg" if grids else None,
        subject=subject.name,
        images=images["images"],
        image_ids=images["image_ids"],
        backbone=name,
        weights=made.digest,
        timm="",
        transform={},
        dtype="float32",
    )
    folder, label = Workdir(work).features, f"{subject.name}-{name}"
    path = store_path(folder, label, key.to_json())
    if path.is_dir():
        store = open_store(path)
    else:
        facts = FeatureFacts(origin="made elsewhere")
        stored = stored_rows(shapes)
        store = create_store(
            folder, label, key.to_json(), subject.image_ids, len(subject.train), stored, facts.to_json()
        )
    done = min(store.committed.values())
    if done == len(rows):
        say(f"{subject.name}: already added, {store.path}")
    else:
        _append(store, made, rows, f"{subject.name} {name}")
    return Extracted(subject.name, store.path, len(rows), len(rows) - done, time.perf_counter() - began)


def _append(store: Store, made: Made, rows: np.ndarray, label: str) -> None:
    with store.writing(), bar(label, len(rows) * len(made.arrays), "rows") as advance:
        store = open_store(store.path)  # as the writer before this one left it
        try:
            for layer, array in made.arrays.items():
                for values in _blocks(store, layer, array, rows):
                    store.append({layer: values})
                    advance(len(values))
        except DataError:  # no run could complete it
            store.path.rename(gone := partial_path(store.path))  # at once, for whoever looks through the folder
            shutil.rmtree(gone, ignore_errors=True)
            raise


def _blocks(store: Store, layer: str, array: Any, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of a layer that are missing, in blocks of whole chunks. Raises DataError for values that are not finite."""
    chunk = store.chunk_rows(layer)
    per_chunk = 4 * chunk * int(np.prod(array.shape[1:]))
    step = chunk * max(1, int(_BLOCK_BYTES // per_chunk))
    for start in range(store.committed[layer], len(rows), step):
        wanted = rows[start : start + step]
        values = rows_of(array, wanted)
        with np.errstate(over="ignore"):
            stored = values.astype(store.arrays[layer].dtype)
        if not np.isfinite(stored).all():
            bad = wanted[np.argwhere(~np.isfinite(stored))[0][0]]
            raise DataError(
                f"features {layer}",
                expected=f"finite numbers that {stored.dtype} can hold",
                found=f"others in row {bad}",
                remedy="correct or scale them",
            )
        yield stored
