"""What there is to do of a recipe, and how far it is."""

import json

import pytest

import cli
from featcache.machine.leases import Leases, State
from featcache.workdir import Workdir
from heads.config import EngineConfig
from heads.recipes.plan import Estimate
from heads.units.listing import forget_failures, list_units, listed_as_json
from heads.units.units import phases_of
from heads.units.worker import take_part
from support.commands import run
from support.steps import parted, whole

TWO = {"a": ("subj01",), "b": ("subj02",)}
HERE = EngineConfig(engine="here")


RECIPE = """
[[steps]]
run = "extract"
backbone = "test_resnet"
weights = "none"
size = 32
layers = "pooled"

[[steps]]
run = "fit-heads"
loss = "mnnpc"
folds = 3
"""


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def listed(steps, work):
    estimates = [Estimate(one.step, memory=4e9, disk=10e9) for one in steps]
    return list_units(steps, work, estimates, attempts=3, lost_after=60)


def test_units_are_known_once_the_steps_before_them_are_done(work):
    steps = [parted(work, 1, "extract", TWO), parted(work, 2, "fit-heads", TWO), whole(work, 3, "blend")]
    before = listed(steps, work)
    assert [(one.step, one.unit, one.state) for one in before] == [
        (1, "a", "open"),
        (1, "b", "open"),
        (2, "", "not known yet"),
        (3, "", "not known yet"),
    ]
    assert [one.needs["disk"] for one in before] == [5e9, 5e9, 10e9, 10e9]
    assert all(one.needs["memory"] == 4e9 for one in before)
    take_part(steps[:1], work, HERE)
    assert [one.state for one in listed(steps, work)] == ["done", "done", "open", "open", "not known yet"]
    take_part(steps, work, HERE)
    after = listed(steps, work)
    assert [one.state for one in after] == ["done"] * 5 and all(one.done for one in after)
    assert after[0].makes == ["extract-a.txt"] and after[0].seconds is not None and after[0].note
    (work / "extract-b.txt").unlink()
    assert [one.state for one in listed(steps, work)][:2] == ["done", "open"]


def test_running_lost_and_failed_units_say_who_and_why(work):
    steps = [parted(work, 1, "extract", {name: ("subj01",) for name in "abc"})]
    units, leases = phases_of(steps)[0].units(""), Leases(Workdir(work).units)
    for _ in range(3):
        leases.take(units[0].id, leases.states().get(units[0].id, State())).fail("out of ink")
    leases.take(units[1].id, State())
    path = Workdir(work).units / f"{units[2].id}.1.lease"
    leases.take(units[2].id, State())
    who = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(who | {"process": 2**22 + 1, "began": 5}) + "\n0\n")
    rows = listed(steps, work)
    assert [row.state for row in rows] == ["failed", "running", "lost"]
    assert rows[0].note == "out of ink" and rows[1].note.startswith("process ")
    assert forget_failures(steps, work) == 1
    assert [row.state for row in listed(steps, work)] == ["open", "running", "lost"]


def test_json_has_every_unit(work):
    steps = [parted(work, 1, "extract", TWO)]
    rows = json.loads(json.dumps(listed_as_json(listed(steps, work))))
    assert [row["unit"] for row in rows] == ["a", "b"]
    assert rows[0].keys() == {
        *("step", "command", "unit", "id", "subjects", "needs", "makes", "state", "note", "seconds", "done")
    }


def test_the_command_lists_what_there_is_to_do(tiny, tmp_path, capfd):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    where = (str(recipe), "--data", str(tiny), "--work", str(tmp_path / "work"))
    before = run(capfd, "units", *where)["units"]
    assert [(one["command"], one["unit"], one["done"]) for one in before] == [
        ("extract", "subj01 test_resnet", False),
        ("extract", "subj02 test_resnet", False),
        ("fit-heads", "", False),
    ]
    assert before[0]["makes"] == ["features.zarr"] and before[0]["needs"]["memory"] > 1e8
    assert not (tmp_path / "work" / "features.zarr").exists()  # nothing was done
    assert cli.run(["run", *where, "--engine", "here"]) == 0
    after = run(capfd, "units", *where)["units"]
    assert [one["done"] for one in after] == [True] * 4
    assert all(any("committed.json" in name for name in one["makes"]) for one in after)
    # two seconds later another process has nothing to do
    assert run(capfd, "run", *where, "--engine", "here")["units"] == 4
