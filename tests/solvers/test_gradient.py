"""The gradient loop recovers what was planted, sees nothing of the held-out fold, and keeps its best epoch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import heads.solvers.gradient
from featcache.dataset.splits import assign_folds
from featcache.errors import ConfigError
from heads.config import HEADS, AdamWConfig, FitConfig
from heads.config.solvers import HeadSpec
from heads.modules.linear import LinearHead, LinearMap, RoiHead
from heads.scores.losses import LOSSES, weighted_sum
from heads.scores.metrics import accuracy_from_r, pearson_r
from heads.solvers.gradient import GradientSolver, Task, calibrate, calibration, train_head
from support.plans import assert_same_fits, block_of, out_of_fold, plan_of
from support.pretended_device import pretended_cuda

FEW = AdamWConfig(learning_rate=1e-2, weight_decay=0.01, epochs=4, batch_size=32)  # where only sameness is asked
QUICK = AdamWConfig(learning_rate=1e-2, weight_decay=0.01, epochs=25, batch_size=32)
N_IMAGES, N_FEATURES, N_VERTICES = 240, 6, 6


def planted(n_images=N_IMAGES, noise=0.3, seed=0):
    """Image ids, features of any size and place, and responses that are linear in them."""
    rng = np.random.default_rng(seed)
    plain = rng.normal(size=(n_images, N_FEATURES))
    responses = plain @ rng.normal(size=(N_FEATURES, N_VERTICES)) / np.sqrt(N_FEATURES)
    responses += noise * rng.normal(size=responses.shape)
    features = plain * np.logspace(-2, 2, N_FEATURES) + np.linspace(-5, 5, N_FEATURES)
    ids = rng.permutation(73_000)[:n_images]
    return ids, torch.tensor(features, dtype=torch.float32), torch.tensor(responses, dtype=torch.float32)


def config_of(loss="mse", head="linear", n_folds=3, seed=0, adamw=QUICK):
    return FitConfig(loss=loss, head=head, solver="adamw", n_folds=n_folds, seed=seed, adamw=adamw)


def fit(ids, features, responses, config, plan=None, test=None, **about):
    """(plan, what each fold's head says of every image): the images, or `test`, are once more the test images."""
    plan = plan or plan_of(ids, config.n_folds, config.seed)
    together = torch.cat([features, features if test is None else test])
    fits = GradientSolver([together], plan, config).fit(block_of(responses, **about))
    return plan, [fold.test for fold in fits.folds]


def out_of_fold_r(ids, features, responses, config, **about):
    """(n_vertices,) mean over folds of each head's r in the fold that it did not see."""
    plan, predictions = fit(ids, features, responses, config, **about)
    r = [pearson_r(one[plan.inside(k)], responses[plan.inside(k)]) for k, one in enumerate(predictions)]
    return np.mean(r, axis=0)


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def differs(one, other):
    return not torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*LOSSES, "smooth_l1+0.5*mnnpc"])
@pytest.mark.parametrize("head", ["linear", "roi"])
def test_a_planted_linear_model_is_recovered_out_of_fold(loss, head):
    masks = (np.arange(N_VERTICES) < 3, np.arange(N_VERTICES) % 2 == 0, np.zeros(N_VERTICES, dtype=bool))
    ceiling = np.full(N_VERTICES, 0.95, dtype=np.float32)
    config = config_of(loss, head)
    if (loss, head) == ("pattern", "roi"):  # without its level and scale, a pattern of three vertices says little
        config = replace(config, roi_loss="smooth_l1")
    r = out_of_fold_r(*planted(), config, noise_ceiling=ceiling, rois=masks)
    assert r.min() > 0.75  # the noise leaves about 0.95


def test_there_is_nothing_to_recover_from_noise():
    ids, features, responses = planted()
    shuffled = responses[torch.randperm(len(responses), generator=torch.Generator().manual_seed(1))]
    assert abs(out_of_fold_r(ids, features, shuffled, config_of()).mean()) < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_predictions_are_in_the_units_of_the_responses(loss):
    ids, features, responses = planted(noise=0.1)
    responses = 2 * responses + 1
    adamw = AdamWConfig(learning_rate=3e-2, weight_decay=0, epochs=40, batch_size=32)
    plan, predictions = fit(ids, features, responses, config_of(loss, adamw=adamw))
    error = (predictions[0] - responses)[plan.inside(0)]
    assert error.square().mean(0).sqrt().max() < 0.8  # the responses spread by 2 around 1; stopping looks at r alone


