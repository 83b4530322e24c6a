"""Arrays in memory, or mapped -> material."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache.dataset.folder import OWN_COLUMNS
from featcache.dataset.images import picture_count
from featcache.dataset.importing.config import DEFAULT_SURFACE
from featcache.dataset.importing.material import Material, Recording, Stimuli
from featcache.dataset.importing.responses import as_fractions, as_ratios
from featcache.dataset.importing.stimuli import (
    LARGEST_ID,
    constant_columns,
    numbered_sessions,
    sessions_of_pictures,
    told_apart,
)
from featcache.dataset.subject import SESSION, ArrayImage, ImageSource
from featcache.errors import DataError
from featcache.formats.arrays import open_array
from featcache.formats.lazy import Array, Joined, Place, numbers

Given = np.ndarray | Array | Sequence[Sequence[float]] | str | Path  # an array, or where one is
Many = Sequence[str | Path] | str | Path  # files, or where an array of pictures is


def material_of(
    images: Many,
    responses: Given | Mapping[str, Given],
    *,
    rois: Mapping[str, Any] | None = None,
    sessions: Sequence[object] | None = None,
    ids: Sequence[int] | np.ndarray | None = None,
    noise_ceiling: Any = None,
    ncsnr: Any = None,
    test_images: Many = (),
    test_responses: Given | Mapping[str, Given] | None = None,
    test_trials: int | None = None,
    columns: Mapping[str, Sequence[object]] | None = None,
    subject: str = "subj01",
) -> Material:
    """One subject of what a program has at hand; `featcache.Dataset.from_arrays` says what its arguments are.

    Raises DataError for arguments that do not fit together.
    """
    shown, tested = _sources(images), _sources(test_images)
    opened = {surface: [_rows(values, surface)] for surface, values in _by_surface(responses, ()).items()}
    surfaces, n_test = tuple(opened), 0 if test_responses is None else len(tested)
    for surface, (rows,) in opened.items():
        _refuse_length(f"responses of {surface}", len(rows), len(shown), "images")
    for name, of_trials in {"sessions": sessions, "ids": ids, **(columns or {})}.items():
        if of_trials is not None:
            _refuse_length(name, len(of_trials), len(shown), "images")
    for surface, values in ({} if test_responses is None else _by_surface(test_responses, surfaces)).items():
        rows = _rows(values, surface)
        _refuse_length(f"test responses of {surface}", len(rows), n_test, "test images")
        opened[surface].append(rows)
    named = None if sessions is None else [str(session) for session in sessions]
    session, session_names = (None, ()) if named is None else numbered_sessions(named, n_test)
    numbers = _ids(ids, len(tested))
    stimulus, first = told_apart(shown, [None] * len(shown) if numbers is None else numbers.tolist())
    return Material(
        name=subject,
        stimuli=Stimuli(
            sources=(*(shown[row] for row in first), *tested),
            ids=None if numbers is None else numbers[first],
            test=np.repeat([False, True], [len(first), len(tested)]),
            columns={
                name: (*values, *[""] * len(tested))
                for name, values in _columns(columns or {}, named, stimulus, first).items()
            },
        ),
        shown=np.append(stimulus, len(first) + np.arange(n_test)),
        session=session,
        session_names=session_names,
        test_trials=test_trials,
        recordings={
            surface: Recording(
                trials=Joined(rows),
                rois=_masks(rois, surface, surfaces, rows[0].shape[1]),
                noise_ceiling=_vector(noise_ceiling, "noise_ceiling", surface, surfaces, rows[0].shape[1]),
                ncsnr=_vector(ncsnr, "ncsnr", surface, surfaces, rows[0].shape[1]),
            )
            for surface, rows in opened.items()
        },
    )


def _columns(
    columns: Mapping[str, Sequence[object]], sessions: Sequence[str] | None, stimulus: np.ndarray, first: np.ndarray
) -> dict[str, tuple[str, ...]]:
    """What is known of each picture, and the sessions in which it was shown, where they are given."""
    taken = {*OWN_COLUMNS, *([SESSION] if sessions is not None else [])}
    if clash := sorted(taken & columns.keys()):
        raise DataError(
            "columns",
            expected=f"other names than {', '.join(sorted(taken))}",
            found=clash[0],
            remedy="rename it; sessions become the column 'session' by themselves",
        )
    texts = {name: tuple(map(str, values)) for name, values in columns.items()}
    kept = constant_columns(texts, stimulus, first)
    if varying := [name for name in texts if name not in kept]:
        raise DataError(
            f"column {varying[0]}",
            expected="one value for all trials of a picture",
            found="several",
            remedy="leave it out",
        )
    return kept if sessions is None else {SESSION: sessions_of_pictures(sessions, stimulus)} | kept


def _sources(images: Many) -> tuple[ImageSource, ...]:
    """Picture of each trial: files, or rows of an array in one file."""
    if isinstance(images, np.ndarray) and images.ndim > 1:
        raise DataError(
            "images",
            expected="image files, or a file with an array of pictures",
            found=f"an array of shape {images.shape}",
            remedy="np.save('pictures.npy', images), and pass 'pictures.npy'",
        )
    if isinstance(images, (str, Path)):
        place = Place.of(str(images))
        if place.path.is_dir():
            raise DataError(
                place.path,
                expected="a list of image files, or a file with an array of pictures",
                found="a folder",
                remedy="pass sorted(folder.iterdir()), in the order of the responses",
            )
        return tuple(ArrayImage(place.path, place.array, row) for row in range(picture_count(place.path, place.array)))
    return tuple(Path(image) for image in images)


def _by_surface(values: Given | Mapping[str, Given], known: Sequence[str]) -> dict[str, Given]:
    """{surface: values}; values alone are of the only surface. Raises DataError for other surfaces than `known`."""
    only = known[0] if len(known) == 1 else DEFAULT_SURFACE
    found = dict(values) if isinstance(values, Mapping) else {only: values}
    if not found:
        raise DataError("responses", expected="those of one surface or more", found="none", remedy="pass an array")
    if known and set(found) != set(known):
        raise DataError(
            "test_responses",
            expected=f"a value for each of {', '.join(known)}",
            found=", ".join(found),
            remedy="pass a dict with the surfaces of the responses",
        )
    return found


def _rows(values: Given, surface: str) -> Array:
    """Responses of one surface, (n_trials, n_vertices), which stay where they are."""
    where = f"responses of {surface}"
    if isinstance(values, (str, Path)):
        array = open_array(Place.of(str(values)))
    elif isinstance(values, Array):
        array = values
    else:
        given = np.asarray(values)
        array = Array(where, given.shape, given.dtype, given.__getitem__)
    numbers(array, where, 2)
    return array


def _refuse_length(what: str, n_found: int, n_expected: int, of: str) -> None:
    if n_found != n_expected:
        raise DataError(
            what,
            expected=f"one for each of {n_expected:,} {of}",
            found=f"{n_found:,}",
            remedy="pass them in the same order, one a trial",
        )


def _ids(ids: Sequence[int] | np.ndarray | None, n_test: int) -> np.ndarray | None:
    if ids is None:
        return None
    given = np.asarray(ids)
    if given.dtype.kind not in "iu" or (given < 0).any() or (given > LARGEST_ID).any() or n_test:
        raise DataError(
            "ids",
            expected="integers of 0 or more, below 2^63, and no test_images beside them",
            found="test_images beside them"
            if n_test
            else f"values of {given.dtype} from {given.min()} to {given.max()}",
            remedy="leave the ids out: they are then made from the pixels",
        )
    return given.astype(np.int64)


def _of_surface(values: Any, name: str, surface: str, surfaces: Sequence[str]) -> Any:
    """What is given for one surface: a value of a dict of surfaces, or the value itself of the only surface."""
    if isinstance(values, Mapping) and set(values) <= set(surfaces):
        return values.get(surface)
    if len(surfaces) > 1:
        raise DataError(
            name,
            expected=f"a dict with one or more of {', '.join(surfaces)}",
            found=", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__,
            remedy="say which surface each is of",
        )
    return values


def _vector(values: Any, name: str, surface: str, surfaces: Sequence[str], n_vertices: int) -> np.ndarray | None:
    given = None if values is None else _of_surface(values, name, surface, surfaces)
    if given is None:
        return None
    array = np.asarray(given, dtype=np.float64).reshape(-1)
    _refuse_length(f"{name} of {surface}", len(array), n_vertices, "vertices")
    checked = as_fractions if name == "noise_ceiling" else as_ratios
    return checked(array, f"{name} of {surface}").astype(np.float32)


def _masks(
    rois: Mapping[str, Any] | None, surface: str, surfaces: Sequence[str], n_vertices: int
) -> dict[str, np.ndarray]:
    given = {} if rois is None else _of_surface(rois, "rois", surface, surfaces)
    masks = {}
    for roi, mask in (given or {}).items():
        masks[roi] = np.asarray(mask)
        _refuse_length(
            f"ROI {roi} of {surface}",
            masks[roi].size if masks[roi].ndim < 2 else len(masks[roi]),
            n_vertices,
            "vertices",
        )
        if masks[roi].ndim != 1 or (masks[roi].dtype != bool and not np.isin(masks[roi], (0, 1)).all()):
            raise DataError(
                f"ROI {roi} of {surface}",
                expected="a mask of True and False",
                found=f"shape {masks[roi].shape} of {masks[roi].dtype}",
                remedy="pass labels == number",
            )
        masks[roi] = masks[roi].astype(bool)
    return masks
