"""From feature stores to files: planted layers are found, blocks do not matter, and what is done is not done again."""

import csv
import json

import numpy as np
import pytest

import featcache as fc
from featcache.cache.store import Row, create_store, list_stores
from featcache.dataset.digests import image_digest
from featcache.dataset.splits import assign_folds
from featcache.errors import ConfigError, StoreError
from featcache.workdir import Workdir
from heads.compare import run as module
from heads.compare.run import blocks_of, compare, needed_bytes
from heads.features.sets import feature_sets
from support.keys import training_of
from support.plans import plan_of
from support.planted import N_VERTICES, planted_features, store_features


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture
def subject(tmp_path, work):
    return planted_features(tmp_path, work)


def test_each_surface_has_its_unique_share_from_the_layer_it_was_planted_in(subject, work):
    found = fc.compare([subject], fc.CompareConfig(n_candidates=2, per="vertex"), work)
    assert found.bands == ("near", "far", "pooled") and found.new == ("subj01",)
    for surface, planted in (("lh", "near"), ("rh", "far")):
        shares = found.row(surface=surface).variance
        assert max(shares.unique, key=lambda band: shares.unique[band].value) == planted
        assert shares.unique[planted].low > 0.1 and shares.full.value > 0.3
        assert all(one.value < 0.05 for band, one in shares.unique.items() if band != planted)
    name = found.folder.name
    files = Workdir(work)
    with files.compared_vertices(name).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(N_VERTICES.values()) * 11
    with np.load(files.compared_subject(name, "subj01")) as arrays:
        full = arrays["lh/values"][0]
    assert np.mean(full) == pytest.approx(found.row(surface="lh").variance.full.value, abs=1e-6)
    content = json.loads(files.compared_json(name).read_text())
    assert content["rows"] == json.loads(json.dumps([row.to_json() for row in found.rows]))
    assert list(content["keys"]) == ["subj01"] and content["versions"]["torch"]


def test_what_is_done_is_not_done_again_and_other_settings_are_another_comparison(subject, work, monkeypatch):
    config = fc.CompareConfig(n_candidates=0)
    first = compare([subject], config, work)
    monkeypatch.setattr(module, "fit_fold", None)
    again = compare([subject], config, work)
    assert again.new == () and again.rows == first.rows
    with pytest.raises(TypeError):
        compare([subject], fc.CompareConfig(n_candidates=0, seed=1), work)
    with pytest.raises(TypeError):  # other responses, in the same folder
        path = subject.response_paths["lh"]
        np.save(path, np.load(path)[::-1])
        compare([subject], config, work)


@pytest.mark.parametrize(("scale", "found"), [(1e25, "in a usual image"), (1e-30, "in a usual image"), (None, "row 3")])
def test_features_that_float32_cannot_hold_are_refused_and_no_table_of_nan_is_written(tmp_path, work, scale, found):
    subject = planted_features(tmp_path, tmp_path / "other")
    (store,) = list_stores(Workdir(tmp_path / "other").features)
    values = {name: store.read(name).astype(np.float32) for name in store.arrays}
    values["near"] *= np.float32(scale or 1)
    if scale is None:
        values["near"][3, 0, 0, 2] = 1e30
    store_features(work, subject.image_ids, values, image_digest(subject, work))
    with pytest.raises(StoreError, match=rf"features near of subj01-planted.*found .*{found}"):
        compare([subject], fc.CompareConfig(n_candidates=0), work)
    assert not list(work.rglob("*.csv"))


def test_blocks_of_vertices_change_nothing(subject, work, monkeypatch):
    config = fc.CompareConfig(n_candidates=1)
    whole = compare([subject], config, work)
    whole.subjects["subj01"].unlink()
    monkeypatch.setattr(module, "block_on", lambda *_: 3)
    parts = compare([subject], config, work)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        for (*_, a), (*_, b) in zip(one.variance.items(), other.variance.items(), strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    pieces = list(blocks_of(subject, 4))
    assert [sum(part.stop - part.start for _, part in block) for block in pieces] == [4, 4, 2]
    assert pieces[1] == [("lh", slice(4, 6)), ("rh", slice(0, 2))]


def test_more_bands_folds_and_images_need_more_memory(subject, work):
    few, many = (needed_bytes(plan_of(n, 4), n_bands, 1) for n, n_bands in ((100, 2), (400, 3)))
    assert all(0 < a < b for a, b in zip(few, many, strict=True))
    with pytest.raises(ConfigError, match="--max-memory"):
        compare([subject], fc.CompareConfig(max_memory=0.001), work)


def test_without_features_or_with_others_for_another_subject_there_is_nothing_to_compare(subject, work):
    with pytest.raises(ConfigError, match="--of: expected patterns"):
        compare([subject], fc.CompareConfig(of="nothing"), work)
    with pytest.raises(StoreError, match="run 'extract' first"):
        compare([subject], fc.CompareConfig(), work / "elsewhere")


def test_without_matplotlib_there_is_everything_but_the_picture(subject, work, monkeypatch):
    monkeypatch.setattr("heads.blend.plot.find_spec", lambda name: None)
    found = compare([subject], fc.CompareConfig(n_candidates=0), work)
    assert sorted(path.name for path in found.folder.iterdir()) == ["shares.csv", "shares.json", "subj01.npz"]


def test_a_trained_backbone_is_compared_with_a_frozen_one_on_the_folds_that_it_held_out(subject, work):
    """Each fold of the trained one has another store; its features of that fold are those that were planted."""
    (frozen,) = feature_sets(subject, work)
    whole = {name: frozen.stores[0].read(name) for name in ("near", "far")}
    rows = {name: Row(values.shape[1:], str(values.dtype)) for name, values in whole.items()}
    noise = {name: np.random.default_rng(5).normal(size=v.shape).astype(v.dtype) for name, v in whole.items()}
    folds = assign_folds(subject.image_ids, 3, 0)
    for fold in (0, 2):
        key = dict(frozen.stores[0].key) | {"layers": list(whole), "backbone": "trained", "weights": f"w{fold}"}
        key["fold"] = training_of(fold)
        facts = {"seen_ids": subject.train.ids[folds[: len(subject.train)] != fold].tolist()}
        store = create_store(Workdir(work).features, "f", key, subject.image_ids, len(subject.train), rows, facts)
        store.append(whole if fold == 0 else noise)
    config = fc.CompareConfig(features=("good=trained*", "vector=b*:pooled"), n_candidates=0)
    found = compare([subject], config, work)
    shares = found.row().variance
    assert shares.unique["good"].low > 0.02 and abs(shares.unique["vector"].value) < 0.05
    settings = json.loads(Workdir(work).compared_json(found.folder.name).read_text())["keys"]["subj01"]
    assert settings["n_folds"] == 3 and len(settings["bands"][0]["features"][0]["weights"]) == 2
