"""Heads that learn from a blend: what they are told, and that nothing is made of it that it is not."""

import json
from pathlib import Path

import numpy as np
import pytest

import cli
from featcache.cache.store import open_store
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.rois import HEMISPHERES
from heads.blend.saved import load_blend
from heads.fit.distil import taught
from heads.scores.metrics import pearson_r


def run(capfd, *arguments):
    code = cli.run([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def stores_of(filled, subject):
    stores = [open_store(path) for path in (filled / "predictions.zarr").iterdir()]
    return {store.facts["model"]: store for store in stores if store.key["subject"] == subject.name}


def test_targets_are_the_blend_out_of_fold(filled, tiny, capfd):
    run(capfd, "blend")
    saved, subjects = load_blend(filled / "submission/blend.safetensors"), open_challenge(tiny).subjects
    for subject, target in zip(subjects, taught(subjects, filled), strict=True):
        assert (target.name, target.noise_ceiling) == (subject.name, {"lh": None, "rh": None})
        assert target.rois is subject.rois and target.train is subject.train
        for hemisphere in HEMISPHERES:
            own = saved[subject.name][hemisphere].apply(hemisphere, stores_of(filled, subject), 0, len(subject.train))
            np.testing.assert_array_equal(target.responses(hemisphere), own)
    first = {path.name for path in (filled / "targets").iterdir()}
    assert len(first) == 2 and {t.folder.name for t in taught(subjects, filled)} == first
    run(capfd, "blend", "--method", "uniform")
    assert {t.folder.name for t in taught(subjects, filled)}.isdisjoint(first)
    assert len(list((filled / "targets").iterdir())) == 2  # those of the older blend are gone


def test_what_learnt_from_a_blend_is_no_member_of_the_next(filled, capfd):
    before = run(capfd, "blend")
    students = run(capfd, "fit-heads", "--target", "blend")
    assert all("distilled" in one["model"] and "distilled.zarr" in one["path"] for one in students["stores"])
    assert len({one["path"] for one in students["stores"]}) == len(students["stores"]) == 4
    assert all(Path(one["weights"]).is_file() for one in students["stores"])
    after = run(capfd, "blend")
    assert after["weights"] == before["weights"] and after["gains"] == before["gains"]
    again = run(capfd, "fit-heads", "--target", "blend")
    assert again["stores"] == students["stores"]
    usual = run(capfd, "fit-heads")
    assert {one["path"] for one in usual["stores"]}.isdisjoint(one["path"] for one in students["stores"])


def test_agreement_is_with_the_blend_on_images_that_neither_saw(filled, tiny, capfd):
    run(capfd, "blend")
    found = run(capfd, "fit-heads", "--target", "blend")["agreement"]
    assert set(found) == {one["model"] for one in run(capfd, "fit-heads", "--target", "blend")["stores"]}
    for model, mean_r in found.items():
        r = []
        for subject in open_challenge(tiny).subjects:
            stores = [open_store(path) for path in (filled / "distilled.zarr").iterdir()]
            (store,) = [s for s in stores if s.facts["model"] == model and s.key["subject"] == subject.name]
            for hemisphere in HEMISPHERES:
                blend = np.load(filled / f"submission/{subject.name}/{hemisphere}_pred_test.npy")
                r.append(pearson_r(store.read(hemisphere, store.n_train), blend))
        assert mean_r == pytest.approx(np.concatenate(r).mean())


def test_one_linear_model_is_learnt_again_from_what_it_says(filled, capfd):
    """The model's own features say it best; not wholly, for each of its folds has heads of its own."""
    run(capfd, "blend", "--models", "test_vit*")
    agreement = run(capfd, "fit-heads", "--target", "blend")["agreement"]
    (own,) = [r for model, r in agreement.items() if model.startswith("test_vit")]
    (other,) = [r for model, r in agreement.items() if not model.startswith("test_vit")]
    assert own > max(other, 0.6)


def test_no_blend_to_learn_from_is_one_line(filled, capfd):
    assert cli.run(["fit-heads", "--target", "blend"]) == 1
    err = capfd.readouterr().err
    assert "expected a blend to learn from; found none; run 'blend' first" in err.splitlines()[-1]
    assert cli.run(["fit-heads", "--target", "oracle"]) == 1
    assert "--target: expected one of responses, blend; found 'oracle'" in capfd.readouterr().err
    assert not (filled / "targets").exists() and not (filled / "distilled.zarr").exists()
