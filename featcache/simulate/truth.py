"""Weights and noise ceilings of every vertex, and the responses that follow from them.

    signal   = features @ weight_matrix.T - offset      mean 0, variance 1 over the reference images
    response = sqrt(NC) signal + sqrt(1 - NC) noise     noise standard normal, so var(signal part) / var(response) = NC

The responses of a dead vertex are always 0. The squared correlation of a response with its own signal is NC on average,
up to 1 / n_images. So the written noise ceiling NC is what the best possible model reaches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse, special

from featcache.dataset.rois import HEMISPHERES
from featcache.simulate.anatomy import AREAS, FIELD_REACH, LEVELS, Vertices, all_vertices, kept
from featcache.simulate.config import SimulateConfig, blocks, generator
from featcache.simulate.features import CHANNELS, N_CHANNELS, N_FEATURES, Group, cell_centres, group_slices

ROWS_PER_BLOCK = 256  # images per random stream of the noise; another number would change the responses of a seed
VERTICES_PER_BLOCK = 1024  # vertices whose weights are built at once, which bounds the memory

# Noise ceilings by subject: two parameters of a beta distribution, its upper end (fraction of variance), and the
# share of vertices at exactly zero. Their means are 0.19 to 0.42, as in the challenge's recordings.
CEILINGS: tuple[tuple[float, float, float, float], ...] = (
    (2.12, 2.68, 0.87, 0.0010),
    (1.50, 1.71, 0.85, 0.0025),
    (1.79, 3.23, 0.77, 0.0056),
    (1.53, 3.41, 0.82, 0.0126),
    (2.44, 2.80, 0.91, 0.0016),
    (2.15, 3.47, 0.76, 0.0034),
    (1.89, 3.59, 0.79, 0.0011),
    (1.31, 3.81, 0.75, 0.0226),
)
CEILING_AGREEMENT = 0.25  # correlation of the ceilings of two subjects over vertices
WEIGHT_AGREEMENT = 0.7  # correlation of the random part of two subjects' weights

# Weights before scaling, by level and channel group: (mean, standard deviation).
LEVEL_WEIGHTS: dict[str, dict[str, tuple[float, float]]] = {
    "early": {"early": (0.15, 1.0)},
    "mid": {"early": (0.0, 0.25), "mid": (0.1, 0.8)},
    "late": {"mid": (0.0, 0.05), "late": (0.1, 0.35), "whole": (0.0, 0.12)},
    "mixed": {"early": (0.0, 0.4), "mid": (0.0, 0.4), "late": (0.0, 0.4), "whole": (0.0, 0.2)},
}
PREFERENCE = 1.5  # added to the weights of the category that a functional-localiser (floc) area prefers
PREFERRED = {"floc-faces": "face", "floc-bodies": "body", "floc-places": "place", "floc-words": "word"}


@dataclass(frozen=True)
class Planted:
    """Truth of one hemisphere of one subject. Arrays are (n_vertices, ...), in the order of the response columns."""

    vertices: Vertices
    weights: np.ndarray  # (n_vertices, N_CHANNELS) float32, per unit of each channel
    offset: np.ndarray  # (n_vertices,) float32, subtracted from the weighted sum
    ceiling: np.ndarray  # (n_vertices,) float32, fraction of variance in [0, 1], 0 where there is no signal
    dead: np.ndarray  # (n_vertices,) bool, constantly 0

    def matrix(self) -> sparse.csr_matrix:
        """Weights, (n_vertices, N_FEATURES) float32: those of the channels, spread over the cells of the field."""
        return weight_matrix(self.vertices, self.weights)

    def signals(self, features: np.ndarray) -> np.ndarray:
        """Signals without noise, (n_images, n_vertices) float32, mean 0 and variance 1 over the reference images.

        features : (n_images, N_FEATURES)
        """
        return np.asarray(np.ascontiguousarray(_product(self.matrix(), features).T) - self.offset)


def plant(config: SimulateConfig, subject: int, hemisphere: str, reference: np.ndarray, scales: np.ndarray) -> Planted:
    """Truth of one hemisphere of one subject, drawn from the seed.

    reference : (n_reference, N_FEATURES), features of the reference images, over which signals are standardised
    scales : (N_CHANNELS,), standard deviations of the channels; weights are drawn for channels divided by these
    """
    common = all_vertices(config, hemisphere)
    mask = kept(config, subject, hemisphere)
    ceiling, dead = _ceilings(config, subject, hemisphere)
    weights = (_weights(config, subject, hemisphere, common) / scales)[mask].astype(np.float32)
    vertices = common.select(mask)
    mean, deviation = _moments(vertices, weights, reference)
    return Planted(
        vertices=vertices,
        weights=(weights / deviation[:, None]).astype(np.float32),
        offset=(mean / deviation).astype(np.float32),
        ceiling=ceiling[mask],
        dead=dead[mask],
    )


def weight_matrix(vertices: Vertices, weights: np.ndarray) -> sparse.csr_matrix:
    """Weights of channels, (n_vertices, N_CHANNELS), as a sparse matrix, (n_vertices, N_FEATURES) float32."""
    parts = [_dense_rows(vertices, weights, rows) for rows in blocks(len(vertices), VERTICES_PER_BLOCK)]
    return sparse.csr_matrix(sparse.vstack(parts, format="csr"))


def response_blocks(
    config: SimulateConfig, planted: Planted, subject: int, hemisphere: str, split: str, features: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(slice of rows, sqrt(NC) signal, response) for blocks of images; the arrays are (n_rows, n_vertices) float32.

    split : "train" or "test"; each has noise of its own
    features : (n_images, N_FEATURES), may be a memory map
    """
    matrix, side = planted.matrix(), HEMISPHERES.index(hemisphere)
    noise_level = np.sqrt(1 - planted.ceiling) * ~planted.dead
    for block, rows in enumerate(blocks(len(features), ROWS_PER_BLOCK)):
        signal = (_product(matrix, features[rows]).T - planted.offset) * np.sqrt(planted.ceiling)
        rng = generator(config.seed, f"{split} noise", subject, side, block)
        noise = rng.standard_normal(signal.shape, dtype=np.float32)
        yield rows, signal, signal + noise_level * noise


