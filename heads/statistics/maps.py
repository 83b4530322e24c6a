"""Scores of vertices as maps of the brain, where it is known where vertices are."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from featcache.dataset.subject import Subject
from featcache.errors import DataError
from featcache.formats.brain_maps import write_gifti, write_nifti
from featcache.machine.progress import say
from heads.statistics.run import VertexScore


def write_maps(folder: Path, subjects: Sequence[Subject], scores: Sequence[VertexScore]) -> list[Path]:
    """Write a file for each surface, model and measure, and return them; names surfaces without places.

    <folder>/<subject>/<surface>.<model>.<measure>.func.gii on the fsaverage surface, or .nii.gz in the space of the
    volumes that were imported. Vertices without a value are NaN.

    Raises DataError where no surface has places, ConfigError where nibabel is missing.
    """
    by_name = {subject.name: subject for subject in subjects}
    paths: list[Path] = []
    nowhere: dict[str, str] = {}
    for one in scores:
        subject = by_name[one.subject]
        if (why := _no_place(subject, one.surface)) is not None:
            nowhere[f"{one.subject} {one.surface}"] = why
            continue
        for measure, values in measures(one).items():
            stem = folder / one.subject / f"{one.surface}.{file_name(one.model)}.{measure}"
            paths.append(_write(stem, subject, one.surface, values, f"{measure}, {one.model}"))
    if not paths:
        where, why = next(iter(nowhere.items()))
        raise DataError(f"--maps-to, {where}", expected="vertices whose places are known", found=why, remedy=_REMEDY)
    for where, why in nowhere.items():
        say(f"{where}: no maps, for {why}; {_REMEDY}")
    return paths


_REMEDY = "import volumes (again, where that was done by an earlier version), or add the fsaverage masks of roi_masks"


def _no_place(subject: Subject, surface: str) -> str | None:
    """Why it is not known where vertices are; None where it is."""
    if subject.fsaverage[surface] is not None or {surface} <= subject.grids.keys() & subject.positions.keys():
        return None
    return (
        "positions without a grid of voxels" if surface in subject.positions else "no fsaverage mask and no positions"
    )


def _write(stem: Path, subject: Subject, surface: str, values: np.ndarray, name: str) -> Path:
    if (grid := subject.grids.get(surface)) is not None:
        path = stem.with_name(f"{stem.name}.nii.gz")
        write_nifti(path, values, name, subject.positions[surface], grid)
        return path
    path, inside = stem.with_name(f"{stem.name}.func.gii"), subject.fsaverage[surface]
    assert inside is not None
    write_gifti(path, values, name, surface, inside)
    return path


def measures(score: VertexScore) -> Mapping[str, np.ndarray]:
    """What there are maps of: {measure: (n_vertices,)}; accuracy only where there are ceilings."""
    found = {"r": score.r, "accuracy": None if score.noise_ceiling is None else score.accuracy(score.r)}
    found |= {"q": score.q, "difference": score.difference, "difference_q": score.difference_q}
    return {measure: values for measure, values in found.items() if values is not None}


def file_name(model: str) -> str:
    """The name of a model as part of the name of a file."""
    return re.sub(r"[^\w.+-]+", "-", model)
