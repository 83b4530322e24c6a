"""Means of checkpoints: the right mean, of the right members, honest about what they saw, and taken like any other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cli
from featcache.backbone.checkpoint import FOLDER, list_checkpoints, open_checkpoint, save_weights
from featcache.cache.extract import extract
from featcache.cache.store import list_stores, open_store
from featcache.config import BackboneConfig, ExtractConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds
from featcache.errors import CheckpointError, ConfigError, LeakError
from heads.backbones.soup import make_soups, mean_weights
from heads.backbones.stages import train_stage
from heads.config import FitConfig, SoupConfig, StageConfig, TrainConfig
from heads.fit.run import fit_heads
from heads.scores.metrics import VertexScores, pearson_r, summarize
from support.checkpoints import HEADS

SMALL = BackboneConfig(name="test_resnet", weights="none", size=48)
QUICK = TrainConfig(loss="smooth_l1", epochs=1, batch_size=4, stop="never", embedding=8, learning_rate=3e-3)
MEMBERS = (QUICK, TrainConfig(**vars(QUICK) | {"loss": "pearson"}), TrainConfig(**vars(QUICK) | {"seed": 1}))


def train(subjects, work, settings, stage="finetune", init="none", **options):
    config = StageConfig(
        stage=stage, train=settings, backbone=SMALL, init=init, n_folds=2, device="cpu", workers=1, **options
    )
    return [one.checkpoint for one in train_stage(subjects, config, work)]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Three trainings of stage 2 from one start, of both subjects and both folds, for reading."""
    work = tmp_path_factory.mktemp("members")
    for settings in MEMBERS:
        train(open_challenge(tiny).subjects, work, settings)
    return work


@pytest.fixture
def work(trained, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "work"))


@pytest.fixture
def subjects(tiny):
    return open_challenge(tiny).subjects


def soups(subjects, work, **options):
    return make_soups(subjects, SoupConfig(**options, device="cpu", workers=1), work)


def tensors(checkpoint, part):
    return load_file(checkpoint.path / checkpoint.facts["weights"] / f"{part}.safetensors")


def edit(checkpoint, **about):
    """Change what a checkpoint's description says, {'facts': {...}, 'recipe': {...}}."""
    path = checkpoint.path / "checkpoint.json"
    now = json.loads(path.read_text())
    for part, values in about.items():
        now[part] |= values
    path.write_text(json.dumps(now))


def killed(*_):
    raise KeyboardInterrupt


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_soup_a_fold_and_subject_and_its_weights_are_the_mean(work, subjects):
    before = list_checkpoints(work)
    made = soups(subjects, work)
    assert sorted((*one.checkpoint.key["subjects"], one.checkpoint.fold["fold"]) for one in made) == [
        (f"subj0{n}", k) for n in (1, 2) for k in (0, 1)
    ]
    for soup in made:
        members = [one for one in before if one.name in {member["name"] for member in soup.members}]
        assert len(members) == 3 and {one.fold["fold"] for one in members} == {soup.checkpoint.fold["fold"]}
        for part in ("backbone", "heads"):
            own, theirs = tensors(soup.checkpoint, part), [tensors(one, part) for one in members]
            assert own.keys() == theirs[0].keys()
            for key, value in own.items():
                expected = np.mean([one[key].double().numpy() for one in theirs], axis=0)
                assert value.dtype == theirs[0][key].dtype
                np.testing.assert_allclose(value.numpy(), expected, rtol=2e-7, atol=1e-12, err_msg=key)
        first, mean = (tensors(one, "backbone") for one in (members[0], soup.checkpoint))
        assert any(not torch.equal(first[key], mean[key]) for key in mean)


def test_a_soup_is_one_training_over_folds_and_subjects_and_none_of_its_members(work, subjects):
    made = [one.checkpoint for one in soups(subjects, work)]
    members = {one.training for one in list_checkpoints(work) if not one.members}
    assert len({one.training for one in made}) == 1 and made[0].training not in members
    assert {one.members for one in made} == {tuple(sorted(members))}
    for one in made:
        like = next(m for m in list_checkpoints(work) if m.name == one.facts["members"][0]["name"])
        assert one.key == {**like.key, "settings": {"soup": sorted(members)}}
        assert one.finished and open_checkpoint(one.path) == one and "-soup-fold" in one.name


