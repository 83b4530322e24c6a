"""Predictions of new images on the disk: a Zarr group for programs, and means over ROIs as a table for people."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from featcache.dataset.inputs import Picture, decoded, name_of
from featcache.dataset.pictures import picture_id
from featcache.errors import ConfigError, StoreError
from featcache.machine.files import refuse_full_disk, whole_file
from featcache.machine.folders import whole_folder
from featcache.machine.prefetch import prefetch
from featcache.machine.progress import bar
from heads.encoder.encoder import Encoder, Responses

FORMAT = 1
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is predicted.

    subjects : their names
    roi : only its vertices; None for all
    model : None for the blend, or the only model
    """

    subjects: Sequence[str]
    roi: str | None = None
    model: str | None = None

    def vertices(self, encoder: Encoder) -> dict[str, dict[str, np.ndarray]]:
        """{subject: {surface: numbers of vertices}}. Raises ConfigError for an ROI that a subject has not."""
        return {subject: encoder.numbers(subject, roi=self.roi) for subject in self.subjects}


def write_predictions(
    encoder: Encoder,
    pictures: Sequence[Picture],
    wanted: Wanted,
    out: Path,
    *,
    table: Path | None = None,
    batch_size: int = 32,
    workers: int = 1,
) -> dict[str, str]:
    """Write predictions to a Zarr group, whole or not at all; returns {subject: what predicted it}.

    - `<subject>/<surface>` (n_images, n_vertices) float32, in the units of the training responses;
    - `<subject>/<surface>.vertices` (n_vertices,) int64, which vertices the columns are, if they are not all;
    - `image_ids` (n_images,) int64, made of the pixels: equal for equal pictures, as `import` makes them.

    The attribute `featcache` has the names of the images, the model and the subjects.

    table : CSV file of means over ROIs: a row for each image and subject, a column for each ROI

    Raises StoreError where `out` or `table` is there already, or the disk is too small.
    """
    refuse_existing(out, table)
    vertices = wanted.vertices(encoder)
    n_columns = sum(len(numbers) for of_subject in vertices.values() for numbers in of_subject.values())
    refuse_full_disk(out.absolute().parent, 4 * n_columns * len(pictures))
    names = [name_of(picture, number) for number, picture in enumerate(pictures)]
    chosen = {subject: encoder.choice(subject, wanted.model) for subject in wanted.subjects}
    means: dict[str, list[dict[str, np.ndarray]]] = {}
    label = f"predict by {', '.join(dict.fromkeys(chosen.values()))}"
    with (
        nullcontext() if table is None else whole_file(table) as partial_table,  # in its place after the folder
        whole_folder(out) as partial,
        bar(label, len(pictures), "images") as advance,
    ):
        group = zarr.open_group(partial, mode="w", zarr_format=3)
        group.attrs["featcache"] = _description(wanted, chosen, names)
        n_vertices = {subject: encoder.surfaces(subject) for subject in vertices}
        arrays = _arrays(group, vertices, n_vertices, len(pictures))
        done = 0
        for chunk in encoder.stream(pictures, vertices, model=wanted.model, batch_size=batch_size, workers=workers):
            n_images = _write_chunk(arrays, chunk, done)
            group["image_ids"][done : done + n_images] = list(  # type: ignore[index]
                prefetch(_id_of, pictures[done : done + n_images], 2 * workers, workers)
            )
            if table is not None:
                for subject, of_subject in chunk.items():
                    means.setdefault(subject, []).append(roi_means(encoder, subject, of_subject, vertices[subject]))
            done += n_images
            advance(n_images)
        if partial_table is not None:
            ids = np.asarray(group["image_ids"][:])  # type: ignore[index]
            write_table(partial_table, names, ids, {subject: _joined(parts) for subject, parts in means.items()})
    return chosen


def refuse_existing(out: Path, table: Path | None) -> None:
    """Raise StoreError for files that are there already, ConfigError where both are to have one name."""
    if table == out:
        raise ConfigError("--out", expected="another name than that of the table", found=str(out), remedy="correct it")
    for path in (one for one in (out, table) if one is not None and one.exists()):
        raise StoreError(path, expected="a new file", found="one that exists", remedy="choose another, or delete it")


def _id_of(picture: Picture) -> int:
    return picture_id(decoded(picture))


def _description(wanted: Wanted, chosen: Mapping[str, str], names: Sequence[str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "predictions of new images",
        "model": dict(chosen),
        "subjects": list(wanted.subjects),
        "roi": wanted.roi,
        "images": list(names),
    }


def _arrays(
    group: zarr.Group,
    vertices: Mapping[str, Mapping[str, np.ndarray]],
    n_vertices: Mapping[str, Mapping[str, int]],
    n_images: int,
) -> dict[tuple[str, str], Any]:
    arrays: dict[tuple[str, str], Any] = {}
    for subject, of_subject in vertices.items():
        for surface, numbers in of_subject.items():
            rows = min(max(_CHUNK_BYTES // (4 * max(len(numbers), 1)), 1), n_images)
            arrays[subject, surface] = group.create_array(
                f"{subject}/{surface}",
                shape=(n_images, len(numbers)),
                chunks=(rows, max(len(numbers), 1)),
                dtype="float32",
                compressors=[Crc32cCodec()],
                fill_value=float("nan"),
            )
            if len(numbers) < n_vertices[subject][surface]:
                group.create_array(f"{subject}/{surface}.vertices", data=numbers.astype(np.int64))
    group.create_array("image_ids", shape=(n_images,), dtype="int64", chunks=(n_images,))
    return arrays


def _write_chunk(arrays: Mapping[tuple[str, str], Any], chunk: Responses, start: int) -> int:
    n_images = 0
    for subject, of_subject in chunk.items():
        for surface, values in of_subject.items():
            n_images = len(values)
            arrays[subject, surface][start : start + n_images] = values
    return n_images


def roi_means(
    encoder: Encoder, subject: str, predictions: Mapping[str, np.ndarray], vertices: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """{ROI, or 'all': (n_images,) mean of the predictions over its vertices of all surfaces} of those predicted."""
    whole = np.concatenate(list(predictions.values()), 1)
    means = {"all": whole.mean(1)} if whole.shape[1] else {}
    for roi in encoder.rois(subject):
        of_roi = encoder.numbers(subject, roi=roi)
        inside = np.concatenate([np.isin(numbers, of_roi[surface]) for surface, numbers in vertices.items()])
        if inside.any():
            means[roi] = whole[:, inside].mean(1)
    return means


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {roi: np.concatenate([part[roi] for part in parts]) for roi in parts[0]}


def write_table(
    path: Path, names: Sequence[str], ids: np.ndarray, means: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Write a row for each image and subject, with a column for each ROI of any subject; empty where it has none."""
    rois = list(dict.fromkeys(roi for of_subject in means.values() for roi in of_subject))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "id", "subject", *rois])
        for number, name in enumerate(names):
            for subject, of_subject in means.items():
                values = [f"{of_subject[roi][number]:.6g}" if roi in of_subject else "" for roi in rois]
                table.writerow([name, int(ids[number]), subject, *values])
