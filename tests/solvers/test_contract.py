"""What every solver promises, for every entry of the tables: a new solver or head is driven by being in them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError
from heads.config import HEADS, SOLVERS, AdamWConfig, CoreConfig, FitConfig, SpatialConfig
from heads.fit.out_of_fold import block_of, predict_surface
from heads.fit.run import rows_from
from heads.modules.readout import HeadKind, InMemory, SavedHeads
from heads.solvers.base import mean_of_tests
from heads.solvers.registry import build_solver
from support.plans import assert_same_fits, out_of_fold
from support.problems import (
    LAYERS,
    N_VERTICES,
    VECTOR,
    features_of,
    planted_responses,
    problem_of,
    responding,
)

LOSS = "mse"
KINDS = [
    (solver, head)
    for solver, spec in SOLVERS.items()
    for head in HEADS
    if (spec.serves(head, [LOSS]) if spec.fits else head == "linear")
]
SHAPES = {"vector": VECTOR, "layers": LAYERS}
FROZEN, TRAINED = [(*kind, False) for kind in KINDS if SOLVERS[kind[0]].fits], [(*kind, True) for kind in KINDS]
every_solver = pytest.mark.parametrize(
    ("solver", "head", "trained"),
    FROZEN + TRAINED,
    ids=lambda value: {False: "frozen", True: "trained"}.get(value, value),
)
both_layouts = pytest.mark.parametrize("layout", SHAPES)


def config_of(solver, head):
    adamw = AdamWConfig(learning_rate=1e-2, epochs=2, batch_size=8)
    heads = {"spatial": SpatialConfig(rank=1), "core": CoreConfig(members=2, hidden=8, channels=4, blocks=1)}
    return FitConfig(loss=LOSS, head=head, solver=solver, n_folds=3, adamw=adamw, device="cpu", **heads)


@pytest.fixture
def subject(tiny):
    return open_challenge(tiny).subjects[0]


@pytest.fixture
def made(subject, tmp_path, solver, head, trained, layout):
    """Makes a problem on planted responses, or on others, and its solver."""

    def make(change=None):
        responses = planted_responses(len(subject.train), SHAPES[layout])
        for values in responses.values():
            if change is not None:
                change(values)
        work = tmp_path / ("planted" if change is None else "changed")
        own = responding(subject, responses, work)
        checkpoints = not SOLVERS[solver].fits
        features = features_of(own, work, SHAPES[layout], trained=trained, checkpoints=checkpoints)
        problem = problem_of(own, features, config_of(solver, head), work)
        return problem, build_solver(problem)

    return make


def block_for(problem, surface="lh", vertices=None):
    responses = problem.subject.responses(surface)
    return block_of(problem.subject, surface, responses, vertices or slice(0, responses.shape[1]), "cpu")


@every_solver
@both_layouts
def test_every_scored_row_is_predicted_once_by_a_head_of_its_fold(made):
    problem, solver = made()
    for surface, n_vertices in N_VERTICES.items():
        fits = solver.fit(block_for(problem, surface))
        assert len(fits.folds) == len(problem.plan)
        for k, fold in enumerate(fits.folds):
            rows = np.concatenate([piece.rows for piece in fold.held_out])
            assert sorted(rows) == problem.plan.inside(k).tolist()
            assert fold.test.shape == (problem.n_test, n_vertices) and fold.test.dtype == torch.float32
            assert fold.test.isfinite().all()
            for piece in fold.held_out:
                assert piece.predictions.shape == (len(piece.rows), n_vertices)
                assert piece.predictions.dtype == torch.float32 and piece.predictions.isfinite().all()
                assert piece.mean.shape == piece.std.shape == (n_vertices,)
                assert (piece.std > 0).all()


@every_solver
@both_layouts
def test_no_image_has_a_say_in_the_head_that_predicts_it(made, solver):
    problem, fitter = made()
    before = fitter.fit(block_for(problem)).folds
    piece = before[1].held_out[-1]

    def move(values):
        values[piece.rows] = 50 * np.random.default_rng(0).normal(size=(len(piece.rows), values.shape[1]))

    moved, fitter = made(move)
    after = fitter.fit(block_for(moved)).folds
    for ours, theirs in zip(piece, after[1].held_out[-1], strict=True):
        # kernels of several priors come from one product, whose last bits hang on which priors these are
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert np.array_equal(after[0].test, before[0].test) is not SOLVERS[solver].fits


@every_solver
@both_layouts
def test_memory_is_positive_and_grows_with_vertices(made):
    _, solver = made()
    sizes = [solver.memory(n) for n in (1, 10, 1000, 100_000)]
    assert sizes[0] > 0 and sizes == sorted(set(sizes))


@every_solver
@both_layouts
def test_fit_does_not_edit_its_block_and_gives_the_same_again(made):
    problem, solver = made()
    block, given = block_for(problem), block_for(problem)
    first = solver.fit(block)
    assert torch.equal(block.responses, given.responses)
    assert np.array_equal(block.noise_ceiling, given.noise_ceiling)
    assert np.array_equal(block.all_responses, given.all_responses)
    assert all(np.array_equal(one, other) for one, other in zip(block.rois, given.rois, strict=True))
    solver.fit(block_for(problem, "rh"))
    again = solver.fit(block)
    assert_same_fits(again, first, rtol=0, atol=0)
    assert again.saved.keys() == first.saved.keys()
    assert all(torch.equal(values, first.saved[name]) for name, values in again.saved.items())


@every_solver
@both_layouts
def test_a_solver_that_takes_blocks_of_vertices_fits_each_as_among_all(made):
    problem, solver = made()
    if solver.vertex_block is None:
        return
    whole = solver.fit(block_for(problem))
    parts = [solver.fit(block_for(problem, vertices=vertices)) for vertices in (slice(0, 2), slice(2, 5))]
    together = np.concatenate([out_of_fold(part, problem.n_train) for part in parts], 1)
    np.testing.assert_allclose(together, out_of_fold(whole, problem.n_train), rtol=1e-3, atol=1e-4)
    for name, values in whole.saved.items():  # what is saved of blocks is laid side by side
        torch.testing.assert_close(torch.cat([part.saved[name] for part in parts], -1), values, rtol=1e-3, atol=1e-4)


@every_solver
@both_layouts
def test_heads_are_saved_under_the_prefixes_of_the_plan_or_of_its_folds(made):
    problem, solver = made()
    saved = solver.fit(block_for(problem)).saved
    folds = {f"fold{fold}." for fold in problem.plan.held_out}
    assert {prefix for prefix, _ in saved} in (set(problem.plan.prefixes), folds)
    assert all(isinstance(values, torch.Tensor) for values in saved.values())


@every_solver
@both_layouts
def test_saved_heads_predict_test_images_as_the_solver_does(made):
    problem, solver = made()
    for surface in N_VERTICES:
        expected = mean_of_tests(solver.fit(block_for(problem, surface)).folds)
        _, saved = predict_surface(solver, problem.subject, surface, lambda _: None, "cpu", problem.plan.held_out)
        tensors = {f"{prefix}{surface}.{part}": values for (prefix, part), values in saved.items()}
        features = problem.features if problem.config.solver_spec.fits else problem.features.only(["pooled"])
        shapes = {name: features.stores[0].arrays[name].shape[1:] for name in features.names}
        heads = SavedHeads(InMemory(tensors), shapes, HeadKind(name=problem.config.head))
        assert heads.fault(surface) == ""
        rows = [rows_from(store, features.names, problem.n_train) for store in features.stores]
        found = heads.predict(surface, rows)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)
        torch.testing.assert_close(heads.predict(surface, rows, slice(1, 3)), found[:, 1:3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("solver", "head"), [kind for kind in KINDS if SOLVERS[kind[0]].fits])
def test_what_memory_does_not_hold_is_refused_before_a_fit(subject, tmp_path, solver, head):
    own = responding(subject, planted_responses(len(subject.train), VECTOR), tmp_path)
    config = replace(config_of(solver, head), max_memory=1e-6)
    with pytest.raises(ConfigError, match="--max-memory"):
        build_solver(problem_of(own, features_of(own, tmp_path), config, tmp_path))
