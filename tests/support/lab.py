"""What a lab has on its disk: a folder of photographs, a table of trials, and responses with a planted model."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featcache.dataset.folder import scan_folder
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.run import import_files
from featcache.dataset.subject import Subject
from featcache.workdir import Workdir

N_IMAGES, N_TEST, N_VERTICES, SIDE = 24, 6, 12, 32


@dataclass(frozen=True)
class Lab:
    """A folder that a lab might have.

    signal : (N_IMAGES + N_TEST, N_VERTICES), what the responses are without noise
    """

    folder: Path
    signal: np.ndarray

    @property
    def names(self) -> list[str]:
        return [f"photo {number:02d}é.png" for number in range(N_IMAGES + N_TEST)]

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    def responses(self, repeats: int = 1, noise: float = 0.5, seed: int = 1) -> np.ndarray:
        """(n_images x repeats, N_VERTICES) float32 of the training images, trial after trial of each."""
        rng = np.random.default_rng(seed)
        clean = np.repeat(self.signal[:N_IMAGES], repeats, axis=0)
        return (clean + noise * rng.normal(size=clean.shape)).astype(np.float32)

    def save(self, name: str, values: np.ndarray) -> Path:
        """A .npy file in the folder."""
        np.save(self.folder / name, values)
        return self.folder / name

    def table(self, name: str, **columns: Sequence[object]) -> Path:
        """A CSV file in the folder."""
        path = self.folder / name
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(columns)
            rows.writerows(zip(*columns.values(), strict=True))
        return path


def build_lab(folder: Path, seed: int = 0) -> Lab:
    """Photographs of noise around a colour, and responses that are a linear map of that colour and its contrast."""
    rng = np.random.default_rng(seed)
    (folder / "photos").mkdir(parents=True)
    colours = rng.uniform(60, 190, size=(N_IMAGES + N_TEST, 3))
    contrast = rng.uniform(5, 50, size=N_IMAGES + N_TEST)
    lab = Lab(folder, _planted(colours, contrast, rng))
    for name, colour, spread in zip(lab.names, colours, contrast, strict=True):
        pixels = colour + spread * rng.normal(size=(SIDE, SIDE, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(lab.photos / name)
    return lab


def _planted(colours: np.ndarray, contrast: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    causes = np.column_stack([colours, contrast])
    causes = (causes - causes.mean(0)) / causes.std(0)
    return causes @ rng.normal(size=(4, N_VERTICES))


def import_one(work: Path, **options: Any) -> Subject:
    """Import a subject by these settings; the subject that the work folder has then."""
    config = ImportConfig(**options)
    import_files(config, work, workers=1)
    dataset, faults = scan_folder(Workdir(work).dataset)
    assert not faults, faults
    return dataset.select(config.subject_name)[0]
