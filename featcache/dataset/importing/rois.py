"""ROIs of a surface from files: masks, labels, tables and label volumes."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from featcache.dataset.subject import listed
from featcache.errors import DataError
from featcache.formats.arrays import open_array
from featcache.formats.lazy import Place, vector
from featcache.formats.names import array_names
from featcache.formats.tables import Table, read_table
from featcache.formats.volumes import Mask, is_volume, read_labels

_TABLES = (".csv", ".tsv", ".parquet")
_MASK_WORDS = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True, "": False}
_NO_ROI = {"", "0", "none", "nan", "unknown", "???", "-1"}
_NUMBERING = {"", "vertex", "voxel", "unit", "neuron", "index"}  # columns that number the rows
_LARGEST_LABEL = 2**32  # as large as colours, which some atlases have for labels
_MOST_LABELS = 1000  # more are no labels of regions


def read_rois(files: Sequence[str], n_vertices: int, mask: Mask) -> dict[str, np.ndarray]:
    """{ROI: (n_vertices,) bool} of some files.

    A table has a row for each vertex, in their order or with their numbers: a column of 0 and 1 is an ROI, a column of
    names has one for each. An array of 0 and 1 is an ROI named after its file, or after its name in the file; other
    whole numbers are labels. Of a volume, labels are read inside `mask`.

    Raises DataError for files of another length or content, and for an ROI that two of them have.
    """
    rois: dict[str, np.ndarray] = {}
    for text in files:
        place = Place.of(text)
        found = _read(place, mask)
        for name, values in found.items():
            if len(values) != n_vertices:
                raise DataError(
                    place,
                    expected=f"a value for each of {n_vertices} vertices",
                    found=f"{len(values)} in {name}",
                    remedy="give the ROIs of these vertices",
                )
        _add(rois, found, place)
    return rois


def _add(rois: dict[str, np.ndarray], more: Mapping[str, np.ndarray], where: object) -> None:
    """Put more ROIs to those that there are. Raises DataError for one that is there already."""
    if twice := sorted(rois.keys() & more.keys()):
        raise DataError(where, expected="an ROI once", found=f"{twice[0]} again", remedy="rename one of the two")
    rois.update(more)


def _read(place: Place, mask: Mask) -> dict[str, np.ndarray]:
    if place.path.suffix.lower() in _TABLES:
        return _of_table(read_table(place.path))
    if is_volume(place.path):
        labels = read_labels(place.path, mask)
        return _of_labels(labels.values, _stem(place), place, labels.names)
    names_there = [place.array] if place.array else array_names(place.path)
    rois: dict[str, np.ndarray] = {}
    for name in names_there:
        inner = Place(place.path, name)
        values = vector(open_array(inner), inner)
        _add(rois, _of_labels(values, name.rpartition("/")[2] or _stem(place), inner, {}), inner)
    return rois


def _stem(place: Place) -> str:
    name = place.path.name
    for ending in (".nii.gz", ".label.gii", ".dlabel.nii"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return place.path.stem


def _of_labels(values: np.ndarray, name: str, place: Place, names: dict[int, str]) -> dict[str, np.ndarray]:
    """One ROI for each label but 0; a mask of 0 and 1 is one ROI of its file's name."""
    whole = np.isfinite(values) & (values == np.round(values)) & (np.abs(values) < _LARGEST_LABEL)
    if len(bad := values[~whole]):
        raise DataError(
            place,
            expected="a mask of 0 and 1, or whole numbers as labels",
            found=f"{bad[0]:.4g}",
            remedy="save a mask, such as probability > 0.5",
        )
    labels = [int(label) for label in np.unique(values) if label > 0]
    if len(labels) > _MOST_LABELS:
        raise _too_many(str(place), len(labels))
    if labels in ([], [1]) and not names:
        return {name: values == 1}
    rois: dict[str, np.ndarray] = {}
    for label in labels:  # labels of one name are one ROI
        roi = names.get(label, f"{name}-{label}")
        if roi.lower() not in _NO_ROI:
            rois[roi] = rois.get(roi, False) | (values == label)
    return rois


def _of_table(table: Table) -> dict[str, np.ndarray]:
    rois: dict[str, np.ndarray] = {}
    order = _order(table)
    for column, cells_there in table.columns.items():
        if column.lower() in _NUMBERING:
            continue
        values = tuple(cells_there[row] for row in order)
        words = {value.lower() for value in values}
        if words <= _MASK_WORDS.keys():
            _add(rois, {column: np.array([_MASK_WORDS[value.lower()] for value in values])}, table.path)
            continue
        labels = [label for label in dict.fromkeys(values) if label.lower() not in _NO_ROI]
        if len(labels) > _MOST_LABELS:
            raise _too_many(f"{table.path}, column {column}", len(labels))
        cells = np.array(values)
        named = {label: f"{column}-{label}" if label.isdecimal() else label for label in labels}
        _add(rois, {roi: cells == label for label, roi in named.items()}, table.path)
    if not rois:
        raise DataError(table.path, expected="columns of ROIs", found=listed(table.columns), remedy="add one")
    return rois


def _order(table: Table) -> np.ndarray:
    """The row of each vertex, (n_vertices,): by a column that numbers vertices, from 0 or from 1, if there is one."""
    order = np.arange(len(table))
    for column, values in table.columns.items():
        if column.lower() in _NUMBERING:
            numbers = [int(value) if re.fullmatch("[0-9]{1,18}", value) else -1 for value in values]
            first = min(numbers)
            if first not in (0, 1) or sorted(numbers) != list(range(first, first + len(table))):
                raise DataError(
                    f"{table.path}, column {column!r}",
                    expected="the number of each vertex once, from 0 or from 1",
                    found=f"others, such as {values[0]!r}",
                    remedy="correct it, or rename the column if it numbers no vertices",
                )
            order = np.argsort(numbers)
    return order


def _too_many(where: str, n_labels: int) -> DataError:
    return DataError(
        where,
        expected=f"labels of at most {_MOST_LABELS} regions",
        found=f"{n_labels:,} of them",
        remedy="leave out what is no label of regions",
    )
