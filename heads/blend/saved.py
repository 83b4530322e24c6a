"""A blend as a file: a coefficient for each model and vertex, which apply to any predictions of the same models."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from featcache.cache.store import Store
from featcache.dataset.subject import Subject
from featcache.errors import StoreError, first_line
from featcache.machine.documents import parse_json, typed
from featcache.machine.tensors import as_float32, refuse_changed_tensors, write_tensors
from heads.blend.models import SubjectModels
from heads.blend.products import N_FOLDS, Gathered, surface_blocks
from heads.blend.weights import nested_sums
from heads.scores.metrics import r_from_sums

T = TypeVar("T")

BLEND = "blend"  # the name of the last blend among those of models
_ORIGIN, _RESPONSES = "featcache blend", "responses"
_MINIMUM_SLOPE = 1e-3  # a vertex that no model explains keeps a trace of the blend instead of a constant


@dataclass(frozen=True)
class Coefficients:
    """A blend of one surface as a linear function of the models' predictions, regressed on the responses.

    models : names
    of_models : (n_models, n_vertices) float32
    intercept : (n_vertices,) float32
    """

    models: tuple[str, ...]
    of_models: np.ndarray
    intercept: np.ndarray

    @property
    def needed(self) -> list[str]:
        """Names of the models with weight at any vertex."""
        return [model for model, row in zip(self.models, self.of_models, strict=True) if row.any()]

    def apply(self, surface: str, stores: Mapping[str, Store], start: int, stop: int) -> np.ndarray:
        """The blend of rows of the models' stores, (stop - start, n_vertices) float32.

        stores : {model: its prediction store}, of those that are `needed` at least
        """
        return self.of_predictions(lambda model: as_float32(stores[model].read(surface, start, stop)), stop - start)

    def of_predictions(self, predictions: Callable[[str], np.ndarray], n_images: int) -> np.ndarray:
        """The blend of predictions, (n_images, n_vertices) float32. predictions : gives those of a model, by name"""
        blend = np.tile(self.intercept, (n_images, 1))
        for model in self.needed:
            blend += self.of_models[self.models.index(model)] * predictions(model)
        return blend

    def at(self, vertices: slice) -> "Coefficients":
        """The blend of some of the vertices; of each model that any vertex needs."""
        return replace(self, of_models=self.of_models[:, vertices], intercept=self.intercept[vertices])


@dataclass(frozen=True)
class NestedCoefficients:
    """A blend of one surface out of fold: for each fold of the blend, coefficients that were learnt on the others.

    models : names
    of_models : (n_folds, n_models, n_vertices) float32
    intercept : (n_folds, n_vertices) float32
    """

    models: tuple[str, ...]
    of_models: np.ndarray
    intercept: np.ndarray

    @property
    def needed(self) -> list[str]:
        """Names of the models with weight at any vertex."""
        return [model for model, row in zip(self.models, self.of_models.swapaxes(0, 1), strict=True) if row.any()]

    def at(self, vertices: slice) -> "NestedCoefficients":
        """Those of some of the vertices."""
        return NestedCoefficients(self.models, self.of_models[..., vertices], self.intercept[:, vertices])

    def apply(self, predictions: Iterable[tuple[str, np.ndarray]], folds: np.ndarray) -> np.ndarray:
        """The blend out of fold, (n_images, n_vertices) float32.

        predictions : each model that is `needed`, and its predictions, (n_images, n_vertices)
        folds : (n_images,) of the blend
        """
        blend: np.ndarray = self.intercept[folds]
        for model, of_model in predictions:
            weights = self.of_models[:, self.models.index(model)]
            for fold, of_fold in enumerate(weights):
                rows = folds == fold
                blend[rows] += of_fold * of_model[rows]
        return blend


SavedBlend = dict[str, dict[str, Coefficients]]  # {subject: {surface: coefficients}}
NestedBlend = dict[str, dict[str, NestedCoefficients]]


def coefficients_of(
    subject: Subject, models: Sequence[str], gathered: Gathered, weights: np.ndarray
) -> dict[str, Coefficients]:
    """{surface: coefficients} of a blend of standardised predictions. One model alone is passed through as it is.

    weights : (n_vertices, n_models), the vertices of all surfaces side by side
    """
    of_models, intercept = _in_units(_slope(gathered, weights), weights, gathered)
    if len(models) == 1:
        of_models, intercept = np.ones_like(of_models), np.zeros_like(intercept)
    return {
        surface: Coefficients(
            tuple(models),
            np.ascontiguousarray(of_models[block].T, np.float32),
            intercept[block].astype(np.float32),
        )
        for surface, block in surface_blocks(subject).items()
    }


def nested_of(
    subject: Subject, models: Sequence[str], gathered: Gathered, weights: np.ndarray, nested: Sequence[np.ndarray]
) -> dict[str, NestedCoefficients]:
    """{surface: coefficients out of fold} of a blend of standardised predictions, in the unit of the responses.

    weights : (n_vertices, n_models), learnt on all images
    nested : (n_vertices, n_models) for each fold, learnt on the others
    """
    slope, varies = _slope(gathered, weights), gathered.products.total().varies
    folds = [_in_units(slope, np.where(varies, of_fold, 0), gathered) for of_fold in nested]
    return {
        surface: NestedCoefficients(
            tuple(models),
            np.ascontiguousarray(np.stack([of_models[block].T for of_models, _ in folds]), np.float32),
            np.stack([intercept[block] for _, intercept in folds]).astype(np.float32),
        )
        for surface, block in surface_blocks(subject).items()
    }


def _slope(gathered: Gathered, weights: np.ndarray) -> np.ndarray:
    """Slope of the responses on a blend of standardised predictions, (n_vertices,)."""
    blended = nested_sums(gathered.products, [weights] * N_FOLDS)
    n, _, squares, _, _, y_squares = blended
    spread = gathered.units.scale[:, -1] * np.sqrt(np.maximum(y_squares, 0) / n)
    size = np.sqrt(np.where(squares > 0, squares / n, 1))
    return np.asarray(np.maximum(r_from_sums(*blended), _MINIMUM_SLOPE) * spread / size)


def _in_units(slope: np.ndarray, weights: np.ndarray, gathered: Gathered) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of predictions as they are, (n_vertices, n_models), and intercept, (n_vertices,)."""
    units = gathered.units
    of_models = slope[:, None] * weights / units.scale[:, :-1]
    return of_models, units.mean[:, -1] - np.einsum("vm,vm->v", of_models, units.mean[:, :-1])


