"""Both stages through the commands: what they learn, what they keep apart, and what they refuse."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from safetensors.torch import load_file

import cli
from featcache.backbone.checkpoint import find_checkpoint, list_checkpoints
from featcache.backbone.keys import StartKey
from featcache.cache.extract import extract
from featcache.cache.store import open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.rois import FSAVERAGE_VERTICES, HEMISPHERES
from featcache.dataset.splits import assign_folds
from featcache.errors import CheckpointError, ConfigError, LeakError
from heads.backbones import stages
from heads.backbones.stages import Trained, train_stage
from heads.config import AdamWConfig, FitConfig, StageConfig, TrainConfig
from heads.features.sets import feature_sets
from heads.fit.names import prediction_key
from heads.fit.run import fit_heads, scores_by_model
from heads.modules.saved import linear_map_of
from heads.scores.metrics import pearson_r
from heads.solvers.held_out import FoldPlan
from support.checkpoints import mean_like
from support.images import add_test_image
from support.training import BACKBONE, QUICK_OPTIONS, fails, run, train

SHORT = TrainConfig(epochs=1, batch_size=4)


def test_a_checkpoint_a_fold_for_all_subjects_and_one_a_fold_and_subject(trained):
    found = [(one.key.stage, *one.key.subjects, one.fold) for one in list_checkpoints(trained)]
    both = [("pretrain", "subj01", "subj02", k) for k in (0, 1)]
    assert sorted(found) == sorted(both + [("finetune", f"subj0{n}", k) for n in (1, 2) for k in (0, 1)])


def test_out_of_fold_stays_out_of_fold_through_both_stages(trained, tiny):
    """No checkpoint, nor the one it started from, saw an image of its fold, of any subject."""
    subjects = open_challenge(tiny).subjects
    by_stage = {(one.key.stage, *one.key.subjects, one.fold): one for one in list_checkpoints(trained)}
    for (stage, *names, fold), one in by_stage.items():
        assert (assign_folds(one.seen_ids, 2, 0) != fold).all()
        if stage == "finetune":
            first = by_stage["pretrain", "subj01", "subj02", fold]
            assert one.key.start == StartKey(weights=first.backbone().digest, training=first.training)
            assert set(first.seen_ids) <= set(one.seen_ids)
        expected = [s.train.ids[assign_folds(s.train.ids, 2, 0) != fold] for s in subjects]
        assert set(one.seen_ids) == set(np.concatenate(expected).tolist()), names


def test_every_stage_runs_on_what_the_one_before_left(work, tiny, capfd):
    exact, _ = run(capfd, "fit-heads", "--loss", "mnnpc")
    as_trained, _ = run(capfd, "fit-heads", "--solver", "trained")
    gradient, _ = run(capfd, "fit-heads", "--loss", "smooth_l1", "--head", "roi", "--epochs", "2")
    for fitted in (exact, as_trained, gradient):
        assert len(fitted["stores"]) == 4 and len({store["model"] for store in fitted["stores"]}) == 2
    blended, said = run(capfd, "blend")
    assert "is the mean over the networks of all folds" in " ".join(said.split())
    assert Path(blended["submission"]).is_file()
    assert len(blended["weights"]["subj01"]["lh"]["all"]) == 6
    again, _ = run(capfd, "finetune", *QUICK_OPTIONS)
    assert all(one["seconds"] < 60 for one in again["checkpoints"]) and len(again["checkpoints"]) == 4


def test_trained_heads_predict_what_the_network_did(work, tiny):
    """The cached features times the heads of the checkpoint are the predictions of the network itself."""
    subject = open_challenge(tiny).subjects[0]
    fitted = fit_heads([subject], FitConfig(solver="trained"), work)
    for one in fitted:
        store = open_store(one.path)
        stage, folds = store.key["features"]["fold"]["stage"], assign_folds(subject.train.ids, 2, 0)
        for checkpoint in list_checkpoints(work):
            if checkpoint.key.stage == stage and checkpoint.concerns(subject):
                rows = np.flatnonzero(folds == checkpoint.fold)
                predicted = [store.read(h, 0, store.n_train)[rows] for h in HEMISPHERES]
                r = [pearson_r(p, subject.responses(h)[rows]) for p, h in zip(predicted, HEMISPHERES, strict=True)]
                if stage == "finetune":  # whose score is of this subject alone
                    from heads.scores.metrics import VertexScores, summarize

                    both = zip(HEMISPHERES, r, strict=True)
                    scores = [VertexScores("s", h, values, subject.noise_ceiling[h]) for h, values in both]
                    found = summarize(scores)[-1].accuracy
                    assert found == pytest.approx(100 * checkpoint.facts.score, abs=1e-3)


def test_heads_of_a_checkpoint_are_one_model_whatever_heads_are_asked_for(work, tiny):
    subject = open_challenge(tiny).subjects[0]
    asked = [
        FitConfig(loss=loss, head=head, solver="trained")
        for loss in ("mnnpc", "smooth_l1")
        for head in ("linear", "roi")
    ]
    found = [{(one.path, one.model) for one in fit_heads([subject], config, work)} for config in asked]
    assert len(found[0]) == 2 and all(one == found[0] for one in found)
    assert len(list((work / "predictions.zarr").iterdir())) == 2
    assert all(" trained " in model and "trained trained" not in model for _, model in found[0])


def test_of_two_stores_of_one_model_the_newer_is_blended_and_the_other_named(work, tiny, capfd):
    """As they were left behind when a store's name told more than its key."""
    fitted, _ = run(capfd, "fit-heads", "--solver", "trained", "--subject", "1")
    made = Path(fitted["stores"][0]["path"])
    older = Path(shutil.copytree(made, made.with_name(made.name.replace("trained", "roi-trained"))))
    os.utime(older / "committed.json", (1_000_000_000, 1_000_000_000))
    blended, err = run(capfd, "blend")
    (line,) = [line for line in err.splitlines() if "same model" in line]
    assert line.startswith(f"subj01: left out {older.name}: {made.name} is of the same model and newer")
    assert set(blended["weights"]["subj01"]["lh"]["all"]) == {store["model"] for store in fitted["stores"]}
    shutil.rmtree(older)
    again, _ = run(capfd, "blend")
    assert again["weights"] == blended["weights"] and again["scores"] == blended["scores"]


