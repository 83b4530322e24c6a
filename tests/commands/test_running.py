"""run: every step gets the options that are given to the recipe, in order, up to the first that fails."""

from dataclasses import replace
from pathlib import Path

import pytest

import cli
from featcache.errors import ConfigError
from heads.commands import running
from heads.recipes.jobs import Outcome
from support.commands import job_of, run

CHECKS = "[[steps]]\nrun = 'check'\n[[steps]]\nrun = 'check'\nworkers = 1\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATCACHE_WORK", str(tmp_path / "work"))
    (path := tmp_path / "recipe.toml").write_text(CHECKS)
    return str(path)


def test_steps_run_in_order_with_the_options_of_the_recipe(tiny, recipe, capfd):
    steps = run(capfd, "run", recipe, "--data", str(tiny))["steps"]
    assert [(step["step"], step["command"], step["data"]) for step in steps] == [
        (1, "check", str(tiny)),
        (2, "check", str(tiny)),
    ]
    assert steps[1]["options"] == {"workers": 1} and steps[0]["faults"] == []


def test_a_step_that_fails_is_the_last(tree, recipe, capfd):
    next((tree / "subj01" / "training_split" / "training_images").iterdir()).write_bytes(b"no picture")
    code = cli.run(["run", recipe, "--data", str(tree)])
    out, _ = capfd.readouterr()
    assert code == 1 and "1 of 2 steps" in out.splitlines()[-1]


def test_what_a_recipe_takes_is_said_before_its_first_step(tiny, recipe, capfd):
    Path(recipe).write_text("title = 'Two checks'\ntakes = 'about a minute'\n" + CHECKS)
    assert cli.run(["run", recipe, "--data", str(tiny)]) == 0
    first, second, *_ = capfd.readouterr().err.splitlines()
    assert first == "Two checks; about a minute (2 steps)" and second.startswith("step 1 of 2: check")
    Path(recipe).write_text("takes = 5\n" + CHECKS)
    with pytest.raises(ConfigError, match="takes: expected text; found 5"):
        job_of("run", recipe, "--data", str(tiny))


@pytest.mark.parametrize(("asked", "display"), [(True, True), (True, False), (False, True)])
def test_the_file_to_look_at_is_named_last_and_opened_where_that_is_asked_for(
    tiny, recipe, tmp_path, capfd, monkeypatch, asked, display
):
    report, opened = tmp_path / "a report.html", []
    honest = running.ready

    def with_report(group, step):
        made = honest(group, step)
        done = Outcome("done", {}, opens=report if step.number == 1 else None)
        return replace(made, job=replace(made.job, call=lambda: done))

    monkeypatch.setattr(running, "ready", with_report)
    monkeypatch.setattr(running, "has_display", lambda: display)
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert cli.run(["run", recipe, "--data", str(tiny), *(["--open"] if asked else [])]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"to look at it, open {report}"
    assert opened == ([report.as_uri()] if asked and display else [])


def test_a_display_is_one_of_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert not running.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert running.has_display()
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert not running.has_display()


def test_a_plan_runs_nothing(tiny, recipe, capfd, monkeypatch):
    monkeypatch.setattr("featcache.dataset.open.deep_faults", lambda *_: pytest.fail("a step ran"))
    assert [step["command"] for step in run(capfd, "run", recipe, "--plan", "--data", str(tiny))["plan"]] == [
        "check",
        "check",
    ]


def test_a_mistake_in_a_step_is_found_before_any_runs(tmp_path):
    (path := tmp_path / "recipe.toml").write_text(CHECKS + "[[steps]]\nrun = 'fit-heads'\nfolds = 1\n")
    with pytest.raises(ConfigError, match=r"step 3 \(fit-heads\): --folds: expected 2 or more"):
        job_of("run", str(path))


def test_seeds_are_refused_where_no_training_takes_them(tiny, tmp_path, recipe):
    (given := tmp_path / "given.toml").write_text("[[steps]]\nrun = 'pretrain'\nseed = 3\n" + CHECKS)
    for path in (recipe, str(given)):
        with pytest.raises(ConfigError, match=r"--seeds: expected a step of pretrain or finetune .* found none in"):
            job_of("run", path, "--seeds", "2")
    given.write_text(given.read_text() + "[[steps]]\nrun = 'finetune'\n")
    job_of("run", str(given), "--seeds", "2", "--data", str(tiny), "--backbone", "test_resnet")