def save_blend(
    path: Path,
    blend: SavedBlend,
    nested: NestedBlend | None = None,
    responses: Mapping[str, str] | None = None,
) -> None:
    """Write safetensors: <subject>.<surface>.coefficients (n_models, n_vertices) and .intercept (n_vertices,), and the
    same out of fold, .nested (n_folds, n_models, n_vertices) and .nested_intercept (n_folds, n_vertices).
    """
    tensors, models = {}, {}
    for subject, surfaces in blend.items():
        for surface, coefficients in surfaces.items():
            models[subject] = list(coefficients.models)
            tensors[f"{subject}.{surface}.coefficients"] = coefficients.of_models
            tensors[f"{subject}.{surface}.intercept"] = coefficients.intercept
            if nested is not None:
                out_of_fold = nested[subject][surface]
                tensors[f"{subject}.{surface}.nested"] = out_of_fold.of_models
                tensors[f"{subject}.{surface}.nested_intercept"] = out_of_fold.intercept
    about = {_ORIGIN: json.dumps(models), _RESPONSES: json.dumps(dict(responses or {}))}
    write_tensors(path, {name: torch.from_numpy(values) for name, values in sorted(tensors.items())}, about)


def load_blend(path: Path) -> SavedBlend:
    """Read a blend. Raises StoreError for a file that is missing, damaged or no blend."""
    return _load(path, "coefficients", "intercept", Coefficients)


