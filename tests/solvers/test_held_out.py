"""On features of a trained backbone every choice is made on held-out images, and none on the image it is scored by."""

import numpy as np
import pytest
import torch

from featcache.dataset.splits import assign_folds
from featcache.errors import ConfigError
from heads.config import AdamWConfig, FitConfig, RidgeConfig
from heads.modules.linear import LinearMap
from heads.scores.metrics import pearson_r
from heads.solvers.held_out import TrainedFolds, TunedAdamW, TunedRidge, clean_parts
from heads.solvers.ridge_folds import RidgeFits

N_FOLDS, N_IMAGES, N_FEATURES, N_VERTICES = 3, 150, 12, 5
RIDGE = RidgeConfig(penalties=(1e-3, 1e-1, 1.0, 10.0))
ADAMW = FitConfig(
    loss="mse", solver="adamw", n_folds=N_FOLDS, adamw=AdamWConfig(learning_rate=1e-2, epochs=6, batch_size=16)
)


def planted(seed=0):
    """Ids, folds, features of three backbones, and responses that are linear in what they have in common."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(73_000)[:N_IMAGES]
    common = rng.normal(size=(N_IMAGES, N_FEATURES))
    features = [common + 0.3 * rng.normal(size=common.shape) for _ in range(N_FOLDS)]
    responses = common @ rng.normal(size=(N_FEATURES, N_VERTICES)) + 2 * rng.normal(size=(N_IMAGES, N_VERTICES))
    tensors = [torch.tensor(x, dtype=torch.float32) for x in features]
    return ids, assign_folds(ids, N_FOLDS, 0), tensors, torch.tensor(responses, dtype=torch.float32)


def solvers(ids, folds, features, held_out=range(N_FOLDS)):
    held_out = list(held_out)
    return {
        "ridge": TunedRidge(features, folds, held_out, ids, RIDGE),
        "adamw": TunedAdamW(features, folds, held_out, ids, ADAMW),
    }


def slow_ridge(x, y, penalty):
    """Weights and intercept in float64, the penalty in units of the mean eigenvalue of the scatter."""
    x, y = x.double().numpy(), y.double().numpy()
    centred = x - x.mean(0)
    gram = centred.T @ centred
    weights = np.linalg.solve(gram + penalty * np.linalg.eigvalsh(gram).mean() * np.eye(len(gram)), centred.T @ y)
    return weights, y.mean(0) - x.mean(0) @ weights


def test_ridge_takes_for_each_part_the_penalty_that_is_best_on_the_other_parts():
    ids, folds, features, responses = planted()
    for k, found in enumerate(solvers(ids, folds, features)["ridge"].fit(responses)):
        x, trained, held_out = features[k], np.flatnonzero(folds != k), np.flatnonzero(folds == k)
        maps = [slow_ridge(x[trained], responses[trained], penalty) for penalty in RIDGE.penalties]
        errors = np.stack([(responses.numpy() - x.numpy() @ w - b) ** 2 for w, b in maps])
        for rows, head in [*found.held_out, (np.array([], dtype=int), found.final)]:
            best = errors[:, np.setdiff1d(held_out, rows)].sum(1).argmin(0)
            for vertex, penalty in enumerate(best):
                np.testing.assert_allclose(head.weights[:, vertex], maps[penalty][0][:, vertex], rtol=1e-3, atol=1e-4)
        assert sorted(np.concatenate([rows for rows, _ in found.held_out])) == held_out.tolist()


@pytest.mark.parametrize("kind", ["ridge", "adamw"])
def test_no_image_has_a_say_in_the_head_that_predicts_it(kind):
    ids, folds, features, responses = planted()
    before = solvers(ids, folds, features)[kind].fit(responses)
    rows, head = before[1].held_out[2]
    other = responses.clone()
    other[rows] = torch.randn(len(rows), N_VERTICES) * 50
    moved = [x.clone() for x in features]
    moved[1][rows] = 50 * torch.randn(len(rows), N_FEATURES)
    after = solvers(ids, folds, moved)[kind].fit(other)[1].held_out[2][1]
    assert torch.equal(after.weights, head.weights) and torch.equal(after.intercept, head.intercept)


@pytest.mark.parametrize("kind", ["ridge", "adamw"])
def test_every_image_is_predicted_once_by_a_head_of_its_own_fold(kind):
    ids, folds, features, responses = planted()
    for k, found in enumerate(solvers(ids, folds, features)[kind].fit(responses)):
        rows = np.concatenate([rows for rows, _ in found.held_out])
        assert sorted(rows) == np.flatnonzero(folds == k).tolist()


def test_some_folds_alone_are_what_they_are_among_all():
    ids, folds, features, responses = planted()
    whole = solvers(ids, folds, features)["ridge"].fit(responses)
    (alone,) = solvers(ids, folds, features[2:], held_out=[2])["ridge"].fit(responses)
    assert torch.equal(alone.final.weights, whole[2].final.weights)


def test_features_that_learnt_the_noise_of_their_training_images_do_not_fool_it():
    """A backbone that memorised responses looks perfect on its training images, and choices made there trust it."""
    rng = np.random.default_rng(1)
    ids, folds, features, responses = planted(1)
    memorised = []
    for k, x in enumerate(features):
        noise = torch.tensor(0.1 * rng.normal(size=(N_IMAGES, 40)), dtype=torch.float32)
        trained = torch.tensor(folds != k)
        noise[trained] += 0.05 * responses[trained] @ torch.randn(N_VERTICES, 40)
        memorised.append(torch.cat([x, noise], 1))

    def r(fits):
        out = np.empty((N_IMAGES, N_VERTICES))
        for x, fit in zip(memorised, fits, strict=True):
            for rows, head in fit.held_out:
                out[rows] = head(x[rows])
        return pearson_r(out, responses).mean()

    wide = RidgeConfig()
    clean = TunedRidge(memorised, folds, list(range(N_FOLDS)), ids, wide).fit(responses)
    naive = np.empty((N_IMAGES, N_VERTICES))
    for k, x in enumerate(memorised):
        (piece,) = RidgeFits(x, folds, wide).fit(responses).folds[k].held_out
        naive[piece.rows] = piece.predictions
    assert r(clean) > pearson_r(naive, responses).mean() + 0.02


def test_trained_heads_are_used_as_they_are():
    _, folds, _, responses = planted()
    maps = [LinearMap(torch.randn(N_FEATURES, N_VERTICES), torch.randn(N_VERTICES)) for _ in range(2)]
    fits = TrainedFolds({"lh": maps}, folds, [0, 2]).fit(responses, hemisphere="lh")
    for fit, fold, head in zip(fits, (0, 2), maps, strict=True):
        ((rows, used),) = fit.held_out
        assert rows.tolist() == np.flatnonzero(folds == fold).tolist()
        assert torch.equal(used.weights, head.weights) and torch.equal(fit.final.intercept, head.intercept)


def test_parts_cover_a_fold_and_leave_something_to_choose_by():
    rng = np.random.default_rng(0)
    for n in (12, 40, 300):
        held_out = rng.permutation(1000)[:n]
        ids = rng.permutation(73_000)[:1000]
        parts = clean_parts(ids, held_out, 0)
        assert sorted(np.concatenate(parts)) == sorted(held_out)
        assert all(n - len(part) >= 2 for part in parts) and len(parts) > 1


def test_a_fold_too_small_to_choose_on_is_refused():
    with pytest.raises(ConfigError, match="fold 1: expected enough held-out images to choose by"):
        clean_parts(np.arange(10), np.array([3, 5]), 1)
