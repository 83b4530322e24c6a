"""scores: models and the last blend of a work folder, with tables and maps; one line where there is nothing."""

import csv
import json

import pytest

import featcache
from featcache.workdir import Workdir
from support.commands import fails, job_of, run


def test_options_are_those_of_the_settings():
    config = job_of("scores", "--against", "a*", "--permutations", "5", "--per-fold", "--models", "b*").config
    assert (config.against, config.permutations, config.per_fold, config.models) == ("a*", 5, True, "b*")


@pytest.mark.slow
def test_scores_of_the_tiny_tree_are_those_of_the_blend_and_of_the_models(filled, tiny, tmp_path, capfd):
    blended = run(capfd, "blend", "--models", "test_resnet*")
    table, maps = tmp_path / "scores.csv", tmp_path / "maps"
    options = ["--csv", str(table), "--parquet", str(tmp_path / "scores.parquet"), "--maps-to", str(maps)]
    found = run(
        capfd, "scores", *options, "--permutations", "19", "--against", "blend", "--models", "test_resnet*,blend"
    )
    assert found["models"][0] == "blend" and len(found["models"]) == 5 and found["against"] == "blend"
    rows = {
        (one["subject"], one["surface"], one["roi"], one["measure"]): one
        for one in found["estimates"]
        if one["model"] == "blend"
    }
    for said in blended["scores"]["blend"]:
        place = said["subject"], said["surface"], said["roi"]
        assert rows[(*place, "r")]["mean"] == pytest.approx(said["mean_r"], abs=1e-4)
        assert rows[(*place, "accuracy")]["mean"] == pytest.approx(said["accuracy"], abs=1e-2)
        assert rows[(*place, "r")]["n_vertices"] == said["n_vertices"]
    alone = {one["name"]: one["score"] for one in run(capfd, "models", "--models", "test_resnet*")["models"]}
    whole = [one for one in found["estimates"] if one["subject"] == one["roi"] == "all" and one["surface"] == "both"]
    means = {one["model"]: one["mean"] for one in whole if one["measure"] == "accuracy" and not one["against"]}
    for model, score in alone.items():
        assert means[model] == pytest.approx(score, abs=1e-4)
    with table.open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 5 * 2 * 84 and {row["model"] for row in cells} == set(found["models"])
    assert (maps / "subj01/lh.blend.r.func.gii").exists() and found["written"][0] == str(table)
    frame = featcache.scores(filled, tiny, models="blend")
    assert len(frame) == 2 * 84 and set(frame.model) == {"blend"}
    mean = frame.r.mean()
    assert mean == pytest.approx(rows["all", "both", "all", "r"]["mean"], abs=1e-5)


@pytest.mark.slow
def test_a_blend_of_other_predictions_or_of_an_earlier_version_is_left_out(filled, capfd):
    run(capfd, "blend", "--models", "test_resnet*")
    files = Workdir(filled)
    weights = json.loads(files.blend_weights.read_text())
    model = next(iter(weights["members"]["subj01"].values()))
    model["predictions"] = "others"
    del weights["digest"]  # as of an earlier version
    files.blend_weights.write_text(json.dumps(weights))
    found = run(capfd, "scores", "--permutations", "0")
    whole = [one for one in found["estimates"] if one["roi"] == "all"]
    blend = {one["subject"] for one in whole if one["model"] == "blend"}
    assert blend == {"subj02"}  # and no mean over all subjects
    files.saved_blend.write_bytes(b"nothing")
    assert "blend" not in run(capfd, "scores", "--permutations", "0")["models"]


@pytest.mark.slow
def test_mistakes_are_one_line(filled, tmp_path, capfd):
    assert "--against: expected a pattern of one of" in fails(capfd, "scores", "--against", "test_*")
    assert "--against: expected" in fails(capfd, "scores", "--against", "nothing")
    assert "--models: expected" in fails(capfd, "scores", "--models", "nothing")
    assert "expected predictions for this tree; found none" in fails(capfd, "scores", "--work", str(tmp_path / "empty"))
