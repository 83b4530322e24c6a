"""Extraction takes the checkpoints that were trained on a subject as it is now, and says what it leaves out."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.backbone.checkpoint import Checkpoint, open_checkpoint
from featcache.backbone.network import load_backbone
from featcache.cache.extract import Extracted, extract
from featcache.cache.keys import FeatureKey
from featcache.cache.sources import choose_checkpoints
from featcache.cache.store import Store, open_store
from featcache.config import BackboneConfig, ExtractConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject
from featcache.errors import BackboneError, CheckpointError
from featcache.workdir import Workdir
from support.checkpoints import HEADS, N_FOLDS, write_checkpoint

BACKBONE = BackboneConfig(name="test_resnet", weights="none", size=48)
CONFIG = ExtractConfig(backbone=BACKBONE, batch_size=16, workers=2)
AUTO = replace(CONFIG, checkpoint="auto")


def run(tree: Path, work: Path, config: ExtractConfig = CONFIG) -> list[Extracted]:
    return extract(open_challenge(tree).subjects, config, work)


def subjects_of(tree: Path) -> tuple[Subject, ...]:
    return open_challenge(tree).subjects


def stores(results: list[Extracted]) -> list[Store]:
    return [open_store(result.path) for result in results]


def folds(results: list[Extracted]) -> list[tuple[str, int | None]]:
    """Subject and fold of each store; None for the fold of a backbone that was not trained."""
    keys = [FeatureKey.of(store) for store in stores(results)]
    return [(key.subject, None if key.fold is None else key.fold.fold) for key in keys]


FROZEN = [("subj01", None), ("subj02", None)]


def assert_rows_are_of(checkpoint: Checkpoint, store: Store, subject: Subject) -> None:
    backbone = checkpoint.backbone()
    images = torch.stack([backbone.transform(Image.open(path).convert("RGB")) for path in subject.image_sources])
    expected = backbone.pooled(images).numpy()
    np.testing.assert_allclose(store.read("pooled"), expected, rtol=1e-3, atol=1e-4)


def test_random_weights_are_not_announced_for_a_network_that_has_none(tiny, tmp_path, said):
    (tmp_path / "net.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Flatten()\n")
    own = replace(CONFIG, backbone=BackboneConfig(name=f"{tmp_path}/net.py:build", weights="none"))
    with pytest.raises(BackboneError, match="--weights: expected own"):
        run(tiny, tmp_path, own)
    assert not any("random weights" in line for line in said)
    run(tiny, tmp_path)
    assert any("test_resnet: random weights, as asked" in line for line in said)


def test_auto_takes_every_finished_checkpoint_and_says_what_it_leaves_out(tiny, tmp_path, said):
    subjects = subjects_of(tiny)
    made = [write_checkpoint(subjects, tmp_path, fold=fold, finished=fold < 2) for fold in range(3)]
    results = run(tiny, tmp_path, AUTO)
    assert folds(results) == [("subj01", 0), ("subj02", 0), ("subj01", 1), ("subj02", 1)]
    for k, store in enumerate(stores(results)):
        assert_rows_are_of(made[k // 2], store, subjects[k % 2])
    assert {line for line in said if "left out" in line} == {
        f"{subject.name}: left out {made[2].name}: its training is not finished; run the same command again"
        for subject in subjects
    }
    assert sum(line.startswith("2 checkpoints in") for line in said) == 1


def test_backbones_of_stage_2_can_go_once_their_features_are_cached_and_the_rest_stays(tiny, tmp_path, said):
    subjects = subjects_of(tiny)[:1]
    first, second = (write_checkpoint(subjects, tmp_path, stage=stage) for stage in ("pretrain", "finetune"))
    digests = [one.backbone().digest for one in (second, first)]
    done = run(tiny, tmp_path, replace(AUTO, prune=True))
    assert [store.key["weights"] for store in stores(done) if store.key["subject"] == "subj01"] == digests
    first, second = (open_checkpoint(one.path) for one in (first, second))
    (line,) = (one for one in said if "was removed" in one)
    assert line.startswith(second.path.name) and "backbone" in line and "B, was removed; its heads stay" in line
    assert first.backbone().digest == digests[1] and second.finished and set(second.heads()) == set(HEADS)
    with pytest.raises(CheckpointError, match=r"found that 'extract --prune' removed it; delete the folder and train"):
        second.backbone()
    said.clear()
    assert len(run(tiny, tmp_path, replace(AUTO, prune=True))) == 1  # of stage 1, which stage 2 may start from again
    assert any("its features were cached, and then its backbone was removed" in line for line in said)
    shutil.rmtree(first.path)
    assert run(tiny, tmp_path, AUTO) == []  # and never the backbone as it was before training


def test_a_store_of_a_checkpoint_says_how_it_was_trained_and_on_which_of_its_images(tiny, tmp_path):
    subjects = subjects_of(tiny)
    made = [write_checkpoint(subjects, tmp_path, fold=fold) for fold in range(2)]
    for k, store in enumerate(stores(run(tiny, tmp_path, AUTO))):
        checkpoint, subject = made[k // 2], subjects[k % 2]
        assert store.key["fold"] == {
            "stage": "pretrain",
            "training": checkpoint.training,
            "fold": k // 2,
            "n_folds": N_FOLDS,
            "seed": 0,
        }
        ids = subject.train.ids
        trained_here = set(ids[assign_folds(ids, N_FOLDS, 0) != k // 2].tolist())
        assert trained_here <= set(store.facts["seen_ids"])
        assert set(store.facts["seen_ids"]) == set(checkpoint.facts.seen_ids) & set(subject.image_ids.tolist())
        assert store.key["weights"] == checkpoint.backbone().digest
        assert store.facts["origin"] == f"checkpoint {checkpoint.name}"


@pytest.mark.parametrize(
    ("asked", "mode"), [(None, "squash"), ("whole", "squash"), ("crop", "center"), ("pad", "border")]
)
def test_a_checkpoint_reads_images_as_it_was_trained_to_unless_it_is_asked(tiny, tmp_path, asked, mode):
    write_checkpoint(subjects_of(tiny), tmp_path, fit="whole")
    config = replace(AUTO, backbone=BackboneConfig(name="test_resnet", weights="none", fit=asked))
    expected = load_backbone(replace(BACKBONE, fit=asked or "whole")).transform_settings
    assert expected["crop_mode"] == mode
    for store in stores(run(tiny, tmp_path, config)):
        assert store.key["transform"] == expected


def test_a_test_image_that_another_subject_trained_on_counts_as_seen(tiny, tmp_path):
    first, second = subjects_of(tiny)
    ids = np.concatenate([second.train.ids, first.train.ids[:1], second.test.ids[1:]])
    shared = replace(second, test=replace(second.test, ids=ids[len(second.train) :]))
    made = write_checkpoint(
        [first, shared], tmp_path, fold=int(assign_folds(first.train.ids[:1], N_FOLDS, 0)[0] + 1) % 3
    )
    results = extract([shared], AUTO, tmp_path)
    seen = stores(results)[0].facts["seen_ids"]
    assert first.train.ids[0] in made.seen_ids and first.train.ids[0] in seen
    assert set(seen) == set(made.seen_ids.tolist()) & set(shared.image_ids.tolist())


@pytest.mark.parametrize("checkpoint", ["auto", "none"])
def test_without_checkpoints_the_backbone_reads_as_its_weights_came(tiny, tmp_path, checkpoint):
    results = run(tiny, tmp_path, replace(CONFIG, checkpoint=checkpoint))
    assert folds(results) == FROZEN
    for store in stores(results):
        assert store.key["weights"] == load_backbone(BACKBONE).digest and "seen_ids" not in store.facts


def test_none_ignores_checkpoints_and_finds_the_frozen_store_again(tiny, tmp_path):
    first = run(tiny, tmp_path)
    write_checkpoint(subjects_of(tiny), tmp_path)
    again = run(tiny, tmp_path)
    assert folds(again) == FROZEN and [(r.path, r.n_new) for r in again] == [(r.path, 0) for r in first]


def test_a_second_run_with_checkpoints_runs_nothing_and_each_fold_has_its_own_store(tiny, tmp_path, monkeypatch, said):
    for fold in range(2):
        write_checkpoint(subjects_of(tiny), tmp_path, fold=fold)
    first = run(tiny, tmp_path, AUTO)
    assert len({r.path for r in first}) == 4 and not any("a new store" in line for line in said)
    monkeypatch.setattr("featcache.cache.extract._forward", lambda *_: pytest.fail("ran the model again"))
    assert [(r.path, r.n_new) for r in run(tiny, tmp_path, AUTO)] == [(r.path, 0) for r in first]


def test_auto_gives_each_subject_the_checkpoints_that_were_trained_on_it(tiny, tmp_path):
    for subject in subjects_of(tiny):
        write_checkpoint([subject], tmp_path, stage="finetune")
    results = run(tiny, tmp_path, AUTO)
    assert sorted(folds(results)) == [("subj01", 0), ("subj02", 0)]
    for store, subject in zip(sorted(stores(results), key=lambda s: s.key["subject"]), subjects_of(tiny), strict=True):
        assert set(store.facts["seen_ids"]) <= set(subject.train.ids.tolist())
        assert store.key["fold"]["stage"] == "finetune"


def test_auto_falls_back_where_no_checkpoint_is_of_the_backbone_that_is_asked_for(tiny, tmp_path):
    write_checkpoint(subjects_of(tiny), tmp_path, name="test_convnext")
    assert folds(run(tiny, tmp_path, AUTO)) == FROZEN
    results = run(tiny, tmp_path, replace(AUTO, backbone=replace(BACKBONE, name=None)))
    assert folds(results) == [("subj01", 0), ("subj02", 0)]
    assert {store.key["backbone"] for store in stores(results)} == {"test_convnext"}


def test_naming_a_backbone_finds_its_trainings_whatever_they_began_with(tiny, tmp_path):
    """Weights that were not asked for have a default, which is no reason to pass a checkpoint over."""
    made = write_checkpoint(subjects_of(tiny), tmp_path)
    named = replace(AUTO, backbone=replace(BACKBONE, weights="hub"))
    ((checkpoint, served),) = choose_checkpoints(subjects_of(tiny), named, tmp_path)
    assert checkpoint.path == made.path and [subject.name for subject in served] == ["subj01", "subj02"]


def test_auto_leaves_out_checkpoints_of_another_tree_and_says_so(tree, tmp_path, said):
    work = tmp_path / "work"
    made = write_checkpoint(subjects_of(tree), work)
    path = sorted((tree / "subj01/training_split/training_images").iterdir())[2]
    Image.fromarray(np.asarray(Image.open(path)) ^ 1).save(path)
    found = folds(run(tree, work, AUTO))
    assert ("subj02", 0) in found and ("subj01", 0) not in found
    assert (
        f"subj01: left out {made.name}: expected a checkpoint of this tree; found one of other images of subj01" in said
    )


@pytest.mark.parametrize("given", ["name", "path"])
def test_a_checkpoint_is_taken_by_name_or_path_and_alone(tiny, tmp_path, given):
    subjects = subjects_of(tiny)
    made = [write_checkpoint(subjects, tmp_path / "trained", fold=fold) for fold in range(2)]
    work = tmp_path / ("trained" if given == "name" else "other")
    wanted = made[1].name if given == "name" else str(made[1].path)
    results = run(tiny, work, replace(CONFIG, checkpoint=wanted))
    assert folds(results) == [("subj01", 1), ("subj02", 1)]
    for store, subject in zip(stores(results), subjects, strict=True):
        assert_rows_are_of(made[1], store, subject)


def test_a_checkpoint_reads_at_its_own_size_unless_another_is_asked_for(tiny, tmp_path):
    write_checkpoint(subjects_of(tiny), tmp_path, size=64)
    for size, expected in ((None, 64), (48, 48)):
        results = run(tiny, tmp_path, replace(AUTO, backbone=replace(BACKBONE, size=size)))
        assert folds(results) == [("subj01", 0), ("subj02", 0)]
        assert {store.key["transform"]["input_size"][-1] for store in stores(results)} == {expected}


def test_a_checkpoint_of_another_architecture_is_refused(tiny, tmp_path):
    made = write_checkpoint(subjects_of(tiny), tmp_path, name="test_convnext")
    named = replace(CONFIG, checkpoint=str(made.path))
    message = r"expected a checkpoint of test_resnet; found one of test_convnext; name --backbone test_convnext"
    with pytest.raises(CheckpointError, match=message):
        run(tiny, tmp_path, named)
    assert not Workdir(tmp_path).features.exists()
    assert len(run(tiny, tmp_path, replace(named, backbone=replace(BACKBONE, name=None)))) == 2


def test_a_checkpoint_of_another_tree_is_refused(tree, tmp_path):
    work = tmp_path / "work"
    made = write_checkpoint(subjects_of(tree), work)
    path = tree / "subj02/training_split/training_fmri/lh_training_fmri.npy"
    np.save(path, np.load(path) * 2)
    message = r"found one of other responses of subj02; choose another checkpoint, or train one on this tree"
    with pytest.raises(CheckpointError, match=message):
        run(tree, work, replace(CONFIG, checkpoint=made.name))
    assert not Workdir(work).features.exists()


def test_a_checkpoint_that_did_not_train_on_a_subject_is_refused_for_it(tiny, tmp_path):
    made = write_checkpoint(subjects_of(tiny)[:1], tmp_path, stage="finetune")
    with pytest.raises(CheckpointError, match="expected a checkpoint that was trained on subj02; found subj01"):
        run(tiny, tmp_path, replace(CONFIG, checkpoint=made.name))


def test_a_checkpoint_that_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: expected a checkpoint's folder; found no checkpoint.json"):
        run(tiny, tmp_path, replace(CONFIG, checkpoint="nowhere"))


def test_a_mean_of_trainings_that_an_older_release_made_is_read_as_one(tiny, tmp_path):
    settings = {"soup": ["0123456789ab", "ba9876543210"]}
    write_checkpoint(subjects_of(tiny), tmp_path, fold=1, settings=settings)
    for store in stores(run(tiny, tmp_path, AUTO)):
        assert list(store.key["fold"]) == ["stage", "training", "soup", "fold", "n_folds", "seed"]
        assert store.key["fold"]["soup"] == 2 and "-test_resnet-pretrain-soup-fold1-" in store.name
