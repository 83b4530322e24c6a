"""From feature stores to files: planted layers are found, blocks do not matter, and what is done is not done again."""

import csv
import json

import numpy as np
import pytest

import featcache as fc
from featcache.errors import ConfigError, StoreError
from featcache.workdir import Workdir
from heads.compare import run as module
from heads.compare.run import blocks_of, compare, needed_bytes
from support.plans import plan_of
from support.planted import N_VERTICES, planted_features


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


def test_blocks_of_vertices_change_nothing(subject, work, monkeypatch):
    config = fc.CompareConfig(n_candidates=1)
    whole = compare([subject], config, work)
    whole.subjects["subj01"].unlink()
    monkeypatch.setattr(module, "block_that_fits", lambda *_: 3)
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
