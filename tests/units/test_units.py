"""Units of steps: which there are, what tells them apart, and what is kept of one that is done."""

from dataclasses import replace
from pathlib import Path

import pytest

import cli
from featcache.config import ExtractConfig, settings_key
from featcache.dataset.algonauts import open_challenge
from featcache.machine.leases import stamp_of
from heads.commands.app import parser
from heads.config import FitConfig, StageConfig
from heads.recipes.jobs import Outcome
from heads.recipes.steps import Step, ready
from heads.units.torchrun import Devices
from heads.units.units import made_by, merged, phases_of, without
from support.steps import parted, whole

TWO = {"a": ("subj01",), "b": ("subj02",)}


def units(tiny, work, *words, devices=Devices(), but=()):  # noqa: B008
    """The units of one command on the tiny tree."""
    line = (*words, "--data", str(tiny), "--work", str(work))
    step = ready(parser(), Step(Path("recipe.toml"), 1, line[0], tuple(line[1:])))
    (phase,) = phases_of([step], devices)
    return phase.units("", but)


def test_steps_of_one_command_that_has_parts_are_one_phase(tmp_path):
    steps = [
        whole(tmp_path, 1, "check"),
        parted(tmp_path, 2, "extract", TWO),
        parted(tmp_path, 3, "extract", TWO),
        parted(tmp_path, 4, "fit-heads", TWO),
        whole(tmp_path, 5, "blend"),
        whole(tmp_path, 6, "blend"),
    ]
    phases = phases_of(steps)
    assert [[one.step.number for one in phase.steps] for phase in phases] == [[1], [2, 3], [4], [5], [6]]
    assert [phase.has_parts for phase in phases] == [False, True, True, False, False]


def test_a_step_without_parts_depends_on_what_comes_before_it(tmp_path):
    (phase,) = phases_of([whole(tmp_path, 1, "blend")])
    assert phase.units("")[0].id != phase.units("other")[0].id
    assert phase.units("")[0].id == phases_of([whole(tmp_path, 1, "blend")])[0].units("")[0].id


def test_a_step_that_is_there_already_has_no_unit(tmp_path):
    step = whole(tmp_path, 1, "simulate")
    done = replace(step, job=replace(step.job, is_done=lambda: True))
    assert phases_of([done])[0].units("") == []


def test_extraction_falls_into_subjects_and_checkpoints(tiny, every_kind):
    names = [unit.name for unit in units(tiny, every_kind, "extract", "--backbone", "test_resnet")]
    assert len(names) == 2 * 2 + 2 * 2  # stage 1: a checkpoint a fold, each for both; stage 2: one for each as well
    assert sorted({name.split()[0] for name in names}) == ["subj01", "subj02"]
    assert sum("pretrain" in name for name in names) == sum("finetune" in name for name in names) == 4
    frozen = units(tiny, every_kind, "extract", "--backbone", "test_resnet", "--checkpoint", "none")
    assert [unit.name for unit in frozen] == ["subj01 test_resnet", "subj02 test_resnet"]
    assert [unit.subjects for unit in frozen] == [("subj01",), ("subj02",)]


def test_training_falls_into_folds_and_in_stage_two_into_subjects(tiny, every_kind):
    network = ("--backbone", "test_resnet", "--weights", "none", "--size", "48", "--folds", "2")
    assert [unit.name for unit in units(tiny, every_kind, "pretrain", *network)] == [
        "subj01, subj02 fold 0",
        "subj01, subj02 fold 1",
    ]
    second = units(tiny, every_kind, "finetune", *network)
    assert [unit.name for unit in second] == ["subj01 fold 0", "subj01 fold 1", "subj02 fold 0", "subj02 fold 1"]
    assert len(units(tiny, every_kind, "finetune", *network, "--fold", "1", "--subject", "2")) == 1


def test_heads_fall_into_subjects_features_layers_and_losses(tiny, fitted):
    names = [unit.name for unit in units(tiny, fitted, "fit-heads", "--loss", "mse,smooth_l1", "--layers", "each")]
    assert len(names) == len(set(names)) == 2 * (3 + 1) * 2
    named = [name for name in names if "test_resnet" in name and "smooth_l1" in name and name.startswith("subj01")]
    assert [name.split()[3] for name in named] == ["pooled", "layer2", "layer4"]


def test_losses_with_the_same_heads_are_one_unit(tiny, fitted):
    one, other = (units(tiny, fitted, "fit-heads", "--loss", loss) for loss in ("mse", "mnnpc"))
    assert [unit.id for unit in one] == [unit.id for unit in other]
    assert not {unit.id for unit in units(tiny, fitted, "fit-heads", "--loss", "smooth_l1")} & {u.id for u in one}


def test_what_several_subjects_make_together_is_one_unit_and_waits_for_all(tiny, fitted):
    words = ("fit-heads", "--head", "spatial", "--space", "4", "--loss", "mse", "--features", "test_resnet*")
    (unit,) = units(tiny, fitted, *words)
    assert unit.subjects == ("subj01", "subj02")
    assert units(tiny, fitted, *words, but=("subj02",)) == []
    assert [one.subjects for one in units(tiny, fitted, "fit-heads", but=("subj02",))] == [("subj01",)] * 2