def test_identical_members_give_their_own_weights_and_score(work, subjects):
    """Twins: one checkpoint under two trainings."""
    one = next(c for c in list_checkpoints(work) if "subj01" in c.name and c.fold["fold"] == 0)
    twin = Path(shutil.copytree(one.path, one.path.with_name(one.path.name.replace("fold0", "fold0-twin"))))
    edit(open_checkpoint(twin), key={"settings": one.key["settings"] | {"seed": 77}})
    (soup,) = soups(subjects[:1], work, models=f"{one.name},{twin.name}")
    for part in ("backbone", "heads"):
        own, theirs = tensors(soup.checkpoint, part), tensors(one, part)
        assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert soup.score == pytest.approx(one.facts["score"], abs=1e-6)
    assert (soup.best, soup.mean) == (one.facts["score"], one.facts["score"])


@pytest.mark.parametrize(("stage", "head"), [("pretrain", "pooled"), ("pretrain", "spatial"), ("finetune", "spatial")])
def test_saved_heads_score_as_training_did_in_every_form(subjects, tmp_path, stage, head):
    """A soup of twins scores what their training scored, whatever heads it had, on both subjects or on one."""
    form = {"head": head, "layers": "0,1", "grid": "2", "space": 3} if head == "spatial" else {}
    settings = TrainConfig(**vars(QUICK) | form)
    chosen = subjects if stage == "pretrain" else subjects[:1]
    (one,) = train(chosen, tmp_path, settings, stage, fold=0)
    twin = Path(shutil.copytree(one.path, one.path.with_name(f"{one.path.name}-twin")))
    edit(open_checkpoint(twin), key={"settings": one.key["settings"] | {"seed": 77}})
    (soup,) = soups(chosen, tmp_path, stage=stage)
    assert soup.score == pytest.approx(one.facts["score"], abs=1e-5)
    assert soup.checkpoint.facts["taps"] == one.facts["taps"]


def test_its_score_is_that_of_its_predictions_of_the_held_out_images(work, subjects):
    made = soups(subjects[:1], work)
    for soup in made:
        extract(subjects[:1], ExtractConfig(backbone=SMALL, checkpoint=str(soup.checkpoint.path), workers=1), work)
    (fitted,) = fit_heads(subjects[:1], FitConfig(solver="trained"), work)
    store, folds = open_store(fitted.path), assign_folds(subjects[0].train.ids, 2, 0)
    assert "finetune soup of 3" in fitted.model
    for soup in made:
        rows = np.flatnonzero(folds == soup.checkpoint.fold["fold"])
        r = {h: pearson_r(store.read(h, 0, store.n_train)[rows], subjects[0].responses(h)[rows]) for h in HEMISPHERES}
        scores = [VertexScores("subj01", h, r[h], subjects[0].noise_ceiling[h]) for h in HEMISPHERES]
        assert summarize(scores)[-1].accuracy == pytest.approx(100 * soup.score, abs=0.05)


def test_it_saw_what_any_member_saw(work, subjects):
    before = [one for one in list_checkpoints(work) if one.fold["fold"] == 0 and "subj02" in one.name]
    foreign = 900_001  # an image of nobody here, as of a stage 1 with other subjects
    edit(before[1], facts={"seen_ids": [*before[1].facts["seen_ids"], foreign]})
    made = {(*s.checkpoint.key["subjects"], s.checkpoint.fold["fold"]): s.checkpoint for s in soups(subjects, work)}
    union = set().union(*(set(one.facts["seen_ids"]) for one in before)) | {foreign}
    assert set(made["subj02", 0].seen_ids.tolist()) == union
    assert foreign not in made["subj02", 1].seen_ids
    folds = assign_folds(made["subj01", 0].seen_ids, 2, 0)
    assert len(folds) and (folds != 0).all()


def test_a_member_that_saw_the_held_out_fold_is_refused_and_nothing_is_left(work, subjects):
    one = next(c for c in list_checkpoints(work) if "subj01" in c.name and c.fold["fold"] == 0)
    held_out = subjects[0].train.ids[assign_folds(subjects[0].train.ids, 2, 0) == 0]
    edit(one, facts={"seen_ids": [*one.facts["seen_ids"], int(held_out[0])]})
    with pytest.raises(LeakError, match=rf"fold 0 of finetune-subj01-test_resnet-soup-fold0 .*id {held_out[0]}\)"):
        soups(subjects, work)
    assert not any(c.members and "subj01" in c.name and c.fold["fold"] == 0 for c in list_checkpoints(work))