def test_a_blend_refuses_images_that_a_backbone_saw_when_features_and_checkpoints_are_gone(work, tiny, capfd):
    fitted, _ = run(capfd, "fit-heads", "--solver", "trained", "--subject", "1")
    for folder in ("features.zarr", "checkpoints", "submission"):
        shutil.rmtree(work / folder, ignore_errors=True)
    subject = open_challenge(tiny).subjects[0]
    path = Path(fitted["stores"][0]["path"])
    group = zarr.open_group(path, mode="r+")
    about = dict(group.attrs["featcache"])
    del about["digest"]  # as of an earlier version
    seen = about["facts"]["seen_ids"]
    folds = assign_folds(subject.train.ids, 2, 0)
    for fold, ids in zip(about["recipe"]["features"]["fold"]["held_out"], seen, strict=True):
        assert set(ids) == set(subject.train.ids[folds != fold].tolist())
    blended, _ = run(capfd, "blend")
    assert len(blended["weights"]["subj01"]["lh"]["all"]) == 2
    leaked = int(subject.train.ids[folds == about["recipe"]["features"]["fold"]["held_out"][1]][0])
    group.attrs["featcache"] = about | {"facts": about["facts"] | {"seen_ids": [seen[0], [*seen[1], leaked]]}}
    assert cli.run(["blend"]) == 1 == cli.run(["models"])
    assert f"id {leaked}" in capfd.readouterr().err
    group.attrs["featcache"] = about | {"facts": {k: v for k, v in about["facts"].items() if k != "seen_ids"}}
    blended, err = run(capfd, "blend")
    assert f"left out {path.name}: it does not say which images its backbone was trained on" in err
    assert len(blended["weights"]["subj01"]["lh"]["all"]) == 1


def test_heads_refuse_images_that_the_backbone_saw(work, tiny):
    """Its ids tell, whatever the key says: one id of the held-out fold among those it saw is enough."""
    subject = open_challenge(tiny).subjects[0]
    path = next(path for path in (work / "features.zarr").iterdir() if "subj01" in path.name and "fold0" in path.name)
    held_out = subject.train.ids[assign_folds(subject.train.ids, 2, 0) == 0]
    group = zarr.open_group(path, mode="r+")
    about = dict(group.attrs["featcache"])
    del about["digest"]  # as of an earlier version
    about["facts"] = about["facts"] | {"seen_ids": [*about["facts"]["seen_ids"], int(held_out[0])]}
    group.attrs["featcache"] = about
    with pytest.raises(LeakError, match=rf"{path.name} of subj01: .*id {held_out[0]}"):
        fit_heads([subject], FitConfig(), work)


