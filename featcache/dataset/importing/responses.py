"""Responses, ROIs and ceilings of each surface, from files of any form."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.dataset.ceilings import is_named_ncsnr, is_percent, note_on_unit, out_of_range
from featcache.dataset.folder import check_name
from featcache.dataset.importing.config import DEFAULT_SURFACE, ImportConfig
from featcache.dataset.importing.material import Recording
from featcache.dataset.importing.rois import read_rois
from featcache.dataset.subject import listed
from featcache.errors import ConfigError, DataError
from featcache.formats.arrays import open_array
from featcache.formats.lazy import Array, Joined, Place, numbers, vector
from featcache.formats.tables import column_names
from featcache.formats.volumes import Grid, is_volume, read_volumes
from featcache.machine.progress import say

# columns of a table that are no vertices
_NO_VERTICES = ("id", "image_id", "image", "trial", "index", "session", "run", "unnamed: 0")


def by_surface(texts: Sequence[str], option: str, known: Sequence[str] = ()) -> dict[str, list[str]]:
    """{surface: files} of an option that may be given several times, as FILE or as NAME=FILE.

    known : surfaces that there are; () if the option itself names them

    Raises ConfigError for a surface that there is not, DataError for a name that no surface can have.
    """
    files: dict[str, list[str]] = {}
    for text in texts:
        name, file = _named(text)
        surface = name or (known[0] if len(known) == 1 else DEFAULT_SURFACE)
        if known and surface not in known:
            raise ConfigError(
                f"{option} {text}",
                expected=f"NAME=FILE, where NAME is one of {', '.join(known)}",
                found=name or "no name",
                remedy="say which surface the file is of",
            )
        files.setdefault(surface, []).append(file)
    return files


def _named(text: str) -> tuple[str, str]:
    """Name and file of NAME=FILE; '' and the file where there is no name, but perhaps '=' in the file's own path."""
    name, sign, file = text.partition("=")
    path_so_far = bool(re.search(r"[/\\:]", name)) and not Place.of(file).path.exists()
    if not name or not sign or path_so_far or Place.of(text).path.exists():
        return "", text
    return check_name(name, "the name of a surface"), file


@dataclass(frozen=True)
class Responses:
    """Responses of every surface.

    rows : {surface: rows of the training trials, then of trials of the test images}
    per_file : number of trials in each file of the training trials
    n_test : trials of the test images
    masks : {surface: mask of its volumes}; None where it has none
    positions : {surface: (n_vertices, 3) mm}; without the surfaces whose positions are not known
    grids : {surface: grid of voxels that the positions are of}, where there is one
    """

    rows: Mapping[str, Array]
    per_file: tuple[int, ...]
    n_test: int
    masks: Mapping[str, Path | None]
    positions: Mapping[str, np.ndarray]
    grids: Mapping[str, Grid]


def read_responses(config: ImportConfig) -> Responses:
    """Responses of all surfaces, mapped. Raises DataError or ConfigError for files that do not fit together."""
    arrays, volumes = by_surface(config.responses, "--responses"), by_surface(config.volume, "--volume")
    if both := sorted(arrays.keys() & volumes.keys()):
        raise ConfigError(
            "--volume", expected="other surfaces than --responses", found=both[0], remedy="name each surface once"
        )
    surfaces = [*arrays, *volumes]
    masks = _masks(config, surfaces, arrays)
    test = _test_files(config, surfaces)
    rows: dict[str, Array] = {}
    counts: dict[str, tuple[int, ...]] = {}
    positions: dict[str, np.ndarray] = {}
    grids: dict[str, Grid] = {}
    for surface, files in arrays.items():
        parts = [_open_rows(file) for file in (*files, *test[surface])]
        rows[surface], counts[surface] = Joined(parts), tuple(map(len, parts))
    for surface, files in volumes.items():
        opened = read_volumes([_volume(file) for file in (*files, *test[surface])], masks[surface])
        rows[surface], counts[surface] = opened.rows, opened.n_of_files
        if opened.positions is not None:
            positions[surface] = opened.positions
        if opened.grid is not None:
            grids[surface] = opened.grid
    n_files = {surface: len(arrays.get(surface) or volumes[surface]) for surface in surfaces}
    return Responses(
        rows=rows,
        per_file=_common({surface: counts[surface][: n_files[surface]] for surface in surfaces}, "responses"),
        n_test=sum(_common({surface: counts[surface][n_files[surface] :] for surface in surfaces}, "test responses")),
        masks=masks,
        positions=positions,
        grids=grids,
    )


def _test_files(config: ImportConfig, surfaces: Sequence[str]) -> dict[str, list[str]]:
    """Files of responses to the test images, of every surface or of none."""
    test = by_surface(config.test_responses, "--test-responses", surfaces)
    if test and (missing := [surface for surface in surfaces if surface not in test]):
        raise ConfigError(
            "--test-responses",
            expected=f"a file for each of {', '.join(surfaces)}",
            found=f"none for {missing[0]}",
            remedy="add it",
        )
    return {surface: test.get(surface, []) for surface in surfaces}


