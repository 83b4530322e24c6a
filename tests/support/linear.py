"""Responses that a linear map of features made."""

import numpy as np
import pytest

both_selections = pytest.mark.parametrize("selection", ["loo", "gcv"])


def planted(n_images, n_features, n_vertices=6, noise=0.5, seed=0):
    """Features, responses, and the weights that made them; float32, as the cache has them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_images, n_features))
    weights = rng.normal(size=(n_features, n_vertices)) / np.sqrt(n_features)
    responses = features @ weights + noise * rng.normal(size=(n_images, n_vertices))
    return features.astype(np.float32), responses.astype(np.float32), weights