def load_nested(path: Path) -> NestedBlend:
    """Read a blend out of fold; empty where the file is of a version that did not keep it. Raises as `load_blend`."""
    return _load(path, "nested", "nested_intercept", NestedCoefficients)


def _load(
    path: Path, kind: str, intercept: str, make: Callable[[tuple[str, ...], np.ndarray, np.ndarray], T]
) -> dict[str, dict[str, T]]:
    """{subject: {surface: coefficients}} of one kind."""
    with _reading(path) as file:
        models = typed(parse_json((file.metadata() or {})[_ORIGIN]), dict[str, list[str]])
        blend: dict[str, dict[str, T]] = {}
        for name in sorted(file.keys()):
            owner, _, tensor = name.rpartition(".")
            if tensor == kind:
                subject = max((one for one in models if owner.startswith(f"{one}.")), key=len)
                surface = owner.removeprefix(f"{subject}.")
                values = _checked(file.get_tensor(name), file.get_tensor(f"{owner}.{intercept}"), models[subject])
                blend.setdefault(subject, {})[surface] = make(tuple(models[subject]), *values)
        return blend


def _checked(of_models: np.ndarray, intercept: np.ndarray, models: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and intercept as `save_blend` writes them. Raises ValueError for others."""
    fits = of_models.shape == (*intercept.shape[:-1], len(models), *intercept.shape[-1:])
    if not fits or of_models.dtype != np.float32 or intercept.dtype != np.float32:
        raise ValueError(f"coefficients of shape {of_models.shape} for {len(models)} models")
    if not np.isfinite(of_models).all() or not np.isfinite(intercept).all():
        raise ValueError("coefficients that are not finite")
    return of_models, intercept


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The opened file of a blend that is as it was written. Raises StoreError for another."""
    try:
        refuse_changed_tensors(path, (_ORIGIN, _RESPONSES))
        with safe_open(path, "numpy") as file:
            yield file
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            path,
            expected="a blend, as 'blend' writes it to submission/blend.safetensors",
            found=f"none that can be read ({first_line(error)})",
            remedy="run 'blend' again",
        ) from error


def _responses_of(path: Path) -> dict[str, str]:
    """{subject: digest of the responses that a blend was learnt on}; {} in a blend of an earlier version."""
    if not path.is_file():
        return {}
    with _reading(path) as file:
        return typed(parse_json((file.metadata() or {}).get(_RESPONSES, "{}")), dict[str, str])


def refuse_strangers(path: Path, blend: SavedBlend, models: SubjectModels) -> None:
    """Raise StoreError where a blend lacks a subject, is of other responses or vertices, or needs a model that is not
    there.
    """
    learnt_on = _responses_of(path)

    def refusal(expected: str, found: object, remedy: str = "run 'blend' on this tree") -> StoreError:
        return StoreError(path, expected=expected, found=found, remedy=remedy)

    for subject, of_subject in models.items():
        names = {model.name for model in of_subject}
        if any(model.key.responses != learnt_on.get(subject.name, model.key.responses) for model in of_subject):
            raise refusal(f"a blend of the responses of {subject.name}", "one of others", "run 'blend' again")
        for surface, n_vertices in subject.n_vertices.items():
            coefficients = blend.get(subject.name, {}).get(surface)
            if coefficients is None:
                raise refusal(f"a blend of {subject.name} {surface}", _label(blend))
            if missing := ", ".join(sorted(set(coefficients.needed) - names)):
                what = f"predictions of {subject.name} by {missing}"
                raise refusal(what, "none", "extract and fit the same models first")
            if len(coefficients.intercept) != n_vertices:
                raise refusal(f"{n_vertices} vertices of {subject.name} {surface}", len(coefficients.intercept))


def _label(blend: SavedBlend) -> str:
    return ", ".join(f"{subject} {surface}" for subject, surfaces in blend.items() for surface in surfaces)