def _masks(config: ImportConfig, surfaces: Sequence[str], arrays: Mapping[str, Any]) -> dict[str, Path | None]:
    """The mask of each surface's volumes; None where it has none."""
    masks: dict[str, Path | None] = dict.fromkeys(surfaces)
    for surface, files in by_surface(config.mask, "--mask", surfaces).items():
        if surface in arrays or len(files) > 1:
            raise ConfigError(
                "--mask",
                expected="one mask for each --volume",
                found=listed(files) if len(files) > 1 else f"{files[0]} for --responses, which are not volumes",
                remedy="leave the others out",
            )
        masks[surface] = Path(files[0])
    return masks


def _volume(file: str) -> Path:
    if not is_volume(Path(file)):
        raise ConfigError(
            f"--volume {file}",
            expected="a brain volume, such as .nii.gz, .mgh or .gii",
            found=repr(Path(file).suffix),
            remedy="give an array as --responses, or convert it",
        )
    return Path(file)


def _open_rows(file: str) -> Array:
    place = Place.of(file)
    if is_volume(place.path):
        raise ConfigError(
            f"--responses {file}",
            expected="an array, such as .npy, .h5 or .mat",
            found="a brain volume",
            remedy="give it as --volume",
        )
    if others := [name for name in column_names(place.path) if name.lower() in _NO_VERTICES]:
        raise DataError(
            place,
            expected="columns of responses alone",
            found=f"a column {others[0]!r}",
            remedy="leave it out; ids, trials and sessions belong in a --table",
        )
    array = open_array(place)
    numbers(array, place, 2)
    return array


def _common(counts: Mapping[str, tuple[int, ...]], what: str) -> tuple[int, ...]:
    """Number of trials in each file, the same for all surfaces. Raises DataError where it is not."""
    first, *others = counts
    for other in others:
        if counts[other] != counts[first]:
            raise DataError(
                f"{what} of {other}",
                expected=f"as many rows as those of {first} ({listed(counts[first])})",
                found=listed(counts[other]),
                remedy="give the files that belong together",
            )
    return counts[first]


def recordings_of(config: ImportConfig, responses: Responses) -> dict[str, Recording]:
    """Responses of each surface, with its ROIs and ceilings."""
    surfaces = list(responses.rows)
    rois = by_surface(config.roi, "--roi", surfaces)
    ceilings = _vectors(config.ceiling, "--ceiling", responses, as_fractions)
    ncsnr = _vectors(config.ncsnr, "--ncsnr", responses, as_ratios)
    return {
        surface: Recording(
            trials=rows,
            rois=read_rois(rois.get(surface, ()), rows.shape[1], responses.masks[surface]),
            noise_ceiling=ceilings.get(surface),
            ncsnr=ncsnr.get(surface),
            positions=responses.positions.get(surface),
            grid=responses.grids.get(surface),
        )
        for surface, rows in responses.rows.items()
    }


def _vectors(
    texts: Sequence[str], option: str, responses: Responses, checked: Callable[[np.ndarray, object], np.ndarray]
) -> dict[str, np.ndarray]:
    """{surface: a number for each vertex}"""
    vectors = {}
    for surface, files in by_surface(texts, option, list(responses.rows)).items():
        place, n_vertices = Place.of(files[0]), responses.rows[surface].shape[1]
        values = vector(open_array(place), place).astype(np.float64)
        if len(values) != n_vertices or len(files) > 1:
            raise DataError(
                f"{option} {place}",
                expected=f"one number for each of {n_vertices} vertices of {surface}",
                found=f"{len(values)} numbers" if len(files) == 1 else f"{len(files)} files",
                remedy="give the file of these vertices",
            )
        if option == "--ceiling" and any(map(is_named_ncsnr, (place.path.name, place.array))):
            raise DataError(
                f"{option} {place}",
                expected="ceilings, in percent or as fractions of variance",
                found="ratios of signal to noise, by their name",
                remedy="give it as --ncsnr",
            )
        vectors[surface] = checked(values, place).astype(np.float32)
    return vectors


def as_fractions(values: np.ndarray, where: object) -> np.ndarray:
    """Ceilings of vertices as fractions of variance; percent are told by their size. Raises DataError for others."""
    percent = is_percent(np.nanmax(values, initial=0))
    fractions = values / 100 if percent else values
    if (bad := np.flatnonzero(~((fractions >= 0) & (fractions <= 1)))).size:  # NaN is bad too
        raise DataError(
            where,
            expected=f"ceilings from 0 to {100 if percent else 1}",
            found=out_of_range(float(values[bad[0]]), bad[0], 100 if percent else 1),
            remedy="correct it, or give ncsnr as --ncsnr; 0 says that a vertex has no signal",
        )
    say(f"{where}: noise ceilings, {note_on_unit([values], 100 if percent else 1)}")
    return fractions


def as_ratios(values: np.ndarray, where: object) -> np.ndarray:
    """Ratios of signal to noise, checked. Raises DataError for one below 0, infinite or NaN."""
    if (bad := np.flatnonzero(~((values >= 0) & np.isfinite(values)))).size:
        raise DataError(
            where,
            expected="ratios of 0 or more",
            found=f"{values[bad[0]]:.4g} at vertex {bad[0]}",
            remedy="correct it; 0 says that a vertex has no signal",
        )
    return values
