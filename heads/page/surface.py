"""The cortex: values of vertices on the mesh fsaverage5, drawn flat and inflated, and as data of a viewer.

Vertices of the challenge are those of fsaverage, whose first 10,242 are the vertices of fsaverage5: the mesh is an
icosahedron that was subdivided, and each subdivision adds vertices after those that there were. So of full-size data
every sixteenth vertex is drawn. nilearn brings the mesh in its wheel; nothing is downloaded.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.dataset.rois import FSAVERAGE5_VERTICES, HEMISPHERES
from featcache.dataset.subject import Subject
from featcache.machine.extra import needed
from heads.blend.plot import new_figure
from heads.blend.products import surface_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

_SIDES = dict(zip(HEMISPHERES, ("left", "right"), strict=True))
_GAP = 8  # mm between hemispheres
_REACH = 2  # edges that a vertex is drawn around itself, where vertices are scattered
_INCHES, _DOTS = (10.4, 2.5), 200  # of pictures before they are made smaller, and their dots an inch
_GREY = (0.62, 0.72)  # of gyri and sulci without data: readable on light and on dark


@dataclass(frozen=True)
class Mesh:
    """Both hemispheres of fsaverage5.

    inflated : (n_points, 3) mm, hemispheres side by side; flat : (n_points, 2) mm
    faces, flat_faces : (n_faces, 3) numbers of points; the flat mesh is cut, and lacks the medial wall
    sulci : (n_points,) bool
    """

    inflated: np.ndarray
    flat: np.ndarray
    faces: np.ndarray
    flat_faces: np.ndarray
    sulci: np.ndarray


@functools.cache
def load_mesh() -> Mesh:
    """The mesh in nilearn's wheel. Raises ConfigError where nilearn is not installed."""
    datasets = needed("nilearn.datasets", "maps of the cortex", "report")
    surface = needed("nilearn.surface", "maps of the cortex", "report")
    files = datasets.fetch_surf_fsaverage("fsaverage5")
    inflated, flat, faces, flat_faces, sulci = [], [], [], [], []
    for number, side in enumerate(_SIDES.values()):
        bent, cut = (surface.load_surf_mesh(files[f"{kind}_{side}"]) for kind in ("infl", "flat"))
        inflated.append(_beside(bent.coordinates, number))
        flat.append(_beside(cut.coordinates[:, :2], number))
        faces.append(bent.faces + number * FSAVERAGE5_VERTICES)
        flat_faces.append(cut.faces + number * FSAVERAGE5_VERTICES)
        sulci.append(surface.load_surf_data(files[f"sulc_{side}"]) > 0)
    return Mesh(*map(np.concatenate, (inflated, flat, faces, flat_faces, sulci)))


def _beside(points: np.ndarray, number: int) -> np.ndarray:
    """The points of a hemisphere, left of 0 the first and right of it the second."""
    edge = points[:, 0].min() - _GAP / 2 if number else points[:, 0].max() + _GAP / 2
    shift = np.zeros(points.shape[1])
    shift[0] = -edge
    return np.asarray(points + shift)


def on_fsaverage(subject: Subject) -> bool:
    """Whether it is known which vertices of fsaverage a subject's columns stand for, and some are of fsaverage5."""
    return set(subject.surfaces) == set(HEMISPHERES) and all(
        mask is not None and bool(mask[:FSAVERAGE5_VERTICES].any()) for mask in subject.fsaverage.values()
    )


def on_mesh(subject: Subject, values: np.ndarray) -> np.ndarray:
    """Values of a subject's vertices, its surfaces side by side, at the points of the mesh; NaN where there is none."""
    mapped = np.full((len(HEMISPHERES), FSAVERAGE5_VERTICES), np.nan)
    blocks = surface_blocks(subject)
    for number, hemisphere in enumerate(HEMISPHERES):
        mask = subject.fsaverage[hemisphere]
        assert mask is not None
        places = np.flatnonzero(mask)
        kept = places < FSAVERAGE5_VERTICES
        mapped[number, places[kept]] = values[blocks[hemisphere]][kept]
    return mapped.ravel()


def is_scattered(mapped: np.ndarray, mesh: Mesh) -> bool:
    """Whether most vertices with a value have no neighbour with one: no face would have a colour."""
    known = ~np.isnan(mapped)
    neighbours = np.zeros(len(mapped), dtype=np.int64)
    for a, b in _edges(mesh):
        np.add.at(neighbours, a, known[b])
    return bool(np.mean(neighbours[known] > 0) < 0.9)