# -------------------------------------------------------------------------------------------------- weights


def _weights(config: SimulateConfig, subject: int, hemisphere: str, vertices: Vertices) -> np.ndarray:
    """Weights of channels at standard deviation 1, (n_vertices, N_CHANNELS): one part shared by subjects, one not."""
    side, shape = HEMISPHERES.index(hemisphere), (len(vertices), N_CHANNELS)
    shared = generator(config.seed, "shared weights", side).standard_normal(shape)
    of_subject = generator(config.seed, "own weights", subject, side).standard_normal(shape)
    drawn = np.sqrt(WEIGHT_AGREEMENT) * shared + np.sqrt(1 - WEIGHT_AGREEMENT) * of_subject
    mean, deviation = (np.stack(profiles) for profiles in zip(*map(_level_profile, LEVELS), strict=True))
    level = np.array([LEVELS.index(name) for name in vertices.level])
    return np.asarray(mean[level] + deviation[level] * drawn + _preferences(vertices))


def _level_profile(level: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the weights of a level, each (N_CHANNELS,)."""
    mean, deviation = np.zeros(N_CHANNELS), np.zeros(N_CHANNELS)
    for group, channels, _ in group_slices():
        mean[channels], deviation[channels] = LEVEL_WEIGHTS[level].get(group.name, (0.0, 0.0))
    return mean, deviation


def _preferences(vertices: Vertices) -> np.ndarray:
    """Weights that floc areas add for their category, (n_vertices, N_CHANNELS); a vertex in two areas prefers both."""
    added = np.zeros((len(vertices), N_CHANNELS))
    for area in AREAS:
        if area.roi_class in PREFERRED:
            inside = (vertices.position >= area.start) & (vertices.position < area.stop)
            added[np.ix_(inside, _category_channels(PREFERRED[area.roi_class]))] = PREFERENCE
    return added


def _category_channels(category: str) -> np.ndarray:
    return np.flatnonzero([channel.startswith(f"late/{category}-") for channel in CHANNELS])


def _dense_rows(vertices: Vertices, weights: np.ndarray, rows: slice) -> sparse.csr_matrix:
    part = np.zeros((rows.stop - rows.start, N_FEATURES), dtype=np.float32)
    for group, channels, columns in group_slices():
        field = _field_cells(vertices, rows, group)
        part[:, columns] = (weights[rows, channels, None] * field[:, None, :]).reshape(len(part), -1)
    return sparse.csr_matrix(part)


def _field_cells(vertices: Vertices, rows: slice, group: Group) -> np.ndarray:
    """Gaussian fields on the cells of a group, cut at FIELD_REACH, each with sum 1: (n_rows, n_cells) float32."""
    x, y, size = (getattr(vertices, f"field_{name}")[rows, None] for name in ("x", "y", "size"))
    centres = cell_centres(group.grid)
    # Every vertex sees the single cell of the group 'whole'.
    squared = ((centres[:, 0] - x) ** 2 + (centres[:, 1] - y) ** 2) * (group.grid > 1)
    field = np.exp(-squared / (2 * size**2)) * (squared <= (FIELD_REACH * size) ** 2)
    # A small field may hold no cell centre of a coarse grid and stay empty; such vertices give those groups no weight.
    return np.asarray((field / np.maximum(field.sum(axis=1, keepdims=True), 1e-12)).astype(np.float32))


def _product(matrix: sparse.csr_matrix, features: np.ndarray) -> np.ndarray:
    """Weighted sums, (n_vertices, n_images) float32; sparse, so that threads do not change the order of summation."""
    return np.asarray(matrix @ np.ascontiguousarray(features.T, dtype=np.float32))


def _moments(vertices: Vertices, weights: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the weighted sums over the reference images, each (n_vertices,) float64."""
    means, deviations = [], []
    for rows in blocks(len(vertices), VERTICES_PER_BLOCK):
        sums = _product(_dense_rows(vertices, weights, rows), reference).astype(np.float64)
        means.append(sums.mean(axis=1))
        deviations.append(sums.std(axis=1))
    return np.concatenate(means), np.concatenate(deviations)


# -------------------------------------------------------------------------------------------------- ceilings


def _ceilings(config: SimulateConfig, subject: int, hemisphere: str) -> tuple[np.ndarray, np.ndarray]:
    """Ceilings and mask of dead vertices, over all vertices, so that deleting some does not shift the others."""
    side = HEMISPHERES.index(hemisphere)
    n_vertices = config.n_vertices[side]
    shared = generator(config.seed, "shared ceiling", side).standard_normal(n_vertices)
    rng = generator(config.seed, "own ceiling", subject, side)
    normal = np.sqrt(CEILING_AGREEMENT) * shared + np.sqrt(1 - CEILING_AGREEMENT) * rng.standard_normal(n_vertices)
    alpha, beta, top, zero_share = CEILINGS[subject - 1]
    ceiling = top * special.betaincinv(alpha, beta, special.ndtr(normal))
    # Dead and silent vertices are chosen among those that the subject has, so that every hemisphere has some.
    silent = rng.permutation(np.flatnonzero(kept(config, subject, hemisphere)))
    n_zero = max(1, round(zero_share * n_vertices))
    ceiling[silent[: config.n_dead + n_zero]] = 0
    dead = np.zeros(n_vertices, dtype=bool)
    dead[silent[: config.n_dead]] = True
    return ceiling.astype(np.float32), dead