@pytest.mark.parametrize(
    ("words", "other"),
    [
        (("--folds", "4"), True),
        (("--fold-seed", "1"), True),
        (("--features", "test_resnet*", "--layers", "pooled"), True),
        (("--max-memory", "2"), True),
        (("--loss", "mse"), False),
    ],
)
def test_a_unit_is_known_by_what_decides_it(tiny, fitted, words, other):
    plain, changed = units(tiny, fitted, "fit-heads"), units(tiny, fitted, "fit-heads", *words)
    assert bool({unit.id for unit in plain} & {unit.id for unit in changed}) is not other


def test_a_unit_is_the_same_on_every_machine(tiny, fitted, monkeypatch):
    words = ("extract", "--backbone", "test_resnet", "--weights", "none", "--size", "48")
    here = units(tiny, fitted, *words)
    there = units(tiny, fitted, *words, "--workers", "7")
    assert [unit.id for unit in here] == [unit.id for unit in there]


def test_changed_images_are_other_units(tree, fitted):
    words = ("extract", "--backbone", "test_resnet", "--weights", "none", "--size", "48")
    before = units(tree, fitted, *words)
    first, second = open_challenge(tree).subjects[0].image_sources[:2]
    first.write_bytes(second.read_bytes())
    after = units(tree, fitted, *words)
    assert before[0].id != after[0].id
    assert before[1].id == after[1].id  # the other subject has its own files


def test_a_file_that_a_setting_names_is_part_of_it(tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"1")
    first = settings_key(ExtractConfig(checkpoint=str(weights)))
    weights.write_bytes(b"22")
    assert settings_key(ExtractConfig(checkpoint=str(weights))) != first
    assert settings_key(FitConfig(split=f"file:{weights}"))["files"] == {f"file:{weights}": list(stamp_of(weights))}


def test_several_devices_make_another_training_and_not_other_features(tiny, every_kind):
    network = ("--backbone", "test_resnet", "--weights", "none", "--size", "48", "--folds", "2")
    two = Devices(processes=2)
    one, both = (
        units(tiny, every_kind, "pretrain", *network),
        units(tiny, every_kind, "pretrain", *network, devices=two),
    )
    assert not {unit.id for unit in one} & {unit.id for unit in both}
    extract = ("extract", "--backbone", "test_resnet")
    assert [unit.id for unit in units(tiny, every_kind, *extract)] == [
        unit.id for unit in units(tiny, every_kind, *extract, devices=two)
    ]
    assert StageConfig(stage="pretrain").fold is None


def test_the_parts_of_a_command_make_what_it_makes(tiny, tmp_path):
    """Each unit alone, in the opposite order, and the command as a whole: the same files."""
    words = ("extract", "--backbone", "test_resnet", "--weights", "none", "--size", "48", "--layers", "pooled,layer2")
    for unit in reversed(units(tiny, tmp_path / "parts", *words)):
        unit.call()
    for unit in reversed(units(tiny, tmp_path / "parts", "fit-heads", "--loss", "mse,smooth_l1", "--epochs", "2")):
        unit.call()
    where = ("--data", str(tiny), "--work", str(tmp_path / "whole"), "--quiet")
    assert cli.run([*words, *where]) == 0
    assert cli.run(["fit-heads", "--loss", "mse,smooth_l1", "--epochs", "2", *where]) == 0
    for folder in ("features.zarr", "predictions.zarr", "heads"):
        parts, whole_ = (
            {p.relative_to(r): p for p in (r / folder).rglob("*") if p.is_file()}
            for r in (tmp_path / "parts", tmp_path / "whole")
        )
        assert parts.keys() == whole_.keys() and parts
        for name in parts:
            if name.suffix != ".safetensors":  # whose header is in an order that the library leaves to chance
                assert parts[name].read_bytes() == whole_[name].read_bytes(), name


def test_what_tells_of_an_outcome_is_found_in_the_work_folder(tmp_path):
    work = tmp_path / "work"
    store = work / "features.zarr" / "one"
    store.mkdir(parents=True)
    for name in ("committed.json", "zarr.json"):
        (store / name).write_text(name)
    (work / "table.csv").write_text("a")
    (tmp_path / "outside.txt").write_text("b")
    result = {"stores": [{"path": str(store), "images": 3}], "files": [str(work / "table.csv")], "text": "a\0b"}
    outside = {"other": str(tmp_path / "outside.txt"), "none": str(work / "missing")}
    made = made_by(Outcome("", result | outside, opens=work / "table.csv"), work)
    assert sorted(made) == ["features.zarr/one/committed.json", "features.zarr/one/zarr.json", "table.csv"]
    assert made["table.csv"] == stamp_of(work / "table.csv")


def test_results_of_parts_are_put_together():
    one = {"stores": [1], "scores": {"m": [1], "n": [2]}, "chosen_on": ["m"], "name": "x"}
    other = {"stores": [2], "scores": {"m": [3]}, "chosen_on": ["m", "k"], "name": "y"}
    assert merged([one, other]) == {
        "stores": [1, 2],
        "scores": {"m": [1, 3], "n": [2]},
        "chosen_on": ["m", "k"],
        "name": "y",
    }
    assert merged([]) == {}


def test_options_are_left_out_of_a_line():
    line = ["fit-heads", "--loss", "mse", "--engine", "local", "--workers=2", "--work", "w"]
    assert without(line, {"--engine", "--workers"}) == ["fit-heads", "--loss", "mse", "--work", "w"]
