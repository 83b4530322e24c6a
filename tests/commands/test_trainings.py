"""trainings: seeds of one training are one arm; the recipe of table 1 ends in its table."""

import csv
from pathlib import Path

import pytest

from support.commands import SMALL, fails, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_recipe_of_table_1_ends_in_arms_with_intervals(tiny, tmp_path, capfd, monkeypatch):
    work = tmp_path / "work"
    for name, value in (SMALL | {"FEATCACHE_DATA": str(tiny), "FEATCACHE_WORK": str(work)}).items():
        monkeypatch.setenv(name, value)
    recipe = tmp_path / "table1.toml"
    text = (ROOT / "recipes/table1.toml").read_text()
    for stage in ("pretrain", "finetune"):  # the tiny tree has too few images for five folds and large batches
        text = text.replace(f'run = "{stage}"', f'run = "{stage}"\nfolds = 2\nbatch-size = 4')
    text = text.replace("correlation-batch = 64", "correlation-batch = 8")
    recipe.write_text(text)
    steps = run(capfd, "run", str(recipe), "--backbone", "test_resnet", "--seeds", "2", "--fold", "0")["steps"]
    arms = {arm["arm"]: arm for arm in steps[-1]["arms"]}
    assert list(arms)[:2] == ["finetune smooth_l1, trained", "finetune smooth_l1, refitted"]
    correlated = "pretrain+finetune smooth_l1+pattern+mnnpc, refitted"
    assert {"pretrain+finetune smooth_l1, trained", correlated} <= set(arms)
    for arm in arms.values():
        assert arm["seeds"] == [0, 1] and len(arm["values"]) == 4 and not arm["chosen_on"]
    first, last = arms["finetune smooth_l1, refitted"], arms[correlated]
    assert last["reference"] == first["arm"] and first["reference"] == "finetune smooth_l1, trained"
    assert [arm["arm"] for arm in arms.values() if arm["reference"] is None] == ["finetune smooth_l1, trained"]
    gap = last["difference"]
    assert gap["n_pairs"] == 4 and gap["low"] < gap["mean"] < gap["high"]
    assert gap["mean"] == pytest.approx(last["mean_r"] - first["mean_r"])
    with (work / "trainings/arms.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == list(arms)
    other = run(capfd, "trainings", "--reference", "pretrain smooth_l1, refitted")["arms"]
    assert {arm["reference"] for arm in other} == {None, "pretrain smooth_l1, refitted"}
    assert "--reference: expected" in fails(capfd, "trainings", "--reference", "nothing")
