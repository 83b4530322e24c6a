<<<<<<< HEAD
"""What fits are expected to take, from counts: against the solvers' own formulas, and as counts grow."""
=======
"""What fits are expected to take, from counts alone, is what their solvers say and save."""
>>>>>>> fittests

from dataclasses import replace

import pytest

from featcache.cache.store import Row
<<<<<<< HEAD
from heads.config import FitConfig
from heads.recipes.fits import Features, FitSizes, fit_memory, saved_bytes
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
    assert (POOLED.n_stores, TRAINED.n_stores) == (1, 3) and TRAINED.trained and not POOLED.trained


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


def test_what_is_saved_are_weights_of_every_vertex():
    config = FitConfig()
    assert saved_bytes(sizes_of(POOLED), config) == 4 * 96 * 1900
    assert saved_bytes(sizes_of(TRAINED), config) == 3 * 4 * 96 * 1900
    assert saved_bytes(sizes_of(LAYERED), config) == 4 * LAYERED.n_features * 1900
    assert saved_bytes(sizes_of(LAYERED, n_vertices=(10**6,)), config) == 0  # too many to save
=======
from featcache.dataset.algonauts import open_challenge
from heads.config import FitConfig
from heads.fit.out_of_fold import predict_surface
from heads.recipes.fits import Features, FitSizes, fit_memory, saved_bytes
from heads.solvers.registry import build_solver
from support.problems import LAYERS, N_VERTICES, VECTOR, features_of, planted_responses, problem_of, responding

RIDGE, ADAMW = FitConfig(n_folds=3), FitConfig(n_folds=3, loss="smooth_l1")


def outline_of(shapes, trained=False):
    rows = {name: Row(shape, "float16" if len(shape) > 1 else "float32") for name, shape in shapes.items()}
    return Features(rows, (0, 1, 2), 3) if trained else Features(rows)


def sizes_of(features, n_train=30, n_test=5):
    return FitSizes(
        n_train=n_train,
        n_test=n_test,
        n_vertices=tuple(N_VERTICES.values()),
        n_held_out=3,
        n_folds=3,
        features=features,
    )


@pytest.fixture
def solver_of(tiny, tmp_path, said):
    """The solver of some settings, and its subject, on planted features."""
    subject = open_challenge(tiny).subjects[0]

    def build(config, shapes, trained):
        own = responding(subject, planted_responses(len(subject.train), shapes), tmp_path)
        features = features_of(own, tmp_path, shapes, trained=trained)
        return build_solver(problem_of(own, features, config, tmp_path)), own

    return build


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shapes", [VECTOR, pytest.param(LAYERS, marks=pytest.mark.slow)], ids=["vector", "layers"])
def test_the_closed_form_takes_and_saves_what_its_solver_does(solver_of, shapes, trained):
    solver, subject = solver_of(RIDGE, shapes, trained)
    sizes = sizes_of(outline_of(shapes, trained))
    # a solver knows of one surface; a plan also counts the weights of the other
    assert fit_memory(sizes, RIDGE) == pytest.approx(solver.memory(max(N_VERTICES.values())), rel=0.05, abs=4096)
    saved = [predict_surface(solver, subject, surface, lambda _: None)[1] for surface in N_VERTICES]
    weights = sum(tensor.nbytes for part in saved for name, tensor in part.items() if "intercept" not in name[1])
    assert saved_bytes(sizes, RIDGE) == weights


@pytest.mark.parametrize("config", [ADAMW, replace(ADAMW, head="roi")], ids=["linear", "roi"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_gradient_loop_takes_what_its_solver_says(solver_of, config, trained):
    solver, _ = solver_of(config, VECTOR, trained)
    assert fit_memory(sizes_of(outline_of(VECTOR, trained)), config) == solver.memory(max(N_VERTICES.values()))


def test_layers_for_rois_take_as_much_again():
    sizes = sizes_of(outline_of(VECTOR))
    assert fit_memory(sizes, replace(ADAMW, head="roi")) > fit_memory(sizes, ADAMW)


@pytest.mark.parametrize("config", [RIDGE, ADAMW], ids=["ridge", "adamw"])
@pytest.mark.parametrize("shapes", [VECTOR, LAYERS], ids=["vector", "layers"])
def test_more_images_take_more(config, shapes):
    few, many = (sizes_of(outline_of(shapes), n_train) for n_train in (30, 3000))
    assert fit_memory(many, config) > fit_memory(few, config) > 0
    assert saved_bytes(many, config) == saved_bytes(few, config)


def test_features_are_counted_before_they_are_there():
    frozen, trained = outline_of(LAYERS), outline_of(LAYERS, True)
    assert (frozen.trained, frozen.n_stores) == (False, 1) and (trained.trained, trained.n_stores) == (True, 3)
    assert frozen.n_features == 6 + 3 * 3 * 4 and frozen.grids == {"pooled": (1, 1), "low": (3, 3)}
    assert frozen.is_layered and not frozen.reading(["pooled"]).is_layered and frozen.reading(["low"]).is_layered
    assert trained.reading(["low"]) == Features({"low": trained.rows["low"]}, (0, 1, 2), 3)
    assert sizes_of(frozen).n_images == 35
>>>>>>> fittests