def spread_out(mapped: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Values whose surroundings without any have them too, up to some edges away."""
    mapped = mapped.copy()
    for _ in range(_REACH):
        before = mapped.copy()
        for a, b in _edges(mesh):
            new = np.isnan(mapped[a]) & ~np.isnan(before[b])
            mapped[a[new]] = before[b[new]]
    return mapped


def _edges(mesh: Mesh) -> list[tuple[np.ndarray, np.ndarray]]:
    columns = mesh.faces.T
    return [(columns[i], columns[j]) for i in range(3) for j in range(3) if i != j]


def colours_of(values: np.ndarray, palette: np.ndarray, low: float, high: float, mesh: Mesh) -> np.ndarray:
    """Colours of the points, (n_points, 3) uint8: of the palette from `low` to `high`, grey where there is no value.

    palette : (n_colours, 3) in [0, 1]
    """
    grey = np.where(mesh.sulci, *_GREY)[:, None].repeat(3, axis=1)
    share = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12)
    numbers = np.clip(np.round(share * (len(palette) - 1)), 0, len(palette) - 1).astype(np.int64)
    colours = np.where(np.isnan(values)[:, None], grey, palette[numbers])
    return np.asarray(np.round(255 * colours), dtype=np.uint8)


@functools.cache
def seen_points() -> np.ndarray:
    """Number of the point that each pixel of a picture shows, (height, width), -1 where it shows none.

    Both hemispheres flat, and inflated from behind and from below. Drawn once for all maps: a face has the colour of
    one of its corners, because a mean of two categories would look like a third.
    """
    mesh = load_mesh()
    figure = new_figure(*_INCHES)
    figure.set_dpi(_DOTS)
    figure.patch.set_facecolor("black")
    flat, behind, below = figure.subplots(1, 3, width_ratios=[2.35, 1.3, 1.0])
    points = mesh.inflated
    _draw_faces(flat, mesh.flat, mesh.flat_faces)
    _draw_faces(behind, points[:, [0, 2]], _seen(points, mesh.faces, 1))
    _draw_faces(below, points[:, [0, 1]] * [1, -1], _seen(points, mesh.faces, 2))  # left on the left, nose down
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(np.int64)  # type: ignore[attr-defined]
    return np.asarray(pixels @ [1 << 16, 1 << 8, 1] - 1)


def _seen(points: np.ndarray, faces: np.ndarray, axis: int) -> np.ndarray:
    """The faces that look towards the lower end of an axis, the nearest last."""
    corners = points[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    seen = faces[normals[:, axis] < 0]
    return np.asarray(seen[np.argsort(-points[seen][:, :, axis].mean(1), kind="stable")])


def _draw_faces(axis: "Axes", points: np.ndarray, faces: np.ndarray) -> None:
    """Draw faces in colours that are numbers of points, counted from 1."""
    from matplotlib.collections import PolyCollection

    number = faces[:, 0] + 1
    colours = np.stack([number >> 16, number >> 8 & 255, number & 255], 1) / 255
    axis.add_collection(
        PolyCollection(points[faces], facecolors=colours, edgecolors=colours, linewidths=0.3, antialiaseds=False)
    )
    axis.set_aspect("equal")
    axis.autoscale_view()
    axis.set_axis_off()


def drawn(colours: np.ndarray, width: int) -> "Image":
    """A map as a picture of some width, on a clear ground.

    colours : (n_points, 3) uint8
    """
    from PIL import Image

    points = seen_points()
    pixels = np.zeros((*points.shape, 4), np.uint8)
    pixels[points >= 0, :3] = colours[points[points >= 0]]
    pixels[points >= 0, 3] = 255
    height = round(width * points.shape[0] / points.shape[1])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)


def viewer_library() -> bytes:
    """The viewer niivue (BSD licence), as nilearn brings it. Raises ConfigError where it does not."""
    from importlib.resources import files

    needed("nilearn", "the viewer", "report")
    return (files("nilearn") / "_assets" / "js" / "niivue.umd.js").read_bytes()


def viewer_mesh(mesh: Mesh) -> dict[str, Any]:
    """The inflated mesh as the viewer takes it: points float32, faces uint32, sulci a byte each."""
    arrays: Mapping[str, np.ndarray] = {
        "points": mesh.inflated.astype("<f4"),
        "faces": mesh.faces.astype("<u4"),
        "grey": np.round(255 * np.where(mesh.sulci, *_GREY)).astype(np.uint8),
    }
    return {name: values.tobytes() for name, values in arrays.items()}
