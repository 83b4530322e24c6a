"""Out-of-fold predictions of different heads are put on one level and scale, from what their heads saw alone."""

import numpy as np
import pytest
import torch

from featcache.cache.store import Row, create_store
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.splits import assign_folds
from heads.config import FitConfig, RidgeConfig
from heads.features.rows import LayerRows
from heads.scores.metrics import pearson_r
from heads.solvers.base import FoldFit, Piece, Problem, Shared, comparable, mean_and_std, mean_of_tests, piece_of
from heads.solvers.layers.priors import prior_set
from heads.solvers.layers.ridge import LayeredRidge, scaled_kernels
from support.plans import block_of, plan_of

N_FOLDS, N_TRAIN, N_VERTICES = 3, 90, 4
IDS = np.random.default_rng(2).permutation(73_000)[:N_TRAIN]
FOLDS = assign_folds(IDS, N_FOLDS, 0)


def pieces(seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for k in range(N_FOLDS):
        rows = np.flatnonzero(k == FOLDS)
        parts = (rng.normal(size=(len(rows), N_VERTICES)), rng.normal(size=N_VERTICES), rng.uniform(0.1, 2, N_VERTICES))
        found.append(Piece(rows, *(torch.tensor(part, dtype=torch.float32) for part in parts)))
    return found


def test_pieces_are_given_one_level_and_the_mean_spread():
    given, level = pieces(), torch.tensor([1.0, -2.0, 0.0, 5.0])
    common = np.mean([piece.std.numpy() for piece in given], 0)
    for piece, found in zip(given, comparable(given, level), strict=True):
        for vertex in range(N_VERTICES):
            z = (piece.predictions[:, vertex] - piece.mean[vertex]) / piece.std[vertex]
            np.testing.assert_allclose(found[:, vertex], level[vertex] + z * common[vertex], rtol=1e-4, atol=1e-5)


def test_r_within_a_fold_does_not_change():
    rng, given = np.random.default_rng(1), pieces()
    for piece, found in zip(given, comparable(given, torch.zeros(N_VERTICES)), strict=True):
        responses = rng.normal(size=found.shape)
        np.testing.assert_allclose(
            pearson_r(found.numpy(), responses), pearson_r(piece.predictions.numpy(), responses), atol=1e-5
        )


def test_heads_that_differ_in_level_and_scale_alone_become_the_same():
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(N_TRAIN, N_VERTICES)), dtype=torch.float32)
    given = []
    for k in range(N_FOLDS):
        rows = np.flatnonzero(k == FOLDS)
        given.append(
            Piece(
                rows,
                k + (k + 1) * z[rows],
                torch.full((N_VERTICES,), float(k)),
                torch.full((N_VERTICES,), float(k + 1)),
            )
        )
    for piece, found in zip(given, comparable(given, torch.ones(N_VERTICES)), strict=True):
        torch.testing.assert_close(found, 1 + 2 * z[piece.rows])


def test_mean_and_std_of_predictions_with_1_where_nothing_varies():
    rng = np.random.default_rng(0)
    values = torch.tensor(rng.normal(size=(30, 3)), dtype=torch.float64)
    values[:, 1] = 4.0
    mean, std = mean_and_std(values)
    np.testing.assert_allclose(mean, values.numpy().mean(0))
    np.testing.assert_allclose(std, [values[:, 0].numpy().std(), 1, values[:, 2].numpy().std()])


def test_a_piece_has_the_mean_and_std_of_the_rows_trained_on():
    values = torch.tensor(np.random.default_rng(0).normal(size=(30, 3)), dtype=torch.float32)
    held_out, trained = np.arange(4, 9), np.arange(10, 30)
    piece = piece_of(values, held_out, trained)
    assert np.array_equal(piece.rows, held_out) and torch.equal(piece.predictions, values[4:9])
    torch.testing.assert_close(piece.mean, values[10:].mean(0))
    torch.testing.assert_close(piece.std, values[10:].std(0, correction=0))


def test_what_fits_share_is_made_once_by_name():
    shared, made = Shared(), []
    for name in ("axes", "products", "axes"):
        assert shared.get_or_make(name, lambda name=name: made.append(name) or name) == name
    assert made == ["axes", "products"]


def test_a_problem_counts_images_and_vertices(tiny):
    subject = open_challenge(tiny).subjects[1]
    problem = Problem(subject=subject, features=None, plan=plan_of(subject.train.ids), config=FitConfig())
    assert (problem.n_train, problem.n_test) == (24, 6)
    assert problem.n_vertices == tuple(subject.n_vertices.values()) and len(problem.n_vertices) == 2
    assert problem.trainees == ()


@pytest.mark.parametrize("louder", [0, 1])
def test_a_fold_whose_head_is_ten_times_as_loud_has_no_more_say_in_test_predictions(louder):
    """The order of test images is that of the mean of both heads at one loudness, whichever of them is the loud one."""
    rng = np.random.default_rng(0)
    heads, train, test = rng.normal(size=(2, 6, 4)), rng.normal(size=(80, 6)), rng.normal(size=(30, 6))
    folds = []
    for k, head in enumerate(heads):
        gain = 10.0 if k == louder else 1.0
        own, new = (torch.tensor(5 * k + gain * x @ head, dtype=torch.float32) for x in (train, test))
        folds.append(FoldFit([], new, *mean_and_std(own)))
    found = mean_of_tests(folds).numpy()
    alike = sum(test @ head / (train @ head).std(0) for head in heads)
    np.testing.assert_array_equal(found.argsort(0), alike.argsort(0))
    by_the_loud_one = (10 * test @ heads[louder] + test @ heads[1 - louder]).argsort(0)
    assert (by_the_loud_one != alike.argsort(0)).any(0).all()


N_NOISE = 60


def pooled_r(fits, responses):
    given = [piece for fold in fits.folds for piece in fold.held_out]
    raw, even = np.empty(responses.shape), np.empty(responses.shape)
    for piece, values in zip(given, comparable(given, responses.mean(0)), strict=True):
        raw[piece.rows], even[piece.rows] = piece.predictions, values
    return pearson_r(raw, responses.numpy()).mean(), pearson_r(even, responses.numpy()).mean()


def test_predictions_of_noise_have_an_r_of_zero_and_not_below(tmp_path):
    """Responses that have nothing to do with the images: pooled as they are, predictions correlate below 0."""
    rng = np.random.default_rng(4)
    shapes = {"low": (3, 3, 6), "deep": (2, 2, 8)}
    rows = {name: Row(shape, "float16") for name, shape in shapes.items()}
    store = create_store(tmp_path, "f", {"x": 1}, np.arange(N_NOISE + 2), N_NOISE, rows, {})
    store.append({n: rng.normal(size=(N_NOISE + 2, *shape)).astype(np.float16) for n, shape in shapes.items()})
    plan = plan_of(rng.permutation(73_000)[:N_NOISE])
    kernels = scaled_kernels([LayerRows(store, tuple(shapes), "cpu", np.inf)], plan)
    responses = torch.tensor(rng.normal(size=(N_NOISE, 1500)), dtype=torch.float32)
    priors = prior_set(kernels[0].rows.grids, (None, 0.0, 1.0))[::5]
    solver = LayeredRidge(kernels, plan, RidgeConfig(), priors)
    raw, even = pooled_r(solver.fit(block_of(responses)), responses)
    assert abs(even) < 0.02 and raw < even - 0.05
