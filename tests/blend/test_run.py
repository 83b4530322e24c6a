"""What `blend` leaves behind and says, with models that are made up and with models that were fitted."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import cli
import heads.blend.run
from featcache.cache.store import create_store, open_store
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.subject import Dataset
from featcache.errors import StoreError
from heads.blend.saved import load_blend
from heads.config import BlendConfig
from heads.scores.metrics import pearson_r
from support.blends import IDS, N_TEST, N_TRAIN, made_up, models_of, subject_of

DEFAULT = BlendConfig()


# --- made up


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Blends made-up models of subjects that are made up as well."""

    def blend(predictions, responses, config=DEFAULT, ceiling=None, n_subjects=1):
        subjects = [
            subject_of(tmp_path / f"subj{n}", responses, ceiling, name=f"subj{n:02d}") for n in range(1, n_subjects + 1)
        ]
        models = {s: models_of(tmp_path / f"stores-{s.name}", predictions) for s in subjects}
        monkeypatch.setattr("heads.blend.run.find_models", lambda *_: models)
        return heads.blend.run.blend(Dataset(tmp_path, tuple(subjects), challenge=True), config, tmp_path), models

    return blend


def predicted(folder: Path, name="subj01"):
    parts = [np.load(folder / "submission" / name / f"{h}_pred_test.npy") for h in ("lh", "rh")]
    return np.concatenate(parts, axis=1)


@pytest.mark.slow
def test_the_blend_is_better_on_images_that_nobody_saw(made, tmp_path):
    predictions, responses = made_up(noise=(2, 2, 2.5, 3))
    done, _ = made(predictions, responses)
    scores = {name: np.mean(np.concatenate([one.r for one in of])) for name, of in done.scores.items()}
    assert list(scores) == ["best single", "uniform", "blend"]
    single, uniform = done.gains
    assert single.gain == pytest.approx(scores["blend"] - scores["best single"])
    assert uniform.score == pytest.approx(scores["uniform"])
    test = {m: pearson_r(p[N_TRAIN:], responses[N_TRAIN:]).mean() for m, p in enumerate(predictions)}
    gain = pearson_r(predicted(tmp_path), responses[N_TRAIN:]).mean() - max(test.values())
    assert gain > 0.05 and abs(gain - single.gain) < 0.1