def test_a_second_run_makes_nothing_and_an_interrupted_one_leaves_nothing_half_written(
    work, subjects, monkeypatch, said
):
    with monkeypatch.context() as patch:
        patch.setattr("heads.backbones.soup.record", killed)
        with pytest.raises(KeyboardInterrupt):
            soups(subjects[:1], work)
    assert not any(one.members for one in list_checkpoints(work))
    first = soups(subjects[:1], work)
    assert [one.new for one in first] == [True, True]
    before = files(work / FOLDER)
    again = soups(subjects[:1], work)
    assert [one.new for one in again] == [False, False] and files(work / FOLDER) == before
    assert [one.checkpoint for one in again] == [one.checkpoint for one in first]
    assert sum("already averaged" in line for line in said) == 2


def test_a_soup_is_made_again_when_a_member_has_other_weights(work, subjects, said, monkeypatch):
    """A member that was deleted and trained anew on other hardware: the same key, other bits."""
    first = {one.checkpoint.name: one.checkpoint for one in soups(subjects[:1], work)}
    member = next(c for c in list_checkpoints(work) if "subj01" in c.name and c.fold["fold"] == 0 and not c.members)
    folder, moved = member.path / "epoch-009", {k: v + 1 for k, v in tensors(member, "heads").items()}
    written = save_weights(folder, tensors(member, "backbone"), moved)
    edit(member, facts={"weights": folder.name, "digests": written})
    stale = next(one for one in first.values() if one.fold["fold"] == 0)
    whole, intercept = files(stale.path), stale.heads()["subj01.lh.intercept"]
    with monkeypatch.context() as patch:
        patch.setattr("heads.backbones.soup.record", killed)
        with pytest.raises(KeyboardInterrupt):
            soups(subjects[:1], work)
    assert whole.items() <= files(stale.path).items() and open_checkpoint(stale.path).heads()
    again = {one.checkpoint.fold["fold"]: one for one in soups(subjects[:1], work)}
    assert (again[0].new, again[1].new) == (True, False) and again[0].checkpoint.path == stale.path
    torch.testing.assert_close(again[0].checkpoint.heads()["subj01.lh.intercept"], intercept + 1 / 3)
    assert [path.name for path in stale.path.iterdir() if path.is_dir()] == [again[0].checkpoint.facts["weights"]]
    assert any("members have other weights now" in line for line in said)


def test_other_settings_make_another_soup_beside_the_first(work, subjects):
    first = soups(subjects[:1], work)
    train(subjects[:1], work, TrainConfig(**vars(QUICK) | {"seed": 2}))
    second = soups(subjects[:1], work)
    assert {one.checkpoint.path for one in first}.isdisjoint(one.checkpoint.path for one in second)
    assert [len(one.members) for one in second] == [4, 4] and all(one.checkpoint.path.is_dir() for one in first)


@pytest.mark.parametrize("by", ["folders", "trainings"])
def test_patterns_choose_members(work, subjects, by):
    known = [one for one in list_checkpoints(work) if "subj01" in one.name]
    wanted = sorted({one.training for one in known})[:2]
    names = [one.name for one in known if one.training in wanted] if by == "folders" else [f"{t[:8]}*" for t in wanted]
    made = soups(subjects[:1], work, models=", ".join(names))
    assert [one.checkpoint.members for one in made] == [tuple(wanted)] * 2
    with pytest.raises(ConfigError, match=r"--models: expected patterns that match one of: finetune-subj01") as found:
        soups(subjects[:1], work, models="convnext*")
    assert "found 'convnext*'" in str(found.value) and "\n" not in str(found.value)


def test_only_folds_that_all_members_have(work, subjects, said):
    gone = next(c for c in list_checkpoints(work) if "subj01" in c.name and c.fold["fold"] == 1)
    shutil.rmtree(gone.path)
    made = soups(subjects, work)
    assert sorted((*one.checkpoint.key["subjects"], one.checkpoint.fold["fold"]) for one in made) == [
        ("subj01", 0),
        ("subj02", 0),
        ("subj02", 1),
    ]
    sibling = next(c.name for c in list_checkpoints(work) if c.training == gone.training and "subj01" in c.name)
    assert any(line.startswith("left out fold 1 of ") and sibling in line for line in said)


