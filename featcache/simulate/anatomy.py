"""Places of vertices, their receptive fields, and their ROIs.

Every vertex has a *position* on a line from 0 to 1, in an order unrelated to its fsaverage index: where columns are
shifted by one, a vertex is taken for one of another area. Level and field belong to the fsaverage vertex, so all
subjects have the same; the borders of ROIs differ a little between subjects.
"""

from dataclasses import dataclass, fields

import numpy as np

from featcache.dataset.rois import CLASSES, FSAVERAGE5_VERTICES, FSAVERAGE_VERTICES, HEMISPHERES
from featcache.simulate.config import SimulateConfig, generator

LEVELS = ("early", "mid", "late", "mixed")
FIELD_REACH = 2.5  # standard deviations from its centre to the end of a field; what is outside has no effect
BORDER_JITTER = 0.003  # standard deviation of an ROI's border between subjects, in positions


@dataclass(frozen=True)
class Area:
    """Place of an ROI on the line of positions."""

    roi_class: str
    name: str
    start: float  # position in [0, 1]
    stop: float  # position in [0, 1]
    prevalence: float = 1.0  # share of the hemispheres that have it


# In the order of their labels, which start at 1 in every class.
AREAS: tuple[Area, ...] = (
    Area("prf-visualrois", "V1v", 0.00, 0.05),
    Area("prf-visualrois", "V1d", 0.05, 0.10),
    Area("prf-visualrois", "V2v", 0.10, 0.14),
    Area("prf-visualrois", "V2d", 0.14, 0.18),
    Area("prf-visualrois", "V3v", 0.18, 0.22),
    Area("prf-visualrois", "V3d", 0.22, 0.26),
    Area("prf-visualrois", "hV4", 0.27, 0.32),
    Area("floc-bodies", "EBA", 0.66, 0.74),
    Area("floc-bodies", "FBA-1", 0.49, 0.515, 0.8),
    Area("floc-bodies", "FBA-2", 0.52, 0.54, 0.8),
    Area("floc-bodies", "mTL-bodies", 0.75, 0.765, 0.3),
    Area("floc-faces", "OFA", 0.37, 0.40),
    Area("floc-faces", "FFA-1", 0.47, 0.50),
    Area("floc-faces", "FFA-2", 0.50, 0.53, 0.8),
    Area("floc-faces", "mTL-faces", 0.70, 0.715, 0.4),
    Area("floc-faces", "aTL-faces", 0.63, 0.645, 0.5),
    Area("floc-places", "OPA", 0.80, 0.86),
    Area("floc-places", "PPA", 0.56, 0.60),
    Area("floc-places", "RSC", 0.90, 0.93),
    Area("floc-words", "OWFA", 0.36, 0.375, 0.9),
    Area("floc-words", "VWFA-1", 0.54, 0.56, 0.9),
    Area("floc-words", "VWFA-2", 0.56, 0.575, 0.8),
    Area("floc-words", "mfs-words", 0.60, 0.62, 0.6),
    Area("floc-words", "mTL-words", 0.76, 0.775, 0.4),
    Area("streams", "early", 0.00, 0.28),
    Area("streams", "midventral", 0.28, 0.35),
    Area("streams", "midlateral", 0.35, 0.41),
    Area("streams", "midparietal", 0.41, 0.46),
    Area("streams", "ventral", 0.46, 0.66),
    Area("streams", "lateral", 0.66, 0.84),
    Area("streams", "parietal", 0.84, 0.95),
)

# Standard deviations of fields, fractions of the image side: (at fixation, growth per unit of eccentricity).
FIELD_SIZES = {"V1": (0.04, 0.05), "V2": (0.05, 0.08), "V3": (0.06, 0.12), "early": (0.05, 0.10), "mid": (0.10, 0.20)}
LATE_SIZES = (0.35, 0.60)
MIXED_SIZES = (0.12, 0.40)
MAX_ECCENTRICITY = 0.44  # distance of a field's centre from the middle of the image, fraction of the image side


@dataclass(frozen=True)
class Vertices:
    """Vertices of one hemisphere, in the order of the response columns. Every array is (n_vertices,)."""

    index: np.ndarray  # int64, fsaverage vertex, rising
    position: np.ndarray  # float64, in [0, 1]
    area: np.ndarray  # str, the area that decides its features: a name of AREAS, or "" outside all
    level: np.ndarray  # str, one of LEVELS
    field_x: np.ndarray  # float64, field centre from the left, fraction of the image side
    field_y: np.ndarray  # float64, field centre from the top, fraction of the image side
    field_size: np.ndarray  # float64, the field's standard deviation, fraction of the image side

    def __len__(self) -> int:
        return len(self.index)

    def select(self, mask: np.ndarray) -> "Vertices":
        """Vertices where the mask, (n_vertices,) bool, is true, in the same order."""
        return Vertices(*(getattr(self, item.name)[mask] for item in fields(self)))


