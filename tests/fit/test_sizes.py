"""What fits are expected to take, from counts: against the solvers' own formulas, and as counts grow."""

from dataclasses import replace

import pytest

from featcache.cache.store import Row
from heads.config import CoreConfig, FitConfig
from heads.fit.sizes import Features, FitSizes, fit_memory, prediction_bytes, saved_bytes
from heads.solvers.memory import Sizes, whole_bytes

POOLED = Features({"pooled": Row((96,))})
LAYERED = Features({"pooled": Row((96,)), "deep": Row((7, 7, 32), "float16")})
TRAINED = Features({"pooled": Row((96,))}, held_out=(0, 1, 2), n_folds=3)


def sizes_of(features, **changes):
    n_folds = features.n_folds or 5
    sizes = FitSizes(
        n_train=800,
        n_test=100,
        n_vertices=(900, 1000),
        n_held_out=len(features.held_out) or n_folds,
        n_folds=n_folds,
        features=features,
    )
    return replace(sizes, **changes)


def test_features_count_places_and_channels():
    assert LAYERED.n_features == 96 + 7 * 7 * 32 and LAYERED.grids == {"pooled": (1, 1), "deep": (7, 7)}
    assert LAYERED.is_layered and not POOLED.is_layered and LAYERED.reading(["deep"]).is_layered
    assert (POOLED.n_stores, TRAINED.n_stores) == (1, 3) and TRAINED.backbone_trained and not POOLED.backbone_trained


def test_predictions_are_counted_in_the_type_that_they_are_stored_in():
    sizes = sizes_of(POOLED)
    whole = prediction_bytes(sizes, 160, "float32")
    assert whole == 4 * (800 + 100 + 124) * (900 + 1000)  # in whole chunks of 256 rows
    assert 2 * prediction_bytes(sizes, 160, "float16") == whole == prediction_bytes(sizes, 100, "float16")


def test_heads_by_gradient_take_what_their_solver_says():
    flat = Sizes(n_train=800, n_test=100, n_features=96, n_vertices=(900, 1000), n_folds=5, n_sources=1)
    assert fit_memory(sizes_of(POOLED), FitConfig(loss="smooth_l1")) == whole_bytes(flat)
    assert fit_memory(sizes_of(POOLED), FitConfig(loss="smooth_l1", head="roi")) == whole_bytes(flat, 2)


@pytest.mark.parametrize("features", [POOLED, LAYERED, TRAINED], ids=["pooled", "layered", "trained"])
@pytest.mark.parametrize("loss", ["mnnpc", "smooth_l1"])
@pytest.mark.parametrize("more", [{"n_train": 950}, {"n_vertices": (900, 2000)}, {"n_test": 900}], ids=str)
def test_more_images_and_vertices_take_more(features, loss, more):
    sizes, config = sizes_of(features), FitConfig(loss=loss)
    assert fit_memory(replace(sizes, **more), config) > fit_memory(sizes, config)


def test_heads_on_a_core_take_what_layers_of_its_shape_trained_for_each_fold_take():
    config = FitConfig(head="core", loss="mse", core=CoreConfig(members=1, channels=16))
    features = Features({"core": Row((7, 7, 16), "float16")}, held_out=(0, 1, 2, 3, 4), n_folds=5)
    assert fit_memory(sizes_of(LAYERED), config) == fit_memory(sizes_of(features), FitConfig())
    assert saved_bytes(sizes_of(LAYERED), config) == saved_bytes(sizes_of(features), FitConfig())


def test_what_is_saved_are_weights_of_every_vertex():
    config = FitConfig()
    assert saved_bytes(sizes_of(POOLED), config) == 4 * 96 * 1900
    assert saved_bytes(sizes_of(TRAINED), config) == 3 * 4 * 96 * 1900
    assert saved_bytes(sizes_of(LAYERED), config) == 4 * LAYERED.n_features * 1900
    assert saved_bytes(sizes_of(LAYERED, n_vertices=(10**6,)), config) == 4 * LAYERED.n_features * 10**6