def test_folds_of_a_training_are_in_the_key_and_not_those_asked_for(work, tiny):
    """Heads on its features follow them whatever --folds says; the gradient loop has a seed of its own."""
    subject = open_challenge(tiny).subjects[0]
    features = feature_sets(subject, work)[0]

    def key(**asked):
        config = FitConfig(**asked)
        plan = FoldPlan.of_features(subject, features, config.n_folds, config.seed)
        return prediction_key(subject, features, plan, config, work)

    assert key().to_json()["n_folds"] == 2 and key(n_folds=7, seed=3) == key()
    adamw = {"loss": "smooth_l1"}
    assert key(**adamw, n_folds=7) == key(**adamw) != key(**adamw, seed=3)


@pytest.mark.parametrize("backbone", ["trained", "frozen"])
@pytest.mark.parametrize(("head", "loss"), [("linear", "mse"), ("linear", "smooth_l1"), ("spatial", "mse")])
def test_what_a_fit_refuses_leaves_no_store_behind(work, tiny, tmp_path, monkeypatch, backbone, head, loss):
    """Splits that are too small are met by every solver, each in its own place."""

    def refuse(*_, **__):
        raise ConfigError("fold 0", expected="enough images", found="too few", remedy="use fewer folds")

    folder = work if backbone == "trained" else tmp_path / "frozen"
    subjects = open_challenge(tiny).subjects[:1]
    if backbone == "frozen":
        extract(subjects, ExtractConfig(backbone=BACKBONE, layers=LayerConfig(layers=("pooled",)), workers=1), folder)
    for place in ("held_out.clean_parts", "held_out.stop_split", "joint.clean_parts"):
        monkeypatch.setattr(f"heads.solvers.{place}", refuse)
    if (backbone, head, loss) == ("frozen", "linear", "mse"):  # the closed form splits nothing there
        monkeypatch.setattr("heads.fit.run.build_solver", refuse)
    with pytest.raises(ConfigError, match="fold 0"):
        fit_heads(subjects, FitConfig(loss=loss, head=head), folder)
    assert not (folder / "predictions.zarr").exists() and not (folder / "heads").exists()


def test_trained_heads_come_with_the_features_they_read(tiny, tmp_path):
    """Trainings that differ in their folds alone are not mixed up: each store's heads never saw its held-out images."""
    subjects = open_challenge(tiny).subjects[:1]
    for n_folds in (2, 3):
        train(tiny, tmp_path, SHORT, fold=1, n_folds=n_folds)
    extract(subjects, ExtractConfig(backbone=BACKBONE, checkpoint="auto"), tmp_path)
    for fitted in fit_heads(subjects, FitConfig(solver="trained"), tmp_path):
        features = open_store(tmp_path / "features.zarr" / open_store(fitted.path).facts["features"])
        checkpoint = find_checkpoint(tmp_path, features.facts["checkpoint"])
        expected = linear_map_of(checkpoint.heads(), ["subj01"], "subj01", "lh")
        assert torch.equal(load_file(fitted.weights)["fold1.lh.weights"], expected.weights)


def test_one_fold_predicts_and_scores_its_own_images_alone(tiny, tmp_path, said):
    subjects = open_challenge(tiny).subjects[:1]
    train(tiny, tmp_path, SHORT, fold=1, n_folds=2)
    extract(subjects, ExtractConfig(backbone=BACKBONE, checkpoint="auto"), tmp_path)
    (fitted,) = fit_heads(subjects, FitConfig(), tmp_path)
    store, ids = open_store(fitted.path), subjects[0].train.ids
    assert store.image_ids[: store.n_train].tolist() == ids[assign_folds(ids, 2, 0) == 1].tolist()
    assert np.isfinite(store.read("lh")).all() and "fold 1" in fitted.model
    ((scores, _),) = scores_by_model(subjects, [fitted]).values()
    rows = assign_folds(ids, 2, 0) == 1
    expected = pearson_r(store.read("lh", 0, store.n_train), subjects[0].responses("lh")[rows])
    np.testing.assert_array_equal(scores.r, expected)


