"""Ridge under many priors equals the plain formula, recovers planted receptive fields, and leaks nothing."""

import gc

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import heads.solvers.layers.axes
import heads.solvers.layers.sizes
from featcache.cache.store import Row, create_store
from heads.config import RidgeConfig
from heads.features.rows import LayerRows
from heads.scores.metrics import pearson_r
from heads.solvers.base import mean_of_tests
from heads.solvers.layers.axes import Basis, method_for
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import DEPTHS, Prior
from heads.solvers.layers.ridge import LayeredRidge, scaled_kernels
from support.plans import assert_same_fits, block_of, out_of_fold, plan_of

N_FOLDS, N_TRAIN, N_TEST = 3, 60, 7
N = N_TRAIN + N_TEST
WIDE = {"pooled": (6,), "low": (5, 5, 4), "deep.cls": (5,), "deep": (3, 3, 5)}  # more features than images
TALL = {"pooled": (6,), "low": (2, 2, 4)}  # fewer
SHAPES = {"dual": WIDE, "primal": TALL}
IDS = np.random.default_rng(9).permutation(73_000)[:N_TRAIN]
PLANS = {trained: plan_of(IDS, N_FOLDS, trained=trained) for trained in (False, True)}
FOLDS = PLANS[False].folds
PRIORS = [Prior(), Prior(0.1, 0.1, 0.2), Prior(0.7, 0.5, 0.35), Prior(0.3, 0.9, 0.35, 0.5)]
both_shapes = pytest.mark.parametrize("shape", ["dual", "primal"])
both_modes = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
MULTIPLES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


def values_of(shapes, seed=0, n=N):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(n, *shape)).astype(np.float16 if len(shape) > 1 else np.float32)
        for name, shape in shapes.items()
    }


def kernels_of(folder, values, n_train=N_TRAIN):
    rows = {name: Row(one.shape[1:], str(one.dtype)) for name, one in values.items()}
    n = len(next(iter(values.values())))
    number = len(list(folder.iterdir()))
    store = create_store(folder, "f", {"number": number}, np.arange(n), n_train, rows, {})
    store.append(values)
    return LayerKernels(LayerRows(store, tuple(values), "cpu", np.inf), np.arange(n_train), whole=True)


def solver(kernels, priors=PRIORS, plan=PLANS[False], config=None, surfaces=None):
    config = RidgeConfig(penalties=MULTIPLES) if config is None else config
    kernels = kernels if plan.backbone_trained else kernels * plan.n_scales  # one scale for all, unless a test says so
    return LayeredRidge(kernels, plan, config, priors, surfaces)


def responses_of(values, n_vertices=5, noise=1.0, seed=1):
    """Linear in a few of the features, and noise."""
    rng = np.random.default_rng(seed)
    x = flat(values)[:N_TRAIN]
    columns = rng.permutation(x.shape[1])[:8]
    y = x[:, columns] @ rng.normal(size=(8, n_vertices)) + noise * rng.normal(size=(N_TRAIN, n_vertices)) + 3
    return torch.tensor(y, dtype=torch.float32)


def flat(values):
    return np.concatenate([one.astype(np.float64).reshape(len(one), -1) for one in values.values()], 1)


def made(tmp_path, shape="dual", trained=False, seed=0, **about):
    """A solver on one store, or on one for each fold, and what is in them."""
    values = [values_of(SHAPES[shape], seed + k) for k in range(N_FOLDS if trained else 1)]
    return solver([kernels_of(tmp_path, one) for one in values], plan=PLANS[trained], **about), values


# --- against the plain formula


