"""Maps of the cortex: the score, the layer that predicts best, and the model that leads the blend."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from gzip import compress
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbone.extent import WHOLE
from featcache.config import POOLED
from featcache.dataset.rois import FSAVERAGE5_VERTICES
from featcache.dataset.subject import Subject
from featcache.errors import StoreError
from heads.blend.models import Model
from heads.blend.products import surface_blocks
from heads.blend.saved import SavedBlend
from heads.maps.read import read_maps
from heads.page.charts import COLOURS
from heads.page.measures import Measured
from heads.page.surface import (
    Mesh,
    colours_of,
    drawn,
    is_scattered,
    on_mesh,
    spread_out,
    viewer_library,
    viewer_mesh,
)

KINDS = {"score": "Score", "layer": "Best layer", "model": "Leading model of the blend"}
_TOP = 0.99  # quantile of scores that has the last colour of the scale
_OTHERS = "others"


@dataclass(frozen=True)
class Scale:
    """What colours mean: numbers from `low` to `high`, or categories, the number of each being its place.

    palette : (n_colours, 3) in [0, 1]
    """

    palette: np.ndarray
    label: str = ""
    low: float = 0.0
    high: float = 1.0
    categories: tuple[str, ...] = ()

    @property
    def css(self) -> list[str]:
        """Colours of the palette as a page names them; of a scale of numbers, some of them."""
        step = 1 if self.categories else max(len(self.palette) // 12, 1)
        return [f"rgb({r} {g} {b})" for r, g, b in np.round(255 * self.palette[::step]).astype(int).tolist()]


@dataclass(frozen=True)
class Map:
    """Values at the points of the mesh, NaN where there is none.

    subject : whose vertices these are, or 'mean of 8 subjects'
    kind : of KINDS
    """

    subject: str
    kind: str
    values: np.ndarray
    scale: Scale

    @property
    def title(self) -> str:
        return f"{KINDS[self.kind]}, {self.subject}"


def categories_scale(names: Sequence[str], colours: Sequence[str] = ()) -> Scale:
    """Categories in some colours; without any, in the order of a row of colours."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if colours:
        palette = np.array([to_rgb(colour) for colour in colours])
    else:
        palette = colormaps["plasma"](np.linspace(0.05, 0.95, max(len(names), 2)))[: len(names), :3]
    return Scale(palette, high=max(len(names) - 1, 1), categories=tuple(names))


def score_maps(measured: Sequence[Measured], mesh: Mesh) -> list[Map]:
    """r of the blend, or else of the best model, at each subject's vertices, and its mean over several subjects."""
    from matplotlib import colormaps

    r = {one.subject: one.r[one.best] for one in measured}
    mapped = {subject.name: on_mesh(subject, values) for subject, values in r.items()}
    if len(mapped) > 1:
        known = ~np.isnan(np.stack(list(mapped.values())))
        total = np.nansum(np.stack(list(mapped.values())), axis=0)
        mean = np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)
        mapped = {f"mean of {len(mapped)} subjects": mean} | mapped
    top = max(float(np.quantile(np.concatenate(list(r.values())), _TOP)), 0.05)
    label = f"r of {best_of(measured)}, out of fold"
    scale = Scale(colormaps["viridis"](np.linspace(0, 1, 256))[:, :3], label, 0.0, top)
    return [Map(name, "score", _shown(values, mesh), scale) for name, values in mapped.items()]


def best_of(measured: Sequence[Measured]) -> str:
    """What `Measured.best` is, in words."""
    return "the blend" if all(one.blended for one in measured) else "each subject's best model or blend"


def _shown(mapped: np.ndarray, mesh: Mesh) -> np.ndarray:
    return spread_out(mapped, mesh) if is_scattered(mapped, mesh) else mapped


def layer_maps(measured: Sequence[Measured], work: Path, mesh: Mesh) -> list[Map]:
    """The layer that predicts each vertex best, of the subjects of which that is known."""
    found = {one.subject: layers for one in measured if (layers := best_layers(one, work)) is not None}
    names = list(dict.fromkeys(name for names, _ in found.values() for name in names))
    if not found:
        return []
    scale = categories_scale(names)
    maps = []
    for subject, (own, best) in found.items():
        places = np.array([names.index(name) for name in own], dtype=float)
        values = np.where(best < 0, np.nan, places[best])
        maps.append(Map(subject.name, "layer", _shown(on_mesh(subject, values), mesh), scale))
    return maps


def best_layers(measured: Measured, work: Path) -> tuple[list[str], np.ndarray] | None:
    """Names of layers, and the number of each vertex's best, (n_vertices,), -1 where none predicts it; None: not known.

    Of models that read one layer each, the layer of the best of them; or else the layer with the largest share of the
    weights of the best model that reads several.
    """
    groups: dict[tuple[str, ...], dict[str, Model]] = {}
    for model in measured.models:
        if len(model.key.read) == 1:
            key = (model.key.backbone, model.stage, *model.key.head_words)
            groups.setdefault(key, {})[model.key.read[0]] = model
    single = max(groups.values(), key=len, default={})
    if len(single) > 1:
        order = [name for name in next(iter(single.values())).key.features["layers"] if name != POOLED]
        names = sorted(single, key=lambda name: order.index(name) if name in order else len(order))  # pooled is deepest
        r = np.stack([measured.r[single[name].name] for name in names])
        return names, np.where(r.max(0) > 0, r.argmax(0), -1)
    several = [model for model in measured.models if len(model.key.read) > 1]
    for model in sorted(several, key=lambda model: -float(measured.r[model.name].mean())):
        try:
            maps = read_maps(model, work, WHOLE)
        except StoreError:  # its weights or features are gone
            continue
        if maps:
            shares = np.concatenate([maps[surface].shares for surface in measured.subject.surfaces])
            r = measured.r[model.name]
            return list(next(iter(maps.values())).layers), np.where(r > 0, shares.argmax(1), -1)
    return None


