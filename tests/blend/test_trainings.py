"""Arms are models that differ in the training's seed alone; what is planted between two of them is found again."""

import json
from dataclasses import replace

import numpy as np
import pytest

from featcache.cache.store import create_store
from featcache.config import fingerprint
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.digests import image_digest, response_digest
from featcache.dataset.splits import assign_folds
from featcache.workdir import Workdir
from heads.blend.trainings import compare_trainings
from support.checkpoints import N_FOLDS, key_of
from support.keys import feature_key

NOISE = {"mse": 1.0, "smooth_l1": 3.0}


FACTS = {"label": "", "origin": "", "seen_ids": []}


def checkpoint_description(key, work):
    path = Workdir(work).checkpoints / f"{key.label}-{fingerprint(key.to_json())}"
    path.mkdir(parents=True)
    (path / "checkpoint.json").write_text(json.dumps({"format": 1, "recipe": key.to_json(), "facts": FACTS}))


def predict(subject, work, training, noise, seed, held_out=range(N_FOLDS)):
    """A prediction store as fit-heads would leave it: the responses and noise. training : None for a frozen backbone"""
    fold = {"stage": "finetune", "training": training, "n_folds": N_FOLDS, "seed": 0, "held_out": list(held_out)}
    weights = {"fold": None} if training is None else {"weights": ["a"] * len(held_out), "fold": fold}
    key = {
        "kind": "predictions",
        "subject": subject.name,
        "features": feature_key(subject.name, images=image_digest(subject, work), **weights),
        "responses": response_digest(subject, work),
        "head": "linear",
        "n_folds": N_FOLDS,
        "seed": 0,
        "solver": "exact",
        "objective": "ridge",
        "settings": {},
    }
    facts = {"model": f"model of {training}", "features": "f", "seen_ids": [[]] * len(held_out)}
    predicted = np.isin(assign_folds(subject.train.ids, N_FOLDS, 0), held_out)
    ids = np.concatenate([subject.train.ids[predicted], subject.test.ids])
    folder, n_train = Workdir(work).predictions, int(predicted.sum())
    store = create_store(folder, subject.name, key, ids, n_train, subject.n_vertices, facts)
    rng, stored = np.random.default_rng(seed), {}
    for surface, n_vertices in subject.n_vertices.items():
        responses = np.asarray(subject.responses(surface), dtype=np.float64)
        rows = (responses + noise * responses.std() * rng.normal(size=responses.shape))[predicted]
        stored[surface] = rows.astype(np.float32)
        store.append(
            {surface: np.concatenate([stored[surface], np.zeros((len(subject.test), n_vertices), np.float32)])}
        )
    return stored


@pytest.fixture
def subjects(tiny, tmp_path):
    """Two trainings by loss, each with three seeds; one has far noisier predictions."""
    subjects = open_challenge(tiny).subjects
    for number, subject in enumerate(subjects):
        base = key_of([subject], tmp_path, stage="finetune", settings={"stop": "never"})
        for loss, noise in NOISE.items():
            for seed in range(3):
                key = replace(base, settings={"stop": "never", "loss": loss, "seed": seed})
                checkpoint_description(key, tmp_path)
                predict(subject, tmp_path, key.training, noise, [number, seed])
    return subjects


@pytest.mark.slow
def test_seeds_are_one_arm_and_the_planted_difference_is_found(subjects, tmp_path):
    first, second = compare_trainings(subjects, tmp_path)
    assert [arm.name for arm in (first, second)] == ["finetune mse, refitted", "finetune smooth_l1, refitted"]
    assert first.seeds == second.seeds == [0, 1, 2] and len(first.values) == 3 * len(subjects)
    assert first.difference is None and second.reference == first.name
    assert second.difference.n_pairs == 3 * len(subjects) and second.difference.high < 0
    assert second.difference.mean == pytest.approx(second.mean_r() - first.mean_r())
    both = compare_trainings(subjects, tmp_path, reference="*smooth*")
    (_, other) = sorted(both, key=lambda arm: arm.difference is not None)
    assert other.difference.low > 0 and not other.chosen_on


@pytest.mark.slow
def test_without_checkpoints_every_training_is_an_arm_of_its_own(subjects, tmp_path, capfd):
    Workdir(tmp_path).checkpoints.rename(tmp_path / "gone")
    arms = compare_trainings(subjects, tmp_path)
    assert len(arms) == 6 and all(not arm.seeds and arm.chosen_on for arm in arms)
    assert "its checkpoint is gone" in capfd.readouterr().err


def planted(work, subjects, held_out):
    """A frozen model with every fold, and a training of some folds; {arm: {subject: {surface: predictions}}}."""
    base = key_of(subjects, work, settings={"stop": "never", "loss": "mse", "seed": 3})
    checkpoint_description(base, work)
    return {
        "frozen": {s.name: predict(s, work, None, 2.0, [0, n]) for n, s in enumerate(subjects)},
        "pretrain": {s.name: predict(s, work, base.training, 1.0, [1, n], held_out) for n, s in enumerate(subjects)},
    }


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [[1], [0, 2]])
def test_a_training_of_some_folds_is_compared_over_their_images(tiny, tmp_path, held_out):
    """The difference is that of mean r over vertices, by numpy, over the images of these folds alone."""
    subjects = open_challenge(tiny).subjects
    every = planted(tmp_path, subjects, held_out)
    frozen, trained = compare_trainings(subjects, tmp_path)
    assert frozen.reference is None and trained.reference == frozen.name == "frozen, refitted"
    differences = []
    for subject in subjects:
        scored = np.isin(assign_folds(subject.train.ids, N_FOLDS, 0), held_out)
        means = {}
        for arm, of_subject in every.items():
            r = []
            for surface, rows in of_subject[subject.name].items():
                rows = rows[scored] if arm == "frozen" else rows
                responses = subject.responses(surface)[scored]
                live = responses.std(0) > 0
                r += [np.corrcoef(a, b)[0, 1] for a, b in zip(rows.T[live], responses.T[live], strict=True)]
                r += [0.0] * int((~live).sum())
            means[arm] = np.mean(r)
        differences.append(means["pretrain"] - means["frozen"])
    assert trained.difference.n_pairs == len(subjects)
    assert trained.difference.mean == pytest.approx(np.mean(differences), abs=1e-6)
    assert trained.difference.mean != pytest.approx(trained.mean_r() - frozen.mean_r(), abs=1e-4)


@pytest.mark.slow
def test_trainings_of_other_folds_have_no_image_to_be_compared_on(tiny, tmp_path):
    subjects = open_challenge(tiny).subjects
    for seed, fold in enumerate((0, 2)):
        base = key_of(subjects, tmp_path, settings={"stop": "never", "loss": "mse", "batches": f"b{seed}", "seed": 3})
        checkpoint_description(base, tmp_path)
        for subject in subjects:
            predict(subject, tmp_path, base.training, 1.0, [seed], [fold])
    first, second = compare_trainings(subjects, tmp_path)
    assert first.difference is None and second.reference == first.name and second.difference is None
