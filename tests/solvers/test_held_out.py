"""On features of a trained backbone every choice is made on held-out images, and none on the image it is scored by."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from featcache.dataset.splits import BY_ID, Split, assign_folds
from featcache.errors import ConfigError, LeakError
from heads.config import AdamWConfig, FitConfig, RidgeConfig
from heads.scores.metrics import pearson_r
from heads.solvers.gradient import GradientSolver
from heads.solvers.held_out import FoldPlan, clean_parts, stop_split
from heads.solvers.ridge_folds import RidgeFolds, TrainedBackboneRidge
from support.plans import assert_same_fits, block_of, out_of_fold, plan_of

N_FOLDS, N_IMAGES, N_FEATURES, N_VERTICES = 3, 150, 12, 5
RIDGE = RidgeConfig(penalties=(1e-3, 1e-1, 1.0, 10.0))
ADAMW = FitConfig(
    loss="mse", solver="adamw", n_folds=N_FOLDS, adamw=AdamWConfig(learning_rate=1e-2, epochs=6, batch_size=16)
)


def planted(seed=0):
    """A plan, features of three backbones, and responses that are linear in what they have in common."""
    rng = np.random.default_rng(seed)
    plan = plan_of(rng.permutation(73_000)[:N_IMAGES], N_FOLDS, trained=True)
    common = rng.normal(size=(N_IMAGES, N_FEATURES))
    features = [common + 0.3 * rng.normal(size=common.shape) for _ in range(N_FOLDS)]
    responses = common @ rng.normal(size=(N_FEATURES, N_VERTICES)) + 2 * rng.normal(size=(N_IMAGES, N_VERTICES))
    tensors = [torch.tensor(x, dtype=torch.float32) for x in features]
    return plan, tensors, torch.tensor(responses, dtype=torch.float32)


SOLVERS = {
    "ridge": lambda features, plan: TrainedBackboneRidge(features, plan, RIDGE),
    "adamw": lambda features, plan: GradientSolver(features, plan, ADAMW),
}


def slow_ridge(x, y, penalty):
    """Weights and intercept in float64, the penalty in units of the mean eigenvalue of the scatter."""
    x, y = x.double().numpy(), y.double().numpy()
    centred = x - x.mean(0)
    gram = centred.T @ centred
    weights = np.linalg.solve(gram + penalty * np.linalg.eigvalsh(gram).mean() * np.eye(len(gram)), centred.T @ y)
    return weights, y.mean(0) - x.mean(0) @ weights


def test_ridge_takes_for_each_part_the_penalty_that_is_best_on_the_other_parts():
    plan, features, responses = planted()
    for k, found in enumerate(TrainedBackboneRidge(features, plan, RIDGE).heads(responses)):
        x, trained, held_out = features[k], plan.outside(k), plan.inside(k)
        maps = [slow_ridge(x[trained], responses[trained], penalty) for penalty in RIDGE.penalties]
        errors = np.stack([(responses.numpy() - x.numpy() @ w - b) ** 2 for w, b in maps])
        for rows, head in [*found.held_out, (np.array([], dtype=int), found.final)]:
            best = errors[:, np.setdiff1d(held_out, rows)].sum(1).argmin(0)
            for vertex, penalty in enumerate(best):
                np.testing.assert_allclose(head.weights[:, vertex], maps[penalty][0][:, vertex], rtol=1e-3, atol=1e-4)
        assert sorted(np.concatenate([rows for rows, _ in found.held_out])) == held_out.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOLVERS)
def test_no_image_has_a_say_in_the_head_that_predicts_it(kind):
    plan, features, responses = planted()
    before = SOLVERS[kind](features, plan).fit(block_of(responses)).folds[1].held_out[2]
    other = responses.clone()
    other[before.rows] = torch.randn(len(before.rows), N_VERTICES) * 50
    after = SOLVERS[kind](features, plan).fit(block_of(other)).folds[1].held_out[2]
    assert torch.equal(after.predictions, before.predictions)
    assert torch.equal(after.mean, before.mean) and torch.equal(after.std, before.std)
    moved = [x.clone() for x in features]
    moved[1][before.rows] = 50 * torch.randn(len(before.rows), N_FEATURES)
    after = SOLVERS[kind](moved, plan).fit(block_of(other)).folds[1].held_out[2]
    assert torch.equal(after.mean, before.mean) and torch.equal(after.std, before.std)  # of the same weights


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_image_is_predicted_once_by_a_head_of_its_own_fold(kind):
    plan, features, responses = planted()
    for k, fold in enumerate(SOLVERS[kind](features, plan).fit(block_of(responses)).folds):
        assert sorted(np.concatenate([piece.rows for piece in fold.held_out])) == plan.inside(k).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOLVERS)
def test_some_folds_alone_are_what_they_are_among_all(kind):
    plan, features, responses = planted()
    whole = SOLVERS[kind](features, plan).fit(block_of(responses))
    alone = SOLVERS[kind](features[2:], plan_of(plan.image_ids, N_FOLDS, held_out=[2], trained=True))
    found = alone.fit(block_of(responses))
    assert_same_fits(found, whole._replace(folds=whole.folds[2:]), rtol=0, atol=0)
    assert torch.equal(found.saved["fold2.", "weights"], whole.saved["fold2.", "weights"])


def test_features_that_learnt_the_noise_of_their_training_images_do_not_fool_it():
    """A backbone that memorised responses looks perfect on its training images, and choices made there trust it."""
    rng = np.random.default_rng(1)
    plan, features, responses = planted(1)
    memorised = []
    for k, x in enumerate(features):
        noise = torch.tensor(0.1 * rng.normal(size=(N_IMAGES, 40)), dtype=torch.float32)
        trained = plan.outside(k)
        noise[trained] += 0.05 * responses[trained] @ torch.randn(N_VERTICES, 40)
        memorised.append(torch.cat([x, noise], 1))
    clean = out_of_fold(TrainedBackboneRidge(memorised, plan, RidgeConfig()).fit(block_of(responses)), N_IMAGES)
    naive = np.empty((N_IMAGES, N_VERTICES))
    for k, x in enumerate(memorised):
        solver = RidgeFolds(x, plan_of(plan.image_ids, N_FOLDS), RidgeConfig())
        (piece,) = solver.fit(block_of(responses)).folds[k].held_out
        naive[piece.rows] = piece.predictions
    assert pearson_r(clean, responses).mean() > pearson_r(naive, responses).mean() + 0.02


# --- plans


def drawing(numbers):
    """A split that puts rows into these parts, whatever their ids."""
    return SimpleNamespace(parts=lambda ids, n_parts, seed: np.asarray(numbers))


def test_a_frozen_backbones_plan_holds_every_fold_out_in_turn():
    ids = np.random.default_rng(0).permutation(73_000)[:60]
    plan = FoldPlan.of_frozen(ids, 4, 3)
    np.testing.assert_array_equal(plan.folds, assign_folds(ids, 4, 3))
    assert plan.held_out == (0, 1, 2, 3) and len(plan) == 4 and plan.n_train == 60
    assert plan.n_sources == 1 and plan.prefixes == [""] and {plan.source(k) for k in range(4)} == {0}
    assert plan.scored.tolist() == list(range(60))
    for k in range(4):
        assert sorted([*plan.inside(k), *plan.outside(k)]) == list(range(60))
        assert set(plan.folds[plan.inside(k)]) == {k} and k not in plan.folds[plan.outside(k)]
        (part,) = plan.parts(k)
        assert np.array_equal(part, plan.inside(k)) and plan.n_choices(k) == 1


def trained_under(split, n_folds=3, seed=4, held_out=(2, 0)):
    """Features of a backbone that was trained once for each of some folds, and a subject with 60 images."""
    trainings = [SimpleNamespace(split=split.key, n_folds=n_folds, seed=seed, fold=fold) for fold in held_out]
    features = SimpleNamespace(backbone_trained=True, trainings=trainings, title="net 123456", held_out=held_out)
    return SimpleNamespace(name="subj01", train=SimpleNamespace(ids=np.arange(60) * 3)), features


@pytest.mark.parametrize("split", [BY_ID, Split("session", {3 * i: str(i // 5) for i in range(60)})])
def test_features_of_a_trained_backbone_have_the_folds_of_its_training(split):
    subject, features = trained_under(split)
    plan = FoldPlan.of_features(subject, features, 5, 0, split)
    np.testing.assert_array_equal(plan.folds, split.folds(subject.train.ids, 3, 4))
    assert plan.held_out == (2, 0) and plan.backbone_trained and plan.by is split
    frozen = FoldPlan.of_features(subject, SimpleNamespace(backbone_trained=False), 5, 0, split)
    np.testing.assert_array_equal(frozen.folds, split.folds(subject.train.ids, 5, 0))
    assert frozen.held_out == (0, 1, 2, 3, 4) and not frozen.backbone_trained and frozen.by is split


def test_features_of_a_backbone_that_was_trained_under_another_split_are_refused():
    groups = {3 * i: str(i // 5) for i in range(60)}
    session = Split("session", groups)
    subject, features = trained_under(session)
    with pytest.raises(LeakError, match=r"net 123456 of subj01: .*; found id; give --split session, or choose other"):
        FoldPlan.of_features(subject, features, 3, 4)
    with pytest.raises(LeakError, match="train it again: the groups have changed since"):
        FoldPlan.of_features(subject, features, 3, 4, Split("session", groups | {0: "another"}))


def test_a_fold_of_a_training_without_images_is_refused():
    subject, features = trained_under(BY_ID, n_folds=500)
    with pytest.raises(ConfigError, match="expected an image in each of the 500 folds"):
        FoldPlan.of_features(subject, features, 3, 4)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("held_out", [[0], [1, 3], [0, 1, 2], [0, 1, 2, 3], [4, 3, 2, 1, 0]])
def test_no_image_of_a_fold_has_a_say_in_the_scales_of_its_features(held_out, trained):
    """And all other folds have one if the backbone was trained; else two sets of scales are enough for all folds."""
    plan = plan_of(200, 5, held_out=held_out, trained=trained)
    assert plan.n_scales == (len(held_out) if trained else min(len(held_out), 2))
    assert {plan.scales(k) for k in range(len(plan))} == set(range(plan.n_scales))
    assert sorted(k for number in range(plan.n_scales) for k in plan.users(number)) == list(range(len(plan)))
    for k in range(len(plan)):
        rows = plan.scale_rows(plan.scales(k))
        assert len(rows) and not np.intersect1d(rows, plan.inside(k)).size
        if trained:
            assert np.array_equal(rows, plan.outside(k))
    sizes = [len(plan.users(number)) for number in range(plan.n_scales)]
    assert max(sizes) - min(sizes) <= 1


def test_a_plan_of_empty_folds_is_refused():
    with pytest.raises(ConfigError, match="fold"):
        FoldPlan.of_frozen(np.arange(3), 5, 0)


def test_a_trained_backbones_plan_has_a_source_and_a_prefix_for_each_fold_that_there_is():
    plan = plan_of(90, 5, held_out=[3, 1], trained=True)
    assert len(plan) == plan.n_sources == 2 and plan.prefixes == ["fold3.", "fold1."]
    assert [plan.source(k) for k in range(2)] == [0, 1]
    assert set(plan.folds[plan.scored]) == {1, 3} and (plan.folds[plan.inside(0)] == 3).all()
    assert plan.n_choices(0) == len(plan.parts(0)) + 1


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_split_trains_on_no_image_that_it_chooses_by_or_predicts(trained):
    plan = plan_of(np.random.default_rng(1).permutation(73_000)[:90], trained=trained)
    for k in range(len(plan)):
        split = plan.split(k, 10, 0)
        assert not np.intersect1d(split.train_rows, plan.inside(k)).size
        assert len(split.choice_rows) == plan.n_choices(k)
        assert sorted(np.concatenate(split.parts)) == plan.inside(k).tolist()
        for rows in split.choice_rows:
            assert len(rows) >= 2 and not np.intersect1d(rows, split.train_rows).size
        for part, rows in zip(split.parts, split.choice_rows, strict=False):
            assert not np.intersect1d(part, rows).size
        assert np.array_equal(split.choice_rows[-1], plan.inside(k)) is trained
        plan.refuse_leaks(split.choice_rows, split.train_rows, "early stopping")


def test_rows_that_are_trained_on_and_chosen_by_are_refused():
    plan = plan_of(np.array([5, 6, 7, 5, 8, 9]), 2)  # one image twice
    with pytest.raises(LeakError, match="early stopping"):
        plan.refuse_leaks([np.array([3, 4])], np.array([0, 1]), "early stopping")


def test_images_to_stop_by_are_one_in_so_many_outside_the_fold_by_id():
    ids = np.random.default_rng(0).permutation(73_000)[:300]
    outside = np.arange(0, 300, 2)
    trained, stop = stop_split(ids, outside, 1, 10, 4)
    assert stop.tolist() == outside[assign_folds(ids[outside], 10, 5) == 0].tolist()
    assert sorted([*trained, *stop]) == outside.tolist()


@pytest.mark.parametrize("n", [4, 5, 9, 14])
def test_of_few_images_some_are_left_to_train_on_and_some_to_stop_by(n):
    for seed in range(20):
        trained, stop = stop_split(np.arange(n) * 7, np.arange(n), 0, 10, seed)
        assert len(trained) >= 2 and len(stop) >= 2 and len(trained) + len(stop) == n


@pytest.mark.parametrize("n_stop", [0, 1, 2, 3, 27, 28, 29, 30])
def test_a_draw_that_leaves_one_image_on_a_side_is_replaced_by_every_tenth(n_stop):
    ids, drawn = np.arange(30) * 7, np.arange(30) < n_stop
    trained, stop = stop_split(ids, np.arange(30), 0, 10, 0, drawing(np.where(drawn, 0, 1)))
    assert stop.tolist() == (np.flatnonzero(drawn).tolist() if 2 <= n_stop <= 28 else [0, 10, 20])
    assert sorted([*trained, *stop]) == list(range(30))


def test_too_few_images_to_stop_by_are_refused():
    with pytest.raises(ConfigError, match=r"fold 2: expected 4 or more images outside it, .*; found 3"):
        stop_split(np.arange(3), np.arange(3), 2, 10, 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [4, 5, 9, 23])
def test_rows_of_one_picture_train_or_stop_together(n, seed):
    ids = np.random.default_rng(seed).permutation(np.repeat(np.arange(n) * 7, 2))
    trained, stop = stop_split(ids, np.arange(2 * n), 0, 10, seed)
    assert not set(ids[trained]) & set(ids[stop])
    assert len(trained) >= 2 and len(stop) >= 2 and sorted([*trained, *stop]) == list(range(2 * n))


def test_fewer_than_four_pictures_outside_a_fold_are_refused_however_often_they_were_shown():
    with pytest.raises(ConfigError, match="found 3"):
        stop_split(np.repeat(np.arange(3), 5), np.arange(15), 2, 10, 0)


def test_parts_cover_a_fold_and_leave_something_to_choose_by():
    rng = np.random.default_rng(0)
    for n in (12, 40, 300):
        held_out = rng.permutation(1000)[:n]
        ids = rng.permutation(73_000)[:1000]
        parts = clean_parts(ids, held_out, 0)
        assert sorted(np.concatenate(parts)) == sorted(held_out)
        assert all(n - len(part) >= 2 for part in parts) and len(parts) == 4


def test_a_fold_too_small_to_choose_on_is_refused():
    with pytest.raises(ConfigError, match="fold 1: expected enough held-out images to choose by"):
        clean_parts(np.arange(10), np.array([3, 5]), 1)


@pytest.mark.parametrize(
    ("numbers", "sizes"), [([0, 0, 3, 3], [2, 2]), ([1] * 6 + [2] * 2, [6, 2]), ([0, 1, 3, 3], [1, 1, 2])]
)
def test_a_part_without_rows_is_none(numbers, sizes):
    parts = clean_parts(np.arange(20), np.arange(len(numbers)), 0, drawing(numbers))
    assert [len(part) for part in parts] == sizes


@pytest.mark.parametrize("numbers", [[2] * 8, [0] * 7 + [1]])
def test_groups_that_leave_too_little_beside_one_are_cut_by_image_id(numbers):
    ids, held_out = np.arange(100, 120), np.arange(8)
    found = clean_parts(ids, held_out, 0, drawing(numbers))
    assert [part.tolist() for part in found] == [part.tolist() for part in clean_parts(ids, held_out, 0)]


def test_groups_stay_in_one_part_of_a_fold_that_has_many():
    ids = np.arange(200, 320)
    groups = Split("session", {int(one): str(one // 4) for one in ids})
    parts = clean_parts(ids, np.arange(120), 0, groups)
    assert len(parts) == 4 and all(len({int(ids[row]) // 4 for row in part}) == len(part) / 4 for part in parts)


def test_a_picture_in_two_parts_of_a_fold_is_a_leak():
    with pytest.raises(LeakError, match="what is chosen on fold 7"):
        clean_parts(np.array([3, 4, 5, 3, 6, 8]), np.arange(6), 7, drawing([0, 0, 1, 1, 2, 2]))
