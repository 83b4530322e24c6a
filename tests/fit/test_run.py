"""Fits are stored once and whole, go on after an interruption, and are refused where an image would leak."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from featcache.cache.store import list_stores, open_store
from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError, DataError, LeakError, StoreError
from featcache.workdir import Workdir
from heads.config import AdamWConfig, FitConfig, SpatialConfig
from heads.features.sets import FeatureSet
from heads.fit import run as run_module
from heads.fit.run import fit_heads, scores_by_model
from heads.solvers.held_out import FoldPlan
from support.blends import slow_r
from support.problems import LAYERS, N_VERTICES, VECTOR, features_of, planted_responses, responding

RIDGE = FitConfig(n_folds=3)
ADAMW = FitConfig(n_folds=3, loss="smooth_l1", adamw=AdamWConfig(epochs=2))


@pytest.fixture
def planted(tiny, tmp_path, monkeypatch):
    """Makes the first subjects of the tiny tree with planted responses, and features of them in the work folder."""
    monkeypatch.setattr("heads.features.sets.image_digest", lambda *_: "these")  # features that no image gave

    def make(n_subjects=1, shapes=VECTOR, change=lambda subject: subject, **about):
        subjects = []
        for subject in open_challenge(tiny).subjects[:n_subjects]:
            responses = planted_responses(len(subject.train), shapes)
            subjects.append(change(responding(subject, responses, tmp_path / subject.name)))
            features_of(subjects[-1], tmp_path / "work", shapes, **about)
        return subjects

    return make


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def files_of(work):
    """Every file of prediction stores and heads: its content, and when it was written."""
    folders = (Workdir(work).predictions, Workdir(work).heads)
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(work): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def contents_of(work):
    """The bytes of every file of prediction stores, and of every tensor of heads.

    A file of heads is more than its tensors: safetensors writes the names beside them in any order.
    """
    heads = {path.name: load_file(path) for path in Workdir(work).heads.iterdir()}
    tensors = {(file, name): values.tobytes() for file, part in heads.items() for name, values in part.items()}
    return tensors | {path: content for path, (content, _) in files_of(work).items() if "heads" not in path.parts}


@pytest.mark.parametrize("config", [RIDGE, ADAMW], ids=["ridge", "adamw"])
def test_what_is_fitted_is_found_and_not_written_again(planted, work, said, config):
    subjects = planted(2)
    first = fit_heads(subjects, config, work)
    before = files_of(work)
    second = fit_heads(subjects, config, work)
    assert [fit.new for fit in first] == [True, True] and [fit.new for fit in second] == [False, False]
    assert [replace(fit, new=True, seconds=0) for fit in second] == [replace(fit, seconds=0) for fit in first]
    assert files_of(work) == before and all(fit.weights.exists() for fit in first)
    assert [line for line in said if "already fitted" in line] == [
        f"{fit.subject}: already fitted, {fit.path}" for fit in first
    ]


def test_a_fit_that_another_process_ends_meanwhile_is_found(planted, work, monkeypatch):
    subjects, honest, theirs = planted(), run_module.build_solver, []

    def after_another_process(problem):
        if not theirs:
            theirs.append(None)
            fit_heads(subjects, RIDGE, work)
            theirs.append(files_of(work))
        return honest(problem)

    monkeypatch.setattr(run_module, "build_solver", after_another_process)
    (fit,) = fit_heads(subjects, RIDGE, work)
    assert not fit.new and files_of(work) == theirs[1]


def test_bars_say_what_tells_models_apart(planted, work, monkeypatch):
    labels, honest = [], run_module.bar
    monkeypatch.setattr(run_module, "bar", lambda label, *about: labels.append(label) or honest(label, *about))
    (subject,) = planted()
    fit_heads([subject], RIDGE, work)
    (fit,) = fit_heads([subject], RIDGE, work)
    assert labels == [f"{subject.name} {fit.model.split(' ')[0]}"]  # one model: its network
    fit_heads([subject], replace(RIDGE, loss="smooth_l1,pattern", solver="auto", adamw=AdamWConfig(epochs=1)), work)
    assert labels[1:] == [f"{subject.name} smooth_l1", f"{subject.name} pattern"]


@pytest.mark.slow  # the fixture, where nobody else has asked for it
def test_fits_of_commands_are_found_by_the_function(filled, tiny):
    before = files_of(filled)
    found = fit_heads(open_challenge(tiny).subjects, FitConfig(), filled)
    assert len(found) == 4 and not any(fit.new for fit in found)  # two backbones, two subjects
    assert files_of(filled) == before


@pytest.mark.parametrize("shapes", [VECTOR, LAYERS], ids=["vector", "layers"])
def test_what_all_fits_need_of_the_disk_is_there_before_the_first(planted, work, monkeypatch, shapes):
    """Predictions and heads of both losses; and nothing for what is there already."""
    subjects, both = planted(2, shapes), replace(ADAMW, loss="mse,pearson", solver="adamw")
    free = [10**12]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": free[0]})())
    asked = []
    honest = run_module.refuse_full_disk
    monkeypatch.setattr(run_module, "refuse_full_disk", lambda *about: asked.append(about[1]) or honest(*about))
    fit_heads(subjects[:1], both, work)
    written = sum(len(content) for content, _ in files_of(work).values())
    heads = sum(path.stat().st_size for path in Workdir(work).heads.iterdir()) / 2
    assert 0 <= written + heads - asked[0] < 0.05 * written + 4 * 12_000  # besides rows there are descriptions
    free[0] = 0
    assert not any(fit.new for fit in fit_heads(subjects[:1], both, work)) and asked[1] == 0
    before, free[0] = files_of(work), asked[0] // 2
    with pytest.raises(StoreError, match="of free disk"):
        fit_heads(subjects, both, work)
    assert files_of(work) == before


@pytest.mark.parametrize("config", [RIDGE, ADAMW], ids=["ridge", "adamw"])
def test_an_interrupted_fit_leaves_nothing_that_counts_and_goes_on_to_the_same_bytes(
    planted, work, tmp_path, monkeypatch, config
):
    subjects = planted()
    shutil.copytree(work, tmp_path / "other")
    fit_heads(subjects, config, tmp_path / "other")

    def interrupted(solver, subject, surface, *about):
        if surface == "rh":
            raise KeyboardInterrupt
        return honest(solver, subject, surface, *about)

    honest = run_module.predict_surface
    monkeypatch.setattr(run_module, "predict_surface", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_heads(subjects, config, work)
    (store,) = list_stores(Workdir(work).predictions)
    assert not store.complete and store.committed["lh"] == len(subjects[0].image_ids) and store.committed["rh"] == 0
    assert not Workdir(work).head_weights(store.name).exists()
    kept = {path: when for path, (_, when) in files_of(work).items() if "lh" in path.parts and "c" in path.parts}

    monkeypatch.undo()
    monkeypatch.setattr("heads.features.sets.image_digest", lambda *_: "these")
    (fit,) = fit_heads(subjects, config, work)
    assert fit.new and open_store(fit.path).complete and kept
    assert contents_of(work) == contents_of(tmp_path / "other")
    assert {path: files_of(work)[path][1] for path in kept} == kept  # what was committed is not written again


def test_a_store_without_its_heads_is_fitted_again_and_keeps_its_rows(planted, work):
    subjects = planted()
    (fit,) = fit_heads(subjects, RIDGE, work)
    before = contents_of(work)
    fit.weights.unlink()
    (again,) = fit_heads(subjects, RIDGE, work)
    assert again.new and contents_of(work) == before


def shown_in_both_splits(subject):
    ids = subject.test.ids.copy()
    ids[1] = subject.train.ids[4]
    return replace(subject, test=replace(subject.test, ids=ids))


def test_a_test_image_among_the_training_images_is_refused_before_a_store_is_made(planted, work):
    subjects = planted(change=shown_in_both_splits)
    with pytest.raises(LeakError, match="test split of subj01"):
        fit_heads(subjects, RIDGE, work)
    assert list_stores(Workdir(work).predictions) == [] and not Workdir(work).heads.exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_the_backbone_saw_is_refused_before_a_store_is_made(planted, work, monkeypatch, split):
    (subject,) = planted(trained=True)
    honest = FeatureSet.seen_ids
    extra = getattr(subject, split).ids[:1]  # of the training images, in the held-out fold of one of the backbones
    monkeypatch.setattr(FeatureSet, "seen_ids", lambda self: [np.append(ids, extra) for ids in honest(self)])
    with pytest.raises(LeakError, match="test split" if split == "test" else "f-.* of subj01"):
        fit_heads([subject], RIDGE, work)
    assert list_stores(Workdir(work).predictions) == []


def test_an_image_in_two_folds_is_refused_before_a_store_is_made(planted, work, monkeypatch):
    (subject,) = planted(change=lambda one: replace(one, train=replace(one.train, ids=twice(one.train.ids))))
    folds = np.arange(len(subject.train)) % 3
    monkeypatch.setattr("featcache.dataset.splits.assign_folds", lambda *_: folds)
    with pytest.raises(LeakError, match="fold 0 of subj01"):
        fit_heads([subject], RIDGE, work)
    assert list_stores(Workdir(work).predictions) == []


def twice(ids):
    """The first image is shown again as the second."""
    return np.concatenate([ids[:1], ids[:1], ids[2:]])


def stored_r(store, subject, surface):
    """r of each vertex by np.corrcoef; rows of the store and of the responses are matched id by id."""
    rows = [subject.train.ids.tolist().index(image_id) for image_id in store.image_ids[: store.n_train]]
    return slow_r(store.read(surface, 0, store.n_train), np.load(subject.response_paths[surface])[rows])


def assert_scores(subjects, fitted):
    scores = scores_by_model(subjects, fitted)
    by_name = {subject.name: subject for subject in subjects}
    assert list(scores) == list(dict.fromkeys(fit.model for fit in fitted))
    for model, of_model in scores.items():
        expected = [(fit, surface) for fit in fitted if fit.model == model for surface in ("lh", "rh")]
        for (fit, surface), score in zip(expected, of_model, strict=True):
            subject = by_name[fit.subject]
            assert (score.subject, score.surface) == (fit.subject, surface)
            np.testing.assert_allclose(score.r, stored_r(open_store(fit.path), subject, surface), atol=1e-5)
            assert score.noise_ceiling is subject.noise_ceiling[surface] and score.rois is subject.rois[surface]


def test_scores_are_r_of_each_vertex_by_model_and_subject(planted, work):
    subjects = planted(2)
    fitted = fit_heads(subjects, RIDGE, work) + fit_heads(subjects[:1], ADAMW, work)
    assert len({fit.model for fit in fitted}) == 2
    assert_scores(subjects, fitted)


def test_folds_that_were_not_trained_are_not_predicted_and_not_scored(planted, work):
    (subject,) = planted(trained=True)
    gone = next(store for store in list_stores(Workdir(work).features) if store.key["fold"]["fold"] == 1)
    shutil.rmtree(gone.path)
    (fit,) = fit_heads([subject], RIDGE, work)
    store = open_store(fit.path)
    folds = FoldPlan.of_frozen(subject.train.ids, 3, 0).folds
    assert store.image_ids.tolist() == [*subject.train.ids[folds != 1], *subject.test.ids]
    assert store.n_train == (folds != 1).sum() and " fold 0,2 " in fit.model
    assert not np.isnan(store.read("lh")).any()
    assert_scores([subject], [fit])


def test_losses_that_are_one_model_share_a_store(planted, work):
    subjects = planted()
    together = fit_heads(subjects, replace(ADAMW, loss="mse,smooth_l1,pearson,mnnpc"), work)
    assert [fit.model.split(" ")[3] for fit in together] == ["ridge", "smooth_l1"]
    assert len(list_stores(Workdir(work).predictions)) == 2
    for loss in ("mse", "pearson", "mnnpc"):
        (alone,) = fit_heads(subjects, replace(RIDGE, loss=loss), work)
        assert alone.path == together[0].path and not alone.new


def test_heads_are_fitted_to_the_features_that_are_named(planted, work):
    (subject,) = planted()
    features_of(subject, work, trained=True)
    every = fit_heads([subject], RIDGE, work)
    named = [fit_heads([subject], replace(RIDGE, features=patterns), work) for patterns in ("b@32", "*finetune")]
    assert [len(fits) for fits in named] == [1, 1] and len(every) == 2
    assert {fits[0].path for fits in named} == {fit.path for fit in every}
    assert " finetune " not in named[0][0].model and named[1][0].model.startswith("b@32 finetune pooled ")
    with pytest.raises(ConfigError, match=r"--features: expected .* one of: 'b@32.*'; found 'b@64'"):
        fit_heads([subject], replace(RIDGE, features="b@32, b@64"), work)  # one that matches nothing is not passed over


def test_fits_come_in_the_order_of_subjects_whatever_is_fitted_together(planted, work):
    subjects = planted(2)
    fitted = fit_heads(subjects, replace(ADAMW, loss="mse,smooth_l1"), work)
    assert [fit.subject for fit in fitted] == ["subj01", "subj01", "subj02", "subj02"]
    assert [fit.model for fit in fitted[:2]] == [fit.model for fit in fitted[2:]]
    assert len({fit.path for fit in fitted}) == 4


def test_subjects_that_are_trained_together_have_each_other_in_their_keys(planted, work):
    subjects = planted(2, LAYERS)
    spatial = SpatialConfig(space=2, rank=1)
    config = replace(ADAMW, head="spatial", layers="low", spatial=spatial, adamw=AdamWConfig(epochs=1, batch_size=8))
    fitted = fit_heads(subjects, config, work)
    keys = [open_store(fit.path).key for fit in fitted]
    assert [list(key["joint"]) for key in keys] == [["subj02"], ["subj01"]]
    assert keys[0]["joint"]["subj02"] == {name: value for name, value in keys[1].items() if name != "joint"}
    assert fitted[0].model == fitted[1].model
    alone = fit_heads(subjects[:1], config, work)
    assert alone[0].path != fitted[0].path and "joint" not in open_store(alone[0].path).key


def test_heads_are_saved_with_the_names_of_their_store_and_model(planted, work):
    (fit,) = fit_heads(planted(), RIDGE, work)
    heads = load_file(fit.weights)
    assert {name: array.shape for name, array in heads.items()} == {
        "lh.weights": (6, N_VERTICES["lh"]),
        "lh.intercept": (N_VERTICES["lh"],),
        "rh.weights": (6, N_VERTICES["rh"]),
        "rh.intercept": (N_VERTICES["rh"],),
    }
    store = open_store(fit.path)
    assert fit.weights == Workdir(work).head_weights(store.name) and store.facts["model"] == fit.model


def test_nothing_to_fit_to_asks_for_what_is_missing(tiny, work, planted):
    subjects = open_challenge(tiny).subjects
    with pytest.raises(StoreError, match=r"complete features of subj01, subj02; found none .*; run 'extract' first"):
        fit_heads(subjects, RIDGE, work)
    frozen = planted()
    with pytest.raises(StoreError, match=r"from a checkpoint with heads; run 'pretrain' or 'finetune'"):
        fit_heads(frozen, FitConfig(solver="trained"), work)
    with pytest.raises(ConfigError, match=r"layers that were extracted \(pooled\); found 'deep'"):
        fit_heads(frozen, replace(RIDGE, layers="deep"), work)
    assert not Workdir(work).predictions.exists()


@pytest.mark.parametrize("surface", ["lh", "rh"])
def test_predictions_that_are_not_finite_leave_no_store_and_no_false_advice(planted, work, monkeypatch, surface):
    honest = run_module.predict_surface

    def broken(solver, subject, which, *more):
        predictions, saved = honest(solver, subject, which, *more)
        predictions[4, 2] = np.nan if which == surface else predictions[4, 2]
        return predictions, saved

    monkeypatch.setattr(run_module, "predict_surface", broken)
    subjects = planted()
    with pytest.raises(StoreError) as refused:
        fit_heads(subjects, RIDGE, work)
    assert str(refused.value).startswith("subj01, ") and f"found nan in {surface}[4, 2]" in str(refused.value)
    assert "--dtype" not in str(refused.value)
    assert list(Workdir(work).predictions.glob("subj*")) == []
    monkeypatch.setattr(run_module, "predict_surface", honest)
    assert fit_heads(subjects, RIDGE, work)[0].new


def test_responses_that_became_nan_behind_their_size_and_time_are_named_and_leave_no_store(planted, work):
    """As a file is that was copied with its time: digests and checks of before are still taken for it."""
    (subject,) = planted()
    path = subject.response_paths["rh"]
    fit_heads([subject], replace(RIDGE, n_folds=2), work)
    times, values = path.stat(), np.load(path)
    values[3, 1] = np.nan
    np.save(path, values)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        DataError, match=r"expected finite responses.*found nan at row 3, vertex 1; the file was changed"
    ):
        fit_heads([subject], RIDGE, work)
    assert len(list(Workdir(work).predictions.glob("subj*"))) == 1
