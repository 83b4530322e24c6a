"""Feature bank: one short row per image, with everything that a simulated response can depend on.

Four groups of channels, each on its own grid of cells over the image:

    early   oriented edges at two scales, contrast, luminance and colour, from the pixels of one cell and its rim
    mid     texture, corners, saturation, and whether there is an object, over larger cells
    late    amount of each category, in two variants, near the cell
    whole   statistics of the scene, one cell

A row has the groups in this order; within a group, channels vary slowest, then y, then x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from featcache.simulate.scenes import BACKGROUNDS, CATEGORIES, Scene, SceneObject

ANALYSIS_SIDE = 80  # pixels of the image as analysed; a multiple of the early and mid grids
SCALES = (0.8, 2.0)  # standard deviations of the blur before edges are taken, analysis pixels
ORIENTATIONS = tuple(np.pi * k / 4 for k in range(4))
BLUR_REACH = 3.0  # standard deviations after which a blur ends, so that a cell sees no further than its rim
RIM = 9  # analysis pixels around a cell that its channels can see, by blur, gradient and resizing


@dataclass(frozen=True)
class Group:
    """Channels on one grid of cells."""

    name: str
    grid: int  # cells per image side
    channels: tuple[str, ...]

    @property
    def n_cells(self) -> int:
        return self.grid**2

    @property
    def n_features(self) -> int:
        return len(self.channels) * self.n_cells


GROUPS: tuple[Group, ...] = (
    Group(
        "early",
        10,
        (
            *(f"edge-{scale}-{45 * k}" for scale in ("fine", "coarse") for k in range(4)),
            "contrast",
            "luminance",
            "red-green",
            "blue-yellow",
        ),
    ),
    Group("mid", 5, ("texture", "anisotropy", "corner", "saturation", "fineness", "object", "animate")),
    Group("late", 4, tuple(f"{category}-{variant}" for category in CATEGORIES for variant in range(2))),
    Group(
        "whole",
        1,
        (
            "mean-luminance",
            "sd-luminance",
            "mean-saturation",
            "mean-red-green",
            "mean-blue-yellow",
            "fine-edges",
            "coarse-edges",
            "verticality",
            "clutter",
            "openness",
            "interior",
            "roughness",
        ),
    ),
)
CHANNELS: tuple[str, ...] = tuple(f"{group.name}/{channel}" for group in GROUPS for channel in group.channels)
N_CHANNELS = len(CHANNELS)
N_FEATURES = sum(group.n_features for group in GROUPS)


def encode(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Row of the feature bank for one image.

    Parameters
    ----------
    image : (n_pixels, n_pixels, 3) uint8
    scene : scene of the image; only channels of objects and categories, and some of the group 'whole', use it

    Returns
    -------
    features : (N_FEATURES,) float16, about -1 to 10. Responses are computed from these rounded values, so a
        stored row reproduces them exactly.
    """
    maps = _pixel_maps(image)
    parts = (_early(maps), _mid(maps, scene), _late(scene), _whole(maps, scene))
    return np.concatenate([part.ravel() for part in parts]).astype(np.float16)


def group_slices() -> tuple[tuple[Group, slice, slice], ...]:
    """(group, its slice of the channels, its slice of a row) for every group."""
    slices, channel, feature = [], 0, 0
    for group in GROUPS:
        next_channel, next_feature = channel + len(group.channels), feature + group.n_features
        slices.append((group, slice(channel, next_channel), slice(feature, next_feature)))
        channel, feature = next_channel, next_feature
    return tuple(slices)


def cell_centres(grid: int) -> np.ndarray:
    """Centres (x, y) of a grid's cells as fractions of the image side: (grid * grid, 2), x fastest."""
    centres = (np.arange(grid) + 0.5) / grid
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def channel_scales(features: np.ndarray) -> np.ndarray:
    """Standard deviation of every channel over images and cells: (N_CHANNELS,) float64, never 0.

    features : (n_images, N_FEATURES)
    """
    scales = np.empty(N_CHANNELS)
    for group, channels, columns in group_slices():
        values = features[:, columns].astype(np.float64).reshape(len(features), len(group.channels), -1)
        scales[channels] = values.std(axis=(0, 2))
    return np.where(scales > 0, scales, 1.0)


# ------------------------------------------------------------------------------------- pixels, per analysis pixel


def _pixel_maps(image: np.ndarray) -> dict[str, np.ndarray]:
    """{name: (ANALYSIS_SIDE, ANALYSIS_SIDE)}, where a value follows from the pixels around it."""
    small = Image.fromarray(image).resize((ANALYSIS_SIDE, ANALYSIS_SIDE), Image.Resampling.BOX)
    red, green, blue = np.moveaxis(np.asarray(small, dtype=np.float32) / 255, -1, 0)
    luminance = (red + green + blue) / 3
    maps = {
        "luminance": luminance,
        "red-green": red - green,
        "blue-yellow": blue - (red + green) / 2,
        "saturation": np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue),
    }
    for scale, sigma in zip(("fine", "coarse"), SCALES, strict=True):
        maps |= _edge_maps(luminance, scale, sigma)
    return maps


