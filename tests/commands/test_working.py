"""Commands whose pieces an engine does: what workers are told, and what is said at the end."""

import os

import pytest

import cli
from featcache.errors import ConfigError
from heads.commands import working as module
from heads.commands.app import parser
from heads.commands.working import do_units, outcome_of, shared
from heads.config import EngineConfig
from heads.recipes.steps import work_of
from support.commands import SMALL, fails, job_of
from support.steps import parted, whole

TWO = {"a": ("subj01",), "b": ("subj02",)}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_workers_get_the_command_line_without_what_says_who_does_it(tiny, tmp_path, monkeypatch):
    line = ["fit-heads", "--loss", "pearson", "--engine", "local", "--workers=3", "--data", str(tiny), "--json"]
    line += ["--work", str(tmp_path), "--interrupt", "leave", "--attempts=2"]
    job = job_of(*line)
    assert job.engine == EngineConfig(engine="local", workers=3, interrupt="leave", attempts=2)
    told = {}

    def drive(steps, work, engine, n_workers, call, orders):
        told.update(orders, n_workers=n_workers, call=call)
        raise KeyboardInterrupt

    monkeypatch.setattr("heads.units.driver.drive", drive)
    monkeypatch.setenv("FEATCACHE_SIZE", "32")
    with pytest.raises(KeyboardInterrupt):
        shared(module.replace(job, line=line), parser()).call()
    assert told["lines"] == [["fit-heads", "--loss", "pearson", "--data", str(tiny), "--work", str(tmp_path)]]
    assert (told["n_workers"], told["attempts"], told["call"]) == (3, 2, do_units)
    assert told["environment"]["FEATCACHE_SIZE"] == "32" and told["folder"] == os.getcwd()


@pytest.mark.parametrize("command", ["extract", "pretrain", "finetune"])
def test_workers_are_processes_with_an_engine_and_threads_without(command):
    assert job_of(command, "--engine", "local", "--workers", "7").engine.workers == 7
    assert job_of(command, "--engine", "local").engine.workers == 0
    threads = job_of(command, "--workers", "7")
    assert threads.engine is None and threads.config.workers == 7
    assert job_of(command, "--engine", "here", "--workers", "7").config.workers == job_of(command).config.workers


def test_a_worker_works_where_the_order_was_given_and_leaves_its_process_as_it_was(tiny, tmp_path, monkeypatch):
    before, line = os.getcwd(), ["extract", "--work", "here", "--layers", "pooled"]
    orders = {"lines": [line], "steps": [1], "recipe": "r.toml", "work": "here", "folder": str(tmp_path)}
    orders |= {"environment": SMALL | {"FEATCACHE_DATA": str(tiny)}}
    orders |= {"attempts": 1, "lost_after": 60, "nodes": 1, "processes": 0}
    assert do_units(orders)["done"] == 2 + 2
    assert (tmp_path / "here" / "features.zarr").is_dir()
    assert os.getcwd() == before and "FEATCACHE_SIZE" not in os.environ


def test_of_a_job_on_several_machines_the_first_works(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert do_units({}) == {}


def test_steps_of_several_work_folders_are_refused(tmp_path, work):
    other = tmp_path / "other"
    other.mkdir()
    assert work_of([parted(work, 1, "extract", TWO)]) == work
    with pytest.raises(ConfigError, match="expected one work folder of all steps"):
        work_of([parted(work, 1, "extract", TWO), parted(other, 2, "extract", TWO)])
    with pytest.raises(ConfigError, match="found none"):
        work_of([])


def test_the_error_of_a_unit_that_was_given_up_ends_it_and_the_rest_is_done(work):
    def act(name):
        if name == "a":
            raise RuntimeError("out of ink")

    steps = [parted(work, 1, "extract", TWO, act), whole(work, 2, "blend")]
    with pytest.raises(
        Exception, match=r"found 1 given up \(blend not begun\), this one because: .*out of ink"
    ) as error:
        outcome_of(steps, EngineConfig(engine="here"))
    assert "units --retry" in str(error.value)
    assert (work / "extract-b.txt").exists()


def test_a_command_that_has_no_parts_has_no_engine(capfd):
    assert cli.run(["blend", "--engine", "local"]) == 1
    assert "No such option" in capfd.readouterr().err


def test_a_recipe_cannot_say_who_does_it(tmp_path, capfd):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[steps]]\nrun = "extract"\nengine = "local"\n')
    assert "expected an option of extract; found 'engine'" in fails(capfd, "run", str(recipe))


def test_a_plan_is_a_plan_with_any_engine(tiny, tmp_path, capfd):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[steps]]\nrun = "extract"\nbackbone = "test_resnet"\nweights = "none"\nlayers = "pooled"\n')
    where = ("--data", str(tiny), "--work", str(tmp_path / "work"))
    assert cli.run(["run", str(recipe), *where, "--plan", "--engine", "local"]) == 0
    assert "1 steps planned, none run" in capfd.readouterr().out
    assert not (tmp_path / "work" / "units").exists()
