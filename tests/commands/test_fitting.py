"""fit-heads and maps: options make the settings of a head, or are refused where they decide nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from featcache.errors import ConfigError
from featcache.workdir import Workdir
from heads.config import AdamWConfig, FitConfig, SpatialConfig, adamw_of
from support.commands import job_of, run


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ((), FitConfig()),
        (("--solver", "exact"), FitConfig(solver="ridge")),  # its name in earlier versions
        (("--seed", "3"), FitConfig(seed=3)),
        (("--fold-seed", "3", "--folds", "4", "--layers", "each"), FitConfig(seed=3, n_folds=4, layers="each")),
        (
            ("--loss", "smooth_l1", "--epochs", "3", "--learning-rate", "0.5"),
            FitConfig(loss="smooth_l1", adamw=AdamWConfig(epochs=3, learning_rate=0.5)),
        ),
        (("--head", "spatial"), FitConfig(head="spatial", adamw=adamw_of("spatial"))),
        (
            ("--head", "spatial", "--epochs", "2", "--rank", "3", "--space", "5"),
            FitConfig(
                head="spatial",
                adamw=replace(adamw_of("spatial"), epochs=2),
                spatial=SpatialConfig(rank=3, space=5),
            ),
        ),
    ],
)
def test_options_make_the_settings(arguments, config):
    assert job_of("fit-heads", *arguments).config == config


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--epochs", "3"), "--epochs: expected --solver adamw with it; found --solver auto, which is ridge"),
        (("--rank", "3"), "--rank: expected --head spatial with it; found --head linear"),
        (("--solver", "trained", "--folds", "3"), "--folds: expected a solver that fits heads with it"),
        (("--solver", "exact", "--loss", "smooth_l1"), "--solver ridge: expected --head linear and a loss of mse"),
    ],
)
def test_what_decides_nothing_or_cannot_work_is_refused(arguments, option):
    with pytest.raises(ConfigError) as refused:
        job_of("fit-heads", *arguments)
    assert str(refused.value).startswith(option)


@pytest.mark.parametrize(
    ("loss", "shared"),
    [
        ("mnnpc", "mnnpc: --solver ridge; its heads are the same under mse, pearson, mnnpc"),
        ("mse,pearson", "mse, pearson: --solver ridge, one model; its heads are the same"),
    ],
)
def test_losses_of_the_closed_form_are_said_and_fits_are_counted(filled, capfd, monkeypatch, loss, shared):
    lines = []
    monkeypatch.setattr("featcache.machine.progress.say", lines.append)
    found = run(capfd, "fit-heads", "--loss", loss)
    assert any(line.startswith(shared) for line in lines)
    assert [store["subject"] for store in found["stores"]] == ["subj01", "subj01", "subj02", "subj02"]
    assert set(found["scores"]) == {store["model"] for store in found["stores"]}
    assert all(Path(store["weights"]).parent == Workdir(filled).heads for store in found["stores"])


def test_maps_say_which_files_were_written(tiny, tmp_path, monkeypatch, capfd):
    asked = []
    written = [tmp_path / "maps" / "a.npz", tmp_path / "maps" / "a.csv"]
    monkeypatch.setattr("heads.maps.export.export_maps", lambda *about: asked.append(about) or written)
    arguments = ("--data", str(tiny), "--work", str(tmp_path), "--subject", "2", "--models", "a*")
    assert run(capfd, "maps", *arguments)["files"] == [str(path) for path in written]
    ((subjects, models, work),) = asked
    assert [subject.name for subject in subjects] == ["subj02"] and (models, work) == ("a*", tmp_path)