@pytest.mark.parametrize("loss", ["mse", "mnnpc"])
def test_held_out_images_do_not_reach_their_fold(loss):
    ids, features, responses = planted()
    plan, before = fit(ids, features, responses, config_of(loss, adamw=FEW))
    held_out = plan.inside(1)
    moved, other = features.clone(), responses.clone()
    moved[held_out] = 1e3 * torch.randn(len(held_out), N_FEATURES)
    other[held_out] = 1e3 * torch.randn(len(held_out), N_VERTICES)
    _, after = fit(ids, moved, other, config_of(loss, adamw=FEW), test=features)
    assert_same(before[1:2], after[1:2])
    assert differs(before[0], after[0])
    assert differs(before[2], after[2])


def test_images_that_decide_when_to_stop_are_not_trained_on():
    ids, features, responses = planted()
    config = config_of(adamw=AdamWConfig(learning_rate=3e-3, epochs=1, batch_size=32))  # one epoch: nothing to decide
    plan, before = fit(ids, features, responses, config)
    validated = torch.from_numpy((assign_folds(ids, 10, config.seed + 1) == 0) & (plan.folds != 0))
    assert 5 < validated.sum() < 40
    responses = responses.clone()
    responses[validated] = -responses[validated]
    _, after = fit(ids, features, responses, config)
    assert_same(before[:1], after[:1])


def test_same_seed_same_heads():
    data = planted()
    _, one = fit(*data, config_of(adamw=FEW))
    torch.manual_seed(99)
    _, other = fit(*data, config_of(adamw=FEW))
    assert_same(one, other)


def test_the_seed_decides_the_batches():
    data, plan = planted(), plan_of(N_IMAGES, folds=np.arange(N_IMAGES) % 3)
    one, other = (fit(*data, config_of(seed=seed, adamw=FEW), plan)[1][0] for seed in (0, 1))
    assert differs(one, other)


def test_ceilings_weigh_the_loss():
    data = planted()
    low, high = np.full(N_VERTICES, 0.2), np.full(N_VERTICES, 0.2)
    high[0] = 1
    _, one = fit(*data, config_of("smooth_l1+mnnpc", adamw=FEW), noise_ceiling=low)
    _, other = fit(*data, config_of("smooth_l1+mnnpc", adamw=FEW), noise_ceiling=high)
    assert differs(one[0], other[0])


@pytest.mark.slow
@pytest.mark.parametrize("ceiling", [np.zeros(N_VERTICES), np.r_[0, 0, np.full(N_VERTICES - 2, 0.95)]])
def test_ceilings_of_zero_break_nothing(ceiling):
    r = out_of_fold_r(*planted(), config_of("mnnpc"), noise_ceiling=ceiling.astype(np.float32))
    assert r.min() > 0.75  # of the vertices without a ceiling too: each is trained


@pytest.mark.slow
def test_features_and_responses_that_never_change():
    ids, features, responses = planted()
    features, responses = features.clone(), responses.clone()
    features[:, 2], responses[:, 1] = 1000.1, 0.7
    r = out_of_fold_r(ids, features, responses, config_of("smooth_l1+pearson"))
    assert r[1] == 0
    assert np.isfinite(r).all()
    assert r[[0, 2, 3, 4, 5]].mean() > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*LOSSES])
@pytest.mark.parametrize(("n_images", "n_folds"), [(12, 3), (12, 2), (16, 5)])
def test_a_handful_of_images(loss, n_images, n_folds):
    for seed in range(2):
        data, config = planted(n_images, seed=seed), config_of(loss, n_folds=n_folds, seed=seed, adamw=FEW)
        _, predictions = fit(*data, config, plan_of(data[0], folds=np.arange(n_images) % n_folds))
        assert len(predictions) == n_folds
        assert all(one.isfinite().all() for one in predictions)


def test_too_few_images_to_train_and_to_stop_by_are_refused_before_there_is_a_fit():
    ids, features, _ = planted(5)
    with pytest.raises(ConfigError, match="4 or more"):
        GradientSolver([features], plan_of(ids, folds=np.array([0, 0, 1, 1, 1])), config_of(n_folds=2))


def watched(monkeypatch):
    """Collect the score of every epoch."""
    scores, score = [], heads.solvers.gradient._score
    monkeypatch.setattr(heads.solvers.gradient, "_score", lambda *parts: scores.append(score(*parts)) or scores[-1])
    return scores


