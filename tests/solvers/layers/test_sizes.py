"""Memory of fits under priors: that of the arrays which are kept, whatever they are computed from."""

from dataclasses import replace

import numpy as np
import pytest

from heads.solvers.layers import sizes
from heads.solvers.layers.axes import LANDMARKS
from heads.solvers.layers.sizes import FINALISTS, SEARCH_IMAGES, LayeredSizes

COUNTS = LayeredSizes(
    n_train=50,
    n_images=60,
    n_fit=(40, 40, 41),
    n_choices=1,
    n_scales=1,
    n_features=900,
    n_priors=20,
    backbone_trained=False,
    stack_bytes=0.0,
    held_bytes=0.0,
    cache_bytes=1e12,
)
MANY = replace(COUNTS, n_train=9000, n_images=10_000, n_fit=(7200,) * 5, n_features=20_000)


def bytes_of(*shapes):
    return sum(np.empty(shape, np.float32).nbytes for shape in shapes)


def test_every_prior_and_fold_keeps_the_scores_of_all_images_on_as_many_axes_as_images():
    assert COUNTS.method == "images"
    assert COUNTS.decomposed_bytes == 20 * bytes_of(*((60, n_fit) for n_fit in COUNTS.n_fit))


def test_with_landmarks_folds_share_the_features_and_finalists_alone_are_kept():
    assert MANY.method == "landmarks" and MANY.searched
    of_a_fold = bytes_of((LANDMARKS, LANDMARKS))
    assert MANY.decomposed_bytes == FINALISTS * (bytes_of((10_000, LANDMARKS)) + 5 * of_a_fold)
    trained = replace(MANY, n_scales=5)
    assert trained.decomposed_bytes == FINALISTS * 5 * (bytes_of((10_000, LANDMARKS)) + of_a_fold)


@pytest.mark.parametrize(
    ("n_train", "n_priors", "searched"),
    [(SEARCH_IMAGES + 1, FINALISTS + 1, True), (SEARCH_IMAGES, FINALISTS + 1, False), (9000, FINALISTS, False)],
)
def test_priors_are_sought_on_a_sample_if_there_are_many_of_both(n_train, n_priors, searched):
    assert replace(COUNTS, n_train=n_train, n_priors=n_priors).searched == searched


def test_what_does_not_fit_is_recomputed():
    assert not replace(COUNTS, cache_bytes=COUNTS.decomposed_bytes).recomputes
    assert replace(COUNTS, cache_bytes=COUNTS.decomposed_bytes - 1).recomputes


def test_weights_are_saved_once_or_for_each_fold_and_beyond_a_limit_are_not_in_memory(monkeypatch):
    once = bytes_of((900, 7))
    trained = replace(COUNTS, backbone_trained=True)
    assert (COUNTS.saved_bytes(7), trained.saved_bytes(7)) == (once, 3 * once)
    before = trained.memory(7)
    monkeypatch.setattr(sizes, "_WEIGHTS_IN_MEMORY", once)
    assert trained.memory(7) < before


@pytest.mark.parametrize("name", ["n_images", "n_choices", "n_priors", "n_features", "stack_bytes", "held_bytes"])
def test_more_of_anything_takes_more_memory(name):
    more = replace(COUNTS, **{name: 2 * getattr(COUNTS, name) + 1e6 * name.endswith("bytes")})
    assert more.memory(300) > COUNTS.memory(300)
    assert COUNTS.memory(600) > COUNTS.memory(300) > COUNTS.decomposed_bytes