@pytest.mark.parametrize(("loss", "way"), [("mse", "closed form"), ("smooth_l1", "by gradient")])
def test_what_is_said_before_a_fit_is_what_it_does(tiny, tmp_path, said, loss, way):
    subjects = open_challenge(tiny).subjects[:1]
    train(tiny, tmp_path, SHORT, fold=1, n_folds=2)
    extract(
        subjects, ExtractConfig(backbone=BACKBONE, layers=LayerConfig(layers=("pooled",)), checkpoint="auto"), tmp_path
    )
    fit_heads(subjects, FitConfig(loss=loss, adamw=AdamWConfig(epochs=1)), tmp_path)
    assert [way in line for line in said if "of memory" in line] == [True]


@pytest.fixture
def coloured(tree):
    """Responses that are the mean colour of a picture, mixed differently at every place of the surface.

    The mixture is one for all subjects, as stage 1 expects, so columns that are not aligned would spoil it.
    """
    rng = np.random.default_rng(0)
    mixture = {hemisphere: rng.normal(size=(3, FSAVERAGE_VERTICES)) for hemisphere in HEMISPHERES}
    for subject in open_challenge(tree).subjects:
        paths = subject.train.sources
        colours = rng.uniform(0, 255, size=(len(paths), 3))
        for path, colour in zip(paths, colours, strict=True):
            Image.fromarray(np.broadcast_to(colour.astype(np.uint8), (32, 32, 3)).copy()).save(path)
        for hemisphere, mask in subject.fsaverage.items():
            signal = (colours - 127) / 74 @ mixture[hemisphere][:, mask]
            noisy = signal + 0.1 * rng.normal(size=signal.shape)
            np.save(subject.response_paths[hemisphere], noisy.astype(np.float32))
    return open_challenge(tree)


@pytest.mark.parametrize("loss", ["smooth_l1", "pearson", "mnnpc+mse"])
def test_both_stages_learn_what_was_planted(coloured, tmp_path, loss):
    """Held-out pictures are predicted nearly as well as the noise allows, from a network that knew nothing."""
    settings = TrainConfig(
        loss=loss,
        epochs=14,
        batch_size=8,
        learning_rate=3e-3,
        head_learning_rate=1e-2,
        freeze_norm=False,
        patience=14,
        embedding=8,
    )
    stage = StageConfig(stage="pretrain", train=settings, backbone=BACKBONE, fold=0, n_folds=3, workers=1)
    (first,) = train_stage(coloured.subjects, stage, tmp_path)
    second = replace(stage, stage="finetune", train=replace(settings, epochs=6))
    best = [one.checkpoint for one in train_stage(coloured.subjects, second, tmp_path)]
    for checkpoint, subjects in [(first.checkpoint, coloured.subjects)] + [
        (one, coloured.select(next(iter(one.key.subjects)))) for one in best
    ]:
        extract(subjects, ExtractConfig(backbone=BACKBONE, checkpoint=str(checkpoint.path)), tmp_path)
    scores = scores_by_model(coloured.subjects, fit_heads(coloured.subjects, FitConfig(solver="trained"), tmp_path))
    for model, of_model in scores.items():
        r = np.concatenate([one.r for one in of_model])
        assert np.median(r) > 0.8, model


