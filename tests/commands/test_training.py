"""pretrain and finetune: presets of each stage, with what is given over them."""

from dataclasses import replace

import pytest

from featcache.config import BackboneConfig
from featcache.errors import ConfigError
from heads.config import PAPER_FIT, PAPER_SIZE, StageConfig, preset
from support.commands import job_of, run

STAGES = pytest.mark.parametrize("stage", ["pretrain", "finetune"])


@STAGES
@pytest.mark.parametrize(
    ("arguments", "settings", "changes"),
    [
        ((), "fast", {}),
        (("--fold", "2"), "fast", {"fold": 2}),
        (("--folds", "3", "--fold", "all", "--fold-seed", "4"), "fast", {"n_folds": 3, "fold_seed": 4}),
        (("--preset", "paper"), "paper", {"backbone": BackboneConfig(size=PAPER_SIZE, fit=PAPER_FIT)}),
        (("--recipe", "paper", "--size", "64"), "paper", {"backbone": BackboneConfig(size=64, fit=PAPER_FIT)}),
        (("--preset", "paper", "--fit", "pad"), "paper", {"backbone": BackboneConfig(size=PAPER_SIZE, fit="pad")}),
        (("--fit", "whole"), "fast", {"backbone": BackboneConfig(fit="whole")}),
        (("--head", "pooled"), "fast", {}),  # the name of linear heads in earlier versions
    ],
)
def test_options_go_over_the_preset_of_the_stage(stage, arguments, settings, changes):
    expected = StageConfig(stage=stage, train=preset(settings, stage), **changes)
    assert job_of(stage, *arguments).config == expected


@STAGES
def test_options_of_training_go_over_the_preset(stage):
    found = job_of(stage, "--preset", "paper", "--epochs", "3", "--batch-size", "2", "--loss", "mse").config
    assert found.train == replace(preset("paper", stage), epochs=3, batch_size=2, loss="mse")


def test_another_start_is_for_the_second_stage_alone():
    assert job_of("finetune", "--init", "none").config.init == "none"
    with pytest.raises(Exception, match="No such option"):
        job_of("pretrain", "--init", "none")


@STAGES
@pytest.mark.parametrize("fold", ["one", "-1", "5", "1.5"])
def test_a_fold_is_a_number_of_one_that_there_is(stage, fold):
    with pytest.raises(ConfigError, match="--fold: expected all or a number from 0 to 4; found"):
        job_of(stage, "--fold", fold)


@STAGES
def test_checkpoints_of_the_subjects_asked_for_are_named(tiny, tmp_path, monkeypatch, capfd, stage):
    asked = []
    monkeypatch.setattr("heads.backbones.stages.train_stage", lambda *about: asked.append(about) or [])
    assert run(capfd, stage, "--data", str(tiny), "--work", str(tmp_path), "--subject", "2")["checkpoints"] == []
    ((subjects, config, work, by),) = asked
    assert (
        [subject.name for subject in subjects] == ["subj02"]
        and config.stage == stage
        and work == tmp_path
        and by.name == "id"
    )
