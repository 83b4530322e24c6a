"""A blend as a file: what each model's predictions are multiplied by, to be applied to others of the same models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from featcache.cache.store import Store
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.subject import Subject
from featcache.errors import StoreError
from heads.blend.products import Gathered
from heads.blend.weights import r_of

_ORIGIN = "featcache blend"
_MINIMUM_SLOPE = 1e-3  # a vertex that no model explains keeps a trace of the blend instead of a constant


@dataclass(frozen=True)
class Coefficients:
    """Of one hemisphere, for the models' predictions as they are: their blend is regressed on the responses.

    models : their names
    of_models : (n_models, n_vertices) float32
    intercept : (n_vertices,) float32
    """

    models: tuple[str, ...]
    of_models: np.ndarray
    intercept: np.ndarray

    def apply(self, hemisphere: str, stores: Mapping[str, Store], start: int, stop: int) -> np.ndarray:
        """(stop - start, n_vertices) float32, from rows of the models' stores; a model without weight needs none."""
        blend = np.tile(self.intercept, (stop - start, 1))
        for model, own in zip(self.models, self.of_models, strict=True):
            if own.any():
                blend += own * stores[model].read(hemisphere, start, stop)
        return blend


def coefficients_of(
    subject: Subject, models: Sequence[str], gathered: Gathered, weights: np.ndarray
) -> dict[str, Coefficients]:
    """{hemisphere: coefficients} of a blend of standardised predictions, (n_vertices, n_models) both hemispheres.

    One model alone is passed through as it is.
    """
    total, units = gathered.moments.total().sums, gathered.units
    n = total[:, -1, -1]
    variance = np.einsum("vm,vmk,vk->v", weights, total[:, :-2, :-2], weights, optimize=True) / n
    spread = units.scale[:, -1] * np.sqrt(np.maximum(total[:, -2, -2], 0) / n)
    slope = np.maximum(r_of(total, weights), _MINIMUM_SLOPE) * spread / np.sqrt(np.where(variance > 0, variance, 1))
    of_models = slope[:, None] * weights / units.scale[:, :-1]
    intercept = units.mean[:, -1] - np.einsum("vm,vm->v", of_models, units.mean[:, :-1])
    if len(models) == 1:
        of_models, intercept = np.ones_like(of_models), np.zeros_like(intercept)
    found, first = {}, 0
    for hemisphere in HEMISPHERES:
        own = slice(first, first + subject.n_vertices[hemisphere])
        parts = (np.ascontiguousarray(of_models[own].T, np.float32), intercept[own].astype(np.float32))
        found[hemisphere] = Coefficients(tuple(models), *parts)
        first = own.stop
    return found


Saved = dict[str, dict[str, Coefficients]]  # {subject: {hemisphere: coefficients}}


def save_blend(path: Path, blend: Saved) -> None:
    """safetensors: <subject>.<hemisphere>.coefficients (n_models, n_vertices) and .intercept (n_vertices,)."""
    tensors, models = {}, {}
    for subject, of_subject in blend.items():
        for hemisphere, own in of_subject.items():
            models[subject] = list(own.models)
            tensors[f"{subject}.{hemisphere}.coefficients"] = own.of_models
            tensors[f"{subject}.{hemisphere}.intercept"] = own.intercept
    save_file(tensors, path, {_ORIGIN: json.dumps(models)})


def load_blend(path: Path) -> Saved:
    """Raises StoreError for a file that is missing, damaged or no blend."""
    try:
        with safe_open(path, "numpy") as file:
            models = json.loads((file.metadata() or {})[_ORIGIN])
            return {
                subject: {
                    h: Coefficients(
                        tuple(names),
                        file.get_tensor(f"{subject}.{h}.coefficients"),
                        file.get_tensor(f"{subject}.{h}.intercept"),
                    )
                    for h in HEMISPHERES
                }
                for subject, names in models.items()
            }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            path,
            expected="a blend, as 'blend' writes it to submission/blend.safetensors",
            found=f"none that can be read ({error})",
            remedy="run 'blend' again",
        ) from error
