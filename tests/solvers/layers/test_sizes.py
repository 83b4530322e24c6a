"""Memory of fits under priors: that of the arrays which are kept, whatever they are computed from."""

from dataclasses import replace

import numpy as np
import pytest

from heads.solvers.layers import sizes
from heads.solvers.layers.axes import LANDMARKS
from heads.solvers.layers.sizes import FINALISTS, FINALISTS_TOGETHER, LayeredSizes

COUNTS = LayeredSizes(
    n_train=50,
    n_images=60,
    n_fit=(40, 40, 41),
    n_choices=1,
    n_scales=2,
    n_features=900,
    n_priors=40,
    backbone_trained=False,
    held_bytes=0.0,
)
MANY = replace(COUNTS, n_train=9000, n_images=10_000, n_fit=(7200,) * 5, n_features=20_000, n_priors=204)


def bytes_of(*shapes):
    return sum(np.empty(shape, np.float32).nbytes for shape in shapes)


N_FINALISTS = FINALISTS["images"]


def test_every_finalist_keeps_its_kernel_and_the_scores_of_all_images_on_as_many_axes_as_images():
    assert COUNTS.method == "images"
    kernels = 3 * N_FINALISTS * bytes_of((60, 60))  # folds that share scales may choose different priors
    scores = N_FINALISTS * bytes_of(*((60, n_fit) for n_fit in COUNTS.n_fit))
    assert COUNTS.axes_bytes == kernels + scores
    few = replace(COUNTS, n_priors=3)
    assert few.axes_bytes == 6 * bytes_of((60, 60)) + 3 * bytes_of(*((60, n_fit) for n_fit in COUNTS.n_fit))


@pytest.mark.parametrize(("n_responses", "together"), [(0, False), (40, True), (41, False)])
def test_surfaces_share_priors_where_all_have_fewer_vertices_than_there_are_images_to_fit_to(n_responses, together):
    counts = replace(COUNTS, n_responses=n_responses)
    assert counts.together == together
    assert counts.n_finalists == (FINALISTS_TOGETHER if together else N_FINALISTS)


def test_with_landmarks_folds_share_the_features_and_surfaces_have_priors_of_their_own():
    assert MANY.method == "landmarks" and MANY.searched and not MANY.together
    of_a_fold = bytes_of((LANDMARKS, LANDMARKS))
    assert MANY.axes_bytes == FINALISTS["landmarks"] * (2 * bytes_of((10_000, LANDMARKS)) + 5 * of_a_fold)


@pytest.mark.parametrize(("n_priors", "searched"), [(N_FINALISTS + 1, True), (N_FINALISTS, False)])
def test_priors_are_sought_if_there_are_more_than_are_computed_exactly(n_priors, searched):
    assert replace(COUNTS, n_priors=n_priors).searched == searched


def test_weights_are_saved_once_or_for_each_fold_and_beyond_a_limit_are_not_in_memory(monkeypatch):
    once = bytes_of((900, 7))
    trained = replace(COUNTS, backbone_trained=True)
    assert (COUNTS.saved_bytes(7), trained.saved_bytes(7)) == (once, 3 * once)
    before = trained.memory(7)
    monkeypatch.setattr(sizes, "_WEIGHTS_IN_MEMORY", once)
    assert trained.memory(7) < before


@pytest.mark.parametrize("name", ["n_images", "n_choices", "n_features", "held_bytes"])
def test_more_of_anything_takes_more_memory(name):
    more = replace(COUNTS, **{name: 2 * getattr(COUNTS, name) + 1e6 * name.endswith("bytes")})
    assert more.memory(300) > COUNTS.memory(300)
    assert COUNTS.memory(600) > COUNTS.memory(300) > COUNTS.axes_bytes
