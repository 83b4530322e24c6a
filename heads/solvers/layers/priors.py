"""Where in the image and in which layers a vertex may have its weights, before any response is seen.

A prior gives every place of every layer a share of the penalised weights' variance: ridge regression under it is
banded ridge with a band per place. Which part of the image a vertex responds to is unknown, so there is a set of priors
to choose from: Gaussian windows over the image, and the full image, each with equal layers or a preferred depth.

The image here is what the network sees, which `--fit crop` cuts and `--fit pad` frames: windows span it whatever part
of the picture it is. They are neither stored nor shown; maps are in coordinates of the picture (heads/maps).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

CENTRES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of windows, as parts of the side of what the network sees
WIDTHS = (0.16, 0.08)  # standard deviations of windows, likewise
NARROW_IMAGES = 1000  # training images from which the second width is worth its time (docs/decisions/0014)
DEPTHS: tuple[float | None, ...] = (None, 0.0, 0.5, 1.0)  # preferred depths, if there are several layers
DEPTH_WIDTH = 0.25  # standard deviation of the preference for a depth, as a share of the network's depth


@dataclass(frozen=True)
class Prior:
    """A window over the image and a preferred depth.

    x, y, width : centre and standard deviation, as parts of the side of what the network sees, from its left and top
    depth : of the preferred layer, 0 the first and 1 the last; None: all layers alike
    """

    x: float = 0.5
    y: float = 0.5
    width: float = math.inf
    depth: float | None = None

    def window(self, grid: tuple[int, int]) -> np.ndarray:
        """(height * width,) share of each place, 1 at the centre of the window."""
        rows, columns = ((np.arange(n) + 0.5) / n for n in grid)
        squared = (rows[:, None] - self.y) ** 2 + (columns[None] - self.x) ** 2
        return np.exp(-squared / (2 * self.width**2)).ravel()

    def layer(self, depth: float) -> float:
        """Share of a layer at this depth, in [0, 1]."""
        return 1.0 if self.depth is None else math.exp(-((depth - self.depth) ** 2) / (2 * DEPTH_WIDTH**2))


def prior_set(grids: Mapping[str, tuple[int, int]], depths: Sequence[float | None], n_images: int = 0) -> list[Prior]:
    """Every window with every preferred depth; only one window if no layer has several places."""
    windows = [Prior()]
    if any(math.prod(grid) > 1 for grid in grids.values()):
        widths = WIDTHS if n_images >= NARROW_IMAGES else WIDTHS[:1]
        windows += [Prior(x, y, width) for width in widths for y in CENTRES for x in CENTRES]
    return [replace(window, depth=depth) for window in windows for depth in depths]


def depths_of(layers: Sequence[str]) -> dict[str, float]:
    """{array: depth in [0, 1]} of arrays in the network's order; pooled features have depth 1."""
    order = list(dict.fromkeys(name.removesuffix(".cls") for name in layers if name != "pooled"))
    last = max(len(order) - 1, 1)
    return {name: 1.0 if name == "pooled" else order.index(name.removesuffix(".cls")) / last for name in layers}
