"""Bands of features whose unique and shared parts of the responses are planted."""

from collections.abc import Sequence

import numpy as np
import torch

from heads.compare.folds import candidates_of, fit_fold
from heads.compare.measures import VarianceSums
from heads.compare.spaces import Spaces
from heads.scores.resampling import image_weights
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.priors import Prior


def planted_bands(
    rng: np.random.Generator, n: int, unique: Sequence[float], shared: float, *, n_own: int = 1, n_vertices: int = 6
) -> tuple[list[np.ndarray], np.ndarray]:
    """Features of each band, (n, 2 n_own), and responses, (n, n_vertices) with variance 1.

    A band has features of its own, which explain its unique share, and those that all bands have, which explain the
    shared one. A third of the noise is common to all vertices.
    """
    own, common = [rng.normal(size=(n, n_own)) for _ in unique], rng.normal(size=(n, n_own))

    def part(features: np.ndarray, share: float) -> np.ndarray:
        weights = rng.normal(size=(n_own, n_vertices))
        return np.sqrt(share) * features @ (weights / np.linalg.norm(weights, axis=0))

    noise = np.sqrt(2 / 3) * rng.normal(size=(n, n_vertices)) + np.sqrt(1 / 3) * rng.normal(size=(n, 1))
    responses = part(common, shared) + sum(part(of_band, share) for of_band, share in zip(own, unique, strict=True))
    responses += np.sqrt(1 - shared - sum(unique)) * noise
    return [np.concatenate([of_band, common], 1) for of_band in own], responses


def spaces_of_features(features: Sequence[np.ndarray], landmarks: np.ndarray | None = None) -> Spaces:
    """Kernels of bands, as `spaces_of` makes them of stores."""
    kernels = []
    for of_band in features:
        scaled = (of_band - of_band.mean(0)) / of_band.std(0) / np.sqrt(of_band.shape[1])
        across = scaled if landmarks is None else scaled[landmarks]
        kernels.append(torch.from_numpy((scaled @ across.T).astype(np.float32)))
    return Spaces({Prior(): kernels}, landmarks)


def shares_of(
    features: Sequence[np.ndarray], responses: np.ndarray, ids: np.ndarray, seed: int = 0, n_random: int = 4
) -> np.ndarray:
    """(n_measures, n_draws, n_vertices) of bands of features, over 5 folds."""
    plan, n = FoldPlan.of_frozen(ids, 5, 0), len(ids)
    draws = np.concatenate([np.ones((1, n)), image_weights(ids, seed)]).astype(np.float32)
    sums, spaces = VarianceSums(len(features), torch.from_numpy(draws)), spaces_of_features(features)
    candidates = candidates_of(len(features), n_random, [Prior()], 0)
    for k in range(len(plan)):
        sums.add(fit_fold(spaces, plan, k, torch.from_numpy(responses.astype(np.float32)), candidates))
    return sums.shares()
