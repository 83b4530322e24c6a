"""One training of several subjects: nobody is trained on images that another chooses on or is scored on."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.errors import LeakError
from heads.config import AdamWConfig, CoreConfig, FitConfig, SpatialConfig
from heads.features.rows import LayerRows
from heads.solvers.core import CoreTraining
from heads.solvers.spatial import SpatialTraining
from support.layered import N_FOLDS, joint
from support.plans import block_of

CONFIG = FitConfig(
    loss="mse",
    head="spatial",
    n_folds=N_FOLDS,
    adamw=AdamWConfig(learning_rate=6e-2, weight_decay=0.05, epochs=2, batch_size=32, patience=6),
    spatial=SpatialConfig(rank=1, space=3, token_dropout=0.1, smoothness=0.0),
)


def training_of(trainees):
    return SpatialTraining(trainees, CONFIG, "cpu")


def fits_of(training, trainees, number):
    responses = np.array(trainees[number].subject.responses("lh"))
    return training.solver(number).fit(block_of(responses, "lh"))


def test_an_image_is_in_the_same_fold_of_every_subject_that_saw_it(tmp_path):
    one, other = joint(tmp_path, 0)
    _, ours, theirs = np.intersect1d(one.subject.train.ids, other.subject.train.ids, return_indices=True)
    assert len(ours) == 36 and np.array_equal(one.plan.folds[ours], other.plan.folds[theirs])


@pytest.mark.slow
def test_responses_of_a_fold_reach_its_predictions_through_no_subject(tmp_path):
    trainees = joint(tmp_path, 0, n_many=120, n_few=90)
    training = training_of(trainees)
    before = [fits_of(training, trainees, number) for number in (0, 1)]
    for trainee in trainees:
        path = trainee.subject.response_paths["lh"]
        responses = np.load(path)
        responses[trainee.plan.folds == 1] *= -50
        np.save(path, responses)
    training = training_of(trainees)
    after = [fits_of(training, trainees, number) for number in (0, 1)]
    for ours, theirs in zip(before, after, strict=True):
        assert torch.equal(ours.folds[1].held_out[0].predictions, theirs.folds[1].held_out[0].predictions)
        assert not torch.equal(ours.folds[0].test, theirs.folds[0].test)


def test_folds_by_subject_are_refused(tmp_path):
    """An image that one subject is scored on may not be one that another is trained on."""
    one, other = joint(tmp_path, 0, n_many=120, n_few=90)
    other = replace(other, plan=replace(other.plan, folds=(other.plan.folds + 1) % N_FOLDS))
    with pytest.raises(LeakError):
        training_of([one, other]).heads(0)


def test_no_subject_is_trained_on_what_another_chooses_by(tmp_path, monkeypatch):
    """Where images to stop by were drawn by subject it is refused, or they are left out of every training."""

    def by_row(image_ids, outside, *settings):
        return outside[len(image_ids) // 4 :], outside[: len(image_ids) // 4]

    seen = []
    monkeypatch.setattr("heads.solvers.held_out.stop_split", by_row)
    monkeypatch.setattr("heads.solvers.joint.train_head", lambda head, tasks, *about: seen.extend(tasks) or [head])
    trainees = joint(tmp_path, 0, n_many=120, n_few=90)
    with suppress(LeakError):
        training_of(trainees).heads(0)
    ids = [trainee.subject.train.ids for trainee in trainees]
    trained = [own[task.train_rows] for own, task in zip(ids, seen, strict=False)]
    chosen = [own[task.choice_rows[0]] for own, task in zip(ids, seen, strict=False)]
    assert not seen or not np.intersect1d(np.concatenate(trained), np.concatenate(chosen)).size


KINDS = {
    "spatial": (SpatialTraining, CONFIG),
    "separate": (SpatialTraining, replace(CONFIG, spatial=replace(CONFIG.spatial, space=0))),
    "core": (CoreTraining, replace(CONFIG, head="core", core=CoreConfig(members=1, hidden=8, channels=4, blocks=1))),
}


@pytest.mark.parametrize(("kind", "config"), KINDS.values(), ids=KINDS)
def test_a_step_of_training_waits_for_nothing(tmp_path, pretended_cuda, kind, config):
    """As many waits with batches of 32 images as with batches of 8, which are four times as many steps."""
    trainees = [replace(one, rows=[on_device(rows) for rows in one.rows]) for one in joint(tmp_path, 0, n_many=120)]
    waits = []
    for batch_size in (32, 8):
        training = kind(trainees, replace(config, adamw=replace(config.adamw, batch_size=batch_size)), "cuda")
        pretended_cuda.forget()
        training.train(0, 0)
        waits.append(len(pretended_cuda.waits))
    assert waits[0] == waits[1], pretended_cuda.by_place()


def on_device(rows):
    """The rows as they are asked for on a device that holds them all."""
    moved = LayerRows(rows._store, tuple(rows.grids), "cuda", np.inf)
    moved.keep_on_device(np.inf)
    return moved
