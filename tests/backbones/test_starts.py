"""What stage 2 starts from: the same fold of stage 1, of this tree, and none that saw what is held out."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from featcache.backbone.checkpoint import list_checkpoints, open_checkpoint
from featcache.dataset.algonauts import open_challenge
from featcache.errors import LeakError
from heads.config import TrainConfig
from support.checkpoints import mean_like
from support.training import QUICK_OPTIONS, edit, fails, run, train


def test_a_checkpoint_of_another_architecture_or_tree_is_refused(work, tree, capfd, monkeypatch):
    given = next(one for one in list_checkpoints(work) if one.key.stage == "pretrain")
    init = ["--init", str(given.path), "--folds", "2"]
    line = fails(capfd, "finetune", *init, "--backbone", "test_vit")
    assert "expected a checkpoint of test_vit; found one of test_resnet" in line
    path = open_challenge(tree).subjects[0].response_paths["lh"]
    np.save(path, np.load(path) + 1)
    monkeypatch.setenv("FEATCACHE_DATA", str(tree))
    assert "expected a checkpoint of this tree; found one of other responses of subj01" in fails(
        capfd, "finetune", *init
    )
    assert "found one of other responses of subj01" in fails(capfd, "extract", "--checkpoint", str(given.path))


def test_stage_2_starts_from_a_checkpoint_of_another_folder(work, tiny, tmp_path, capfd):
    """Its fold is found beside the one that was named."""
    given = next(one for one in list_checkpoints(work) if one.key.stage == "pretrain")
    done, _ = run(capfd, "finetune", "--init", str(given.path), *QUICK_OPTIONS, "--work", str(tmp_path / "other"))
    starts = {one.key.start.training for one in list_checkpoints(tmp_path / "other")}
    assert len(done["checkpoints"]) == 4 and starts == {given.training}


def test_a_second_stage_2_goes_on_from_the_same_subject(work, tiny, tmp_path, capfd):
    given = {
        next(iter(one.key.subjects)): one
        for one in list_checkpoints(work)
        if one.key.stage == "finetune" and one.fold == 0
    }
    options = ["--fold", "0", "--subject", "2", *QUICK_OPTIONS, "--work", str(tmp_path / "other")]
    run(capfd, "finetune", "--init", str(given["subj02"].path), *options)
    (again,) = list_checkpoints(tmp_path / "other")
    assert again.key.start.weights == given["subj02"].backbone().digest
    assert "subj02; found subj01" in fails(capfd, "finetune", "--init", str(given["subj01"].path), *options)


def test_the_weights_file_of_a_checkpoint_is_refused_wherever_it_lies(work, tmp_path, capfd):
    """It does not say what it saw, so nothing could be held out from it."""
    one = list_checkpoints(work)[0]
    file = shutil.copy(one.path / one.facts.weights / "backbone.safetensors", tmp_path / "weights.safetensors")
    for command in (
        ["finetune", "--init"],
        ["pretrain", "--weights"],
        ["extract", "--checkpoint", "none", "--weights"],
    ):
        assert f"found those of checkpoint {one.name}" in fails(capfd, *command, str(file))


def test_stage_2_reads_images_as_its_start_did_unless_it_is_asked(work, capfd):
    """The work folder has stage 1 of cropped images, too."""
    where = [*QUICK_OPTIONS, "--fold", "0"]
    done, _ = run(capfd, "pretrain", *where, "--fit", "whole")
    (first,) = (open_checkpoint(Path(one["path"])) for one in done["checkpoints"])
    assert (first.key.backbone.fit, first.key.transform["crop_mode"]) == ("whole", "squash")
    where += ["--subject", "1", "--seed", "6"]

    def trained(*options):
        (made,) = run(capfd, "finetune", *where, *options)[0]["checkpoints"]
        key = open_checkpoint(Path(made["path"])).key
        return key.backbone.fit, key.transform["crop_mode"], key.start.training

    assert trained("--fit", "whole") == ("whole", "squash", first.training)
    assert trained("--init", str(first.path)) == ("whole", "squash", first.training)
    assert trained("--init", str(first.path), "--fit", "pad") == ("pad", "border", first.training)
    assert trained("--fit", "crop")[:2] == ("crop", "center")
    assert "expected a stage-1 checkpoint of fold 0" in fails(capfd, "finetune", *where, "--fit", "pad")


def stage_1(work, training, **settings):
    """A checkpoint of fold 0 as another stage 1 would leave it, with other settings."""
    given = first_of_fold_0(work)
    path = shutil.copytree(given.path, given.path.with_name(f"{given.name}-{training}"))
    copy = next(one for one in list_checkpoints(work) if one.path == path)
    edit(copy, "recipe", settings={**given.key.settings, **settings})
    return next(one for one in list_checkpoints(work) if one.path == path).training


def started(work, capfd, *options):
    """The training that stage 2 of fold 0 starts from."""
    before = {one.path for one in list_checkpoints(work)}
    run(capfd, "finetune", *QUICK_OPTIONS, "--subject", "1", "--fold", "0", *options)
    (new,) = [one for one in list_checkpoints(work) if one.path not in before]
    return new.key.start.training


def test_of_several_stage_1_trainings_the_one_with_the_same_loss_and_then_seed_is_the_start(work, capfd):
    first = first_of_fold_0(work).training  # smooth_l1, seed 0
    alone = started(work, capfd, "--loss", "mse")
    pattern = stage_1(work, "b", loss="smooth_l1+pattern")
    seeded = stage_1(work, "c", loss="smooth_l1+pattern", seed=1)
    assert len({first, pattern, seeded}) == 3
    assert alone == first  # the only one there was, whatever its loss
    assert started(work, capfd, "--loss", "smooth_l1", "--seed", "1") == first  # the only one with this loss
    assert started(work, capfd, "--loss", "pattern+smooth_l1") == pattern
    assert started(work, capfd, "--loss", "pattern+smooth_l1", "--seed", "1") == seeded
    assert started(work, capfd, "--loss", "mse", "--seed", "1") == seeded  # none has this loss, one this seed


def test_stage_1_trainings_that_loss_and_seed_do_not_tell_apart_are_named(work, capfd):
    first = first_of_fold_0(work)
    stage_1(work, "b", epochs=7)
    for options in ([], ["--loss", "smooth_l1"], ["--loss", "smooth_l1", "--seed", "3"]):
        line = fails(capfd, "finetune", *QUICK_OPTIONS, *options)
        assert "expected one stage-1 training in" in line and "or one alone with the same --loss and --seed" in line
        assert f"{first.name}-b" in line and "name the folder of one with --init" in line


def first_of_fold_0(work):
    """The checkpoint of stage 1."""
    return next(one for one in list_checkpoints(work) if one.key.stage == "pretrain" and one.fold == 0)


def test_a_start_that_saw_the_held_out_fold_is_refused(work, tiny):
    """Even where its key claims that fold: the ids count."""
    subject = open_challenge(tiny).subjects[0]
    edit(first_of_fold_0(work), "facts", seen_ids=subject.train.ids.tolist())
    with pytest.raises(LeakError, match="fold 0 of finetune-subj01"):
        train(tiny, work, TrainConfig(epochs=1, batch_size=4, seed=3), init="stage1", n_folds=2)


def test_an_unfinished_stage_1_is_not_started_from(work, tiny, capfd):
    edit(first_of_fold_0(work), "facts", finished=False)
    assert "found only folds 1; run pretrain --fold 0" in fails(capfd, "finetune", *QUICK_OPTIONS, "--seed", "4")


def test_a_mean_of_stage_1_is_a_start_by_name_alone(work, capfd):
    """Earlier versions made such means; beside the training they are of, they do not confuse."""
    members = [one for one in list_checkpoints(work) if one.key.stage == "pretrain"]
    means = [mean_like(one, work) for one in members]
    options = ["finetune", *QUICK_OPTIONS, "--seed", "5", "--subject", "1", "--fold", str(means[0].fold)]
    run(capfd, *options)
    run(capfd, *options, "--init", str(means[0].path))
    started = [one.key.start.training for one in list_checkpoints(work) if one.key.settings.get("seed") == 5]
    assert sorted(started) == sorted([members[0].training, means[0].training])
