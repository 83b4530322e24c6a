"""--split through the commands: groups stay whole from training to the blend, and nothing of two splits is mixed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import cli
from featcache.backbone.checkpoint import list_checkpoints
from featcache.backbone.keys import Split as HeldOut
from featcache.cache.keys import FoldKey, HeldOutFolds
from featcache.cache.store import open_store
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.grouping import recall, split_of
from featcache.dataset.splits import SplitKey
from featcache.errors import LeakError
from featcache.workdir import Workdir
from heads.config import FitConfig
from heads.fit.run import fit_heads
from heads.scores.metrics import pearson_r
from support.commands import SMALL, fails, run
from support.training import QUICK_OPTIONS


def says(capfd, *arguments):
    """What a command that succeeds says on stderr."""
    assert cli.run(list(arguments)) == 0
    return capfd.readouterr().err


@pytest.fixture
def grouped(tiny, tmp_path, monkeypatch):
    """The tiny tree with sessions of six images, which commands find; the subjects as commands see them.

    Sessions follow the image ids, so that those of subjects that share images agree.
    """
    opened = open_challenge(tiny)
    ids = sorted({int(i) for subject in opened.subjects for i in subject.image_ids})
    session = {i: f"ses-{place // 6:02d}" for place, i in enumerate(ids)}
    subjects = tuple(
        replace(subject, columns={"session": tuple(session[int(i)] for i in subject.image_ids)})
        for subject in opened.subjects
    )
    monkeypatch.setattr("featcache.dataset.open.open_dataset", lambda *_: replace(opened, subjects=subjects))
    for name, value in (SMALL | {"FEATCACHE_DATA": str(tiny), "FEATCACHE_WORK": str(tmp_path / "work")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FEATCACHE_SIZE", "32")
    return subjects


def sides(subjects, split, n_folds):
    """For each fold, the groups of images in it and those outside it, over all subjects."""
    for fold in range(n_folds):
        held_out = [subject.train.ids[split.folds(subject.train.ids, n_folds, 0) == fold] for subject in subjects]
        yield fold, set(np.concatenate(held_out).tolist())


@pytest.mark.slow
def test_sessions_stay_whole_from_the_first_stage_to_the_blend(grouped, tmp_path, capfd):
    """No backbone and no head saw an image of a session that it predicts; nothing of another split is mixed in."""
    work, by = tmp_path / "work", ("--split", "session")
    run(capfd, "pretrain", *QUICK_OPTIONS, *by)
    run(capfd, "finetune", *QUICK_OPTIONS, *by, "--subject", "1", "--fold", "0")
    session = {int(i): s for one in grouped for i, s in zip(one.image_ids, one.columns["session"], strict=True)}
    split = recall(SplitKey.from_json(list_checkpoints(work)[0].key.to_json()["fold"]["split"]), work)
    held_out = dict(sides(grouped, split, 2))
    assert len(list_checkpoints(work)) == 3
    for checkpoint in list_checkpoints(work):
        seen = {session[int(i)] for i in checkpoint.seen_ids}
        assert seen.isdisjoint({session[i] for i in held_out[checkpoint.fold]}) and seen
    run(capfd, "extract", "--layers", "pooled")
    run(capfd, "extract", "--layers", "pooled", "--checkpoint", "none")
    options = ("--folds", "2", "--layers", "pooled", *by)
    fitted = run(capfd, "fit-heads", *options)
    as_trained = run(capfd, "fit-heads", "--solver", "trained", *by)
    assert all(" split session " in store["model"] for store in fitted["stores"] + as_trained["stores"])
    assert all(store["path"] == again["path"] for store, again in zip(
        fitted["stores"], run(capfd, "fit-heads", *options)["stores"], strict=True))  # fmt: skip
    blended = run(capfd, "blend")
    assert len(blended["weights"]["subj01"]["lh"]["all"]) == 3
    about = json.loads((work / "submission" / "weights.json").read_text())["folds"]
    assert about == {"n_folds": 5, "seed": 0, "split": {"name": "session", "digest": split.digest}}

    refused = fails(capfd, "fit-heads", *options[:4])
    assert "expected --split session" in refused and "found id; give --split session, or choose other" in refused
    stage_2 = fails(capfd, "finetune", *QUICK_OPTIONS, "--fold", "0")
    assert "expected a stage-1 checkpoint of the same folds (2, seed 0)" in stage_2 and "--split session" in stage_2
    by_id = run(capfd, "fit-heads", *options[:4], "--features", "*@32 ??????")
    assert len(by_id["stores"]) == 2
    mixed = fails(capfd, "blend")
    assert "--models: expected models of one split; found --split " in mixed
    assert "--split id (test_resnet@32 pooled" in mixed and f"--split session ({split.digest[:6]}) (" in mixed
    assert len(run(capfd, "models")["models"]) == 4  # listed together, though they cannot be blended
    assert len(run(capfd, "models", "--exclude", "*split*")["models"]) == 1
    assert len(run(capfd, "blend", "--models", "*split session*")["weights"]["subj01"]["lh"]["all"]) == 3

    for path in Workdir(work).splits.iterdir():
        path.unlink()
    assert "left out" in says(capfd, "models", "--exclude", "*split*")
    run(capfd, "fit-heads", *options)  # writes it again
    assert len(run(capfd, "models", "--models", "*split*")["models"]) == 3


@pytest.mark.parametrize("kind", [FoldKey, HeldOutFolds, HeldOut])
def test_keys_by_image_id_are_those_of_earlier_versions_and_others_name_their_split(kind):
    """The JSON that names of checkpoints and stores are made of: by image id, there is nothing of a split."""
    values = {"n_folds": 5, "seed": 0} | ({"held_out": [0, 1]} if kind is HeldOutFolds else {"fold": 1})
    values |= {} if kind is HeldOut else {"stage": "pretrain", "training": "0123456789ab"}
    assert kind.from_json(values).to_json() == values
    split = {"name": "session", "digest": "ba9876543210"}
    assert kind.from_json(values | {"split": split}).to_json() == values | {"split": split}


@pytest.mark.slow
def test_a_planted_leak_of_a_session_is_refused(grouped, tmp_path, capfd):
    """Columns that change after training: the digest tells. A backbone that saw a session mate: its ids tell."""
    work, by = tmp_path / "work", ("--split", "session")
    run(capfd, "finetune", "--init", "none", "--subject", "1", *QUICK_OPTIONS, *by)
    run(capfd, "extract", "--layers", "pooled", "--subject", "1")
    subject, split = grouped[0], split_of("session", grouped, work)
    (path,) = (one for one in Workdir(work).features.iterdir() if "fold0" in one.name)
    group = zarr.open_group(path, mode="r+")
    about = dict(group.attrs["featcache"])
    del about["digest"]  # as of an earlier version
    ids = subject.train.ids
    held_out = ids[split.folds(ids, 2, 0) == 0].tolist()
    sessions = {split.groups[i] for i in held_out}
    mate = next(i for i, of_mate in split.groups.items() if of_mate in sessions and i not in subject.image_ids)
    for leaked, line in ((held_out[0], f"(id {held_out[0]})"), (mate, f"(group {split.groups[mate]})")):
        facts = about["facts"] | {"seen_ids": [*about["facts"]["seen_ids"], leaked]}
        group.attrs["featcache"] = about | {"facts": facts}
        refused = fails(capfd, "fit-heads", "--layers", "pooled", "--subject", "1", *by)
        assert f"found 1 on both sides of the split {line}" in refused
    changed = list(subject.columns["session"])
    moved = next(row for row, one in enumerate(changed) if one != changed[1])
    changed[1], changed[moved] = changed[moved], changed[1]
    swapped = replace(subject, columns={"session": tuple(changed)})
    with pytest.raises(LeakError, match="train it again: the groups have changed since"):
        fit_heads([swapped], FitConfig(split="session"), work)


@pytest.mark.slow
def test_test_images_of_a_published_split_have_a_score_of_their_own(grouped, tmp_path, capfd):
    """It is that of heads which were fitted to exactly the other images."""
    subject = grouped[0]
    tested = sorted({int(i) for one in grouped for i in one.train.ids})[::4]
    train = [source.name for one in grouped for source, i in zip(one.train.sources, one.train.ids, strict=True)
             if int(i) not in tested]  # fmt: skip
    test = [source.name for one in grouped for source, i in zip(one.train.sources, one.train.ids, strict=True)
            if int(i) in tested]  # fmt: skip
    path = tmp_path / "ood.json"
    path.write_text(json.dumps({"name": "ood", "variants": [{"variant_id": 0, "train_ids": train, "test_ids": test}]}))
    run(capfd, "extract", "--layers", "pooled")
    found = run(capfd, "fit-heads", "--layers", "pooled", "--folds", "3", "--split", f"file:{path}")
    assert found["held_out"]["name"] == "ood"
    (store,) = (open_store(Path(one["path"])) for one in found["stores"] if one["subject"] == "subj01")
    rows = np.isin(subject.train.ids, tested)
    expected = [
        pearson_r(store.read(surface, 0, store.n_train)[rows], subject.responses(surface)[rows])
        for surface in subject.surfaces
    ]
    (scores,) = found["held_out"]["scores"].values()
    (row,) = (one for one in scores if (one["subject"], one["surface"], one["roi"]) == ("subj01", "lh", "all"))
    assert row["mean_r"] == pytest.approx(expected[0].mean(), abs=1e-5)
    assert set(run(capfd, "blend")["weights"]) == {"subj01", "subj02"}


@pytest.mark.slow
def test_few_groups_leave_folds_of_a_blend_empty_and_it_still_blends(grouped, tmp_path, capfd):
    """Three folds of a file, five of a blend."""
    ids = sorted({int(i) for one in grouped for i in one.train.ids})
    path = tmp_path / "folds.csv"
    path.write_text("id,fold\n" + "".join(f"{i},{i % 3}\n" for i in ids))
    run(capfd, "extract", "--layers", "pooled")
    by = ("--split", f"file:{path}", "--layers", "pooled")
    assert "expected an image in each of the 5 folds; found none of" in fails(capfd, "fit-heads", *by)
    run(capfd, "fit-heads", "--folds", "3", "--loss", "mse,smooth_l1", "--epochs", "1", *by)
    blended = run(capfd, "blend")
    assert all(np.isfinite(row["mean_r"]) for row in blended["scores"]["blend"])
    assert len(run(capfd, "models")["models"]) == 2


@pytest.mark.slow
def test_clusters_of_images_are_looked_for_once(grouped, tmp_path, capfd, monkeypatch):
    run(capfd, "extract", "--layers", "pooled")
    options = ("fit-heads", "--layers", "pooled", "--folds", "2", "--split", "cluster")
    first = run(capfd, *options)
    monkeypatch.setattr("featcache.dataset.looks.describe", lambda *_: pytest.fail("looked again"))
    second = run(capfd, *options, "--subject", "2")
    assert second["stores"] == first["stores"][1:] and " split cluster " in second["stores"][0]["model"]
