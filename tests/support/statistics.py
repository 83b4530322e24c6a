"""Models in memory for tests of statistics, and heads that are fitted out of fold to what is made up."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.dataset.subject import Images, Subject


@dataclass(frozen=True)
class Given:
    """A model whose predictions are given, {surface: (n_images, n_vertices)}."""

    name: str
    predictions: dict[str, np.ndarray]

    def read(self, surface: str, vertices: slice) -> np.ndarray:
        return self.predictions[surface][:, vertices]


def subject_with(
    folder: Path, responses: dict[str, np.ndarray], name="subj01", ids=None, rois=None, ceilings=None
) -> Subject:
    """A subject without test images. responses : {surface: (n_images, n_vertices)}"""
    paths = {surface: folder / f"{name}-{surface}.npy" for surface in responses}
    for surface, path in paths.items():
        np.save(path, responses[surface].astype(np.float32))
    n = len(next(iter(responses.values())))
    ids = np.arange(n) * 7 + 3 if ids is None else np.asarray(ids)
    return Subject(
        name=name,
        train=Images(tuple(Path(f"{one}.png") for one in ids), ids),
        test=Images.none(),
        response_paths=paths,
        n_vertices={surface: values.shape[1] for surface, values in responses.items()},
        rois={surface: (rois or {}).get(surface, {}) for surface in responses},
        noise_ceiling={surface: (ceilings or {}).get(surface) for surface in responses},
        fsaverage=dict.fromkeys(responses),
    )


def out_of_fold(features: np.ndarray, responses: np.ndarray, folds: np.ndarray, penalty: float) -> np.ndarray:
    """Predictions of ridge heads that were fitted without the fold of each image, on the level of all responses."""
    predictions = np.empty_like(responses)
    for fold in np.unique(folds):
        rest = folds != fold
        x, level = features[rest] - features[rest].mean(0), features[rest].mean(0)
        kernel = x.T @ x + penalty * np.eye(features.shape[1])
        weights = np.linalg.solve(kernel, x.T @ (responses[rest] - responses[rest].mean(0)))
        predictions[~rest] = (features[~rest] - level) @ weights + responses.mean(0)
    return predictions
