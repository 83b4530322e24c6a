"""Options of commands are fields of settings: of one name, meaning and default, in groups."""

from dataclasses import dataclass

import pytest
import typer
from typer.testing import CliRunner

import cli
from featcache.config import ExtractConfig, LayerConfig, option
from featcache.errors import FeatcacheError
from featcache.simulate import SimulateConfig
from heads.commands.options import PANELS, command, given, on_command_line, read
from heads.config import FitConfig
from heads.recipes.jobs import Job, Outcome
from support.commands import job_of

GROUP = typer.main.get_command(cli.app)
OPTIONS = [(name, one) for name, command in GROUP.commands.items() for one in command.params if one.opts[0] != "--help"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Some settings of a command that does not exist."""

    n_parts: int = option(3, "Number of parts.", "Machine", name="parts")
    loud: bool = option(False, "Whether to be heard.", "Output")
    name: str | None = option(None, "What to call it.", "Data", shown="nothing")
    inner: float = 0.5  # no option


def parsed(arguments, **about):
    """What a command of these settings is called with."""
    calls = []

    @command(Settings, **about)
    def tell(context: typer.Context, words: str = "none", **options: object) -> Job:
        """Tell."""
        calls.append((words, options, on_command_line(context)))
        return Job(None, lambda: Outcome("told", {}))

    app = typer.Typer()
    app.command(add_help_option=False)(tell)
    done = CliRunner().invoke(app, arguments)
    return (*calls, done.output)


def test_a_command_gets_the_fields_that_have_a_help_text():
    (words, options, said), _ = parsed(["--parts", "5", "--loud"])
    assert (words, options, said) == ("none", {"n_parts": 5, "loud": True, "name": None}, ["parts", "loud"])
    assert read(Settings, options, inner=2.0) == Settings(n_parts=5, loud=True, inner=2.0)
    assert given(Settings, options) == {"n_parts": 5, "loud": True}


def test_a_name_of_earlier_versions_still_works_and_is_not_shown():
    (_, options, said), _ = parsed(["--pieces", "4"], old={"pieces": "n_parts"})
    assert options["n_parts"] == 4 and said == ["pieces"]
    (help_text,) = parsed(["--help"], old={"pieces": "n_parts"})
    assert "--parts" in help_text and "--pieces" not in help_text


def test_under_presets_nothing_is_given_and_help_shows_the_values_of_each():
    presets = {Settings: {"few": vars(Settings()), "many": vars(Settings(n_parts=9))}}
    (_, options, _), _ = parsed([], presets=presets)
    assert given(Settings, options) == {}
    (help_text,) = parsed(["-h"], presets=presets)
    assert "3; many: 9" in help_text and "off" in help_text


def test_fields_that_are_left_out_are_no_options():
    assert "No such option" in parsed(["--parts", "5"], leave_out=("n_parts",))[-1]


def test_an_option_of_one_value_is_not_given_twice(capfd):
    assert cli.run(["blend", "--models", "a*", "--seed", "1", "--models=b*"]) == 1
    assert capfd.readouterr().err.startswith(
        "error: --models: expected one value; found the option twice; give it once"
    )
    several = ("--responses", "nowhere.npy", "--responses", "b=c.npy", "--quiet", "--quiet")
    with pytest.raises(FeatcacheError, match=r"nowhere.npy: expected a file"):
        job_of("import", "--images", "i", *several).call()


def test_help_is_in_groups_from_data_to_output():
    (help_text,) = parsed(["--help"])
    places = [help_text.index(f" {panel} ") for panel in ("Data", "Machine", "Output")]
    assert places == sorted(places)


@pytest.mark.parametrize(("name", "one"), OPTIONS, ids=[f"{name} {one.opts[0]}" for name, one in OPTIONS])
def test_every_option_has_a_group_and_a_sentence(name, one):
    if one.param_type_name == "option" and not one.hidden:
        assert one.rich_help_panel in PANELS and one.help[0].isupper() and one.help[-1] in ".)"


def test_an_option_of_one_name_means_one_thing():
    """Of those that are said in one word everywhere, the words are the same in all commands."""
    meanings: dict[str, set[str]] = {}
    for command_name, one in OPTIONS:
        # these two write what others read: their folder and their subject are new ones
        if one.param_type_name == "option" and not one.hidden and command_name not in ("simulate", "import"):
            meanings.setdefault(one.opts[0], set()).add(f"{one.rich_help_panel}: {one.help}")
    shared = ("--data", "--work", "--noise-ceiling", "--subject", "--backbone", "--weights", "--size", "--device")
    shared += ("--folds", "--models", "--exclude", "--json", "--quiet")
    spatial = ("--rank", "--space", "--token-dropout", "--smoothness", "--sparsity")
    assert {name: len(meanings[name]) for name in (*shared, *spatial)} == {name: 1 for name in (*shared, *spatial)}
    assert len({text.partition(": ")[2] for text in meanings["--grid"]}) == 1
    seeds = ("Training: Seed", "Blend: Seed", "Data: Seed", "Statistics: Seed")
    assert all(text.startswith(seeds) for text in meanings["--seed"])
    assert all("linear" in text and "spatial" in text for text in meanings["--head"])


def test_defaults_of_simulate_are_those_of_its_settings():
    """They are written twice, because its settings load what `--help` must not wait for."""
    defaults = {one.name: one.default for name, one in OPTIONS if name == "simulate"}
    usual = SimulateConfig()
    assert (defaults["subjects"], defaults["images"], defaults["test_images"]) == (
        usual.n_subjects,
        usual.n_train,
        usual.n_test,
    )
    assert defaults["vertices"] == sum(usual.n_vertices)
    assert (defaults["image_size"], defaults["seed"], defaults["workers"]) == (
        usual.image_size,
        usual.seed,
        usual.workers,
    )


def test_defaults_of_commands_are_those_of_their_settings():
    extract, fit = ({one.name: one.default for name, one in OPTIONS if name == of} for of in ("extract", "fit-heads"))
    assert {name: extract[name] for name in ("dtype", "batch_size", "device")} == {
        "dtype": ExtractConfig.dtype,
        "batch_size": ExtractConfig.batch_size,
        "device": ExtractConfig.device,
    }
    assert (extract["grid"], extract["pool"], extract["layers"]) == (LayerConfig.grid, LayerConfig.pool, "auto")
    assert {name: fit[name] for name in ("loss", "head", "layers", "solver", "n_folds", "seed")} == {
        name: getattr(FitConfig, name) for name in ("loss", "head", "layers", "solver", "n_folds", "seed")
    }
