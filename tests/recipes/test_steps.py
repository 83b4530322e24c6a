"""Recipes: a run is the commands one by one, goes on where it stopped, and does not start with a mistake in it."""

import inspect
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import cli
from featcache.errors import ConfigError
from heads.recipes.jobs import Job
from heads.recipes.steps import Option, commands_of, read_recipe
from support.commands import SMALL, fails, run

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[[str], str]

RECIPE = """
title = "two kinds of heads"
[[steps]]
run = "extract"
backbone = "test_resnet"
layers = "pooled"
[[steps]]
run = "fit-heads"
[[steps]]
run = "fit-heads"
loss = ["smooth_l1", "smooth_l1+pearson"]
epochs = 2
[[steps]]
run = "blend"
"""
COMMANDS = (
    ("extract", "--backbone", "test_resnet", "--layers", "pooled"),
    ("fit-heads",),
    ("fit-heads", "--loss", "smooth_l1", "--epochs", "2"),
    ("fit-heads", "--loss", "smooth_l1+pearson", "--epochs", "2"),
    ("blend",),
)


@pytest.fixture
def work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (SMALL | {"FEATCACHE_DATA": str(tiny), "FEATCACHE_WORK": str(tmp_path / "work")}).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "work"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe; its path."""

    def written(text: str) -> str:
        path = tmp_path / "r.toml"
        path.write_text(text)
        return str(path)

    return written


def names(work: Path) -> set[str]:
    return {path.name for kind in ("features.zarr", "predictions.zarr") for path in (work / kind).glob("[!.]*")}


def results(found: list[dict]) -> list[dict]:
    """Scores and names of stores, without the folders they are in."""
    kept = [{key: one.get(key) for key in ("scores", "stores", "weights")} for one in found]
    return json.loads(re.sub(r'"[^"]*/', '"', json.dumps(kept)).replace('"new": true', '"new": false'))


def test_a_run_is_its_commands_one_by_one(work, write, capfd):
    whole = run(capfd, "run", write(RECIPE), "--work", str(work / "whole"))["steps"]
    alone = [run(capfd, *command, "--work", str(work / "alone")) for command in COMMANDS]
    assert names(work / "whole") == names(work / "alone") and len(names(work / "whole")) == 2 + 3 * 2
    assert results(whole) == results(alone)
    zips = [(work / one / "submission.zip").read_bytes() for one in ("whole", "alone")]
    assert zips[0] == zips[1]


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(work, write, monkeypatch, capfd):
    path = write(RECIPE)
    whole = run(capfd, "run", path, "--work", str(work / "whole"))["steps"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "heads.solvers.gradient.train_head", interrupted
        )  # of the third step, after the closed form is done
        assert cli.run(["run", path]) == 130
    capfd.readouterr()
    before = names(work)
    again = run(capfd, "run", path)["steps"]
    assert [store["new"] for store in again[0]["stores"]] == [0, 0]
    assert before < names(work) == names(work / "whole") and results(again)[1:] == results(whole)[1:]


def test_a_tree_that_is_there_is_not_simulated_again(work, write, tmp_path, capfd):
    settings = "subjects = 1, images = 12, test-images = 3, shared = 0, vertices = 90, image-size = 32"
    text = f'steps = [{{run = "simulate", {settings}}}]'
    arguments = ("run", write(text), "--data", str(tmp_path / "made"))
    assert [one["skipped"] for one in run(capfd, *arguments)["steps"]] == [False]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*")}
    assert [one["skipped"] for one in run(capfd, *arguments)["steps"]] == [True]
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*")}


def test_a_step_that_fails_ends_the_run_with_its_place(work, write, capfd):
    line = fails(capfd, "run", write('[[steps]]\nrun = "fit-heads"\n[[steps]]\nrun = "blend"'))
    assert "r.toml, step 1 (fit-heads): " in line and "run 'extract' first" in line


def test_faults_that_check_finds_end_the_run(work, write, tree, capfd):
    sorted((tree / "subj01/test_split/test_images").iterdir())[0].write_bytes(b"")
    assert cli.run(["run", write('[[steps]]\nrun = "check"\n[[steps]]\nrun = "extract"'), "--data", str(tree)]) == 1
    assert not (work / "features.zarr").exists()


def test_what_is_given_to_run_goes_to_every_step(work, write, tree, capfd):
    text = '[options]\nsubject = 2\n[[steps]]\nrun = "extract"\nlayers = "pooled"\n[[steps]]\nrun = "fit-heads"'
    options = ("--data", str(tree), "--work", str(work / "there"), "--subject", "1", "--device", "cpu")
    for step in run(capfd, "run", write(text), *options)["steps"]:
        assert [Path(one["path"]).parents[1].name for one in step["stores"]] == ["there"]
        assert [one["subject"] for one in step["stores"]] == ["subj01"]
    assert [one["subject"] for one in run(capfd, "run", write(text))["steps"][0]["stores"]] == ["subj02"]


# --- reading


KNOWN = {
    "fit": {"loss": Option(str, "--loss"), "size": Option(int, "--size"), "rate": Option(float, "--rate")},
    "tell": {
        "data": Option(Path, "--data"),
        "loud": Option(bool, "--loud", "--no-loud"),
        "flag": Option(bool, "--flag"),
    },
}


def read(write: Write, text: str, **given: str) -> list[tuple[str, ...]]:
    return [(step.command, *step.arguments) for step in read_recipe(Path(write(text)), KNOWN, given)]


def test_lists_are_products_and_the_last_changes_fastest(write):
    steps = read(write, '[[steps]]\nrun = "fit"\nloss = ["b", "a"]\nsize = [2, 1]\n[[steps]]\nsize = 3\nrun = "fit"')
    assert steps == [
        ("fit", "--loss=b", "--size=2"),
        ("fit", "--loss=b", "--size=1"),
        ("fit", "--loss=a", "--size=2"),
        ("fit", "--loss=a", "--size=1"),
        ("fit", "--size=3"),
    ]


def test_a_step_counts_before_the_options_of_the_file_and_run_before_both(write):
    text = '[options]\nsize = 1\nloss = "x"\n[[steps]]\nrun = "fit"\nsize = 2\n[[steps]]\nrun = "tell"'
    assert read(write, text) == [("fit", "--size=2", "--loss=x"), ("tell",)]
    assert read(write, text, loss="y", data="d")[0] == ("fit", "--size=2", "--loss=y")
    assert read(write, text, loss="y", data="d")[1] == ("tell", "--data=d")


def test_values_are_written_as_the_command_line_has_them(write):
    text = '[[steps]]\nrun = "tell"\nloud = {}\nflag = {}\n[[steps]]\nrun = "fit"\nloss = -1\nrate = 1e-5'
    assert read(write, text.format("true", "true"))[0] == ("tell", "--loud", "--flag")
    assert read(write, text.format("false", "false")) == [("tell", "--no-loud"), ("fit", "--loss=-1", "--rate=1e-05")]


STEP = '[[steps]]\nrun = "extract"\n'
GOOD = '[[steps]]\nrun = "extract"\nlayers = "pooled"\n[[steps]]\nrun = "fit-heads"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = [", r"r.toml: expected TOML; found a mistake in it: .*; correct it"),
        ("title = 'nothing'", r"r.toml: expected one or more \[\[steps\]\]; found none; add them"),
        ("steps = []", r"expected one or more \[\[steps\]\]; found none"),
        ("step = [{run = 'blend'}]", r"r.toml: expected title, .*; found 'step'; did you mean steps\?"),
        ("options = 3\n" + STEP, r"expected a table \[options\]; found options = 3"),
        ("[[steps]]\nlayers = 'auto'", r"r.toml, step 1: expected run = and a command; found nothing; add it"),
        ("[[steps]]\nrun = ['extract']", r"step 1: expected run = and a command; found \['extract'\]"),
        (GOOD + "[[steps]]\nrun = 'belnd'", r"r.toml, step 3: expected one of .*; found 'belnd'; did you mean blend\?"),
        (GOOD + "[[steps]]\nrun = 'run'", r"step 3: expected one of extract, .*; found 'run'"),
        (
            GOOD + "[[steps]]\nrun = 'blend'\nloss = 'mse'",
            r"step 3 \(blend\): expected an option of blend; found 'loss'",
        ),
        (
            GOOD + "[[steps]]\nrun = 'fit-heads'\nlos = 'mse'",
            r"step 3 \(fit-heads\): .* found 'los'; did you mean loss\?",
        ),
        (GOOD + "[[steps]]\nrun = 'fit-heads'\nbatch_size = 8", r"found 'batch_size'; did you mean batch-size\?"),
        (
            GOOD + "[[steps]]\nrun = 'blend'\njson = true",
            r"step 3 \(blend\): expected an option of blend; found 'json'",
        ),
        (GOOD + "folds = 'five'", r"step 2 \(fit-heads\): --folds: expected a whole number; found 'five'; correct it"),
        (GOOD + "folds = true", r"step 2 \(fit-heads\): --folds: expected a whole number; found True; correct it"),
        (GOOD + "loss = true", r"--loss: expected text or a number; found True"),
        (GOOD + "loss = {a = 1}", r"--loss: expected text or a number; found \{'a': 1\}"),
        (GOOD + "loss = []", r"step 2 \(fit-heads\): expected one or more values of loss; found \[\]; leave it out"),
        (GOOD + "loss = ['mse', 'msee']", r"step 2 \(fit-heads\): --loss: expected smooth_l1, .*; found 'msee'"),
        (GOOD + "epochs = 3", r"step 2 \(fit-heads\): --epochs: expected --solver adamw with it; found --solver auto"),
        (GOOD + "device = 'tpu'", r"step 2 \(fit-heads\): --device: expected one of auto, cpu, cuda; found 'tpu'"),
        (
            GOOD + "data = 'nowhere'",
            r"step 2 \(fit-heads\): --data: expected a dataset; found no folder nowhere",
        ),
        (GOOD + "subject = 9", r"step 2 \(fit-heads\): --subject: expected one of subj01, subj02; found 'subj09'"),
        (GOOD + STEP + "backbone = 'test_resnett'", r"step 3 \(extract\): --backbone: .* did you mean test_resnet"),
        (
            GOOD + STEP + "weights = 'packaged'",
            r"step 3 \(extract\): --weights packaged: expected one of tf_efficientnet",
        ),
        ("[options]\nlos = 1\n" + GOOD, r"r.toml, \[options\]: expected an option of one of the steps; found 'los'"),
        ("[options]\nloss = ['mse']\n" + GOOD, r"\[options\]: expected one value of loss; found a list"),
        ("[options]\nfolds = 1\n" + GOOD, r"step 2 \(fit-heads\): --folds: expected 2 or more; found 1"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--plan",)], ids=["run", "plan"])
def test_a_mistake_is_one_line_and_nothing_is_started(work, write, capfd, text, message, more):
    line = fails(capfd, "run", write(text), *more)
    assert re.search(message, line), line
    assert not work.exists()


def test_files_that_are_no_recipe(work, tmp_path, capfd):
    assert "expected a recipe; found no such file; name one" in fails(capfd, "run", "nowhere.toml")
    assert "expected a recipe; found a folder" in fails(capfd, "run", str(tmp_path))
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    assert "expected TOML; found a mistake in it" in fails(capfd, "run", str(tmp_path / "b.toml"))


def test_a_mistake_in_the_environment_names_the_step(work, write, monkeypatch, capfd):
    monkeypatch.setenv("FEATCACHE_SIZE", "big")
    line = fails(capfd, "run", write(GOOD))
    assert "step 1 (extract): " in line and "--size" in line and "correct it, or the environment" in line


def test_a_tree_that_an_earlier_step_simulates_need_not_be_there(work, write, tmp_path, capfd):
    text = '[[steps]]\nrun = "simulate"\nsubjects = 2\n' + GOOD
    data = ("--data", str(tmp_path / "made"))
    assert "step 3 (fit-heads): --subject: " in fails(capfd, "run", write(text + "subject = 3"), *data)
    assert "step 1 (extract): --data: " in fails(capfd, "run", write(GOOD + "[[steps]]\nrun = 'simulate'"), *data)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_checked_without_a_mistake(tree, path, monkeypatch, capfd):
    """Nothing is estimated: outlines of the networks are not what is checked."""
    monkeypatch.setattr("heads.recipes.plan.estimates_of", lambda steps, subjects: [])
    monkeypatch.setattr("heads.report.plans.plan_table", lambda estimates: "")
    monkeypatch.setattr("heads.report.plans.plan_as_json", lambda estimates: {})
    if path.stem == "demo":
        shutil.rmtree(tree)  # which its first step makes
    assert cli.run(["run", str(path), "--data", str(tree), "--plan"]) == 0, capfd.readouterr().err


BACKBONES_OF_THE_PAPER = {
    "convnext_xlarge",
    "seresnext101d_32x8d",
    "convnext_base",
    "vit_small_patch16_224",
    "tf_efficientnet_b7",  # the paper has efficientnet_b7, for which timm has no weights
    "seresnet152d",
    "seresnextaa101d_32x8d",
}
LOSSES_OF_THE_PAPER = {"smooth_l1", "smooth_l1+pattern", "smooth_l1+pattern+mnnpc"}


@pytest.fixture
def paper():
    return read_recipe(ROOT / "recipes/paper.toml", commands_of(typer.main.get_command(cli.app)), {})


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_paper_recipe_trains_every_backbone_of_the_paper_under_every_loss_in_both_stages(paper, stage):
    trained = [step for step in paper if step.command == stage]
    assert all({"--preset=paper", "--fit=whole"} <= set(step.arguments) for step in trained)
    trainings = [(step.own["backbone"], step.own["loss"]) for step in trained if "roi-loss" not in step.own]
    assert sorted(trainings) == sorted(itertools.product(BACKBONES_OF_THE_PAPER, LOSSES_OF_THE_PAPER))


def test_every_step_of_the_paper_recipe_that_names_backbones_names_all_of_them(paper):
    named = {step.number: set() for step in paper if "backbone" in step.own}
    for step in paper:
        if step.number in named:
            named[step.number].add(step.own["backbone"])
    assert len(named) > 1 and all(backbones == BACKBONES_OF_THE_PAPER for backbones in named.values())


def test_a_correlation_over_images_has_several_of_a_subject_in_stage_1_of_the_paper_recipe(paper):
    """A batch of 8 is shared among 8 subjects."""
    over_images = [step for step in paper if step.command == "pretrain" and "mnnpc" in step.own["loss"]]
    assert over_images and {step.own["correlation-batch"] for step in over_images} == {64}


def test_a_command_line_is_read_without_being_done():
    """A command that worked while it reads its options would do so while a recipe is checked."""
    group = typer.main.get_command(cli.app)
    assert commands_of(group).keys() == group.commands.keys() - {"run", "units", "layers"}
    assert {inspect.signature(command.callback).return_annotation for command in group.commands.values()} == {Job}


SEEDED = """
[[steps]]
run = "pretrain"
[[steps]]
run = "finetune"
seed = 7
[[steps]]
run = "extract"
backbone = ["a", "b"]
"""


def test_seeds_are_for_steps_that_give_none_and_a_given_backbone_takes_the_place_of_lists(write):
    commands = commands_of(typer.main.get_command(cli.app))
    unsaid = {"pretrain": {"seed": [0, 1]}, "finetune": {"seed": [0, 1]}}
    steps = read_recipe(Path(write(SEEDED)), commands, {"backbone": "c"}, unsaid)
    assert [(step.command, *step.arguments) for step in steps] == [
        ("pretrain", "--seed=0", "--backbone=c"),
        ("pretrain", "--seed=1", "--backbone=c"),
        ("finetune", "--seed=7", "--backbone=c"),
        ("extract", "--backbone=c"),
    ]


def test_lists_that_multiply_to_millions_of_steps_are_refused_at_once(write):
    lists = "\n".join(f"{name} = {list(range(1, 201))}" for name in ("epochs", "folds", "batch-size"))
    with pytest.raises(
        ConfigError, match=r"step 1 \(fit-heads\): expected 10,000 steps at most.*found 8,000,000 in all"
    ):
        read_recipe(
            Path(write(f'[[steps]]\nrun = "fit-heads"\n{lists}\n')), commands_of(typer.main.get_command(cli.app)), {}
        )
