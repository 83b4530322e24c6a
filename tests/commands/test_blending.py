"""blend and models: presets with what is given over them, and nothing of learning beside a saved blend."""

from pathlib import Path

import pytest

from featcache.errors import ConfigError
from featcache.workdir import Workdir
from heads.config import BlendConfig, blend_preset
from support.commands import job_of, run


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ((), BlendConfig()),
        (("--preset", "paper"), blend_preset("paper")),
        (("--recipe", "paper"), blend_preset("paper")),  # its name in earlier versions
        (("--preset", "paper", "--per", "roi"), BlendConfig(method="score", per="roi", by="backbone")),
        (("--method", "nnls", "--seed", "4", "--exclude", "a*"), BlendConfig(method="nnls", seed=4, exclude="a*")),
    ],
)
def test_options_go_over_the_preset(arguments, config):
    assert job_of("blend", *arguments).config == config


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("preset", "best"),
        ("recipe", "best"),
        ("method", "score"),
        ("per", "all"),
        ("models", "*"),
        ("exclude", "a"),
        ("seed", "0"),
    ],
)
def test_a_saved_blend_is_taken_as_it_was_saved(option, value):
    """Even an option that is given its default would decide nothing."""
    with pytest.raises(ConfigError, match=f"--{option}: expected no --apply beside it"):
        job_of("blend", "--apply", "blend.safetensors", f"--{option}", value)
    assert job_of("blend", "--apply", "blend.safetensors", "--work", "w").config == BlendConfig()


@pytest.mark.slow  # models and a blend of the tiny tree
def test_models_are_listed_best_first_and_a_blend_says_where_it_is(filled, capfd):
    found = run(capfd, "models", "--models", "test_resnet*")["models"]
    assert len(found) == 4 and all(model["name"].startswith("test_resnet") for model in found)
    assert [model["score"] for model in found] == sorted((model["score"] for model in found), reverse=True)
    blended = run(capfd, "blend", "--method", "uniform", "--models", "test_vit*")
    assert Path(blended["predictions"]) == Workdir(filled).submission
    assert Path(blended["submission"]) == Workdir(filled).submission_zip
