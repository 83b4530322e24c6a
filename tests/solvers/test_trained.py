"""Heads that were trained with the backbone are taken as they are, of the checkpoints that made the features."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.cache.extract import extract
from featcache.cache.pixels import cache_pixels
from featcache.cache.store import open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.errors import CheckpointError, ConfigError, LeakError
from featcache.workdir import Workdir
from heads.backbones.stages import train_stage
from heads.config import FitConfig, StageConfig, TrainConfig
from heads.features.rows import LayerRows
from heads.features.sets import feature_sets
from heads.fit.out_of_fold import predict_surface
from heads.fit.run import fit_heads
from heads.modules.linear import LinearMap
from heads.modules.saved import spatial_head_of
from heads.scores.metrics import pearson_r
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
        torch.testing.assert_close(piece.std, own.std(0, correction=0), rtol=1e-3, atol=1e-4)
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
            seen = expected[problem.plan.outside(k)]
            tests.append((expected[len(subject.train) :], seen.mean(0), seen.std(0, correction=0)))
            own = solver.fit(block_of(np.array(subject.responses(surface)), surface)).folds[k]
            torch.testing.assert_close(own.held_out[0].predictions, expected[problem.plan.inside(k)])
            assert torch.equal(saved[f"fold{k}.", "weights"], weights)
        values, means, stds = (torch.stack(parts) for parts in zip(*tests, strict=True))
        of_one_spread = (values - means[:, None]) / stds[:, None] * stds.mean(0) + means.mean(0)
        np.testing.assert_allclose(found[len(subject.train) :], of_one_spread.mean(0), rtol=1e-3, atol=1e-3)


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
    with pytest.raises(ConfigError, match=r"--solver trained: .*features pooled .*; found pooled missing .*; extract"):
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


# --- spatial heads that were trained with their backbones

SMALL = BackboneConfig(name="test_resnet", weights="none", size=32)
SPATIAL = TrainConfig(head="spatial", epochs=1, batch_size=8, stop="never", layers="0,pooled", grid="2")


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """A work folder with the checkpoints of two folds, and these."""
    folder = tmp_path_factory.mktemp("checkpoints")
    subjects = open_challenge(tiny).subjects[:1]
    stage = StageConfig(
        stage="finetune", train=SPATIAL, backbone=SMALL, init="none", n_folds=2, device="cpu", workers=1
    )
    return folder, [trained.checkpoint for trained in train_stage(subjects, stage, folder)]


@pytest.fixture(scope="module")
def extracted(tiny, checkpoints, tmp_path_factory):
    """Makes a work folder with nothing but their features, on a grid; one more layer than the heads read is there."""
    made = {}

    def make(grid, folder):
        if grid not in made:
            made[grid] = tmp_path_factory.mktemp("extracted")
            (made[grid] / "checkpoints").symlink_to(checkpoints[0] / "checkpoints")
            layers = LayerConfig(layers=("0", "1", "pooled"), grid=grid)
            config = ExtractConfig(backbone=SMALL, layers=layers, checkpoint="auto", workers=1, device="cpu")
            extract(open_challenge(tiny).subjects[:1], config, made[grid])
        for part in ("checkpoints", "features.zarr"):
            (folder / part).symlink_to(made[grid] / part)
        return folder

    return make


def layer_names(subject, work):
    """Names of the layers that were extracted, in the order of the network."""
    return [name for name in feature_sets(subject, work)[0].names if name != "pooled"]


@pytest.mark.slow
def test_spatial_heads_of_a_checkpoint_predict_what_the_encoder_did(tiny, checkpoints, extracted, tmp_path, said):
    (subject,) = open_challenge(tiny).subjects[:1]
    work = extracted("2", tmp_path)
    (features,), layers = feature_sets(subject, work), f"{layer_names(subject, work)[0]},pooled"
    problem = problem_of(subject, *features.reading(layers), FitConfig(solver="trained"), work)
    solver = build(problem)
    (fitted,) = fit_heads([subject], FitConfig(solver="trained", layers=layers), work)
    store = open_store(fitted.path)
    for checkpoint in checkpoints[1]:
        backbone, held_out = checkpoint.backbone(), problem.plan.inside(checkpoint.fold)
        assert not np.isin(subject.train.ids[held_out], checkpoint.seen_ids).any()
        (pixels,) = cache_pixels([subject], backbone, tmp_path, 1.0, 1)
        with torch.inference_mode():
            rows = backbone.read(backbone.normalise(pixels.read(held_out)), backbone.taps(SPATIAL.tapped))
        for surface in subject.surfaces:
            head = spatial_head_of(checkpoint.heads(), [subject.name], subject.name, surface)
            block = block_of(np.array(subject.responses(surface)), surface)
            (piece,) = solver.fit(block).folds[checkpoint.fold].held_out
            assert np.array_equal(piece.rows, held_out)
            torch.testing.assert_close(piece.predictions, head(rows), rtol=1e-2, atol=1e-2)  # rows are float16
            stored = store.read(surface)[: store.n_train][held_out]
            assert np.median(pearson_r(stored, head(rows).numpy())) > 0.999


@pytest.mark.slow
def test_spatial_heads_of_a_checkpoint_are_found_among_more_layers(tiny, extracted, tmp_path, said):
    (subject,) = open_challenge(tiny).subjects[:1]
    work = extracted("2", tmp_path)
    read, spare = layer_names(subject, work)
    (fitted,) = fit_heads([subject], FitConfig(solver="trained"), work)
    store = open_store(fitted.path)
    assert store.complete and set(store.key["features"]["read"]) == {read, "pooled"}
    assert spare in feature_sets(subject, work)[0].names


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "lacking"), [("3", "nothing"), ("2", "a layer"), ("2", "layers")])
def test_features_that_spatial_heads_cannot_read_are_refused(tiny, extracted, tmp_path, said, grid, lacking):
    (subject,) = open_challenge(tiny).subjects[:1]
    work = extracted(grid, tmp_path)
    first, second = layer_names(subject, work)
    layers = {"nothing": f"{first},pooled", "a layer": f"{second},pooled", "layers": "pooled"}[lacking]
    with pytest.raises(
        ConfigError, match=r"--solver trained: expected .*; found .* missing .*; extract with .*\(2 places"
    ) as refusal:
        fit_heads([subject], FitConfig(solver="trained", layers=layers), work)
    assert "\n" not in str(refusal.value) and not (work / "predictions.zarr").exists()
