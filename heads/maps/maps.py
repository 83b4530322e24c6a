"""What fitted heads look at: where in the image and in which layers, per vertex and per ROI.

A map has the size of a vertex's weights at each place of a layer, on channels of unit variance; a layer's share is the
size of all its weights. Both are of weights, not of variance explained: layers and places that resemble each other
share them.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from featcache.backbone.weights import first_line
from featcache.cache.store import Store, open_store
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Subject
from featcache.errors import StoreError
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.blend.models import chosen
from heads.features.rows import LayerRows
from heads.features.sets import subject_stores
from heads.fit.run import score
from heads.modules.spatial import SpatialReadout
from heads.solvers.layers.priors import depths_of

FOLDER = "maps"
_SIDE = 7  # places a side of the grid on which the maps of layers are put together
_LEAST_CEILING = 0.2  # of the vertices that recovery is judged by: fraction of variance that is signal


@dataclass(frozen=True)
class VertexMaps:
    """One hemisphere's maps.

    places : {layer: (n_vertices, height, width)}, which sum to 1 for each vertex
    shares : (n_vertices, n_layers) of each array in the order of `layers`, which sum to 1
    """

    layers: tuple[str, ...]
    places: dict[str, np.ndarray]
    shares: np.ndarray

    def together(self) -> np.ndarray:
        """(n_vertices, side, side): the maps of all layers, weighed by their shares, on one grid; they sum to 1."""
        total = np.zeros((len(self.shares), _SIDE, _SIDE))
        for name, maps in self.places.items():
            # sizes are squared: what is left of a penalised weight everywhere else would pull every centre inwards
            squares = torch.from_numpy(np.square(maps, dtype=np.float32))[:, None]
            even = functional.interpolate(squares, (_SIDE, _SIDE), mode="bilinear", antialias=True)[:, 0].numpy()
            total += even * self.shares[:, [self.layers.index(name)], None] / (even.sum((1, 2), keepdims=True) + 1e-30)
        return total / (total.sum((1, 2), keepdims=True) + 1e-30)

    def fields(self) -> np.ndarray:
        """(n_vertices, 3): x and y of the centre, and the standard deviation about it, as parts of the image's side."""
        weights = self.together().reshape(len(self.shares), -1)
        at = (np.arange(_SIDE) + 0.5) / _SIDE
        y, x = (axis.ravel() for axis in np.meshgrid(at, at, indexing="ij"))
        centre_x, centre_y = weights @ x, weights @ y
        squared = (x - centre_x[:, None]) ** 2 + (y - centre_y[:, None]) ** 2
        return np.stack([centre_x, centre_y, np.sqrt((weights * squared).sum(1) / 2)], 1)

    def depth(self) -> np.ndarray:
        """(n_vertices,) mean depth of the layers, 0 the first and 1 the last, by their shares."""
        depths = depths_of(self.layers)
        return self.shares @ np.array([depths[name] for name in self.layers])


def read_maps(store: Store, work: Path) -> dict[str, VertexMaps] | None:
    """{hemisphere: maps} of a model's heads; None where they read no places, or their weights were not kept.

    Raises StoreError for a file of weights that is missing, damaged or of other heads.
    """
    features = [open_store(Workdir(work).features / name) for name in store.facts["features"].split("+")]
    arrays = tuple(store.key["features"].get("read") or features[0].arrays)
    rows = [LayerRows(one, arrays, "cpu", 0) for one in features]
    if all(np.prod(grid) == 1 for grid in rows[0].grids.values()):
        return None
    path = Workdir(work).head_weights(store.name)
    try:
        with safe_open(path, "pt") as file:
            of = (file.metadata() or {}).get("predictions", store.name)
            if of != store.name:
                raise _unreadable(path, f"those of {of}")
            return _maps_of(file, rows, store)
    except FileNotFoundError as error:
        raise _unreadable(path, "no such file", "run 'fit-heads' again") from error
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, f"a damaged file ({first_line(error)})") from error


def _unreadable(path: Path, found: str, to_do: str = "delete it and run 'fit-heads' again") -> StoreError:
    return StoreError(path, expected=f"the weights that made {path.stem}", found=found, remedy=str(to_do))


def _maps_of(file: Any, rows: Sequence[LayerRows], store: Store) -> dict[str, VertexMaps] | None:
    names = set(file.keys())
    found = {}
    for hemisphere in HEMISPHERES:
        prefixes = sorted({name.split(f"{hemisphere}.")[0] for name in names if f"{hemisphere}." in name}, key=_fold)
        sizes = []
        for k, prefix in enumerate(prefixes):
            own = {
                name.removeprefix(f"{prefix}{hemisphere}."): file.get_tensor(name)
                for name in names
                if name.startswith(f"{prefix}{hemisphere}.")
            }
            own_rows = rows[k if len(rows) > 1 else 0]
            sizes.append(_of_readout(own, own_rows) if "head.0.bias" in own else _of_weights(own, own_rows, store))
        if not sizes or not sizes[0]:
            return None
        added_up = {name: torch.stack([one[name] for one in sizes]).sum(0) for name in sizes[0]}
        found[hemisphere] = _maps(added_up, rows[0])
    return found