def _edge_maps(luminance: np.ndarray, scale: str, sigma: float) -> dict[str, np.ndarray]:
    blurred = ndimage.gaussian_filter(luminance, sigma, truncate=BLUR_REACH)
    gy, gx = np.gradient(blurred)
    energy = gx**2 + gy**2
    maps = {
        f"edge-{scale}-{45 * k}": np.abs(np.cos(angle) * gx + np.sin(angle) * gy)
        for k, angle in enumerate(ORIENTATIONS)
    }
    return maps | {f"energy-{scale}": energy, f"gx-{scale}": gx, f"gy-{scale}": gy}


def _pool(values: np.ndarray, grid: int) -> np.ndarray:
    """Mean over every cell: (ANALYSIS_SIDE, ANALYSIS_SIDE) -> (grid, grid)."""
    side = ANALYSIS_SIDE // grid
    return np.asarray(values.reshape(grid, side, grid, side).mean(axis=(1, 3)))


def _spread(values: np.ndarray, grid: int) -> np.ndarray:
    """Standard deviation within every cell: (ANALYSIS_SIDE, ANALYSIS_SIDE) -> (grid, grid)."""
    return np.asarray(np.sqrt(np.maximum(_pool(values**2, grid) - _pool(values, grid) ** 2, 0)))


# -------------------------------------------------------------------------------------------------- the four groups


def _early(maps: dict[str, np.ndarray]) -> np.ndarray:
    grid = GROUPS[0].grid
    edges = [np.sqrt(10 * _pool(maps[name], grid)) for name in GROUPS[0].channels[:8]]
    rest = [_pool(maps[name], grid) for name in ("luminance", "red-green", "blue-yellow")]
    return np.stack([*edges, _spread(maps["luminance"], grid), *rest])


def _mid(maps: dict[str, np.ndarray], scene: Scene) -> np.ndarray:
    grid = GROUPS[1].grid
    xx, yy = _pool(maps["gx-coarse"] ** 2, grid), _pool(maps["gy-coarse"] ** 2, grid)
    xy = _pool(maps["gx-coarse"] * maps["gy-coarse"], grid)
    # Eigenvalues of the cell's structure tensor, mean + gap and mean - gap: both are large at corners and curves, only
    # the first at a straight edge.
    mean, gap = (xx + yy) / 2, np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    fine, coarse = _pool(maps["energy-fine"], grid), _pool(maps["energy-coarse"], grid)
    animate = [thing for thing in scene.objects if thing.category in ("face", "body")]
    return np.stack(
        [
            np.sqrt(10 * _spread(np.sqrt(maps["energy-fine"]), grid)),
            gap / (mean + 1e-5),
            np.sqrt(10 * np.sqrt(np.maximum(mean - gap, 0))),
            _pool(maps["saturation"], grid),
            np.log2((fine + 1e-4) / (coarse + 1e-4)),
            _coverage(scene.objects, grid),
            _coverage(animate, grid),
        ]
    )


def _late(scene: Scene) -> np.ndarray:
    """Mass of every object, divided among the cells near it, in the channel of its category and variant."""
    group = GROUPS[2]
    near = _proximity(scene.objects, group.grid)
    maps = np.zeros((len(group.channels), group.grid, group.grid))
    for thing, cells in zip(scene.objects, near / near.sum(axis=(1, 2), keepdims=True), strict=True):
        maps[group.channels.index(f"{thing.category}-{thing.variant}")] += thing.mass * cells
    return maps


def _whole(maps: dict[str, np.ndarray], scene: Scene) -> np.ndarray:
    luminance = maps["luminance"]
    upright, level = maps["edge-coarse-0"].mean(), maps["edge-coarse-90"].mean()
    return np.array(
        [
            luminance.mean(),
            luminance.std(),
            maps["saturation"].mean(),
            maps["red-green"].mean(),
            maps["blue-yellow"].mean(),
            np.sqrt(10 * np.sqrt(maps["energy-fine"]).mean()),
            np.sqrt(10 * np.sqrt(maps["energy-coarse"]).mean()),
            (upright - level) / (upright + level + 1e-5),
            len(scene.objects) / 5,
            scene.background == BACKGROUNDS[1],
            scene.background == BACKGROUNDS[2],
            scene.roughness,
        ]
    )


def _proximity(things: Sequence[SceneObject], grid: int) -> np.ndarray:
    """Gaussian of the distance from each object to each cell, as wide as the object: (n_objects, grid, grid)."""
    centres = np.array([(thing.x, thing.y) for thing in things]).reshape(-1, 1, 2)
    widths = np.array([thing.size / 2 for thing in things]).reshape(-1, 1)
    squared = ((cell_centres(grid)[None] - centres) ** 2).sum(axis=-1)
    return np.asarray(np.exp(-squared / (2 * widths**2)).reshape(-1, grid, grid))


def _coverage(things: Sequence[SceneObject], grid: int) -> np.ndarray:
    return np.asarray(_proximity(things, grid).sum(axis=0))
