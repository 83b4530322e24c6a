"""Trainings are found by their fingerprint, and say whether their epoch was chosen on the held-out fold."""

import pytest

from featcache.backbone.trainings import Trainings
from featcache.dataset.algonauts import open_challenge
from support.checkpoints import write_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "chosen"),
    [("never", "never", False), ("fold", "never", True), ("never", "fold", True)],
)
def test_a_choice_in_either_stage_counts(tiny, tmp_path, before, after, chosen):
    subjects = open_challenge(tiny).subjects[:1]
    first = write_checkpoint(subjects, tmp_path, settings={"stop": before, "seed": 4, "loss": "mse"})
    settings = {"stop": after, "seed": 5, "loss": "mse"}
    second = write_checkpoint(subjects, tmp_path, stage="finetune", start=first, settings=settings)
    trainings = Trainings(tmp_path)
    assert trainings.chosen_on(second.training) is chosen
    assert trainings.find(second.training).settings["seed"] == 5
    assert trainings.starts_with(second.training).settings["seed"] == 4


def test_of_a_training_whose_checkpoint_is_gone_the_default_is_taken(tmp_path):
    assert Trainings(tmp_path).chosen_on("0123456789ab") and Trainings(tmp_path).find("0123456789ab") is None


@pytest.mark.slow
def test_a_damaged_checkpoint_counts_as_gone(tiny, tmp_path):
    checkpoint = write_checkpoint(open_challenge(tiny).subjects[:1], tmp_path)
    (checkpoint.path / "checkpoint.json").write_text("{")
    assert Trainings(tmp_path).find(checkpoint.training) is None