def test_noise_is_not_predicted_through_both_stages_and_refitted_heads(tree, tmp_path):
    """A backbone that learnt its training responses by heart knows nothing of those that were held out."""
    rng = np.random.default_rng(3)
    subjects = open_challenge(tree).subjects
    for subject in subjects:
        for hemisphere, n_vertices in subject.n_vertices.items():
            noise = rng.normal(size=(len(subject.train), n_vertices)).astype(np.float32)
            np.save(subject.response_paths[hemisphere], noise)
    settings = TrainConfig(
        loss="mse", epochs=5, batch_size=4, learning_rate=3e-3, head_learning_rate=1e-2, stop="never", embedding=8
    )
    stage = StageConfig(stage="pretrain", train=settings, backbone=BACKBONE, n_folds=2, workers=1)
    train_stage(subjects, stage, tmp_path)
    train_stage(subjects, replace(stage, stage="finetune"), tmp_path)
    extract(subjects, ExtractConfig(backbone=BACKBONE, checkpoint="auto"), tmp_path)
    for solver in ("ridge", "trained"):
        for model, scores in scores_by_model(subjects, fit_heads(subjects, FitConfig(solver=solver), tmp_path)).items():
            r = np.concatenate([one.r for one in scores])  # of 168 vertices, each of spread 0.2
            assert abs(r.mean()) < 0.06, model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--fold", "2", "--folds", "2"], "--fold: expected all or a number from 0 to 1; found 2"),
        (["pretrain", "--fold", "last"], "--fold: expected all or a number from 0 to 4; found 'last'"),
        (["finetune", "--subject", "7"], "--subject: expected one of subj01, subj02; found 'subj07'"),
        (["finetune", "--folds", "3"], "expected a stage-1 checkpoint of the same folds (3, seed 0)"),
        (["finetune", "--folds", "2", "--fold-seed", "5"], "found one of others, which saw images"),
        (["finetune", "--backbone", "test_vit"], "expected a stage-1 checkpoint of fold 0 of subj01"),
        (["finetune", "--init", "nothing-there"], "--weights: expected hub, packaged, none or a weights file"),
        (["pretrain", "--preset", "slow"], "--preset: expected one of fast, paper; found 'slow'"),
        (["pretrain", "--loss", "rmse"], "--loss: expected smooth_l1"),
        (["pretrain", "--learning-rate", "0"], "--learning-rate: expected a number above 0"),
        (["pretrain", "--folds", "2"], "--batch-size: expected at least 32 training images for one step; found"),
        (["pretrain", "--warmup", "inf"], "--warmup: expected a finite number; found inf"),
        (["pretrain", "--fold", "²"], "--fold: expected all or a number from 0 to 4; found '²'"),
        (["pretrain", *QUICK_OPTIONS, "--size", "16", "--backbone", "test_convnext"], "--size: expected a size that"),
        (["pretrain", "--ema", "2"], "--ema: expected a number from 0 to 1"),
        (
            ["pretrain", *QUICK_OPTIONS, "--seed", "9", "--image-cache", "1e-7"],
            "to fit into --image-cache 1e-07 GB; found",
        ),
        (["extract", "--checkpoint", "nothing-there"], "expected a checkpoint's folder; found no checkpoint.json"),
    ],
)
def test_mistakes_are_one_line(work, capfd, arguments, message):
    shutil.rmtree(work / "pixels")
    assert message in fails(capfd, *arguments)


FAMILIES = ["test_convnext", "seresnext26d_32x4d", "test_vit", "test_efficientnet", "seresnet18"]
FAMILIES += ["efficientvit_m0", "mobilenetv3_small_050"]  # a norm in the classifier; a layer between it and the pooling


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_the_paper_trains_and_extracts(tiny, tmp_path, name):
    """Convnets with and without squeeze and excitation, and a transformer at a size that is not its own."""
    subjects, backbone = open_challenge(tiny).subjects[:1], BackboneConfig(name=name, weights="none", size=64)
    checkpoint = train(tiny, tmp_path, SHORT, backbone=backbone, n_folds=2)
    assert checkpoint.backbone().digest != checkpoint.key.start.weights
    (stored,) = extract(subjects, ExtractConfig(backbone=backbone, checkpoint="auto"), tmp_path)
    assert np.isfinite(open_store(stored.path).read("pooled")).all()
    with pytest.raises(CheckpointError, match=f"expected a checkpoint of test_byobnet; found one of {name}"):
        other = ExtractConfig(backbone=BackboneConfig(name="test_byobnet", weights="none"), checkpoint=checkpoint.name)
        extract(subjects, other, tmp_path)


def test_a_mean_of_checkpoints_is_extracted_fitted_and_blended(work, tiny, capfd):
    """Earlier versions made such means; they are models of their own beside the training they are of."""
    members = [one for one in list_checkpoints(work) if one.key.stage == "finetune" and "subj01" in one.key.subjects]
    means = [mean_like(one, work) for one in members]
    extracted, _ = run(capfd, "extract", "--subject", "1")
    assert sum("-soup-fold" in store["path"] for store in extracted["stores"]) == len(means) == 2
    models = set()
    for options in (["--loss", "mnnpc"], ["--solver", "trained"]):
        fitted, _ = run(capfd, "fit-heads", "--subject", "1", *options)
        models |= {store["model"] for store in fitted["stores"]}
    assert len(models) == 6 and sum("finetune soup of 2" in model for model in models) == 2
    blended, _ = run(capfd, "blend")
    assert set(blended["weights"]["subj01"]["lh"]["all"]) == models


def without_rois(subject):
    return replace(subject, rois={surface: {} for surface in subject.surfaces})


