"""run: every step gets the options that are given to the recipe, in order, up to the first that fails."""

import pytest

import cli
from featcache.errors import ConfigError
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