def all_vertices(config: SimulateConfig, hemisphere: str) -> Vertices:
    """All vertices of a hemisphere, before some are deleted in some subjects."""
    side = HEMISPHERES.index(hemisphere)
    rng = generator(config.seed, "vertices", side)
    n_vertices = config.n_vertices[side]
    index = rng.choice(FSAVERAGE_VERTICES, n_vertices, replace=False)
    if n_vertices <= FSAVERAGE5_VERTICES:  # of few vertices, maps on the coarser mesh show all
        index = generator(config.seed, "places", side).choice(FSAVERAGE5_VERTICES, n_vertices, replace=False)
    position = (rng.permutation(n_vertices) + 0.5) / n_vertices
    area = np.array([_leading_area(place) for place in position])
    level = np.array([level_of(name) for name in area])
    # A left hemisphere sees the right half of the image, and a right one the left half.
    x, y, size = _fields(rng, area, level, sign=1.0 if hemisphere == "lh" else -1.0)
    return Vertices(np.sort(index), position, area, level, x, y, size)


def kept(config: SimulateConfig, subject: int, hemisphere: str) -> np.ndarray:
    """Mask of the vertices that a subject has: (n_vertices,) bool, over those of `all_vertices`."""
    side = HEMISPHERES.index(hemisphere)
    mask = np.ones(config.n_vertices[side], dtype=bool)
    rng = generator(config.seed, "deleted", subject, side)
    mask[rng.choice(len(mask), config.n_deleted(subject, hemisphere), replace=False)] = False
    return mask


def mapping(roi_class: str) -> dict[int, str]:
    """{label: ROI name} of a class; 0 is no ROI."""
    names = [area.name for area in AREAS if area.roi_class == roi_class]
    return {0: "Unknown"} | dict(enumerate(names, start=1))


def roi_labels(config: SimulateConfig, subject: int, hemisphere: str, position: np.ndarray) -> dict[str, np.ndarray]:
    """{class: labels, (n_vertices,) uint8}; an ROI that the hemisphere lacks has no vertex."""
    rng = generator(config.seed, "rois", subject, HEMISPHERES.index(hemisphere))
    absent = _absent(config, subject, rng)
    labels = {roi_class: np.zeros(len(position), dtype=np.uint8) for roi_class in CLASSES}
    names = {roi_class: list(mapping(roi_class).values()) for roi_class in CLASSES}
    for area in AREAS:
        start, stop = np.array([area.start, area.stop]) + BORDER_JITTER * rng.standard_normal(2)
        if area.name not in absent:
            inside = (position >= start) & (position < stop)
            labels[area.roi_class][inside] = names[area.roi_class].index(area.name)
    return labels


def level_of(area: str) -> str:
    """Level of the features that drive an area: one of LEVELS."""
    if area == "":
        return "mixed"
    if area == "early" or area[:2] in ("V1", "V2", "V3"):
        return "early"
    return "mid" if area == "hV4" or area.startswith("mid") else "late"


def _absent(config: SimulateConfig, subject: int, rng: np.random.Generator) -> set[str]:
    """Names of ROIs that a hemisphere lacks: some by chance, and one rare ROI that both of the subject lack."""
    chance = rng.uniform(size=len(AREAS))
    rare = [area.name for area in AREAS if area.prevalence <= 0.5]
    always = rare[generator(config.seed, "rare", subject).integers(len(rare))]
    return {always} | {area.name for area, draw in zip(AREAS, chance, strict=True) if draw >= area.prevalence}


def _leading_area(position: float) -> str:
    """Name of the area that decides a vertex's features: the narrowest at its position, streams last."""
    areas = [area for area in AREAS if area.start <= position < area.stop]
    narrowest = min(areas, key=lambda area: (area.roi_class == "streams", area.stop - area.start), default=None)
    return narrowest.name if narrowest else ""


def _fields(
    rng: np.random.Generator, area: np.ndarray, level: np.ndarray, sign: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (x, y) and sizes of the fields, each (n_vertices,), for fields to the right (`sign` 1) or left (-1)."""
    n_vertices = len(area)
    eccentricity = MAX_ECCENTRICITY * rng.uniform(size=n_vertices) ** 0.7
    angle = _polar_angles(rng, area)
    offset = sign * 0.04 + 0.05 * rng.standard_normal((2, n_vertices))
    spread = rng.uniform(size=n_vertices)
    late, mixed = level == "late", level == "mixed"
    x = np.where(late, 0.5 + offset[0], 0.5 + sign * eccentricity * np.cos(angle))
    y = np.where(late, 0.5 + offset[1] - sign * 0.04, 0.5 - eccentricity * np.sin(angle))
    size = np.array([_local_size(*pair) for pair in zip(area, level, eccentricity, strict=True)])
    size = np.where(late, LATE_SIZES[0] + np.ptp(LATE_SIZES) * spread, size)
    return x, y, np.where(mixed, MIXED_SIZES[0] + np.ptp(MIXED_SIZES) * spread, size)


def _polar_angles(rng: np.random.Generator, area: np.ndarray) -> np.ndarray:
    """Angles of field centres, radians above the horizontal: ventral maps see the upper half, dorsal maps the lower."""
    free = rng.uniform(-np.pi / 2, np.pi / 2, len(area))
    quarter = np.array([{"v": 1, "d": -1}.get(name[2:3], 0) if name[:2] in ("V1", "V2", "V3") else 0 for name in area])
    return np.where(quarter == 0, free, quarter * np.abs(free))


def _local_size(area: str, level: str, eccentricity: float) -> float:
    at_fixation, growth = FIELD_SIZES.get(area[:2]) or FIELD_SIZES.get(level, (0.0, 0.0))
    return at_fixation + growth * eccentricity
