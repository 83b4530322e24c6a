"""Predictions of a surface, put together from blocks and folds, equal a slow formula, vertex by vertex."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError
from featcache.machine.tensors import Spool
from heads.fit.out_of_fold import block_of, predict_surface
from heads.solvers.base import Fits, FoldFit, Piece
from support.problems import responding

N_VERTICES, N_FOLDS, N_FEATURES = 5, 3, 4
NEVER = 7  # a training image that no piece holds


class Recorded:
    """A solver whose predictions are a formula of fold, row and vertex; it keeps the blocks that it was given.

    Every fold's images are in two pieces, by heads of different level and spread, as where a backbone was trained.
    """

    def __init__(self, n_train, n_test, vertex_block):
        self.n_train, self.n_test, self.vertex_block, self.blocks = n_train, n_test, vertex_block, []

    def rows(self, k, half):
        return np.setdiff1d(np.arange(self.n_train), [NEVER])[k::N_FOLDS][half::2]

    def held_out(self, k, half, vertices):
        rows = self.rows(k, half)
        return np.sin(1 + 3 * rows[:, None] + 7 * vertices[None] + 11 * k + 13 * half)

    def level(self, k, half, vertices):
        return 0.5 * k - half + vertices

    def spread(self, k, half, vertices):
        return 1.0 + k + 0.5 * half + 0.1 * vertices

    def test(self, k, vertices):
        return np.cos(np.arange(self.n_test)[:, None] + 2 * vertices[None] + 5 * k)

    def saved(self, k, vertices):
        return np.arange(N_FEATURES)[:, None] + 10.0 * vertices[None] + 100 * k

    def fit(self, block):
        self.blocks.append(block)
        vertices = np.arange(block.vertices.start, block.vertices.stop)
        folds = []
        for k in range(N_FOLDS):
            pieces = [
                Piece(self.rows(k, half), *(tensor(part(k, half, vertices)) for part in self.parts)) for half in (0, 1)
            ]
            test = (self.test(k, vertices), self.level(k, 2, vertices), self.spread(k, 2, vertices))
            folds.append(FoldFit(pieces, *map(tensor, test)))
        saved = {(f"fold{k}.", "weights"): tensor(self.saved(k, vertices)) for k in range(N_FOLDS)}
        return Fits(folds, saved | {("", "intercept"): tensor(vertices)})

    @property
    def parts(self):
        return self.held_out, self.level, self.spread


def tensor(values):
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


@pytest.fixture
def subject(tiny, tmp_path):
    found = open_challenge(tiny).subjects[0]
    rng = np.random.default_rng(0)
    responses = {s: rng.normal(2, 3, size=(len(found.train), n)) for s, n in (("lh", N_VERTICES), ("rh", 3))}
    return responding(found, {surface: values.astype(np.float16) for surface, values in responses.items()}, tmp_path)


@pytest.fixture(params=[2, 1, 3, N_VERTICES, 100, None])
def solver(request, subject):
    return Recorded(len(subject.train), len(subject.test), request.param)


def test_every_row_is_predicted_by_its_own_piece_at_one_level_and_scale(subject, solver):
    predictions, _ = predict_surface(solver, subject, "lh", lambda _: None)
    n_train, level = len(subject.train), np.load(subject.response_paths["lh"]).astype(np.float64).mean(0)
    expected = np.full((n_train, N_VERTICES), np.nan)
    pieces = [(k, half) for k in range(N_FOLDS) for half in (0, 1)]
    for vertex in range(N_VERTICES):
        common = np.mean([solver.spread(k, half, vertex) for k, half in pieces])
        for k, half in pieces:
            own = solver.held_out(k, half, np.array([vertex]))[:, 0]
            z = (own - solver.level(k, half, vertex)) / solver.spread(k, half, vertex)
            expected[solver.rows(k, half), vertex] = level[vertex] + common * z
    assert predictions.shape == (n_train + len(subject.test), N_VERTICES) and predictions.dtype == np.float32
    np.testing.assert_allclose(predictions[:n_train], expected, rtol=1e-5, atol=1e-4)
    assert np.isnan(predictions[NEVER]).all() and np.isnan(predictions).any(1).sum() == 1


def test_test_rows_are_the_mean_over_folds_at_one_level_and_scale(subject, solver):
    predictions, _ = predict_surface(solver, subject, "lh", lambda _: None)
    vertices = np.arange(N_VERTICES)
    level, spread = (
        np.mean([part(k, 2, vertices) for k in range(N_FOLDS)], 0) for part in (solver.level, solver.spread)
    )
    scores = [
        (solver.test(k, vertices) - solver.level(k, 2, vertices)) / solver.spread(k, 2, vertices)
        for k in range(N_FOLDS)
    ]
    expected = level + spread * np.mean(scores, 0)
    np.testing.assert_allclose(predictions[len(subject.train) :], expected, rtol=1e-5, atol=1e-6)


def test_saved_tensors_are_put_together_over_blocks(subject, solver):
    _, saved = predict_surface(solver, subject, "lh", lambda _: None)
    vertices = np.arange(N_VERTICES)
    assert list(saved) == [("fold0.", "weights"), ("fold1.", "weights"), ("fold2.", "weights"), ("", "intercept")]
    for k in range(N_FOLDS):
        np.testing.assert_array_equal(saved[f"fold{k}.", "weights"], solver.saved(k, vertices).astype(np.float32))
    np.testing.assert_array_equal(saved["", "intercept"], vertices)


def test_a_block_has_its_vertices_of_responses_ceilings_and_rois(subject, solver):
    predict_surface(solver, subject, "lh", lambda _: None)
    step = min(solver.vertex_block or N_VERTICES, N_VERTICES)
    starts = range(0, N_VERTICES, step)
    assert [block.vertices for block in solver.blocks] == [slice(k, min(k + step, N_VERTICES)) for k in starts]
    responses = np.load(subject.response_paths["lh"])
    for block in solver.blocks:
        own = block.vertices
        assert block.surface == "lh" and block.responses.dtype == torch.float32
        np.testing.assert_array_equal(block.responses, responses[:, own].astype(np.float32))
        np.testing.assert_array_equal(block.all_responses, responses)
        np.testing.assert_array_equal(block.noise_ceiling, subject.noise_ceiling["lh"][own])
        assert [mask.tolist() for mask in block.rois] == [m[own].tolist() for m in subject.rois["lh"].values()]


def test_progress_counts_every_vertex_once(subject, solver):
    steps = []
    predict_surface(solver, subject, "lh", steps.append)
    assert sum(steps) == N_VERTICES and len(steps) == len(solver.blocks)


def test_a_surface_without_ceilings_or_rois_says_so(subject):
    bare = replace(subject, noise_ceiling={"lh": None, "rh": None}, rois={"lh": {}, "rh": {}})
    block = block_of(bare, "rh", bare.responses("rh"), slice(1, 3), "cpu")
    assert block.noise_ceiling is None and block.rois == () and block.responses.shape == (len(subject.train), 2)


def test_changing_a_block_leaves_the_responses_on_disk(subject):
    """Solvers centre responses in place; the next block and the next solver must find them as they were."""
    before = subject.response_paths["lh"].read_bytes()
    block = block_of(subject, "lh", subject.responses("lh"), slice(0, 2), "cpu")
    block.responses.zero_()
    assert subject.response_paths["lh"].read_bytes() == before
    assert not np.array_equal(subject.responses("lh")[:, :2], block.responses)


def test_a_surface_without_vertices_has_predictions_of_none(subject, tmp_path):
    empty = responding(subject, {"lh": np.zeros((len(subject.train), 0), np.float32)}, tmp_path / "empty")
    solver = Recorded(len(subject.train), len(subject.test), 2)
    predictions, saved = predict_surface(solver, empty, "lh", lambda _: None)
    assert predictions.shape == (len(subject.image_ids), 0) and saved == {} and solver.blocks == []


class Large(Recorded):
    """A solver whose device has memory for `fitting` vertices at a time."""

    fitting = 100

    def fit(self, block):
        if block.responses.shape[1] > self.fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        fits = super().fit(replace(block, responses=block.responses.cpu()))
        moved = [
            FoldFit(
                [Piece(piece.rows, *(part.cuda() for part in piece[1:])) for piece in fold.held_out],
                *(part.cuda() for part in fold[1:4]),
            )
            for fold in fits.folds
        ]
        return Fits(moved, {name: values.cuda() for name, values in fits.saved.items()})


def test_blocks_that_a_device_does_not_hold_are_halved_and_nothing_is_lost(
    pretended_cuda, subject, monkeypatch, said, tmp_path
):
    monkeypatch.setattr("heads.fit.out_of_fold._LEAST", 1)
    n_train, n_test = len(subject.train), len(subject.test)
    expected = predict_surface(Recorded(n_train, n_test, N_VERTICES), subject, "lh", lambda _: None)
    advanced, solver = [], Large(n_train, n_test, N_VERTICES)
    solver.fitting = 2
    found = predict_surface(solver, subject, "lh", advanced.append, "cuda", spool=Spool(tmp_path))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert list(found[1]) == list(expected[1]) and sum(advanced) == N_VERTICES
    assert all(torch.equal(found[1][name], values) for name, values in expected[1].items())
    assert [line for line in said if "full" in line] == ["the device's memory is full: goes on with 2 vertices"]


@pytest.mark.parametrize(("vertex_block", "tried"), [(N_VERTICES, 3), (None, N_VERTICES)], ids=["blocks", "whole"])
def test_what_a_device_does_not_hold_in_any_way_is_one_line(
    pretended_cuda, subject, monkeypatch, said, vertex_block, tried
):
    monkeypatch.setattr("heads.fit.out_of_fold._LEAST", 3)
    solver = Large(len(subject.train), len(subject.test), vertex_block)
    solver.fitting = 2
    with pytest.raises(
        ConfigError, match=f"enough memory for {tried} vertices; found CUDA out of memory.*--device cpu"
    ):
        predict_surface(solver, subject, "lh", lambda _: None, "cuda")


def test_a_block_waits_for_the_device_once(pretended_cuda, subject):
    solver = Large(len(subject.train), len(subject.test), 2)
    predict_surface(solver, subject, "lh", lambda _: None, "cuda")
    assert len(pretended_cuda.waits_in("heads/fit/out_of_fold.py")) + len(
        [wait for wait in pretended_cuda.waits_in("featcache/machine/device.py") if wait.operation == "synchronize"]
    ) == -(-N_VERTICES // 2)