def leading_models(measured: Measured, blend: SavedBlend) -> tuple[list[str], np.ndarray] | None:
    """Names of models, and the number of the one with the largest part in the blend at each vertex; None: no blend.

    A model's part is its coefficient times the standard deviation of its predictions; -1 where all parts are 0.
    """
    subject = measured.subject
    surfaces = blend.get(subject.name, {})
    if set(surfaces) != set(subject.surfaces):
        return None
    names = list(next(iter(surfaces.values())).models)
    if any(name not in measured.spread for name in names):
        return None
    parts = np.zeros((len(names), sum(subject.n_vertices.values())))
    for surface, block in surface_blocks(subject).items():
        if surfaces[surface].of_models.shape[1] != block.stop - block.start:
            return None
        parts[:, block] = np.abs(surfaces[surface].of_models)
    parts *= np.stack([measured.spread[name] for name in names])
    return names, np.where(parts.max(0) > 0, parts.argmax(0), -1)


def model_maps(measured: Sequence[Measured], blend: SavedBlend, named: Sequence[str], mesh: Mesh) -> list[Map]:
    """The model that leads the blend at each vertex, of the subjects that were blended.

    named : models with a colour of their own, in the order of the page
    """
    found = {one.subject: models for one in measured if (models := leading_models(one, blend)) is not None}
    present = {names[number] for names, best in found.values() for number in np.unique(best[best >= 0])}
    shown = [name for name in named[: len(COLOURS) - 1] if name in present]
    rest = [_OTHERS] if present - set(shown) else []
    colours = [COLOURS[named.index(name)] for name in shown] + [COLOURS[-1]] * len(rest)
    scale = categories_scale([*shown, *rest], colours)
    maps = []
    for subject, (names, best) in found.items():
        places = np.array([shown.index(name) if name in shown else len(shown) for name in names], dtype=float)
        values = np.where(best < 0, np.nan, places[best])
        maps.append(Map(subject.name, "model", _shown(on_mesh(subject, values), mesh), scale))
    return maps


def colours(one: Map, mesh: Mesh) -> np.ndarray:
    """Colours of a map's points, (n_points, 3) uint8."""
    return colours_of(one.values, one.scale.palette, one.scale.low, one.scale.high, mesh)


def picture(one: Map, mesh: Mesh, width: int) -> str:
    """A map flat and inflated, as WebP in base64, on a clear ground."""
    file = io.BytesIO()
    drawn(colours(one, mesh), width).save(file, "WEBP", quality=65, alpha_quality=50, method=4)
    return base64.b64encode(file.getvalue()).decode()


def viewer_data(maps: Sequence[Map], mesh: Mesh) -> dict[str, str]:
    """What the viewer needs, each part compressed and in base64: its library, the mesh, and all maps.

    A map is a byte for each point: the number of its colour, and 255 where there is no value.
    """
    parts = viewer_mesh(mesh)
    sizes = {name: len(content) for name, content in parts.items()}
    return {
        "library": _packed(viewer_library()),
        "mesh": _packed(json.dumps(sizes).encode() + b"\n" + b"".join(parts.values())),
        "maps": _packed(json.dumps([_of_viewer(one) for one in maps]).encode()),
    }


def _of_viewer(one: Map) -> dict[str, Any]:
    scale = one.scale
    n_colours = min(len(scale.palette), 255)
    palette = scale.palette[np.linspace(0, len(scale.palette) - 1, n_colours).round().astype(int)]
    share = (np.nan_to_num(one.values, nan=scale.low) - scale.low) / max(scale.high - scale.low, 1e-12)
    numbers = np.where(np.isnan(one.values), 255, np.clip(np.round(share * (n_colours - 1)), 0, n_colours - 1))
    return {
        "title": one.title,
        "palette": np.round(255 * palette).astype(int).tolist(),
        "values": base64.b64encode(numbers.astype(np.uint8).tobytes()).decode(),
    }


def _packed(content: bytes) -> str:
    return base64.b64encode(compress(content, 9, mtime=0)).decode()


def drawn_share(subjects: Sequence[Subject]) -> float:
    """Share of the subjects' vertices that are on the mesh of the maps."""
    drawn = total = 0
    for subject in subjects:
        for mask in subject.fsaverage.values():
            assert mask is not None
            drawn += int(mask[:FSAVERAGE5_VERTICES].sum())
            total += int(mask.sum())
    return drawn / max(total, 1)


def by_subject(maps: Sequence[Map]) -> Iterator[tuple[str, list[Map]]]:
    """Maps of each subject together, in the order in which subjects first appear."""
    for subject in dict.fromkeys(one.subject for one in maps):
        yield subject, [one for one in maps if one.subject == subject]