def slow_penalties(x, rows, multiples):
    """In units of the mean eigenvalue that is not null, of the centred scatter."""
    centred = x[rows] - x[rows].mean(0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    return np.array(multiples) * values[values > 1e-7 * values.max()].mean()


def too_free(x, penalty):
    """Infinite where a penalty leaves fewer than 1 % of the degrees of freedom to judge it by."""
    squares = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    return np.inf if (squares / (squares + penalty)).sum() + 1 > 0.99 * len(x) else 0.0


@both_shapes
def test_with_one_prior_and_one_penalty_it_is_plain_ridge(tmp_path, shape):
    for prior in PRIORS[:3]:
        values = values_of(SHAPES[shape])
        kernels = kernels_of(tmp_path, values)
        assert method_for(N_TRAIN * 2 // 3, kernels.rows.n_features) == {"dual": "images", "primal": "features"}[shape]
        x, y = kernels.features(prior).double().numpy(), responses_of(values)
        fits = solver([kernels], [prior], config=RidgeConfig(penalties=(0.3,))).fit(block_of(y))
        for k, fold in enumerate(fits.folds):
            rows = np.flatnonzero(k != FOLDS)
            (penalty,) = slow_penalties(x, rows, (0.3,))
            ridge = Ridge(alpha=penalty, solver="svd").fit(x[:N_TRAIN][rows], y.numpy()[rows].astype(np.float64))
            ((held_out, found, mean, spread),) = fold.held_out
            assert held_out.tolist() == np.flatnonzero(k == FOLDS).tolist()
            np.testing.assert_allclose(found, ridge.predict(x[held_out]), rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(fold.test, ridge.predict(x[N_TRAIN:]), rtol=1e-3, atol=1e-3)
            own = ridge.predict(x[:N_TRAIN][rows])
            np.testing.assert_allclose(mean, own.mean(0), rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(spread, own.std(0), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@both_shapes
def test_penalties_are_those_of_the_least_error_of_refits_without_each_image(tmp_path, shape):
    values, prior = values_of(SHAPES[shape]), Prior(0.3, 0.3, 0.35)
    kernels, y = kernels_of(tmp_path, values), responses_of(values, 3, noise=3.0)
    few = MULTIPLES[1::2]  # every image is refitted without
    x, target = kernels.features(prior).double().numpy(), y.numpy().astype(np.float64)
    fits = solver([kernels], [prior], config=RidgeConfig(penalties=few, selection="loo")).fit(block_of(y))
    for k, fold in enumerate(fits.folds):
        rows = np.flatnonzero(k != FOLDS)
        penalties, errors = slow_penalties(x, rows, few), []
        for penalty in penalties:
            refits = [
                Ridge(alpha=penalty, solver="svd").fit(x[np.delete(rows, i)], target[np.delete(rows, i)])
                for i in range(len(rows))
            ]
            out = np.stack([one.predict(x[[row]])[0] for one, row in zip(refits, rows, strict=True)])
            errors.append(((out - target[rows]) ** 2).mean(0) + too_free(x[rows], penalty))
        best = np.argmin(errors, 0)
        maps = [Ridge(alpha=penalty, solver="svd").fit(x[rows], target[rows]) for penalty in penalties]
        expected = np.stack([maps[p].predict(x[N_TRAIN:])[:, v] for v, p in enumerate(best)], 1)
        np.testing.assert_allclose(fold.test, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("selection", ["loo", "gcv"])
def test_both_errors_lead_to_finite_predictions_that_agree_roughly(tmp_path, selection):
    """Generalised cross-validation is what every subject of the challenge has: more than 1,024 images to fit to."""
    values = values_of(TALL)
    y = responses_of(values, noise=0.3)
    fits = solver([kernels_of(tmp_path, values)], config=RidgeConfig(penalties=MULTIPLES, selection=selection)).fit(
        block_of(y)
    )
    for fold in fits.folds:
        piece = fold.held_out[0]
        assert fold.test.dtype == piece.predictions.dtype == torch.float32
        assert pearson_r(piece.predictions.numpy(), y[piece.rows].numpy()).min() > 0.7


def slow_mixture(kernels, y, rows, priors, multiples, n_images):
    """The documented mean over priors, from exact leave-one-out errors of the hat matrix. Of all images."""
    target, errors, predictions = y.numpy().astype(np.float64), [], []
    variance = target[rows].var(0)
    for prior in priors:
        x = kernels.features(prior).double().numpy()
        own = x[rows] - x[rows].mean(0)
        u, s, _ = np.linalg.svd(own, full_matrices=False)
        found = []
        for penalty in slow_penalties(x, rows, multiples):
            hat = u * (s**2 / (s**2 + penalty)) @ u.T + 1 / len(own)
            error = (((target[rows] - hat @ target[rows]) / (1 - hat.diagonal())[:, None]) ** 2).mean(0)
            found.append(error + too_free(x[rows], penalty))
        which = np.argmin(found, 0)
        maps = [Ridge(alpha=p, solver="svd").fit(x[rows], target[rows]) for p in slow_penalties(x, rows, multiples)]
        errors.append(np.min(found, 0) / variance)
        predictions.append(np.stack([maps[p].predict(x)[:, v] for v, p in enumerate(which)], 1))
    weights = np.exp(-n_images / 8 * (np.array(errors) - np.min(errors, 0)))
    weights[weights < 0.01] = 0
    return (weights[:, None] * np.array(predictions)).sum(0) / weights.sum(0)


@pytest.mark.slow
@both_shapes
def test_priors_are_weighed_by_their_errors_as_documented(tmp_path, shape):
    values = values_of(SHAPES[shape])
    kernels, y = kernels_of(tmp_path, values), responses_of(values, noise=2.0)
    fits = solver([kernels]).fit(block_of(y))
    for k, fold in enumerate(fits.folds):
        rows = np.flatnonzero(k != FOLDS)
        expected = slow_mixture(kernels, y, rows, PRIORS, MULTIPLES, len(rows))
        np.testing.assert_allclose(fold.test, expected[N_TRAIN:], rtol=5e-3, atol=5e-3)
        np.testing.assert_allclose(fold.held_out[0].predictions, expected[fold.held_out[0].rows], rtol=5e-3, atol=5e-3)


# --- what may say what


def scaled_solver(folder, values, plan, priors=PRIORS):
    """A solver whose scales are those that `fit-heads` would take."""
    rows = kernels_of(folder, values, plan.n_train).rows
    config = RidgeConfig(penalties=MULTIPLES)
    return LayeredRidge(scaled_kernels([rows], plan), plan, config, priors)


def with_another_image(values, row):
    """The features, with one image that is far brighter than all others."""
    moved = {name: one.copy() for name, one in values.items()}
    for one in moved.values():
        one[row] = 40 * one[row] + 100
    return moved


def assert_a_held_out_image_moves_nobody_elses(before, after, plan, row):
    """Neither predictions of the other images of its fold and of test images, nor their level and spread."""
    k = int(plan.folds[row])
    (first,), (second,) = before.folds[k].held_out, after.folds[k].held_out
    others = first.rows != row
    torch.testing.assert_close(second.predictions[others], first.predictions[others], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.std, first.std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.mean, first.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.folds[k].test, before.folds[k].test, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(second.predictions[~others], first.predictions[~others], rtol=1e-2)
    for other in set(range(len(plan))) - {k}:  # which train on it
        assert not torch.allclose(after.folds[other].test, before.folds[other].test, rtol=1e-2)


@both_shapes
@pytest.mark.parametrize("k", range(N_FOLDS))
def test_features_of_a_held_out_image_have_no_say_in_what_its_fold_predicts(tmp_path, shape, k):
    values, plan = values_of(SHAPES[shape]), PLANS[False]
    row, y = int(plan.inside(k)[3]), responses_of(values)
    fits = [scaled_solver(tmp_path, v, plan).fit(block_of(y)) for v in (values, with_another_image(values, row))]
    assert_a_held_out_image_moves_nobody_elses(*fits, plan, row)


def test_nor_have_they_where_priors_are_sought_and_images_are_landmarks(tmp_path, monkeypatch):
    monkeypatch.setattr(heads.solvers.layers.axes, "LANDMARKS", 20)
    searching(monkeypatch, images=45, finalists=2)
    values, plan = values_of(WIDE), PLANS[False]
    y = responses_of(values)
    for row in plan.inside(1)[:8]:
        both = [scaled_solver(tmp_path, v, plan) for v in (values, with_another_image(values, row))]
        assert {one.method for one in both} == {"landmarks"}
        assert_a_held_out_image_moves_nobody_elses(*(one.fit(block_of(y)) for one in both), plan, row)


@both_shapes
def test_held_out_responses_have_no_say_in_what_a_frozen_fold_predicts(tmp_path, shape):
    heads, (values,) = made(tmp_path, shape)
    y = responses_of(values)
    before, moved = heads.fit(block_of(y)), y.clone()
    moved[FOLDS == 1] = 50 * torch.randn(int((FOLDS == 1).sum()), y.shape[1])
    after = heads.fit(block_of(moved))
    assert torch.equal(before.folds[1].held_out[0].predictions, after.folds[1].held_out[0].predictions)
    assert torch.equal(before.folds[1].held_out[0].std, after.folds[1].held_out[0].std)
    assert torch.equal(before.folds[1].test, after.folds[1].test)
    assert not torch.equal(before.folds[0].test, after.folds[0].test)


@pytest.mark.slow
@both_shapes
def test_a_part_of_a_trained_fold_is_predicted_by_choices_made_on_the_other_parts(tmp_path, shape):
    heads, values = made(tmp_path, shape, trained=True)
    y = responses_of(values[0], noise=4.0)
    before = heads.fit(block_of(y))
    changed = 0
    for number, piece in enumerate(before.folds[1].held_out):
        moved = y.clone()
        moved[piece.rows] = 50 * torch.randn(len(piece.rows), y.shape[1])
        after = heads.fit(block_of(moved)).folds[1]
        assert torch.equal(after.held_out[number].predictions, piece.predictions)
        assert torch.equal(after.held_out[number].mean, piece.mean)
        others = [i for i in range(len(after.held_out)) if i != number]
        changed += sum(
            not torch.equal(after.held_out[i].predictions, before.folds[1].held_out[i].predictions) for i in others
        )
    assert changed


@both_shapes
def test_a_trained_fold_chooses_penalties_by_its_held_out_images(tmp_path, shape):
    values = [values_of(SHAPES[shape], k) for k in range(N_FOLDS)]
    kernels = [kernels_of(tmp_path, one) for one in values]
    y = responses_of(values[0], noise=4.0)
    target = y.numpy().astype(np.float64)
    for k, fold in enumerate(solver(kernels, PRIORS[:1], PLANS[True]).fit(block_of(y)).folds):
        x = kernels[k].features(PRIORS[0]).double().numpy()
        rows, held_out = np.flatnonzero(k != FOLDS), np.flatnonzero(k == FOLDS)
        penalties = slow_penalties(x, rows, MULTIPLES)
        out = [Ridge(alpha=p, solver="svd").fit(x[rows], target[rows]).predict(x) for p in penalties]
        squares = np.stack([(one[:N_TRAIN] - target) ** 2 for one in out])
        for piece in fold.held_out:
            best = squares[:, np.setdiff1d(held_out, piece.rows)].sum(1).argmin(0)
            expected = np.stack([out[p][piece.rows, v] for v, p in enumerate(best)], 1)
            np.testing.assert_allclose(piece.predictions, expected, rtol=1e-3, atol=2e-3)
        best = squares[:, held_out].sum(1).argmin(0)
        expected = np.stack([out[p][N_TRAIN:, v] for v, p in enumerate(best)], 1)
        np.testing.assert_allclose(fold.test, expected, rtol=1e-3, atol=2e-3)


@both_modes
def test_every_image_is_predicted_once(tmp_path, trained):
    heads, values = made(tmp_path, trained=trained)
    for k, fold in enumerate(heads.fit(block_of(responses_of(values[0]))).folds):
        rows = np.concatenate([piece.rows for piece in fold.held_out])
        assert sorted(rows) == np.flatnonzero(k == FOLDS).tolist()
        assert len(fold.held_out) == (4 if trained else 1)


def test_some_folds_alone_are_what_they_are_among_all(tmp_path):
    values = [values_of(WIDE, k) for k in range(N_FOLDS)]
    kernels, y = [kernels_of(tmp_path, one) for one in values], responses_of(values[0])
    whole = solver(kernels, plan=PLANS[True]).fit(block_of(y))
    alone = solver(kernels[2:], plan=plan_of(IDS, held_out=[2], trained=True)).fit(block_of(y))
    assert_same_fits(alone, whole._replace(folds=whole.folds[2:]))
    assert {prefix for prefix, _ in alone.saved} == {"fold2."}
    for name, tensor in alone.saved.items():
        torch.testing.assert_close(tensor, whole.saved[name])


@both_shapes
def test_each_vertex_is_fitted_as_if_it_were_alone(tmp_path, shape):
    heads, (values,) = made(tmp_path, shape)
    y = responses_of(values)
    whole, alone = heads.fit(block_of(y)), heads.fit(block_of(y[:, 2:3]))
    torch.testing.assert_close(alone.folds[0].test, whole.folds[0].test[:, 2:3], rtol=1e-3, atol=1e-4)


# --- receptive fields


N_MANY = 200


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two layers of smooth noise; every vertex sees the lower left corner of the second alone."""
    rng = np.random.default_rng(3)
    values = {
        "low": rng.normal(size=(N_MANY + 40, 5, 5, 4)).astype(np.float16),
        "deep": rng.normal(size=(N_MANY + 40, 5, 5, 4)).astype(np.float16),
    }
    corner = values["deep"][:, 3:, :2].astype(np.float64).reshape(N_MANY + 40, -1)
    y = corner @ rng.normal(size=(16, 6)) / 4
    y += 0.7 * rng.normal(size=y.shape)
    folder = tmp_path_factory.mktemp("planted")
    plan = plan_of(rng.permutation(73_000)[:N_MANY])
    return kernels_of(folder, values, N_MANY), torch.tensor(y, dtype=torch.float32), plan


# a coarser set than the heads' own: one of its windows is where the vertices see
WINDOWS = [(), *((x, y, 0.16) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8))]
EVERYWHERE = [Prior(*window, depth=depth) for window in WINDOWS for depth in DEPTHS]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def on_planted(planted, priors, **about):
    kernels, y, plan = planted
    fits = solver([kernels], priors, plan, **about).fit(block_of(y[:N_MANY]))
    test = mean_of_tests(fits.folds)
    return fits, pearson_r(test.numpy(), y[N_MANY:].numpy()).mean()


@pytest.fixture(scope="module")
def flat_fit(planted):
    return on_planted(planted, [Prior()])


@pytest.fixture(scope="module")
def whole_fit(planted):
    return on_planted(planted, EVERYWHERE)


@pytest.mark.slow
def test_a_planted_receptive_field_is_found_and_helps(planted, flat_fit, whole_fit):
    (_, flat_r), (fits, r) = flat_fit, whole_fit
    assert r > flat_r + 0.1
    assert pearson_r(out_of_fold(fits, N_MANY), planted[1][:N_MANY].numpy()).mean() > flat_r


def energy(saved):
    """(2, 5, 5) part of the squared weights at each place of both layers."""
    squares = np.stack([saved["", f"{n}.weights"].square().sum(1).reshape(5, 5, 4).sum(2) for n in ("low", "deep")])
    return squares / squares.sum()


def test_weights_have_their_energy_where_it_was_planted(flat_fit, whole_fit):
    there, before = (energy(fits.saved)[1, 3:, :2].sum() for fits, _ in (whole_fit, flat_fit))
    assert there > 0.6 and there > before + 0.15  # 4 of 50 places


def searching(monkeypatch, images=50, finalists=3):
    monkeypatch.setattr(heads.solvers.layers.sizes, "SEARCH_IMAGES", images)
    monkeypatch.setattr(heads.solvers.layers.sizes, "FINALISTS", dict.fromkeys(("images", "landmarks"), finalists))
    monkeypatch.setattr(heads.solvers.layers.sizes, "FINALISTS_TOGETHER", finalists)


@pytest.mark.slow
def test_a_search_on_a_part_of_the_images_finds_it_too(planted, flat_fit, whole_fit, monkeypatch):
    searching(monkeypatch, images=99)
    fits, r = on_planted(planted, EVERYWHERE)
    assert r > flat_fit[1] + 0.1 and r > whole_fit[1] - 0.05
    assert energy(fits.saved)[1, 3:, :2].sum() > 0.5


def test_a_search_asks_no_held_out_image(planted, monkeypatch):
    searching(monkeypatch)
    kernels, y, plan = planted
    moved = y[:N_MANY].clone()
    moved[plan.inside(2)] = 50 * torch.randn(len(plan.inside(2)), 6)
    before, after = (solver([kernels], EVERYWHERE[::3], plan).fit(block_of(one)) for one in (y[:N_MANY], moved))
    # other folds' finalists decide the order in which priors are added up, so the last bit may differ
    (ours,), (theirs,) = before.folds[2].held_out, after.folds[2].held_out
    torch.testing.assert_close(ours.predictions, theirs.predictions, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before.folds[2].test, after.folds[2].test, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before.folds[0].test, after.folds[0].test, atol=0.1)


def other_surface(kernels):
    """(N_MANY, 6) responses that see another corner of the other layer."""
    return kernels.features(Prior(0.9, 0.1, 0.2, 0.0))[:N_MANY] @ torch.randn(200, 6)


def test_a_search_for_one_surface_does_not_narrow_the_next_ones(planted, monkeypatch):
    """Finalists are of the responses that they were found for."""
    searching(monkeypatch, finalists=2)
    kernels, y, plan = planted
    right, priors = other_surface(kernels), EVERYWHERE[::3]
    used = solver([kernels], priors, plan)
    used.fit(block_of(y[:N_MANY], "lh", all_responses=y[:N_MANY]))
    found = used.fit(block_of(right, "rh", all_responses=right))
    assert_same_fits(found, solver([kernels], priors, plan).fit(block_of(right, "rh", all_responses=right)))


@pytest.mark.slow
def test_one_surface_after_the_other_keeps_the_axes_of_the_last_alone(planted, monkeypatch):
    searching(monkeypatch, finalists=2)
    kernels, y, plan = planted
    used = solver([kernels], EVERYWHERE[::3], plan)
    allowed = 4 * 2 * len(kernels.rows) * sum(len(plan.outside(k)) for k in range(3))
    noisy = other_surface(kernels) + 5 * torch.randn(N_MANY, 6)  # without noise, axes in float64 would be there too
    for surface, responses in (("lh", y[:N_MANY]), ("rh", noisy)):
        used.fit(block_of(responses, surface, all_responses=responses))
        assert 0 < bytes_of_axes() <= allowed


def bytes_of_axes():
    """Bytes of the scores in all exact axes that there are; the axes of a search are not among them."""
    gc.collect()
    bases = [one for one in gc.get_objects() if isinstance(one, Basis)]
    return sum(4 * basis.features.numel() for basis in bases if basis.axes is None)


def test_surfaces_that_are_known_beforehand_share_priors_that_serve_both(planted, monkeypatch):
    searching(monkeypatch, finalists=2)
    kernels, y, plan = planted
    surfaces = {"lh": y[:N_MANY], "rh": other_surface(kernels)}
    priors = [Prior(0.2, 0.8, 0.16, 1.0), Prior(0.9, 0.1, 0.2, 0.0), Prior(), Prior(0.5, 0.5, 0.16)]
    used = solver([kernels], priors, plan, surfaces=surfaces)
    fits = {name: used.fit(block_of(of_surface, name)) for name, of_surface in surfaces.items()}
    both = solver([kernels], priors[:2], plan)  # the two that the surfaces were made from
    for name, of_surface in surfaces.items():
        assert_same_fits(fits[name], both.fit(block_of(of_surface, name)), rtol=1e-4, atol=1e-4)


def test_priors_are_sought_for_the_whole_surface_and_once(planted, monkeypatch):
    """Blocks of its vertices take those of all, so that a vertex's fit does not hang on its neighbours in a block."""
    searching(monkeypatch, finalists=2)
    kernels, y, plan = planted
    used, y = solver([kernels], EVERYWHERE[::3], plan), y[:N_MANY]
    whole = used.fit(block_of(y, all_responses=y))
    # what a search decomposes a part of the images by
    monkeypatch.setattr("heads.solvers.layers.search.landmark_features", lambda *_: pytest.fail("searched again"))
    block = used.fit(block_of(y[:, :2], all_responses=y))
    for one, other in zip(whole.folds, block.folds, strict=True):
        torch.testing.assert_close(one.test[:, :2], other.test, rtol=1e-4, atol=1e-4)


# --- saved weights


@both_shapes
@both_modes
def test_saved_weights_on_stored_features_are_the_test_predictions(tmp_path, shape, trained):
    heads, values = made(tmp_path, shape, trained)
    fits = heads.fit(block_of(responses_of(values[0])))
    assert {prefix for prefix, _ in fits.saved} == ({"fold0.", "fold1.", "fold2."} if trained else {""})

    def predicted(prefix, of):
        out = fits.saved[prefix, "intercept"].double().numpy()
        for name, stored in of.items():
            weights = fits.saved[prefix, f"{name}.weights"].double().numpy()
            out = out + stored[N_TRAIN:].astype(np.float64).reshape(N_TEST, -1) @ weights
        return out

    if trained:
        for k, fold in enumerate(fits.folds):
            np.testing.assert_allclose(fold.test, predicted(f"fold{k}.", values[k]), rtol=1e-3, atol=2e-3)
    else:
        mean = mean_of_tests(fits.folds)
        np.testing.assert_allclose(mean, predicted("", values[0]), rtol=1e-3, atol=2e-3)


# --- landmarks


@pytest.mark.slow
@both_modes
def test_with_landmarks_saved_weights_are_the_predictions_and_blocks_change_nothing(tmp_path, monkeypatch, trained):
    for module in (heads.solvers.layers.axes, heads.solvers.layers.sizes):
        monkeypatch.setattr(module, "LANDMARKS", 25)
    heads_, values = made(tmp_path, "dual", trained)
    assert heads_.method == "landmarks"
    y = responses_of(values[0])
    fits = heads_.fit(block_of(y))
    one = heads_.fit(block_of(y[:, 2:3]))
    for whole, alone in zip(fits.folds, one.folds, strict=True):
        torch.testing.assert_close(whole.test[:, 2:3], alone.test, rtol=1e-3, atol=1e-3)
    predicted = []
    for prefix, of in zip(("fold0.", "fold1.", "fold2.") if trained else ("",), values, strict=True):
        weights = np.concatenate([fits.saved[prefix, f"{name}.weights"].double().numpy() for name in of])
        predicted.append(flat(of)[N_TRAIN:] @ weights + fits.saved[prefix, "intercept"].double().numpy())
    plain = torch.stack([fold.test for fold in fits.folds]).mean(0)
    mean = plain if trained else mean_of_tests(fits.folds)
    np.testing.assert_allclose(mean, np.mean(predicted, 0), rtol=1e-3, atol=2e-3)


def test_landmarks_lose_little_of_a_planted_field(planted, flat_fit, whole_fit, monkeypatch):
    for module in (heads.solvers.layers.axes, heads.solvers.layers.sizes):
        monkeypatch.setattr(module, "LANDMARKS", 60)
    _, r = on_planted(planted, EVERYWHERE)
    assert r > flat_fit[1] + 0.1 and r > whole_fit[1] - 0.05


# --- what may go wrong


@both_shapes
@both_modes
def test_vertices_that_never_answer_are_predicted_as_they_are(tmp_path, shape, trained):
    heads, values = made(tmp_path, shape, trained)
    y = responses_of(values[0])
    y[:, 1], y[:, 3] = 0, 0.1
    fits = heads.fit(block_of(y))
    for fold in fits.folds:
        for found in (fold.test, *(piece.predictions for piece in fold.held_out)):
            assert found.isfinite().all()
            torch.testing.assert_close(found[:, 1], torch.zeros(len(found)), atol=1e-5, rtol=0)
            torch.testing.assert_close(found[:, 3], torch.full((len(found),), 0.1), atol=1e-5, rtol=0)
        assert all((piece.std > 0).all() for piece in fold.held_out)


@both_modes
def test_vertices_that_answer_held_out_images_alone_are_predicted_by_their_level(tmp_path, trained):
    heads, values = made(tmp_path, "dual", trained)
    y = responses_of(values[0])
    y[FOLDS != 1, 2] = 0
    fits = heads.fit(block_of(y))
    for found in (fits.folds[1].test, *(piece.predictions for piece in fits.folds[1].held_out)):
        assert found.isfinite().all()
        torch.testing.assert_close(found[:, 2], torch.zeros(len(found)), atol=1e-5, rtol=0)


def test_a_penalty_too_small_to_judge_still_predicts(tmp_path):
    """With the freedom of every image there is no error left to choose by, and all priors are alike."""
    heads, (values,) = made(tmp_path, "dual", config=RidgeConfig(penalties=(1e-6,)))
    for fold in heads.fit(block_of(responses_of(values))).folds:
        assert fold.test.isfinite().all() and fold.held_out[0].predictions.isfinite().all()


@both_shapes
@both_modes
def test_a_second_fit_with_axes_that_are_kept_is_the_first(tmp_path, shape, trained):
    heads, values = made(tmp_path, shape, trained)
    y = responses_of(values[0])
    first, second = heads.fit(block_of(y)), heads.fit(block_of(y))
    assert_same_fits(first, second, rtol=0, atol=0)


def test_kernels_that_are_kept_or_streamed_give_the_same_predictions(tmp_path):
    values = values_of(WIDE)
    y, kept = responses_of(values), kernels_of(tmp_path, values)
    streamed = LayerKernels(kept.rows, kept.scale_rows, whole=False)
    first, second = (solver([kernels]).fit(block_of(y)) for kernels in (kept, streamed))
    assert_same_fits(first, second, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_vertices_whose_penalty_is_below_what_float32_resolves_are_as_in_float64(tmp_path, monkeypatch):
    """Responses without noise, features of which some hardly vary: the smallest penalties are the best."""
    rng = np.random.default_rng(4)
    sizes = np.geomspace(1, 3e-4, 40).reshape(8, 5)
    values = {"deep": (rng.normal(size=(N, 2, 4, 5)) * sizes.reshape(2, 4, 5)).astype(np.float32)}
    kernels = kernels_of(tmp_path, values)
    flat_features = kernels.features(Prior()).double()[:N_TRAIN]
    y = (flat_features @ torch.randn(40, 6, dtype=torch.float64)).float()
    config = RidgeConfig(penalties=(1e-6, 1e-2, 1.0))
    ours = solver([kernels], [Prior()], config=config).fit(block_of(y))
    monkeypatch.setattr("heads.solvers.layers.bases._rough_basis", lambda task: task[0].basis(task[1]))
    assert_same_fits(ours, solver([kernels], [Prior()], config=config).fit(block_of(y)), rtol=1e-3, atol=1e-3)
