"""A work folder is an encoder, or says in one line what it lacks; older stores are read as well as can be."""

import json
import shutil

import numpy as np
import pytest

import cli
from featcache.cache.store import list_stores
from featcache.config import BackboneConfig
from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError, FeatcacheError, StoreError
from featcache.workdir import Workdir
from heads.encoder.work import encoder_of_work, models_to_use


@pytest.fixture(scope="module")
def subjects(tiny):
    return open_challenge(tiny).subjects


def refused(kind, match, subjects, work, *given):
    with pytest.raises(kind, match=match) as caught:
        encoder_of_work(subjects, work, *given)
    assert "\n" not in str(caught.value)


def remove(work, subject, pattern=""):
    """Delete the predictions of a subject's models."""
    for store in list_stores(Workdir(work).predictions):
        if store.key["subject"] == subject.name and pattern in store.facts["model"]:
            shutil.rmtree(store.path)


def test_a_folder_without_models_says_which_commands_make_them(subjects, tmp_path):
    refused(
        StoreError, "predictions of subj01, subj02; found none; run 'extract' and 'fit-heads' first", subjects, tmp_path
    )


def test_a_subject_without_models_is_named(work, subjects, monkeypatch):
    remove(work, subjects[1])
    said = []
    monkeypatch.setattr("heads.encoder.work.say", said.append)
    assert encoder_of_work(subjects, work).subjects == ["subj01"]
    (line,) = said
    assert line.startswith("without subj02: not in predictions; run 'extract' and 'fit-heads' for them")
    refused(StoreError, "predictions of subj02; found none; run 'extract' and 'fit-heads' first", subjects[1:], work)


def test_a_blend_of_some_subjects_predicts_these_and_names_the_others(work, subjects, monkeypatch):
    assert cli.run(["blend", "--subject", "2", "--method", "uniform", "--quiet"]) == 0
    said = []
    monkeypatch.setattr("heads.encoder.work.say", said.append)
    encoder = encoder_of_work(subjects, work)
    assert encoder.subjects == ["subj02"] and encoder.models()[0] == "blend"
    (line,) = said
    assert line.startswith("without subj01: not in the last blend; run 'blend' for them")
    refused(StoreError, "the last blend of subj01; found none; run 'blend' first", subjects[:1], work)


def test_the_card_is_of_the_subjects_that_are_exported(work, tmp_path, capfd):
    assert cli.run(["blend", "--subject", "2", "--method", "uniform", "--quiet"]) == 0
    capfd.readouterr()
    assert cli.run(["export", str(tmp_path / "out")]) == 0
    assert [line[:14] for line in capfd.readouterr().err.splitlines() if "subj01" in line] == ["without subj01"]
    card = (tmp_path / "out/README.md").read_text()
    assert "subj02" in card and "subj01" not in card


def test_a_blend_of_other_responses_predicts_nothing(work, subjects, monkeypatch):
    monkeypatch.setattr("heads.blend.saved._responses_of", lambda path: {"subj01": "those of another day"})
    refused(StoreError, "a blend of the responses of subj01; found one of others; run 'blend' again", subjects, work)


def test_without_a_blend_a_model_has_to_be_named(work, subjects):
    Workdir(work).saved_blend.unlink()
    refused(StoreError, "expected a blend; found none; run 'blend' first", subjects, work, "blend")
    encoder = encoder_of_work(subjects, work)
    assert "blend" not in encoder.models() and len(encoder.models()) == 11
    with pytest.raises(ConfigError, match=r"model: expected one of .*; found none"):
        encoder.predict(subjects[0].test.sources[0], subject="subj01")


def test_a_blend_of_models_that_are_gone_is_refused(work, subjects):
    remove(work, subjects[0], "spatial")
    refused(StoreError, "expected predictions of subj01 by .*spatial.*; found none", subjects, work)


def test_a_subject_that_lacks_the_model_is_not_predicted_by_another(work, subjects):
    remove(work, subjects[1], "test_vit")
    model = next(m.name for m in models_to_use(subjects[:1], work, "blend")[0][subjects[0]] if "test_vit" in m.name)
    encoder = encoder_of_work(subjects, work, model)
    picture = subjects[0].test.sources[0]
    assert encoder.predict(picture, subject="subj01", model=model).shape[0] == 1
    for given in (model, None):
        with pytest.raises(ConfigError, match=r"a model of subj02; found .*; fit heads, or blend"):
            encoder.predict(picture, subject="subj02", model=given)


def test_a_name_that_no_model_has_is_refused(work, subjects):
    refused(ConfigError, "'resnet'", subjects, work, "resnet")


def test_models_whose_features_were_deleted_say_so(work, subjects):
    vit = [store for store in list_stores(Workdir(work).features) if store.key["backbone"] == "test_vit"]
    assert len(vit) == 2
    for store in vit:
        shutil.rmtree(store.path)
    refused(
        StoreError, "the features that test_vit.* was fitted to.*no such store; run 'extract' again", subjects, work
    )
    name = next(m.name for m in models_to_use(subjects, work, "blend")[0][subjects[0]] if "test_vit" not in m.name)
    assert encoder_of_work(subjects, work, name).models() == [name]  # the others do not matter


def test_features_that_were_made_elsewhere_cannot_read_new_images(subjects, tiny, tmp_path):
    work = tmp_path / "work"
    where = ["--data", str(tiny), "--work", str(work), "--quiet"]
    ids = subjects[0].image_ids
    (tmp_path / "ids.csv").write_text("\n".join(["id", *map(str, ids)]))
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32))
    add = ["add-features", str(tmp_path / "clip.npy"), "--ids", str(tmp_path / "ids.csv"), "--subject", "subj01"]
    assert cli.run([*add, *where]) == 0
    assert cli.run(["fit-heads", "--subject", "subj01", "--folds", "2", *where]) == 0
    refused(ConfigError, "found features that were made elsewhere; choose another model", subjects[:1], work)


def test_older_stores_without_what_the_network_was_called_are_guessed(work, subjects):
    expected = encoder_of_work(subjects, work)
    picture = subjects[0].test.sources[0]
    forgotten = 0
    for path in Workdir(work).features.rglob("zarr.json"):
        content = json.loads(path.read_text())
        text = json.dumps(content)
        for facts in facts_in(content):
            forgotten += sum(facts.pop(name, None) is not None for name in ("network", "weights"))
        if json.dumps(content) != text:
            content["attributes"]["featcache"].pop("digest")
            path.write_text(json.dumps(content))
    assert forgotten > 0
    found = encoder_of_work(subjects, work)
    for name in found.subjects:
        np.testing.assert_array_equal(found.predict(picture, subject=name), expected.predict(picture, subject=name))


def facts_in(content):
    """Every mapping under the name 'facts'."""
    if isinstance(content, dict):
        if isinstance(content.get("facts"), dict):
            yield content["facts"]
        for value in content.values():
            yield from facts_in(value)


def test_weights_that_are_named_wrongly_are_refused(work, subjects):
    model = next(m.name for m in models_to_use(subjects, work, "blend")[0][subjects[0]] if "test_vit" in m.name)
    given = BackboneConfig(name="test_vit", weights="gone.safetensors")
    encoder = encoder_of_work(subjects, work, model, given)
    with pytest.raises(FeatcacheError, match=r"gone\.safetensors"):
        encoder.predict(subjects[0].test.sources[0], subject="subj01")