def test_the_key_of_stage_2_has_the_loss_of_roi_heads_where_there_are_any(tiny, tmp_path):
    """Without ROIs, weights are what they were before each head had a loss, and so is the key."""
    subject = open_challenge(tiny).subjects[0]
    config = StageConfig(
        stage="finetune", train=SHORT, backbone=BACKBONE, init="none", fold=0, n_folds=3, device="cpu", workers=1
    )
    keys = [train_stage([one], config, tmp_path)[0].checkpoint.key for one in (subject, without_rois(subject))]
    assert [key.settings.get("roi_loss") for key in keys] == ["smooth_l1", None]
    assert keys[1].settings == replace(SHORT, precision="float32").key()  # on a CPU
    given = replace(config, train=replace(SHORT, roi_loss="smooth_l1+pattern"))
    assert train_stage([subject], given, tmp_path)[0].checkpoint.key.settings["roi_loss"] == "smooth_l1+pattern"


def test_stage_1_has_no_loss_of_roi_heads(capfd):
    code = cli.run(["pretrain", "--roi-loss", "mse"])
    assert code != 0 and "--roi-loss" in capfd.readouterr().err


def test_a_loss_of_roi_heads_is_refused_where_there_are_no_rois(work, tiny):
    config = StageConfig(stage="finetune", train=replace(SHORT, roi_loss="mse"))
    subjects = [without_rois(subject) for subject in open_challenge(tiny).subjects]
    with pytest.raises(ConfigError, match="--roi-loss: expected one or more ROIs in roi_masks; found none"):
        train_stage(subjects, config, work)


def test_roi_heads_are_refused_where_there_are_no_rois(work, tiny):
    subjects = [without_rois(subject) for subject in open_challenge(tiny).subjects]
    with pytest.raises(
        ConfigError, match="--head roi: expected one or more ROIs in roi_masks; found none; use --head l"
    ):
        fit_heads(subjects, FitConfig(loss="smooth_l1,mse", head="roi"), work)


@pytest.mark.parametrize("with_lists", [True, False])
def test_an_added_test_image_needs_no_training(tree, tmp_path, said, with_lists):
    """Both stages find what they trained, and an interrupted training would go on."""
    work = tmp_path / "work"

    def both() -> list[Trained]:
        subjects, done = open_challenge(tree).subjects, []
        for stage in ("pretrain", "finetune"):
            config = StageConfig(stage=stage, backbone=BACKBONE, train=SHORT, n_folds=2, device="cpu", workers=1)
            done += train_stage(subjects, config, work)
        return done

    first = both()
    if not with_lists:
        shutil.rmtree(work / "images")
    add_test_image(tree, place=2)
    second = both()
    assert [one.new for one in first] == [True] * 6 and [one.new for one in second] == [False] * 6
    assert [one.checkpoint.path for one in first] == [one.checkpoint.path for one in second]
    assert len(list_checkpoints(work)) == 6 and len(list((work / "pixels").glob("*.npy"))) == 2


def test_a_test_image_that_was_trained_on_makes_another_training_without_it(tree, tmp_path):
    first, second = open_challenge(tree).subjects
    config = StageConfig(stage="pretrain", backbone=BACKBONE, train=SHORT, n_folds=2, fold=0, device="cpu", workers=1)
    (before,) = train_stage([first, second], config, tmp_path / "work")
    seen = next(i for i in before.checkpoint.facts.seen_ids if i not in first.train.ids)
    add_test_image(tree, image_id=seen)
    (after,) = train_stage(open_challenge(tree).subjects, config, tmp_path / "work")
    assert after.new and set(before.checkpoint.facts.seen_ids) - set(after.checkpoint.facts.seen_ids) == {seen}


def test_a_training_that_another_process_ends_meanwhile_is_found(tiny, tmp_path, monkeypatch):
    theirs, honest = [], stages.start_heads

    def after_another_process(*given):
        if not theirs:
            theirs.append(None)
            theirs[0] = train(tiny, tmp_path, SHORT)
            theirs.append({path: path.stat().st_mtime_ns for path in theirs[0].path.rglob("*")})
        return honest(*given)

    monkeypatch.setattr(stages, "start_heads", after_another_process)
    ours = train(tiny, tmp_path, SHORT)
    assert ours.finished and ours.facts == theirs[0].facts
    assert {path: path.stat().st_mtime_ns for path in ours.path.rglob("*") if path.name != ".writing.lock"}.items() <= (
        theirs[1].items()
    )
