"""Where in the image, and in which layers, fitted heads look: from their weights, for each vertex.

A map has the size of a vertex's weights at each place of a layer, on channels of unit variance; a layer's share is the
size of all its weights. Both are of weights, not of variance explained: layers and places that resemble each other
share them. Places are those of a layer's grid, which spans what the network sees; fields are in coordinates of the
image.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from featcache.backbone.extent import WHOLE, Extent
from featcache.cache.store import open_store
from featcache.workdir import Workdir
from heads.blend.models import Model
from heads.features.rows import LayerRows
from heads.modules.readout import InFile, by_head
from heads.modules.saved import tensors_under
from heads.modules.spatial import readout_of

_SIDE = 7  # places a side of the grid on which the maps of layers are put together


@dataclass(frozen=True)
class VertexMaps:
    """One surface's maps.

    places : {layer: (n_vertices, height, width)}, which sum to 1 for each vertex
    shares : (n_vertices, n_layers) of each array in the order of `layers`, which sum to 1
    extent : the part of the image that the places span
    """

    layers: tuple[str, ...]
    places: dict[str, np.ndarray]
    shares: np.ndarray
    extent: Extent = WHOLE

    def together(self) -> np.ndarray:
        """The maps of all layers weighed by their shares, on one grid: (n_vertices, side, side), which sum to 1."""
        total = np.zeros((len(self.shares), _SIDE, _SIDE))
        for name, maps in self.places.items():
            # sizes are squared: what is left of a penalised weight everywhere else would pull every centre inwards
            squares = torch.from_numpy(np.square(maps, dtype=np.float32))[:, None]
            even = functional.interpolate(squares, (_SIDE, _SIDE), mode="bilinear", antialias=True)[:, 0].numpy()
            total += even * self.shares[:, [self.layers.index(name)], None] / (even.sum((1, 2), keepdims=True) + 1e-30)
        return np.asarray(total / (total.sum((1, 2), keepdims=True) + 1e-30))

    def fields(self) -> np.ndarray:
        """(n_vertices, 3): x and y of the centre, from the left and the top, and the standard deviation about it.

        x is a part of the image's width and y of its height; the deviation is the root mean square of those in x and y.
        """
        weights = self.together().reshape(len(self.shares), -1)
        at, extent = (np.arange(_SIDE) + 0.5) / _SIDE, self.extent
        rows, columns = extent.top + extent.height * at, extent.left + extent.width * at
        y, x = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
        centre_x, centre_y = weights @ x, weights @ y
        squared = (x - centre_x[:, None]) ** 2 + (y - centre_y[:, None]) ** 2
        return np.stack([centre_x, centre_y, np.sqrt((weights * squared).sum(1) / 2)], 1)


Tensors = Mapping[str, torch.Tensor]


def read_maps(model: Model, work: Path, extent: Extent = WHOLE) -> dict[str, VertexMaps] | None:
    """{surface: maps} of a model's heads; None where they read no places, or their weights were not kept.

    extent : the part of the image that the network saw

    Raises StoreError for a file of weights that is missing, damaged or of other heads.
    """
    features = [open_store(Workdir(work).features / name) for name in model.facts.features.split("+")]
    arrays = tuple(model.key.features.get("read") or features[0].arrays)
    rows = [LayerRows(store, arrays, "cpu", 0) for store in features]
    if all(np.prod(grid) == 1 for grid in rows[0].grids.values()):
        return None
    maps = {}
    for surface, heads in groupby(_heads(model, work), key=itemgetter(0)):
        # where folds have features of their own, the heads of a fold read those of that fold
        sizes = [
            _sizes(tensors, rows[number if len(rows) > 1 else 0], model.store.n_train)
            for number, (_, tensors) in enumerate(heads)
        ]
        if sizes[0]:
            summed = {name: torch.stack([of[name] for of in sizes]).sum(0) for name in sizes[0]}
            maps[surface] = _maps(summed, rows[0], extent)
    return maps or None


def _heads(model: Model, work: Path) -> Iterator[tuple[str, Tensors]]:
    """(surface, {part: tensor}) of each head, surface by surface and fold by fold. One at a time is in memory."""
    file = InFile(Workdir(work).head_weights(model.store.name), model.store.name)
    for (surface, _), names in by_head(file.names(), tuple(model.store.arrays)).items():
        yield surface, {part: file.read(name) for part, name in names.items()}


def _sizes(head: Tensors, rows: LayerRows, n_train: int) -> dict[str, torch.Tensor]:
    """{array: (n_vertices, n_places)} sizes of one head's weights; {} where they are not of arrays."""
    return _of_readout(head, rows) if "head.0.bias" in head else _of_weights(head, rows, n_train)


def _of_weights(head: Tensors, rows: LayerRows, n_train: int) -> dict[str, torch.Tensor]:
    """Sizes of weights on the features as they are stored."""
    sizes = {}
    for name in rows.grids:
        if (weights := head.get(f"{name}.weights")) is None:
            return {}
        _, variance = rows.mean_and_variance(name, np.arange(n_train))
        on_places = weights.reshape(rows.n_places(name), rows.channels[name], -1)
        sizes[name] = (on_places.square() * variance[:, None]).sum(1).sqrt().T
    return sizes


def _of_readout(head: Tensors, rows: LayerRows) -> dict[str, torch.Tensor]:
    """Sizes of a spatial head. Vertices that are linear in a space have those of its outputs, by their weights."""
    readout = readout_of(rows.shapes, tensors_under(head, "head.0."))
    n_outputs = readout.n_outputs
    places, shares = readout.maps()
    sizes = {
        name: shares[:, [k]]
        * (functional.normalize(places[name].flatten(1), dim=1) if name in places else torch.ones(n_outputs, 1))
        for k, name in enumerate(rows.grids)
    }
    if "head.1.weight" in head:
        sizes = {name: head["head.1.weight"].abs() @ size for name, size in sizes.items()}
    return sizes


def _maps(sizes: Tensors, rows: LayerRows, extent: Extent) -> VertexMaps:
    """Maps and shares, from sizes of weights at each place."""
    whole = torch.stack([size.square().sum(1).sqrt() for size in sizes.values()], 1)
    places = {
        name: functional.normalize(size, p=1, dim=1).reshape(-1, *rows.grids[name]).numpy()
        for name, size in sizes.items()
        if size.shape[1] > 1
    }
    return VertexMaps(tuple(sizes), places, functional.normalize(whole, p=1, dim=1).numpy(), extent)