def test_a_family_of_one_is_said_and_alone_refused_in_one_line(tiny, subjects, tmp_path, said):
    train(subjects[:1], tmp_path, QUICK)
    names = [one.name for one in list_checkpoints(tmp_path)]
    with pytest.raises(CheckpointError, match=r"expected two or more finished finetune checkpoints .*--seed") as found:
        soups(subjects, tmp_path)
    assert "\n" not in str(found.value)
    assert any(all(name in line for name in names) and "a family of one training" in line for line in said)
    for stage in ("finetune", "pretrain"):
        with pytest.raises(CheckpointError, match=f"expected finished {stage} checkpoints of this tree; found none"):
            soups(subjects, tmp_path / "nowhere", stage=stage)


def test_what_started_elsewhere_or_is_unfinished_or_of_another_tree_is_no_member(work, tree, said):
    """Another start is another family, and recordings that changed leave nothing to average."""
    subjects = open_challenge(tree).subjects
    (first,) = train(subjects, work, QUICK, "pretrain", fold=0)
    train(subjects[:1], work, QUICK, init=str(first.path), fold=0)
    early = next(c for c in list_checkpoints(work) if c.training in soups(subjects, work)[0].checkpoint.members)
    edit(early, facts={"finished": False})
    path = subjects[1].response_paths["lh"]
    np.save(path, np.load(path) + 1)
    said.clear()
    made = soups(open_challenge(tree).subjects, work)
    assert all(list(one.checkpoint.key["subjects"]) == ["subj01"] for one in made)
    assert all(early.name not in [member["name"] for member in one.members] for one in made)
    assert any(f"left out {early.name}: its training is not finished" in line for line in said)
    assert any("found one of other responses of subj02" in line for line in said)
    assert any("a family of one training" in line and str(first.fold["fold"]) in line for line in said)


def test_mean_weights_is_summed_in_float64_and_of_the_first_ones_type():
    values = [torch.tensor([1e8, 1.0, 1 / 3]), torch.tensor([1.0, 2.0, 1 / 3]), torch.tensor([-1e8, 6.0, 1 / 3])]
    half = torch.tensor([1.0, 2.0], dtype=torch.float16)
    found = mean_weights(
        (
            str(n),
            {"weight": value, "half": half, "norm.num_batches_tracked": torch.tensor(n), "columns.a": torch.arange(3)},
        )
        for n, value in enumerate(values)
    )
    assert torch.equal(found["weight"], torch.tensor([np.float32(1 / 3), 3.0, 1 / 3]))
    assert torch.equal(found["half"], half) and found["half"].dtype == torch.float16
    assert found["norm.num_batches_tracked"] == 0 and torch.equal(found["columns.a"], torch.arange(3))
    assert torch.equal(values[0], torch.tensor([1e8, 1.0, 1 / 3]))  # what was given is as it was


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"linear.weight": torch.zeros(2, 4)}, r"linear.weight of float32 \(2, 4\), which is float32 \(2, 3\) there"),
        ({"linear.weight": torch.zeros(2, 3).half()}, r"linear.weight of float16 \(2, 3\), which is float32"),
        ({"columns.subj01.lh": torch.tensor([0, 1, 3, 2])}, "another columns.subj01.lh"),
        ({"more": torch.zeros(1)}, "more, which is not there"),
        ({"linear.weight": None}, "no linear.weight"),
    ],
)
def test_members_with_other_tensors_are_refused_by_name(other, fault):
    theirs = {key: value for key, value in (HEADS | other).items() if value is not None}
    message = f"second: expected the same tensors as in first; found {fault}"
    with pytest.raises(CheckpointError, match=message) as found:
        mean_weights([("first", HEADS), ("second", theirs)])
    assert "--models" in str(found.value) and "\n" not in str(found.value)


