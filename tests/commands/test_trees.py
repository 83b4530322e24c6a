"""simulate and check: counts as they are asked for, and a list of everything that is wrong."""

import json

import pytest

import cli
from featcache.errors import ConfigError
from featcache.simulate import SimulateConfig
from support.commands import job_of, run


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ((), SimulateConfig()),
        (("--full", "--seed", "3"), SimulateConfig.full(seed=3)),
        (
            ("--subjects", "2", "--images", "20", "--test-images", "5", "--shared", "4", "--image-size", "32"),
            SimulateConfig(n_subjects=2, n_train=20, n_test=5, n_shared=4, image_size=32),
        ),
        (("--images", "40"), SimulateConfig(n_train=40, n_shared=40)),
        (("--size", "64", "--workers", "1"), SimulateConfig(image_size=64, workers=1)),  # its name in earlier versions
    ],
)
def test_options_make_the_settings(arguments, config):
    assert job_of("simulate", *arguments).config == config


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--images", "20", "--shared", "21"), "--shared: expected a whole number from 0 to 20; found 21; change it"),
        (("--vertices", "60"), "--vertices, of one hemisphere: expected"),
        (("--subjects", "9"), "--subjects: expected a whole number from 1 to 8; found 9"),
        (("--seed", "-1"), "--seed: expected a whole number from 0"),
    ],
)
def test_a_count_that_cannot_be_is_called_by_its_option(arguments, line):
    with pytest.raises(ConfigError, match=line):
        job_of("simulate", *arguments)


@pytest.mark.parametrize("n_vertices", [90, 989, 39_548])
def test_vertices_are_shared_out_as_in_the_real_challenge(n_vertices):
    left, right = job_of("simulate", "--vertices", str(n_vertices)).config.n_vertices
    assert left + right == n_vertices and left / n_vertices == pytest.approx(19_004 / 39_548, abs=0.5 / n_vertices)


def test_a_tree_that_is_there_is_done(tmp_path):
    assert job_of("simulate", "--data", str(tmp_path)).is_done()
    assert not job_of("simulate", "--data", str(tmp_path / "new")).is_done()


def test_a_sound_tree_has_no_faults(tiny, tmp_path, capfd):
    found = run(capfd, "check", "--data", str(tiny), "--work", str(tmp_path), "--workers", "1")
    assert found["faults"] == [] and found["data"] == str(tiny)


def test_every_fault_is_listed_and_the_exit_code_is_1(tree, tmp_path, capfd):
    images = sorted((tree / "subj01" / "training_split" / "training_images").iterdir())
    for image in images[:2]:
        image.write_bytes(b"no picture")
    code = cli.run(["check", "--data", str(tree), "--work", str(tmp_path / "work"), "--workers", "1", "--json"])
    *lines, last = capfd.readouterr().out.splitlines()
    faults = json.loads(last)["faults"]
    assert code == 1 and len(faults) == 2
    assert all(str(image) in fault for image, fault in zip(images, faults, strict=False))
    assert lines[:2] == faults and "2 faults" in lines[2]


def test_faults_of_some_subjects_are_those_of_their_files(tree, tmp_path, capfd):
    for subject in ("subj01", "subj02"):
        sorted((tree / subject / "test_split" / "test_images").iterdir())[0].write_bytes(b"no picture")
    (tree / "subj01/training_split/training_fmri/lh_training_fmri.npy").unlink()
    where = ("check", "--data", str(tree), "--work", str(tmp_path / "work"), "--workers", "1", "--json")
    found = {}
    for chosen in ("1", "2", "all"):
        assert cli.run([*where, "--subject", chosen]) == 1
        found[chosen] = json.loads(capfd.readouterr().out.splitlines()[-1])["faults"]
    assert len(found["1"]) == 2 and all("subj01" in fault for fault in found["1"])
    assert (
        len(found["2"]) == 1 and "subj02" in found["2"][0] and sorted(found["1"] + found["2"]) == sorted(found["all"])
    )


def test_a_folder_that_is_not_there_is_refused_when_the_command_runs(tmp_path):
    job = job_of("check", "--data", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--data: expected a dataset"):
        job.call()
