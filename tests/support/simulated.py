"""Small simulated trees, and what their files hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from featcache.simulate import SimulateConfig
from featcache.simulate.anatomy import Vertices
from featcache.simulate.truth import Planted

TINY = SimulateConfig(
    n_train=6, n_test=3, n_shared=4, n_vertices=(120, 130), n_dead=2, image_size=32, n_reference=50, workers=1
)
SMALLEST = replace(TINY, n_subjects=2, n_vertices=(40, 44), n_train=(5, 6))
VERTEX_ARRAYS = ("index", "position", "area", "level", "field_x", "field_y", "field_size")


def load_truth(root: Path, subject: str, hemisphere: str) -> dict[str, np.ndarray]:
    with np.load(root / "truth" / subject / f"{hemisphere}.npz") as file:
        return dict(file)


def load_planted(root: Path, subject: str, hemisphere: str) -> Planted:
    truth = load_truth(root, subject, hemisphere)
    vertices = Vertices(*(truth[name] for name in VERTEX_ARRAYS))
    return Planted(vertices, truth["weights"], truth["offset"], truth["ceiling"], truth["dead"])


def load_responses(root: Path, subject: str, hemisphere: str) -> np.ndarray:
    return np.load(root / subject / "training_split" / "training_fmri" / f"{hemisphere}_training_fmri.npy")


def load_mask(root: Path, subject: str, name: str) -> np.ndarray:
    return np.load(root / subject / "roi_masks" / f"{name}.npy")


def ids_of(root: Path, subject: str, split: str) -> list[int]:
    folder = root / subject / f"{split}_split"
    return [int(path.stem[-5:]) for path in sorted(folder.glob("*_images/*.png"))]
