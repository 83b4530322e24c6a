"""Files of maps: per vertex (.npz), means over ROIs (.csv), and pictures (.png)."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbone.extent import Extent, extent_of
from featcache.cache.store import list_stores
from featcache.dataset.images import image_shape
from featcache.dataset.subject import Subject
from featcache.errors import StoreError
from featcache.machine.files import whole_file
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.blend.models import Model, choose_names, names_of
from heads.blend.plot import can_draw
from heads.features.sets import say_without, subject_stores
from heads.fit.run import score
from heads.maps.plot import plot_maps
from heads.maps.read import VertexMaps, read_maps

Shapes = Counter[tuple[int, int]]  # number of images of each width and height


@dataclass(frozen=True)
class RoiMaps:
    """Means over the vertices of an ROI. Each vertex is weighed by its squared out-of-fold r: noise has maps too.

    places : on the grids of the layers
    field : x, y and size as in `VertexMaps.fields`
    """

    roi: str
    n_vertices: int
    shares: dict[str, float]
    places: dict[str, np.ndarray]
    field: tuple[float, float, float]


def export_maps(subjects: Sequence[Subject], pattern: str, work: Path) -> list[Path]:
    """Write maps of every model whose name matches, and return the files.

    Raises ConfigError where no model matches, StoreError where nothing was fitted.
    """
    pairs, draws = list(_models(subjects, pattern, work)), can_draw("maps")
    shapes = {subject: Counter(map(image_shape, subject.train.sources)) for subject, _ in pairs}
    return [path for subject, model in pairs for path in _export(subject, model, shapes[subject], work, draws)]


def _export(subject: Subject, model: Model, shapes: Shapes, work: Path, draws: bool) -> list[Path]:
    maps = read_maps(model, work, extent := _extent(subject, model, shapes))
    if maps is None:
        say(f"{subject.name}: left out {model.name}: no weights on places are kept of it")
        return []
    folder = Workdir(work).maps
    vertices, table, picture = (folder / f"{model.store.name}.{end}" for end in ("npz", "csv", "png"))
    _write_vertices(vertices, maps)
    rois = list(roi_means(subject, model, maps))
    if not rois:
        say(f"{subject.name}: no means over ROIs of {model.name}: it predicts no vertex")
        return [vertices]
    _write_table(table, rois)
    if draws:
        with whole_file(picture) as partial:
            plot_maps(partial, rois, f"{subject.name}, {model.name}", extent)
    return [vertices, table, *([picture] if draws else [])]


def _extent(subject: Subject, model: Model, shapes: Shapes) -> Extent:
    """The part of the subject's training images that the network of a model saw; of most of them, where they differ."""
    extents: Counter[Extent] = Counter()
    for (width, height), n_images in shapes.items():
        extents[extent_of(model.key.features["transform"], width, height)] += n_images
    ((extent, n_images),) = extents.most_common(1)
    if len(extents) > 1:
        say(f"{subject.name}: images have several shapes; maps are in coordinates of {n_images} of {extents.total()}")
    return extent


def _models(subjects: Sequence[Subject], pattern: str, work: Path) -> Iterator[tuple[Subject, Model]]:
    """Every subject's models whose names match."""
    folder = Workdir(work).predictions
    stores = list_stores(folder)
    models = {
        subject: [Model.from_store(store) for store in subject_stores(subject, stores, "fit-heads")]
        for subject in subjects
    }
    if not any(models.values()):
        raise StoreError(folder, expected="fitted heads", found="none", remedy="run 'fit-heads' first")
    say_without(models, folder, "fit-heads")
    names = choose_names(names_of(models), pattern)
    yield from (
        (subject, model) for subject, of_subject in models.items() for model in of_subject if model.name in names
    )


def roi_means(subject: Subject, model: Model, maps: Mapping[str, VertexMaps]) -> Iterator[RoiMaps]:
    """Means over the vertices of all surfaces: over every vertex first, then over each ROI."""
    r = np.concatenate([score(subject, surface, model.store).r for surface in maps])
    shares = np.concatenate([of_surface.shares for of_surface in maps.values()])
    fields = np.concatenate([of_surface.fields() for of_surface in maps.values()])
    first = next(iter(maps.values()))
    places = {name: np.concatenate([of_surface.places[name] for of_surface in maps.values()]) for name in first.places}
    masks = {"all": np.ones(len(r), dtype=bool)}
    for roi in dict.fromkeys(roi for surface in maps for roi, mask in subject.rois[surface].items() if mask.any()):
        none = {surface: np.zeros(subject.n_vertices[surface], dtype=bool) for surface in maps}
        masks[roi] = np.concatenate([subject.rois[surface].get(roi, none[surface]) for surface in maps])
    for roi, mask in masks.items():
        weights = np.nan_to_num(np.maximum(r, 0)) ** 2 * mask
        if total := weights.sum():
            x, y, size = (weights @ fields / total).tolist()
            yield RoiMaps(
                roi=roi,
                n_vertices=int((weights > 0).sum()),
                shares=dict(zip(first.layers, (weights @ shares / total).tolist(), strict=True)),
                places={name: np.tensordot(weights, values, 1) / total for name, values in places.items()},
                field=(x, y, size),
            )


def _write_vertices(path: Path, maps: Mapping[str, VertexMaps]) -> None:
    first = next(iter(maps.values()))
    arrays: dict[str, Any] = {"layers": np.array(first.layers), "extent": np.array(astuple(first.extent))}
    for surface, of_surface in maps.items():
        arrays |= {f"{surface}/{name}": values for name, values in of_surface.places.items()}
        arrays |= {f"{surface}/layer_shares": of_surface.shares, f"{surface}/fields": of_surface.fields()}
    with whole_file(path) as partial:
        np.savez_compressed(partial, **arrays)


def _write_table(path: Path, rois: Sequence[RoiMaps]) -> None:
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["roi", "vertices", *(f"share {name}" for name in rois[0].shares), "x", "y", "size"])
        for roi in rois:
            numbers = [f"{value:.4f}" for value in (*roi.shares.values(), *roi.field)]
            table.writerow([roi.roi, roi.n_vertices, *numbers])