@pytest.mark.slow
def test_weights_are_listed_by_roi_and_models_without_any_by_name(made, tmp_path, pictures):
    predictions, responses = made_up(noise=(1, 1.5, 2, 2))
    predictions[3] = 7  # explains nothing
    done, models = made(predictions, responses, BlendConfig(method="nnls", per="roi"))
    about = json.loads((tmp_path / "submission/weights.json").read_text())
    assert done.unused == about["unused"] == ["model 3"]
    assert about["weights"] == done.weights
    assert {h: set(of) for h, of in done.weights["subj01"].items()} == {
        "lh": {"all", "V1", "early"},
        "rh": {"all", "V1"},
    }
    subject = next(iter(models))
    for of_hemisphere in done.weights["subj01"].values():
        for of_roi in of_hemisphere.values():
            assert sum(of_roi.values()) == pytest.approx(1, abs=1e-5)
    stores = {model.name: model.store.name for model in models[subject]}
    assert {m: of["predictions"] for m, of in about["members"]["subj01"].items()} == stores
    assert (about["method"], about["per"], about["seed"]) == ("nnls", "roi", 0)
    assert {"featcache", "numpy", "torch", "zarr"} <= set(about["versions"])
    assert [choice["level"] for choice in about["choices"]["subj01"]] == ["all", "surface", "roi"]
    assert (tmp_path / "submission/weights.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_same_blend_again_is_the_same_bytes(made, tmp_path):
    data = made_up(noise=(2, 2.5, 3, 4))
    config = BlendConfig(method="greedy", per="surface", seed=3)
    one, _ = made(*data, config)
    first = (tmp_path / "submission.zip").read_bytes(), (tmp_path / "submission/weights.json").read_bytes()
    shutil.rmtree(tmp_path / "stores-subj01")
    other, _ = made(*data, config)
    assert first == ((tmp_path / "submission.zip").read_bytes(), (tmp_path / "submission/weights.json").read_bytes())
    assert vars(one.gains[0]) == vars(other.gains[0])


@pytest.mark.slow
def test_one_model_is_passed_through_and_said(made, tmp_path, said):
    predictions, responses = made_up(n_models=1)
    done, _ = made(predictions, responses)
    np.testing.assert_allclose(predicted(tmp_path), predictions[0, N_TRAIN:], rtol=1e-4)
    assert any("one model only, model 0" in line for line in said)
    assert list(done.scores) == ["blend"] and done.gains == [] and done.null is None  # nothing to compare it with
    r = np.concatenate([one.r for one in done.scores["blend"]])
    np.testing.assert_allclose(r, pearson_r(predictions[0, :N_TRAIN], responses[:N_TRAIN]), atol=1e-6)


@pytest.mark.slow
def test_models_of_one_backbone_have_one_weight_under_the_preset_of_the_paper(made):
    done, _ = made(*made_up(noise=(1, 3, 2, 2)), BlendConfig(method="score", per="all", by="backbone"))
    for of_hemisphere in done.weights["subj01"].values():
        weights = of_hemisphere["all"]
        assert weights["model 0"] == weights["model 1"] and weights["model 2"] == weights["model 3"]
        assert weights["model 0"] != weights["model 2"]


@pytest.mark.slow
def test_a_blend_is_applied_to_other_predictions_of_its_models(made, tmp_path):
    predictions, responses = made_up(noise=(1, 2, 3, 4))
    _, models = made(predictions, responses)
    (subject,) = models
    saved = shutil.copyfile(tmp_path / "submission/blend.safetensors", tmp_path / "kept.safetensors")
    first = predicted(tmp_path)
    changed = predictions.copy()
    changed[:, N_TRAIN:] = predictions[:, N_TRAIN:][:, ::-1]  # other test images
    shutil.rmtree(tmp_path / "stores-subj01")
    models[subject] = models_of(tmp_path / "stores-subj01", changed)
    assert (
        heads.blend.run.apply(Dataset(tmp_path, (subject,), challenge=True), saved, tmp_path)
        == tmp_path / "submission.zip"
    )
    np.testing.assert_allclose(predicted(tmp_path), first[::-1], rtol=1e-4)
    models[subject] = models[subject][:1]
    before = (tmp_path / "submission.zip").read_bytes()
    with pytest.raises(StoreError, match=r"expected predictions of subj01 by model 1.*; found none"):
        heads.blend.run.apply(Dataset(tmp_path, (subject,), challenge=True), saved, tmp_path)
    assert (tmp_path / "submission.zip").read_bytes() == before
    stranger = subject_of(tmp_path / "other", responses, name="subj07")
    models[stranger] = models.pop(subject)
    with pytest.raises(StoreError, match="expected a blend of subj07 lh; found subj01 lh, subj01 rh"):
        heads.blend.run.apply(Dataset(tmp_path, (stranger,)), saved, tmp_path)
    assert len(IDS) == N_TRAIN + N_TEST


@pytest.mark.slow
def test_a_submission_has_one_blend_and_says_which_subjects_of_an_earlier_one_are_gone(made, tmp_path, said):
    _, models = made(*made_up(noise=(1, 2)), n_subjects=3)
    first, second, third = models
    dataset = Dataset(tmp_path, tuple(models), challenge=True)
    assert (tmp_path / "submission.zip").is_file() and not any("removed" in line for line in said)
    del models[first], models[third]
    done = heads.blend.run.blend(dataset, DEFAULT, tmp_path, [second])
    assert done.submission is None and not (tmp_path / "submission.zip").exists()
    assert [path.name for path in (tmp_path / "submission").iterdir() if path.is_dir()] == ["subj02"]
    (line,) = [line for line in said if "removed" in line]
    assert "predictions of subj01, subj03 by an earlier blend were removed" in line


# --- fitted


def run(capfd, *arguments):
    code = cli.run([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), out, err


def fails(capfd, *arguments):
    assert cli.run(list(arguments)) == 1
    out, err = capfd.readouterr()
    assert err.splitlines()[-1].startswith("error: ") and err.count("error: ") == 1, (out, err)
    return err.splitlines()[-1]


def test_models_are_chosen_by_name(filled, capfd):
    found, _, _ = run(capfd, "models", "--models", "test_resnet*", "--exclude", "*3 layers*,*layer4*")
    names = {model["name"] for model in found["models"]}
    assert len(names) == 2
    one = names.pop()
    blended, _, _ = run(capfd, "blend", "--models", one.rpartition(" ")[2])
    assert set(blended["weights"]["subj02"]["rh"]["all"]) == {one}


def test_a_pattern_that_leaves_no_model_lists_them(filled, capfd):
    line = fails(capfd, "blend", "--models", "convnext*")
    assert "--models: expected one that matches one of 'test_resnet@48" in line and "found 'convnext*'" in line
    assert "--exclude: expected a pattern that leaves one of" in fails(capfd, "models", "--exclude", "*")


@pytest.mark.parametrize("options", [("--preset", "paper"), ("--method", "greedy", "--per", "roi"), ()])
def test_what_is_handed_in_is_what_the_saved_blend_gives(filled, tiny, capfd, options):
    blended, out, _ = run(capfd, "blend", *options)
    saved = load_blend(filled / "submission/blend.safetensors")
    stores = [open_store(path) for path in (filled / "predictions.zarr").iterdir()]
    for subject in open_challenge(tiny).subjects:
        own = {s.facts["model"]: s for s in stores if s.key["subject"] == subject.name}
        n_train, n = len(subject.train), len(subject.image_ids)
        for hemisphere, coefficients in saved[subject.name].items():
            test = coefficients.apply(hemisphere, own, n_train, n)
            written = np.load(filled / f"submission/{subject.name}/{hemisphere}_pred_test.npy")
            np.testing.assert_allclose(written, test, rtol=2e-5, atol=1e-7)
    lines = [line for line in out.splitlines() if line.startswith(("blend over", "blends of shuffled"))]
    assert len(lines) == 3 and all(re.search(r"95 % interval over images [-+]", line) for line in lines[:2])
    assert blended["gains"][0]["low"] <= blended["gains"][0]["gain"] <= blended["gains"][0]["high"]
    before = (filled / "submission.zip").read_bytes()
    about = (filled / "submission/weights.json").read_bytes()
    again, _, _ = run(capfd, "blend", "--apply", str(filled / "submission/blend.safetensors"))
    assert again["submission"] == blended["submission"] and (filled / "submission.zip").read_bytes() == before
    assert (filled / "submission/weights.json").read_bytes() == about


@pytest.mark.parametrize(("option", "value"), [("--models", "*"), ("--method", "nnls"), ("--seed", "0")])
def test_a_saved_blend_takes_no_options_of_learning(option, value, filled, capfd):
    line = fails(capfd, "blend", "--apply", "any.safetensors", option, value)
    assert f"{option}: expected no --apply beside it" in line


def test_a_blend_that_is_none_is_one_line(filled, capfd):
    assert "expected a blend" in fails(capfd, "blend", "--apply", str(filled / "nothing"))


def test_some_subjects_are_blended_alone(filled, capfd):
    both, _, _ = run(capfd, "blend", "--models", "test_vit*")
    one, out, err = run(capfd, "blend", "--models", "test_vit*", "--subject", "2")
    assert list(one["weights"]) == ["subj02"] and one["weights"]["subj02"] == both["weights"]["subj02"]
    assert one["submission"] is None and "no submission.zip: it takes predictions of every subject" in out
    assert "predictions of subj01 by an earlier blend were removed" in err
    saved = str(filled / "submission/blend.safetensors")
    assert "expected a blend of subj01 lh" in fails(capfd, "blend", "--apply", saved)
    run(capfd, "blend", "--apply", saved, "--subject", "2")


def test_a_damaged_store_stops_a_blend_and_costs_nothing(filled, capfd):
    run(capfd, "blend")
    before = (filled / "submission.zip").read_bytes()
    store = sorted((filled / "predictions.zarr").iterdir())[2]
    chunk = next(path for path in (store / "rh" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"x" * 9)
    line = fails(capfd, "blend")
    assert store.name in line and "fails its checksum" in line
    assert (filled / "submission.zip").read_bytes() == before and (filled / "submission/weights.json").is_file()


def test_models_that_lack_rows_or_vertices_are_left_out_by_name(filled, capfd):
    short, narrow, *_ = sorted((filled / "predictions.zarr").glob("subj01-*"))
    open_store(short).commit({"lh": 4})
    whole = open_store(narrow)
    key, facts, ids, rows = whole.key, whole.facts, whole.image_ids, whole.read("lh")
    shutil.rmtree(narrow)
    label, width = narrow.name.rpartition("-")[0], {"lh": rows.shape[1]}
    create_store(narrow.parent, label, key, ids, whole.n_train, width, facts).append({"lh": rows.astype(np.float32)})
    blended, _, err = run(capfd, "blend")
    assert f"left out {short.name}: not complete" in err and f"left out {narrow.name}: it has" in err
    assert len(blended["weights"]["subj01"]["lh"]["all"]) == 3 and len(blended["weights"]["subj02"]["lh"]["all"]) == 5
    assert "subj01: blended without" in err


def test_models_of_other_folds_are_blended_and_said(filled, capfd):
    run(capfd, "fit-heads", "--layers", "pooled", "--folds", "3")
    blended, _, err = run(capfd, "blend")
    assert "models of different folds: 5 folds of seed 0" in err and "3 folds of seed 0" in err
    assert len(blended["weights"]["subj01"]["lh"]["all"]) > 5


def test_models_of_another_tree_are_left_out_by_name(filled, tree, capfd):
    path = tree / "subj01/training_split/training_fmri/lh_training_fmri.npy"
    np.save(path, np.load(path)[::-1])
    blended, _, err = run(capfd, "blend", "--data", str(tree))
    assert err.count("fitted to other images or responses than the tree has now") == 5
    assert list(blended["weights"]) == ["subj02"]