def overfitted(config, noise_ceiling=None):
    """A head trained on fewer images than features, and what scored it: few epochs are enough, and more are worse."""
    torch.manual_seed(0)
    features = torch.randn(100, 60)
    responses = features[:, :1] + 3 * torch.randn(100, 4)
    trained, validated = np.arange(50), np.arange(50, 100)
    head = LinearHead(60, 4)
    (best,) = train_head(head, [Task(features, responses, trained, [validated], noise_ceiling)], LOSSES["mse"], config)
    return best, head, features[validated], responses[validated]


@pytest.mark.parametrize("noise_ceiling", [None, np.array([0.2, 0.4, 0.0, 1.0]), np.zeros(4)], ids=["no", "some", "0"])
def test_the_best_epoch_is_kept(noise_ceiling, monkeypatch):
    scores = watched(monkeypatch)
    config = AdamWConfig(learning_rate=0.03, weight_decay=0, epochs=40, batch_size=16, patience=40)
    best, head, features, responses = overfitted(config, noise_ceiling)
    r = pearson_r(best(features), responses)
    counted = noise_ceiling is not None and noise_ceiling.any()
    expected = np.nanmean(accuracy_from_r(r, noise_ceiling)) if counted else r.mean()
    assert len(scores) == 40
    assert max(scores) > max(scores[-5:])  # else the last would do
    assert max(scores) == pytest.approx(expected, abs=1e-6 * max(scores))
    assert differs(best.weights, head.linear_map().weights)  # later steps did not reach into what was kept


def test_patience_ends_the_training(monkeypatch):
    scores = watched(monkeypatch)
    overfitted(AdamWConfig(learning_rate=0.03, weight_decay=0, epochs=200, batch_size=16, patience=3))
    assert len(scores) < 200
    assert np.argmax(scores) == len(scores) - 1 - 3


def test_weights_decay_and_intercepts_do_not():
    torch.manual_seed(0)
    features = torch.randn(200, 5)
    responses = features[:, :2] + 3
    head = LinearHead(5, 2)
    config = AdamWConfig(learning_rate=0.05, weight_decay=10, epochs=60, batch_size=50, patience=60)
    train_head(head, [Task(features, responses, np.arange(150), [np.arange(150, 200)], None)], LOSSES["mse"], config)
    assert head.layer.weight.abs().max() < 0.2
    torch.testing.assert_close(head.layer.bias.detach(), torch.full((2,), 3.0), atol=0.3, rtol=0)


@pytest.mark.parametrize("loss", [*LOSSES])
def test_a_step_does_not_wait_for_the_device(loss):
    """The host waits for what an epoch scores, however many steps the epoch has."""
    torch.manual_seed(0)
    features, responses, ceiling = torch.randn(60, 5), torch.randn(60, 4), np.linspace(0, 1, 4)
    waits = []
    for batch_size in (40, 4):
        with pretended_cuda() as device:
            task = Task(features.to("cuda"), responses.to("cuda"), np.arange(40), [np.arange(40, 60)], ceiling)
            config = AdamWConfig(epochs=2, batch_size=batch_size)
            train_head(LinearHead(5, 4).to("cuda"), [task], LOSSES[loss], config)
            waits.append(len(device.waits))
    assert waits[0] == waits[1] > 0


def test_rows_outside_are_not_touched():
    torch.manual_seed(0)
    features, responses = torch.randn(60, 5), torch.randn(60, 2)
    features[40:50], responses[40:50] = torch.nan, torch.nan
    config = AdamWConfig(epochs=3, batch_size=8)
    (best,) = train_head(
        LinearHead(5, 2),
        [Task(features, responses, np.arange(40), [np.arange(50, 60)], None)],
        LOSSES["pearson"],
        config,
    )
    assert best.weights.isfinite().all()


def test_arguments_are_left_as_they_are():
    ids, features, responses = planted(60)
    ceiling = np.array([0, 0.2, 0.4, 0.6, 0.8, 1])
    before = features.clone(), responses.clone(), ceiling.copy()
    fit(ids, features, responses, config_of("mnnpc", adamw=FEW), noise_ceiling=ceiling)
    assert torch.equal(features, before[0])
    assert torch.equal(responses, before[1])
    np.testing.assert_array_equal(ceiling, before[2])


