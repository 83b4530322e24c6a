"""A shared core finds what no linear head can, and sees nothing of what it is scored on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.dataset.splits import assign_folds
from featcache.errors import ConfigError
from heads.config import AdamWConfig, CoreConfig, FitConfig
from heads.fit.out_of_fold import predict_surface
from heads.scores.metrics import pearson_r
from heads.solvers.core import CoreTraining, as_trained
from heads.solvers.joint import TraineeRows
from support.layered import N_FOLDS, N_TEST, ids_of, rows_of, subject_of, values_of
from support.plans import assert_same_fits, block_of, plan_of

N_IMAGES = 400
CONFIG = FitConfig(
    loss="mse",
    head="core",
    n_folds=N_FOLDS,
    adamw=AdamWConfig(learning_rate=1e-2, weight_decay=0.05, epochs=12, batch_size=32),
    core=CoreConfig(members=1, hidden=32, channels=16, blocks=1, core_dropout=0.1),
)
FEW = replace(CONFIG, adamw=replace(CONFIG.adamw, epochs=1), core=replace(CONFIG.core, members=2))


def trainee_of(folder, name, seed, shared):
    """A subject whose vertices are sums of absolute values, which no linear map can follow, at one place of a layer."""
    rng = np.random.default_rng(seed)
    values = {"near": values_of(N_IMAGES + N_TEST, seed)["near"]}
    seen = values["near"][:, 1, 2].astype(np.float64)
    bent = np.abs((seen - seen.mean(0)) @ shared)
    responses = {}
    for surface, n_vertices in {"lh": 5, "rh": 4}.items():
        signal = bent @ rng.normal(size=(shared.shape[1], n_vertices))
        signal = (signal - signal.mean(0)) / signal.std(0)
        responses[surface] = signal + 0.3 * rng.normal(size=signal.shape)
    ids = ids_of(N_IMAGES, seed)
    subject = subject_of(folder, name, ids, responses)
    return TraineeRows(subject, [rows_of(folder / name, values, n_train=N_IMAGES)], plan_of(ids, N_FOLDS))


@pytest.fixture(scope="module")
def trainees(tmp_path_factory):
    """Two subjects whose vertices bend the same three numbers of an image; for reading."""
    folder, shared = tmp_path_factory.mktemp("core"), np.random.default_rng(9).normal(size=(6, 3))
    return [trainee_of(folder, f"subj0{number}", number, shared) for number in (1, 2)]


def fits_of(training, number, surface="lh"):
    responses = np.array(training.trainees[number].subject.responses(surface))
    return training.solver(number).fit(block_of(responses, surface))


@pytest.mark.slow
def test_what_subjects_have_in_common_is_found_though_no_linear_head_could(trainees):
    training, r, linear = CoreTraining(trainees, CONFIG, "cpu"), [], []
    for number, trainee in enumerate(trainees):
        solver = training.solver(number)
        predictions, _ = predict_surface(solver, trainee.subject, "lh", lambda _: None)
        responses = np.array(trainee.subject.responses("lh"))
        r.append(pearson_r(predictions[:N_IMAGES], responses).mean())
        features = trainee.rows[0].dense().numpy()[:N_IMAGES]
        folds, guess = trainee.plan.folds, np.empty_like(responses)
        for fold in range(N_FOLDS):
            x, y = features[folds != fold], responses[folds != fold]
            gram = x.T @ x + 100 * np.eye(x.shape[1])
            guess[folds == fold] = features[folds == fold] @ np.linalg.solve(gram, x.T @ (y - y.mean(0)))
        linear.append(pearson_r(guess, responses).mean())
    assert np.mean(r) > 0.35 and np.mean(linear) < 0.15, (r, linear)


def test_responses_of_an_image_have_no_say_in_its_prediction_by_any_subject(trainees, tmp_path):
    """A part of a fold is predicted without its responses, and a fold's core is trained without the fold."""
    before = CoreTraining(trainees, FEW, "cpu")
    changed = []
    for trainee in trainees:
        plan, subject = trainee.plan, trainee.subject
        responses = {surface: np.array(subject.responses(surface)) for surface in subject.surfaces}
        fold = np.flatnonzero(plan.folds == 1)
        part = as_trained(plan).parts(1)[0]
        responses["lh"][part if trainee is trainees[0] else fold] *= -50
        other = subject_of(tmp_path, subject.name, subject.train.ids, responses)
        changed.append(replace(trainee, subject=other))
    after = CoreTraining(changed, FEW, "cpu")
    ours, theirs = fits_of(before, 0), fits_of(after, 0)
    assert torch.equal(ours.folds[1].held_out[0].predictions, theirs.folds[1].held_out[0].predictions)
    assert not torch.equal(ours.folds[1].held_out[1].predictions, theirs.folds[1].held_out[1].predictions)
    assert not torch.equal(ours.folds[0].test, theirs.folds[0].test)


