"""Heads that were trained with the backbone are taken as they are, of the checkpoints that made the features."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.dataset.algonauts import open_challenge
from featcache.errors import CheckpointError, ConfigError, LeakError
from featcache.workdir import Workdir
from heads.config import FitConfig
from heads.features.rows import LayerRows
from heads.fit.out_of_fold import predict_surface
from heads.modules.linear import LinearMap
from heads.solvers.memory import Sizes
from heads.solvers.trained import TrainedMaps, TrainedModules, build, predict, read_by_its_heads
from support.plans import block_of, plan_of
from support.problems import (
    LAYERS,
    N_VERTICES,
    VECTOR,
    features_of,
    planted_responses,
    problem_of,
    responding,
    trained_heads,
)

N_TRAIN, N_TEST, N_FEATURES = 60, 7, 6
PLAN = plan_of(N_TRAIN, held_out=[0, 2], trained=True)


def responses_of(n_vertices=4):
    return torch.tensor(np.random.default_rng(1).normal(size=(N_TRAIN, n_vertices)), dtype=torch.float32)


def test_trained_heads_are_used_as_they_are():
    torch.manual_seed(0)
    features = [torch.randn(N_TRAIN + N_TEST, N_FEATURES) for _ in range(2)]
    maps = [LinearMap(torch.randn(N_FEATURES, 4), torch.randn(4)) for _ in range(2)]
    other = [LinearMap(torch.randn(N_FEATURES, 4), torch.randn(4)) for _ in range(2)]
    fits = TrainedMaps({"lh": maps, "rh": other}, features, PLAN).fit(block_of(responses_of()))
    for k, (fold, head, rows) in enumerate(zip(fits.folds, maps, features, strict=True)):
        (piece,) = fold.held_out
        assert np.array_equal(piece.rows, PLAN.inside(k))
        torch.testing.assert_close(piece.predictions, head(rows[piece.rows]))
        own = head(rows[PLAN.outside(k)])
        torch.testing.assert_close(piece.mean, own.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(piece.spread, own.std(0, correction=0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fold.test, head(rows[N_TRAIN:]))
        prefix = PLAN.prefixes[k]
        assert torch.equal(fits.saved[prefix, "weights"], head.weights)
        assert torch.equal(fits.saved[prefix, "intercept"], head.intercept)


class Places(torch.nn.Module):
    """Reads the places of one layer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(36, 4)

    def forward(self, rows):
        return self.layer(rows["low"].flatten(1))


def test_heads_of_places_read_the_rows_of_their_fold(tiny, tmp_path):
    (subject,) = open_challenge(tiny).subjects[:1]
    features = features_of(subject, tmp_path, LAYERS, trained=True)
    rows, n_train = features.read("cpu", np.inf), len(subject.train)
    plan = plan_of(subject.train.ids, trained=True)
    heads = [Places(k).eval().requires_grad_(False) for k in range(3)]
    sizes = Sizes.of_matrix(plan, (len(subject.image_ids), rows[0].n_features), 4)
    fits = TrainedModules({"lh": heads}, rows, plan, sizes).fit(block_of(responses_of()[:n_train]))
    for k, (fold, head) in enumerate(zip(fits.folds, heads, strict=True)):
        expected = head(rows[k].rows(np.arange(len(subject.image_ids))))
        (piece,) = fold.held_out
        assert np.array_equal(piece.rows, plan.inside(k))
        torch.testing.assert_close(piece.predictions, expected[piece.rows])
        torch.testing.assert_close(piece.mean, expected[plan.outside(k)].mean(0))
        torch.testing.assert_close(fold.test, expected[n_train:])
        assert torch.equal(fits.saved[f"fold{k}.", "head.layer.weight"], head.layer.weight)


def test_one_pass_over_the_rows_serves_all_heads(tiny, tmp_path, monkeypatch):
    (subject,) = open_challenge(tiny).subjects[:1]
    (rows,) = features_of(subject, tmp_path, LAYERS).read("cpu", np.inf)
    heads = [Places(0), Places(1)]
    whole = [head(rows.rows(np.arange(len(rows)))) for head in heads]
    reads, honest = [], LayerRows.rows
    monkeypatch.setattr(LayerRows, "rows", lambda self, index: reads.extend(index) or honest(self, index))
    monkeypatch.setattr("heads.solvers.trained._BATCH", 8)
    for found, expected in zip(predict(heads, rows), whole, strict=True):
        torch.testing.assert_close(found, expected.detach())
    assert reads == list(range(len(rows)))


# --- of checkpoints


@pytest.fixture
def made(tiny, tmp_path):
    """A subject with planted responses, and its features with their checkpoints."""
    (subject,) = open_challenge(tiny).subjects[:1]
    own = responding(subject, planted_responses(len(subject.train), LAYERS), tmp_path)
    return own, features_of(own, tmp_path, LAYERS, trained=True, checkpoints=True), tmp_path


def test_heads_of_checkpoints_predict_the_images_of_their_fold(made):
    subject, features, work = made
    problem = problem_of(subject, features, FitConfig(solver="trained"), work)
    solver, rows = build(problem), features.read("cpu", np.inf)
    for surface, n_vertices in N_VERTICES.items():
        found, saved = predict_surface(solver, subject, surface, lambda n: None)
        assert found.shape == (len(subject.image_ids), n_vertices) and np.isfinite(found).all()
        tests = []
        for k in range(3):
            heads = trained_heads(subject, VECTOR, k)
            weights, intercept = (heads[f"{subject.name}.{surface}.{part}"] for part in ("weights", "intercept"))
            expected = rows[k].read("pooled")[:, 0] @ weights + intercept
            tests.append(expected[len(subject.train) :])
            own = solver.fit(block_of(np.array(subject.responses(surface)), surface)).folds[k]
            torch.testing.assert_close(own.held_out[0].predictions, expected[problem.plan.inside(k)])
            assert torch.equal(saved[f"fold{k}.", "weights"], weights)
        np.testing.assert_allclose(found[len(subject.train) :], torch.stack(tests).mean(0), rtol=1e-4, atol=1e-4)


def test_of_all_layers_only_those_are_read_that_the_heads_read(made):
    _, features, work = made
    assert features.names == tuple(LAYERS)
    assert read_by_its_heads(features, work).names == ("pooled",)
    only = read_by_its_heads(replace(features, arrays=("pooled",)), work)
    assert only.names == ("pooled",)


def test_features_without_what_the_heads_read_are_left_whole_and_refused(made):
    subject, features, work = made
    bare = replace(features, arrays=("low",))
    assert read_by_its_heads(bare, work) is bare
    with pytest.raises(ConfigError, match=r"--solver trained: expected .*pooled; found no pooled .*; extract with"):
        build(problem_of(subject, bare, FitConfig(solver="trained"), work))


def test_checkpoints_that_are_gone_are_named(made):
    subject, features, work = made
    gone = features.facts[1].checkpoint
    shutil.rmtree(Workdir(work).checkpoints / gone)
    with pytest.raises(CheckpointError, match=gone):
        build(problem_of(subject, features, FitConfig(solver="trained"), work))


def test_heads_that_saw_an_image_of_their_fold_are_refused(made):
    subject, features, work = made
    problem = problem_of(subject, features, FitConfig(solver="trained"), work)
    plan = replace(problem.plan, held_out=(1, 0, 2))  # as if stores were in another order
    with pytest.raises(LeakError, match="the heads of"):
        build(replace(problem, plan=plan))