def _fold(prefix: str) -> int:
    """'fold10.' -> 10, and 0 where folds share one set of weights."""
    return int(prefix.removeprefix("fold").rstrip(".") or 0)


def _of_weights(own: dict[str, torch.Tensor], rows: LayerRows, store: Store) -> dict[str, torch.Tensor]:
    """{array: (n_vertices, n_places)} sizes of weights on the features as they are stored."""
    sizes = {}
    for name in rows.grids:
        if (weights := own.get(f"{name}.weights")) is None:
            return {}
        _, variance = rows.mean_and_variance(name, store.n_train)
        on_places = weights.reshape(rows.n_places(name), rows.channels[name], -1)
        sizes[name] = (on_places.square() * variance[:, None]).sum(1).sqrt().T
    return sizes


def _of_readout(own: dict[str, torch.Tensor], rows: LayerRows) -> dict[str, torch.Tensor]:
    """The same of spatial heads; vertices that are linear in a space have what its outputs have, by their weights."""
    state = {key.removeprefix("head."): value for key, value in own.items()}
    n_outputs = len(state["0.bias"])
    rank = next((value.shape[1] for key, value in state.items() if key.endswith(".spatial")), 1)
    readout = SpatialReadout(rows.shapes, n_outputs, rank)
    readout.load_state_dict({key[2:]: value for key, value in state.items() if key.startswith("0.")})
    places, shares = readout.maps()
    sizes = {
        name: shares[:, [k]]
        * (functional.normalize(places[name].flatten(1), dim=1) if name in places else torch.ones(n_outputs, 1))
        for k, name in enumerate(rows.grids)
    }
    if "1.weight" in state:
        sizes = {name: state["1.weight"].abs() @ size for name, size in sizes.items()}
    return sizes


def _maps(sizes: dict[str, torch.Tensor], rows: LayerRows) -> VertexMaps:
    whole = torch.stack([size.square().sum(1).sqrt() for size in sizes.values()], 1)
    places = {
        name: functional.normalize(size, p=1, dim=1).reshape(-1, *rows.grids[name]).numpy()
        for name, size in sizes.items()
        if size.shape[1] > 1
    }
    return VertexMaps(tuple(sizes), places, functional.normalize(whole, p=1, dim=1).numpy())


@dataclass(frozen=True)
class RoiMaps:
    """Means over the vertices of an ROI, each weighed by its squared out-of-fold r, for noise has maps too.

    field : x, y and size as in `VertexMaps.fields`
    """

    roi: str
    n_vertices: int
    shares: dict[str, float]
    places: dict[str, np.ndarray]
    field: tuple[float, float, float]


def export_maps(subjects: Sequence[Subject], pattern: str, work: Path) -> tuple[list[Path], list[dict[str, float]]]:
    """Write maps of every model whose name matches: per vertex (.npz), per ROI (.csv) and plotted (.png).

    Also gives, for each, how well they agree with what was planted, where the tree says. Raises ConfigError where no
    model matches.
    """
    written, recovered = [], []
    for subject, store in _models(subjects, pattern, work):
        maps = read_maps(store, work)
        if maps is None:
            say(f"{subject.name}: left out {store.facts['model']}: no weights on places are kept of it")
            continue
        (work / FOLDER).mkdir(parents=True, exist_ok=True)
        path = work / FOLDER / store.name
        rois = list(_roi_means(subject, store, maps))
        _write_vertices(path.with_name(f"{path.name}.npz"), maps)
        written.append(path.with_name(f"{path.name}.npz"))
        if not rois:
            say(f"{subject.name}: no means over ROIs of {store.facts['model']}: it predicts no vertex")
            continue
        _write_table(path.with_name(f"{path.name}.csv"), rois)
        written.append(path.with_name(f"{path.name}.csv"))
        if find_spec("matplotlib") is None:
            say("no pictures: they need matplotlib, of the plot extra")
        else:
            _plot(path.with_name(f"{path.name}.png"), rois, f"{subject.name}, {store.facts['model']}")
            written.append(path.with_name(f"{path.name}.png"))
        if found := recovery(subject, maps):
            recovered.append(found)
    return written, recovered


def _models(subjects: Sequence[Subject], pattern: str, work: Path) -> Iterator[tuple[Subject, Store]]:
    pairs = [
        (subject, store)
        for subject in subjects
        for store in subject_stores(subject, Workdir(work).predictions, "fit-heads")
    ]
    if not pairs:
        raise StoreError(
            Workdir(work).predictions, expected="fitted heads", found="none", remedy="run 'fit-heads' first"
        )
    wanted = chosen(list(dict.fromkeys(store.facts["model"] for _, store in pairs)), pattern)
    yield from ((subject, store) for subject, store in pairs if store.facts["model"] in wanted)


