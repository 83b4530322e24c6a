"""Every command that writes to a work folder leaves a record there, with what it took and how it ended."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
from featcache import __version__
from featcache.errors import StoreError
from featcache.machine.journal import read
from featcache.workdir import Workdir
from heads.config import FitConfig
from heads.recipes.doing import do
from heads.recipes.jobs import Job, Outcome

LINE = ("fit-heads", "--loss", "mnnpc")


def records(work: Path) -> list[dict[str, Any]]:
    return read(Workdir(work).journal)


def test_a_record_says_what_was_run_and_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEATCACHE_SIZE", "48")

    def call() -> Outcome:
        block = np.ones(20_000_000)  # 160 MB
        return Outcome(f"{block.sum():.0f}", {"stores": [{"path": "work/predictions.zarr/subj01-a-0123"}]})

    do(Job(None, lambda: Outcome("", {}), work=tmp_path))
    before = records(tmp_path)[0]
    outcome = do(Job(FitConfig(device="cpu"), call, work=tmp_path, line=LINE))
    assert outcome.message == "20000000"
    record = records(tmp_path)[1]
    assert (record["command"], record["arguments"]) == ("fit-heads", ["--loss", "mnnpc"])
    assert (record["exit"], record["wrote"], record["device"]) == (0, ["subj01-a-0123"], "cpu")
    assert record["environment"] == {"FEATCACHE_SIZE": "48"} and "device" not in before
    assert record["versions"]["featcache"] == __version__ and record["versions"]["numpy"] == np.__version__
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["peak_memory"] > before["peak_memory"] + 100e6 and record["seconds"] > 0


@pytest.mark.parametrize(("error", "code"), [(ValueError, 1), (KeyboardInterrupt, 130)])
def test_a_command_that_fails_is_recorded_and_fails_as_before(tmp_path: Path, error: type[BaseException], code: int):
    def call() -> Outcome:
        raise error

    with pytest.raises(error):
        do(Job(None, call, work=tmp_path, line=LINE))
    assert [record["exit"] for record in records(tmp_path)] == [code]


@pytest.mark.parametrize(("anew", "found"), [(True, "another one"), (False, "none")])
def test_a_work_folder_that_was_taken_away_meanwhile_is_no_success(tmp_path: Path, anew: bool, found: str):
    work, taken = tmp_path / "work", tmp_path / "taken"
    work.mkdir()

    def call() -> Outcome:
        work.rename(taken)
        if anew:
            work.mkdir()
        return Outcome("done", {})

    expected = f"{work}: expected the folder that was there when the command began; found {found}; see to its disk"
    with pytest.raises(StoreError, match=re.escape(expected)):
        do(Job(None, call, work=work, line=LINE))
    assert [record["exit"] for record in records(work)] == [1] * anew


def test_a_work_folder_may_be_made_by_the_command(tmp_path: Path):
    work = tmp_path / "work"
    do(Job(None, lambda: work.mkdir() or Outcome("done", {}), work=work, line=LINE))
    assert [record["exit"] for record in records(work)] == [0]


def test_a_journal_that_cannot_be_written_fails_nothing(tmp_path: Path):
    Workdir(tmp_path).journal.mkdir()
    assert do(Job(None, lambda: Outcome("done", {}), work=tmp_path)).message == "done"


def test_only_the_first_of_several_processes_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    do(Job(None, lambda: Outcome("", {}), work=tmp_path))
    assert records(tmp_path) == []


def test_commands_that_only_look_leave_none_and_steps_of_a_recipe_one_each(
    filled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    earlier = len(records(filled))
    assert cli.run(["models"]) == 0 and len(records(filled)) == earlier
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[steps]]\nrun = "fit-heads"\n[[steps]]\nrun = "maps"\nmodels = "nothing"\n')
    assert cli.run(["run", str(recipe)]) == 1
    capfd.readouterr()
    made = records(filled)[earlier:]
    assert [(one["command"], one["exit"]) for one in made] == [("fit-heads", 0), ("maps", 1)]
    assert made[0]["wrote"] and made[1]["arguments"] == ["--models=nothing"]


def test_a_mistake_makes_no_work_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert cli.run(["blend", "--data", str(tmp_path / "nowhere"), "--work", str(tmp_path / "work")]) == 1
    assert not (tmp_path / "work").exists() and "--data" in capfd.readouterr().err