def test_pooled_and_spatial_heads_are_refused_through_the_command(subjects, tiny, tmp_path, capfd):
    train(subjects[:1], tmp_path, QUICK, fold=0)
    train(subjects[:1], tmp_path, TrainConfig(**vars(QUICK) | {"head": "spatial", "layers": "0", "grid": "2"}), fold=0)
    assert cli.run(["soup", "--data", str(tiny), "--work", str(tmp_path)]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: finetune-subj01-test_resnet-fold0-") and "expected the same tensors as in" in line
    assert not any(one.members for one in list_checkpoints(tmp_path))


def test_the_whole_pipeline_takes_it_through_the_commands(work, tiny, capfd, monkeypatch):
    for name, value in {"BACKBONE": "test_resnet", "WEIGHTS": "none", "SIZE": "48", "DATA": tiny, "WORK": work}.items():
        monkeypatch.setenv(f"FEATCACHE_{name}", str(value))

    def run(*arguments):
        code = cli.run([*arguments, "--json"])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out.splitlines()[-1]), out

    made, out = run("soup")
    assert len(made["soups"]) == 4 and "4 soups, 4 of them new" in out and "soup - best" in out
    for one in made["soups"]:
        scores = [member["score"] for member in one["members"]]
        assert len(scores) == 3 and (one["best"], one["mean"]) == (max(scores), pytest.approx(np.mean(scores)))
    extracted, _ = run("extract", "--layers", "pooled")
    assert len(extracted["stores"]) == 16 and sum("-soup-" in one["path"] for one in extracted["stores"]) == 4
    of_soup = [store for store in list_stores(work / "features.zarr") if "soup" in store.key["fold"]]
    assert {store.key["fold"]["soup"] for store in of_soup} == {3} and all(s.facts["seen_ids"] for s in of_soup)
    for options in (["--loss", "mnnpc"], ["--solver", "trained"]):
        fitted, _ = run("fit-heads", *options)
        models = {store["model"] for store in fitted["stores"]}
        assert len(models) == 4 and sum("finetune soup of 3" in model for model in models) == 1
    blended, _ = run("blend")
    assert Path(blended["submission"]).is_file() and len(blended["weights"]["subj01"]["lh"]["all"]) == 8
    again, _ = run("soup")
    assert [one["new"] for one in again["soups"]] == [False] * 4


def test_stage_1_soups_do_not_confuse_stage_2_and_are_a_start_by_name(subjects, tmp_path, said):
    both = [train(subjects, tmp_path, s, "pretrain")[0] for s in (QUICK, TrainConfig(**vars(QUICK) | {"loss": "mse"}))]
    made = soups(subjects, tmp_path, stage="pretrain")
    assert [one.checkpoint.fold["fold"] for one in made] == [0, 1]
    shutil.rmtree(both[1].path)  # leaves one stage-1 training of fold 0, and the other's fold 1
    for one in list_checkpoints(tmp_path):
        if one.training == both[1].training:
            shutil.rmtree(one.path)
    plain = train(subjects[:1], tmp_path, QUICK, init="stage1")
    assert {one.key["start"]["training"] for one in plain} == {both[0].training}
    named = train(subjects[:1], tmp_path, QUICK, init=str(made[1].checkpoint.path))
    assert {one.key["start"]["training"] for one in named} == {made[0].checkpoint.training}
    for one, soup in zip(named, made, strict=True):
        assert one.key["start"]["weights"] == soup.checkpoint.backbone().digest
        assert set(soup.checkpoint.seen_ids) <= set(one.seen_ids)


def test_subjects_of_a_stage_1_are_averaged_together_or_not_at_all(subjects, tmp_path, said):
    for seed in (0, 1):
        train(subjects, tmp_path, TrainConfig(**vars(QUICK) | {"seed": seed}), "pretrain", fold=0)
    with pytest.raises(CheckpointError, match="expected finished pretrain checkpoints of this tree; found none"):
        soups(subjects[:1], tmp_path, stage="pretrain")
    assert any("it was trained on subj02 too; ask for --subject all" in line for line in said)


def test_soups_below_their_best_member_are_named_and_kept(work, subjects, said):
    one = next(c for c in list_checkpoints(work) if "subj01" in c.name and c.fold["fold"] == 0)
    edit(one, facts={"score": 0.9})
    made = {soup.checkpoint.fold["fold"]: soup for soup in soups(subjects[:1], work)}
    (line,) = [line for line in said if "below its best member" in line and "fold 0" in line]
    assert f"below its best member by {0.9 - made[0].score:.4f}" in line and made[0].checkpoint.path.is_dir()