def _roi_means(subject: Subject, store: Store, maps: dict[str, VertexMaps]) -> Iterator[RoiMaps]:
    """Of both hemispheres together; all vertices first."""
    r = {h: np.nan_to_num(np.maximum(score(subject, h, store).r, 0)) ** 2 for h in HEMISPHERES}
    names = dict.fromkeys(roi for h in HEMISPHERES for roi, mask in subject.rois[h].items() if mask.any())
    fields = {h: maps[h].fields() for h in HEMISPHERES}
    for roi in ("all", *names):
        weights = {h: r[h] * (1 if roi == "all" else subject.rois[h].get(roi, np.zeros(len(r[h])))) for h in r}
        total = sum(one.sum() for one in weights.values())
        if not total:
            continue
        first = maps[HEMISPHERES[0]]
        shares = sum(weights[h] @ maps[h].shares for h in HEMISPHERES) / total
        places = {
            name: sum(np.tensordot(weights[h], maps[h].places[name], 1) for h in HEMISPHERES) / total
            for name in first.places
        }
        field = sum(weights[h] @ fields[h] for h in HEMISPHERES) / total
        n_vertices = int(sum((one > 0).sum() for one in weights.values()))
        x, y, size = (float(value) for value in field)
        yield RoiMaps(roi, n_vertices, dict(zip(first.layers, shares.tolist(), strict=True)), places, (x, y, size))


def _write_vertices(path: Path, maps: dict[str, VertexMaps]) -> None:
    arrays: dict[str, Any] = {"layers": np.array(maps[HEMISPHERES[0]].layers)}
    for hemisphere, own in maps.items():
        arrays |= {f"{hemisphere}/{name}": values for name, values in own.places.items()}
        arrays |= {f"{hemisphere}/layer_shares": own.shares, f"{hemisphere}/fields": own.fields()}
    np.savez_compressed(path, **arrays)


def _write_table(path: Path, rois: Sequence[RoiMaps]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["roi", "vertices", *(f"share {name}" for name in rois[0].shares), "x", "y", "size"])
        for one in rois:
            numbers = [f"{value:.4f}" for value in (*one.shares.values(), *one.field)]
            table.writerow([one.roi, one.n_vertices, *numbers])


def _plot(path: Path, rois: Sequence[RoiMaps], title: str) -> None:
    """A row for each ROI: its mean map of each layer, and the layers' shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = list(rois[0].places)
    figure = Figure(figsize=(1.3 * (len(layers) + 2), 1.15 * len(rois) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(len(rois), len(layers) + 1, squeeze=False, width_ratios=[1] * len(layers) + [2])
    for axis, name in zip(axes[0], layers, strict=False):
        axis.set_title(name, fontsize=7)
    for row, one in zip(axes, rois, strict=True):
        for axis, name in zip(row, layers, strict=False):
            axis.imshow(one.places[name], cmap="magma", vmin=0)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(one.roi, fontsize=7)
        row[-1].bar(range(len(one.shares)), list(one.shares.values()), color="0.4")
        row[-1].set(xticks=[], yticks=[], ylim=(0, max(one.shares.values()) * 1.05))
    axes[-1][-1].set_xticks(range(len(rois[0].shares)), list(rois[0].shares), rotation=90, fontsize=6)
    axes[0][-1].set_title("share of each layer", fontsize=7)
    figure.savefig(path, dpi=110)


def recovery(subject: Subject, maps: dict[str, VertexMaps]) -> dict[str, float]:
    """How well maps agree with what was planted in a simulated tree; nothing where there is no truth.

    x, y, size : correlation over vertices of early and middle areas with the planted centre and size of their fields
    level : correlation of the ranks of the mean depth of layers and of the level, early, mid or late
    """
    parts = []
    for hemisphere in HEMISPHERES:
        path = subject.folder.parent / "truth" / subject.name / f"{hemisphere}.npz"
        if not path.is_file():
            return {}
        truth = np.load(path)
        level = np.array([_LEVELS.get(str(one), -1) for one in truth["level"]])
        planted = np.stack([truth["field_x"], truth["field_y"], truth["field_size"], level], 1)
        found = np.concatenate([maps[hemisphere].fields(), maps[hemisphere].depth()[:, None]], 1)
        parts.append(np.stack([planted, found])[:, truth["ceiling"] >= _LEAST_CEILING])
    planted, found = np.concatenate(parts, 1)
    local, ordered = (planted[:, 3] >= 0) & (planted[:, 3] <= 1), planted[:, 3] >= 0
    if local.sum() < 3 or ordered.sum() < 3:
        return {}
    names = ("x", "y", "size")
    numbers = {name: float(np.corrcoef(planted[local, k], found[local, k])[0, 1]) for k, name in enumerate(names)}
    if np.ptp(found[ordered, 3]) == 0:  # heads that read one layer say nothing of levels
        return numbers
    return numbers | {"level": _rank_correlation(planted[ordered, 3], found[ordered, 3])}


_LEVELS = {"early": 0, "mid": 1, "late": 2}


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)
