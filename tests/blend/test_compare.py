"""Arms are models that differ in the training's seed alone; what is planted between two of them is found again."""

import json
from dataclasses import replace

import numpy as np
import pytest

from featcache.cache.store import create_store
from featcache.config import fingerprint
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.digests import image_digest, response_digest
from featcache.workdir import Workdir
from heads.blend.compare import compare
from support.checkpoints import N_FOLDS, key_of
from support.keys import feature_key

NOISE = {"mse": 1.0, "smooth_l1": 3.0}


def checkpoint_description(key, work):
    path = Workdir(work).checkpoints / f"{key.label}-{fingerprint(key.to_json())}"
    path.mkdir(parents=True)
    (path / "checkpoint.json").write_text(json.dumps({"format": 1, "recipe": key.to_json(), "facts": {}}))


def predict(subject, work, training, noise, seed):
    """A prediction store of a trained backbone, as fit-heads would leave it: the responses and noise."""
    fold = {"stage": "finetune", "training": training, "n_folds": N_FOLDS, "seed": 0, "held_out": list(range(N_FOLDS))}
    features = feature_key(subject.name, images=image_digest(subject, work), weights=["a"] * N_FOLDS, fold=fold)
    key = {
        "kind": "predictions",
        "subject": subject.name,
        "features": features,
        "responses": response_digest(subject, work),
        "head": "linear",
        "n_folds": N_FOLDS,
        "seed": 0,
        "solver": "exact",
        "objective": "ridge",
        "settings": {},
    }
    facts = {"model": f"model of {training}", "features": "f", "seen_ids": [[]] * N_FOLDS}
    folder = Workdir(work).predictions
    store = create_store(folder, subject.name, key, subject.image_ids, len(subject.train), subject.n_vertices, facts)
    rng = np.random.default_rng(seed)
    for surface, n_vertices in subject.n_vertices.items():
        responses = np.asarray(subject.responses(surface), dtype=np.float64)
        rows = responses + noise * responses.std() * rng.normal(size=responses.shape)
        store.append({surface: np.concatenate([rows, np.zeros((len(subject.test), n_vertices))]).astype(np.float32)})


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
    first, second = compare(subjects, tmp_path)
    assert [arm.name for arm in (first, second)] == ["finetune mse, refitted", "finetune smooth_l1, refitted"]
    assert first.seeds == second.seeds == [0, 1, 2] and len(first.values) == 3 * len(subjects)
    assert first.difference is None and second.reference == first.name
    assert second.difference.n_pairs == 3 * len(subjects) and second.difference.high < 0
    assert second.difference.mean == pytest.approx(second.mean_r() - first.mean_r())
    (_, other) = sorted(compare(subjects, tmp_path, reference="*smooth*"), key=lambda arm: arm.difference is not None)
    assert other.difference.low > 0 and not other.chosen_on


@pytest.mark.slow
def test_without_checkpoints_every_training_is_an_arm_of_its_own(subjects, tmp_path, capfd):
    Workdir(tmp_path).checkpoints.rename(tmp_path / "gone")
    arms = compare(subjects, tmp_path)
    assert len(arms) == 6 and all(not arm.seeds and arm.chosen_on for arm in arms)
    assert "its checkpoint is gone" in capfd.readouterr().err