def test_each_choice_has_the_epoch_that_scored_best_on_its_own_rows(monkeypatch):
    """Two sets of rows that prefer other epochs get other maps out of one training."""
    _, features, responses = planted(120)
    scores = iter([0.1, 0.9, 0.5, 0.5, 0.9, 0.1])  # first choice, second choice, epoch by epoch
    monkeypatch.setattr(heads.solvers.gradient, "_score", lambda *_: next(scores))
    config = AdamWConfig(learning_rate=1e-2, epochs=3, batch_size=32)
    rows = np.arange(80), [np.arange(80, 100), np.arange(100, 120)]
    torch.manual_seed(0)
    late, early = train_head(
        LinearHead(N_FEATURES, N_VERTICES), [Task(features, responses, *rows, None)], LOSSES["mse"], config
    )
    errors = [LOSSES["mse"](one(features[:80]), responses[:80]) for one in (late, early)]
    assert errors[0] < errors[1]


# --- calibration


def test_calibrated_predictions_are_closest_to_the_responses():
    """The slope and shift of each vertex are those of a regression of its responses on its predictions."""
    rng = np.random.default_rng(0)
    predictions = torch.tensor(rng.normal(size=(50, 4)), dtype=torch.float64)
    responses = 3 * predictions + 2 + torch.tensor(rng.normal(size=(50, 4)))
    slope, shift = calibration(predictions, responses)
    for vertex in range(4):
        expected = np.polyfit(predictions[:, vertex], responses[:, vertex], 1)
        np.testing.assert_allclose([slope[vertex], shift[vertex]], expected)


def test_a_vertex_that_is_predicted_the_wrong_way_round_or_not_at_all_has_its_level():
    predictions = torch.tensor([[0.0, 1, 2], [1, 1, 2], [2, 1, 2]])
    responses = torch.tensor([[4.0, 1, 5], [2, 2, 5], [0, 3, 5]])
    slope, shift = calibration(predictions, responses)
    assert slope.tolist() == [0, 0, 0] and shift.tolist() == [2, 2, 5]


def test_a_calibrated_map_keeps_its_directions():
    torch.manual_seed(0)
    features, head = torch.randn(40, 3), LinearMap(torch.randn(3, 2), torch.randn(2))
    responses = 5 * head(features) - 1
    found = calibrate(head, features, responses)
    torch.testing.assert_close(found(features), responses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weights, 5 * head.weights, rtol=1e-4, atol=1e-4)


# --- heads that are no linear map


def make_mlp(n_features, n_vertices, rois):
    """A head of an extension: any module of this signature will do."""
    return torch.nn.Sequential(
        torch.nn.Linear(n_features, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, n_vertices)
    )


@pytest.fixture
def mlp(monkeypatch):
    """Settings of an MLP, as a new entry of the table has it."""
    monkeypatch.setitem(HEADS, "mlp", HeadSpec(module=f"{__name__}:make_mlp"))
    monkeypatch.setattr("heads.solvers.gradient.load", lambda reference: make_mlp)
    return config_of("pearson", "mlp", adamw=AdamWConfig(learning_rate=2e-2, epochs=25, batch_size=32))


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_module_that_is_no_linear_map_is_fitted_out_of_fold(mlp, trained):
    """What is planted here no linear map of the features can say."""
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(N_IMAGES + 20, 2)), dtype=torch.float32)
    signal = features.abs() @ torch.tensor([[1.0, 3, 0], [0, 1, 2]])
    responses = 10 * signal[:N_IMAGES] + 4
    plan = plan_of(rng.permutation(73_000)[:N_IMAGES], trained=trained)
    fits = GradientSolver([features] * plan.n_sources, plan, mlp).fit(block_of(responses))
    found = out_of_fold(fits, N_IMAGES)
    assert pearson_r(found, responses).min() > 0.8
    assert np.sqrt(np.square(found - responses.numpy()).mean(0)).max() < 0.5 * responses.std(0).max()  # in their units
    test = torch.stack([fold.test for fold in fits.folds]).mean(0)
    assert pearson_r(test.numpy(), signal[N_IMAGES:].numpy()).min() > 0.8
    for k, fold in enumerate(fits.folds):
        assert len(fold.held_out) == (len(plan.parts(k)) if trained else 1)
        assert sorted(np.concatenate([piece.rows for piece in fold.held_out])) == plan.inside(k).tolist()
        assert all((piece.std > 0).all() for piece in fold.held_out)