def test_every_image_is_predicted_once_and_pictures_of_any_test_split_train_no_core(trainees):
    fits = fits_of(CoreTraining(trainees, FEW, "cpu"), 0)
    rows = np.concatenate([piece.rows for fold in fits.folds for piece in fold.held_out])
    assert np.array_equal(np.sort(rows), np.arange(N_IMAGES))
    tested = trainees[0].subject.train.ids[:7]
    trainees[1].subject.test.ids[:7], kept = tested, trainees[1].subject.test.ids[:7].copy()
    split = CoreTraining(trainees, FEW, "cpu").split(0, 0)
    trainees[1].subject.test.ids[:7] = kept
    assert not np.isin(trainees[0].subject.train.ids[split.train_rows], tested).any()
    assert len(split.train_rows) == (trainees[0].plan.folds[7:] != 0).sum() and not split.choice_rows


def test_the_seed_decides_everything_and_members_differ(trainees):
    first, again = (CoreTraining(trainees, FEW, "cpu") for _ in range(2))
    assert_same_fits(fits_of(first, 1), fits_of(again, 1))
    one, other = (member.standardise.core.norm.weight for member in first.members(0))
    assert not torch.equal(one, other)
    other_seed = CoreTraining(trainees, replace(FEW, seed=3), "cpu")
    assert not torch.equal(fits_of(other_seed, 1).folds[0].test, fits_of(again, 1).folds[0].test)


def test_saved_heads_and_cores_rebuild_the_test_predictions_of_their_fold(trainees):
    training = CoreTraining(trainees, FEW, "cpu")
    fits = fits_of(training, 0, "rh")
    rows = trainees[0].rows[0][np.arange(N_IMAGES, N_IMAGES + N_TEST)]
    for k, fold in enumerate(fits.folds):
        shared = {part: tensor for (prefix, part), tensor in fits.shared.items() if prefix == f"fold{k}."}
        saved = {part: tensor for (prefix, part), tensor in fits.saved.items() if prefix == f"fold{k}."}
        outputs = []
        for number, member in enumerate(training.members(k)):
            prefix = f"core{number}."
            state = {name.removeprefix(prefix): t for name, t in shared.items() if name.startswith(prefix)}
            member.standardise.load_state_dict(state)
            outputs.append(member.standardise(rows)["core"].half().float())
        rebuilt = torch.cat(outputs, -1).flatten(1) @ saved["core.weights"] + saved["intercept"]
        torch.testing.assert_close(rebuilt, fold.test, rtol=1e-3, atol=1e-3)


def test_memory_is_known_before_a_core_is_trained(trainees):
    training = CoreTraining(trainees, FEW, "cpu")
    solver = training.solver(0)
    expected = solver.memory(5)
    assert not training._members
    assert solver._ridge.memory(5) == pytest.approx(expected, rel=0.01)


def test_folds_that_are_too_small_are_refused_before_anything_is_trained(trainees):
    few = np.sort(np.argsort(assign_folds(trainees[0].subject.train.ids, N_FOLDS, 0) == 0)[-3:])
    plan = replace(trainees[0].plan, folds=np.where(np.isin(np.arange(N_IMAGES), few), 0, 1), held_out=(0, 1))
    with pytest.raises(ConfigError, match="enough held-out images"):
        CoreTraining([replace(trainees[0], plan=plan)], FEW, "cpu").split(0, 0)
