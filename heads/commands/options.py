"""Options that several commands have, and the challenge tree that they name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.config import DEFAULT_BACKBONE, DEFAULT_WEIGHTS, BackboneConfig
from featcache.errors import ConfigError

if TYPE_CHECKING:
    from featcache.dataset.subject import Challenge

Data = Annotated[Path, typer.Option("--data", envvar="FEATCACHE_DATA", help="The challenge tree.")]
Work = Annotated[Path, typer.Option("--work", envvar="FEATCACHE_WORK", help="Where stores and results go.")]
Ceiling = Annotated[
    Path | None,
    typer.Option(
        "--noise-ceiling",
        envvar="FEATCACHE_NOISE_CEILING",
        help="Folder of subjXX/{lh,rh}.npy, percent or fraction. Default: noise_ceiling in the tree, if there.",
    ),
]
Subjects = Annotated[str, typer.Option("--subject", help="all, or numbers such as 1,3.")]
Name = Annotated[
    str | None,
    typer.Option("--backbone", envvar="FEATCACHE_BACKBONE", help=f"Any model name of timm. [{DEFAULT_BACKBONE}]"),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", envvar="FEATCACHE_WEIGHTS", help=f"hub, packaged, none or a file. [{DEFAULT_WEIGHTS}]"),
]
Size = Annotated[
    int | None,
    typer.Option("--size", envvar="FEATCACHE_SIZE", help="Pixels on a side. [what the weights were trained at]"),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Make the last line of stdout a JSON object.")]

Chosen = Annotated[
    str, typer.Option("--models", help="Those whose names match, such as 'convnext*'; several: with commas.")
]
Exclude = Annotated[str, typer.Option("--exclude", help="But for those whose names match.")]

DATA, WORK = Path("data/challenge"), Path("work")


def given(**options: Any) -> dict[str, Any]:
    """The options that have a value: None leaves the choice to the settings."""
    return {name: value for name, value in options.items() if value is not None}


def on_command_line(context: typer.Context) -> list[str]:
    """The options that were given there, and not by the environment or by default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def backbone_of(name: str | None, weights: str | None, size: int | None) -> BackboneConfig:
    return BackboneConfig(name=name, weights=weights, size=size)


def existing(data: Path) -> Path:
    if not data.is_dir():
        raise ConfigError(
            "--data",
            expected="a challenge tree",
            found=f"no folder {data}",
            remedy="get the data of the Algonauts 2023 challenge (algonauts.csail.mit.edu/2023), "
            "or write a stand-in with 'simulate'",
        )
    return data


def open_tree(data: Path, noise_ceiling: Path | None) -> "Challenge":
    from featcache.dataset.algonauts import open_challenge
    from featcache.machine.progress import say

    challenge = open_challenge(existing(data), noise_ceiling)
    for note in challenge.notes:
        say(note)
    return challenge