@pytest.mark.slow
def test_a_module_is_calibrated_on_the_rows_that_it_was_trained_on(mlp):
    ids, features, responses = planted()
    plan = plan_of(ids)
    fits = GradientSolver([torch.cat([features, features])], plan, mlp).fit(block_of(10 * responses + 7))
    for k, fold in enumerate(fits.folds):
        trained = plan.split(k, mlp.adamw.validation, mlp.seed).train_rows
        slope, shift = calibration(fold.test[trained], 10 * responses[trained] + 7)
        torch.testing.assert_close(slope, torch.ones(N_VERTICES), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(shift, torch.zeros(N_VERTICES), rtol=0, atol=5e-2)


def test_saved_tensors_of_a_module_rebuild_its_predictions(mlp):
    """With the standardisation of its features; what is not saved is a slope and a shift of each vertex."""
    ids, features, responses = planted()
    mlp = replace(mlp, adamw=FEW)
    fits = GradientSolver([torch.cat([features, features])], plan_of(ids), mlp).fit(block_of(responses))
    assert {prefix for prefix, _ in fits.saved} == {"fold0.", "fold1.", "fold2."}
    for k, fold in enumerate(fits.folds):
        own = {part.removeprefix("head."): t for (prefix, part), t in fits.saved.items() if prefix == f"fold{k}."}
        mean, scale = own.pop("mean"), own.pop("scale")
        head = make_mlp(N_FEATURES, N_VERTICES, ())
        head.load_state_dict({name.removeprefix("head."): values for name, values in own.items()})
        with torch.no_grad():
            rebuilt = head.eval()((features - mean) / scale)
        varies = fold.test.std(0) > 1e-4
        assert varies.any()
        np.testing.assert_allclose(pearson_r(rebuilt[:, varies], fold.test[:, varies]), 1, atol=1e-4)


@pytest.mark.slow
def test_held_out_images_do_not_reach_the_module_that_predicts_them(mlp):
    ids, features, responses = planted()
    mlp = replace(mlp, adamw=FEW)
    plan, before = fit(ids, features, responses, mlp)
    other = responses.clone()
    other[plan.inside(1)] = 1e3 * torch.randn(len(plan.inside(1)), N_VERTICES)
    _, after = fit(ids, features, other, mlp)
    assert torch.equal(before[1], after[1]) and differs(before[0], after[0])


def test_fits_of_one_solver_do_not_depend_on_what_it_fitted_before():
    ids, features, responses = planted()
    solver = GradientSolver([features], plan_of(ids), config_of(adamw=FEW))
    first = solver.fit(block_of(responses))
    solver.fit(block_of(responses.flip(0), "rh"))
    assert_same_fits(first, solver.fit(block_of(responses)), rtol=0, atol=0)


@pytest.mark.parametrize(("roi_loss", "differ"), [("smooth_l1", True), ("same", False)])
def test_a_roi_head_finds_the_optimum_of_its_own_loss(roi_loss, differ):
    """Noise is skewed: the mean, which mse asks for, is above the values that smooth_l1 asks for."""
    _, features, responses = planted(noise=0.0)
    features = (features - features.mean(0)) / features.std(0)
    skewed = np.random.default_rng(1).exponential(size=responses.shape) ** 2
    responses = responses + torch.tensor(2 * skewed, dtype=torch.float32)
    config = replace(config_of("mse", "roi"), roi_loss=roi_loss)
    roi = torch.arange(N_VERTICES) < 4
    torch.manual_seed(0)
    head = RoiHead(N_FEATURES, N_VERTICES, [roi])
    loss = head.outputs.averaged(weighted_sum(config.terms), weighted_sum(config.roi_terms))
    adamw = AdamWConfig(learning_rate=0.1, weight_decay=0, epochs=200, batch_size=120, patience=200)
    rows = np.arange(N_IMAGES)
    train_head(head, [Task(features, responses, rows, [rows[:40]], None)], loss, adamw)
    whole, of_roi = head.layer.bias[:N_VERTICES][roi].detach(), head.layer.bias[N_VERTICES:].detach()
    torch.testing.assert_close(whole, responses.mean(0)[roi], atol=0.2, rtol=0)
    assert bool((whole - of_roi > 0.5).all()) is differ
    if not differ:
        torch.testing.assert_close(whole, of_roi, atol=0.05, rtol=0)


def test_roi_heads_trained_one_by_one_differ_from_their_mean_under_another_loss_for_rois():
    masks = (np.arange(N_VERTICES) < 3,)
    predictions = [
        fit(*planted(), replace(config_of("mse", "roi", adamw=FEW), roi_loss=roi_loss), rois=masks)[1]
        for roi_loss in ("same", "smooth_l1")
    ]
    assert differs(predictions[0][0][:, 0], predictions[1][0][:, 0])
    torch.testing.assert_close(predictions[0][0][:, 5], predictions[1][0][:, 5])  # of no ROI
