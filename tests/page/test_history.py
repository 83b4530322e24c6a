"""Journals, learning curves and keys, as the page says them."""

import json

import pytest

from featcache.machine.journal import append
from featcache.workdir import Workdir
from heads.page.history import keys, runs, stages
from support.training import edit, train


def test_runs_of_any_version(tmp_path):
    path = Workdir(tmp_path).journal
    assert runs(tmp_path) == []
    append(path, {})
    append(
        path,
        {
            "command": "extract",
            "arguments": ["--size", "48"],
            "environment": {"FEATCACHE_WORK": "w"},
            "began": "2026-11-27T07:06:57+00:00",
            "seconds": 2.5,
            "peak_memory": 1.5e9,
            "peak_device_memory": 2e6,
            "device": "NVIDIA H100",
            "exit": 130,
            "wrote": ["subj01-a"],
            "versions": {"featcache": "0.1", "torch": "2"},
        },
    )
    empty, full = runs(tmp_path)
    assert (empty.line, empty.memory, empty.code) == ("", "", 0)
    assert full.line == "FEATCACHE_WORK=w extract --size 48" and full.began == "2026-11-27 07:06:57"
    assert (full.seconds, full.memory, full.device) == (2.5, "1.5 GB, 2.0 MB of the device", "NVIDIA H100")
    assert (full.code, list(full.wrote), full.versions) == (130, ["subj01-a"], "featcache 0.1, torch 2")


@pytest.mark.slow
def test_learning_curves_are_the_scores_of_checkpoints(tiny, tmp_path):
    assert stages(tmp_path) == []
    first = train(tiny, tmp_path, fold=0)
    second = train(tiny, tmp_path, fold=1)
    edit(second, "facts", finished=False)
    (stage,) = stages(tmp_path)
    assert stage.name == "finetune" and stage.n_unfinished == 1
    curves = [(first.facts.scores, first.facts.epoch), (second.facts.scores, second.facts.epoch)]
    assert list(stage.curves) == ["subj01"] and sorted(stage.curves["subj01"]) == sorted(curves)
    assert len(first.facts.scores) == 2
    (first.path / "checkpoint.json").write_text("{")
    assert stages(tmp_path) == []


def test_keys_are_those_of_the_stores(models):
    found = keys([*models, *models])
    assert set(found) == {model.name for model in models}
    for model in models:
        names, key = found[model.name]
        assert names == [model.store.name] * 2 and json.loads(key) == dict(model.store.key)
