"""How commands get their options: those that several have, and those that are fields of settings.

A command is an ordinary function that returns a Job. `command` gives it an option for every field of its settings that
has a help text (see `featcache.config.option`), and the options that every command has. So a default and its meaning
are written once, in the settings, and an option of one name means one thing.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
import typer.core

from featcache.config import usual_workers
from featcache.errors import ConfigError
from featcache.workdir import CHALLENGE, data_folder
from heads.config import EngineConfig
from heads.config.checks import refuse_given
from heads.config.engines import ENGINE_PANEL
from heads.recipes.jobs import Job, Outcome, Part

if TYPE_CHECKING:
    from featcache.dataset.splits import Split
    from featcache.dataset.subject import Dataset, Subject

T = TypeVar("T")

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="FEATCACHE_DATA",
        help="Folder of the dataset: the challenge's tree, or subjects in the form that import writes.",
        rich_help_panel="Data",
        show_default=f"dataset in the work folder, once something was imported, or {CHALLENGE}",
    ),
]
Work = Annotated[
    Path,
    typer.Option(
        "--work",
        envvar="FEATCACHE_WORK",
        help="Work folder: all results are written there.",
        rich_help_panel="Data",
    ),
]
Ceiling = Annotated[
    Path | None,
    typer.Option(
        "--noise-ceiling",
        envvar="FEATCACHE_NOISE_CEILING",
        help="Folder of noise ceilings, subjXX/{lh,rh}.npy, in percent or as fractions.",
        rich_help_panel="Data",
        show_default="noise_ceiling in the dataset, if that folder exists",
    ),
]
Subjects = Annotated[
    str, typer.Option("--subject", help="Subjects: all, or numbers or names, such as 1,3.", rich_help_panel="Data")
]

DATA = None


class OneValueCommand(typer.core.TyperCommand):
    """A command that refuses an option of one value that is given twice, where typer would keep the last value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments as typer does. Raises ConfigError for an option that is given twice."""
        given_in_order = self.make_parser(ctx).parse_args(args=list(args))[2]
        for number, one in enumerate(given_in_order):
            if one in given_in_order[:number] and not (one.multiple or getattr(one, "is_flag", False)):
                raise ConfigError(
                    max(one.opts, key=len),
                    expected="one value",
                    found="the option twice",
                    remedy="give it once; where it takes several values, they have commas between",
                )
        return super().parse_args(ctx, args)


def _show_help(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(context.get_help())
        raise typer.Exit


_OUTPUT = {
    "as_json": Annotated[
        bool,
        typer.Option(
            "--json", help="Print the result as JSON too, as the last line of stdout.", rich_help_panel="Output"
        ),
    ],
    "quiet": Annotated[
        bool, typer.Option("--quiet", help="Print no progress on stderr, only errors.", rich_help_panel="Output")
    ],
    "show_help": Annotated[
        bool,
        typer.Option(
            "--help",
            "-h",
            help="Show this message and exit.",
            rich_help_panel="Output",
            is_eager=True,
            expose_value=False,
            callback=_show_help,
        ),
    ],
}
# groups of options in --help, from what a beginner needs first
PANELS = (
    "Images",
    "Responses",
    "Natural Scenes Dataset",
    "Subject",
    "Data",
    "Backbone",
    "Layers",
    "Heads",
    "Spatial heads",
    "Shared core",
    "Blend",
    "Statistics",
    "Training",
    "Training, in detail",
    "Machine",
    ENGINE_PANEL,
    "Output",
)


def command(
    *settings: type,
    old: Mapping[str, str] | None = None,
    presets: Mapping[type, Mapping[str, Mapping[str, Any]]] | None = None,
    leave_out: Collection[str] = (),
    writes: bool = True,
    has_parts: bool = False,
) -> Callable[[Callable[..., Job]], Callable[..., Job]]:
    """Decorator that gives a command the options of its settings, and those that every command has.

    The function takes them by the names of the fields; of a name that several settings have, there is one option. Use
    `read` to build the settings.

    Parameters
    ----------
    settings : settings classes
    old : {name of an option in earlier versions: name of the parameter}; it still works, and help leaves it out
    presets : {settings class: {preset: {field: its value}}}; an option that is not given is None then, and help shows
        the values under all presets
    leave_out : fields that are no options of this command
    writes : whether it changes the work folder, whose journal then has a record of it
    has_parts : whether an engine can do it, in parts; it then has the options of EngineConfig, and --workers
    """

    def decorated(function: Callable[..., Job]) -> Callable[..., Job]:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        parameters = {one.name: one.replace(kind=one.KEYWORD_ONLY) for one in own}
        own_names = set(parameters)
        for kind in settings:
            for setting in _offered(kind):
                if setting.name not in (*parameters, *leave_out):
                    parameters[setting.name] = _parameter(setting, (presets or {}).get(kind))
        if has_parts:
            parameters |= _of_engine(parameters)
        for name, parameter in (old or {}).items():
            parameters[f"old_{name}"] = _hidden(name, parameters[parameter])
        for name, annotation in _OUTPUT.items():
            parameters[name] = _keyword(name, annotation, False)

        @functools.wraps(function)
        def run(*, as_json: bool, quiet: bool, show_help: bool, **options: Any) -> Job:
            for name, parameter in (old or {}).items():
                if (value := options.pop(f"old_{name}")) is not None:
                    options[parameter] = value
            engine = _engine(options, own_names, parameters["workers"].default) if has_parts else None
            work = options.get("work") if writes else None
            return replace(function(**options), as_json=as_json, quiet=quiet, work=work, engine=engine)

        described = cast(Any, run)
        described.__signature__ = signature.replace(parameters=sorted(parameters.values(), key=_panel))
        described.__annotations__ = {name: one.annotation for name, one in parameters.items()}
        return run

    return decorated


def _engine(options: dict[str, Any], own: Collection[str], usual_workers: int) -> EngineConfig | None:
    """Take the settings of an engine out of the options of a command; None where it has none.

    own : names of the options that the command's function takes itself
    usual_workers : the value of --workers that is not given: 0, unless it is of the threads of the command
    """
    context = options["context"] if "context" in own else options.pop("context")
    said = on_command_line(context)
    values = {one.name: options.pop(one.name) for one in _offered(EngineConfig)}
    n_workers = options["workers"] if "workers" in said else 0
    if not usual_workers:
        options.pop("workers")
    if values["engine"] is None:
        unread = [name for name in (*values, *([] if usual_workers else ["workers"])) if name in said]
        refuse_given(unread, "--engine", "none")
        return None
    if usual_workers:
        options["workers"] = usual_workers
    return read(EngineConfig, values, workers=n_workers)


_WORKERS = Annotated[
    int,
    typer.Option(
        help="Processes or jobs of --engine that share the work. 0: as many as it has.",
        rich_help_panel=ENGINE_PANEL,
        min=0,
    ),
]


def _of_engine(parameters: Mapping[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    """The parameters that a command with parts has besides its own."""
    more = {one.name: _parameter(one, None) for one in _offered(EngineConfig)}
    more["context"] = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    if "workers" not in parameters:
        more["workers"] = _keyword("workers", _WORKERS, 0)
    return more


def _panel(parameter: inspect.Parameter) -> int:
    """Number of the group that an option is in; 0 for what is in none, such as arguments."""
    options = getattr(parameter.annotation, "__metadata__", ())
    panels = [option.rich_help_panel for option in options if option.rich_help_panel]
    return PANELS.index(panels[0]) + 1 if panels else 0


def _offered(settings: type) -> list[Field[Any]]:
    return [setting for setting in fields(settings) if "help" in setting.metadata]


def _parameter(setting: Field[Any], presets: Mapping[str, Mapping[str, Any]] | None) -> inspect.Parameter:
    kind: Any = setting.type
    if kind == tuple[str, ...]:  # an option that may be given several times
        return _keyword(setting.name, Annotated[list[str], _option(setting)], list(_default(setting)))
    if presets is None:
        return _keyword(setting.name, Annotated[kind, _option(setting)], _default(setting))
    return _keyword(setting.name, Annotated[kind | None, _option(setting, _values(setting.name, presets))], None)


def option_of(settings: type, name: str) -> Any:
    """The option of one field, for a command that has no other field of these settings."""
    return _option(next(setting for setting in _offered(settings) if setting.name == name))


def _option(setting: Field[Any], shown: str | None = None) -> Any:
    """shown : what help says of the default, where the settings do not say it"""
    about = setting.metadata
    return typer.Option(
        *([f"--{about['name']}"] if "name" in about else []),
        envvar=about.get("envvar"),
        help=about["help"],
        rich_help_panel=about["panel"],
        metavar="<str> ..." if setting.type == tuple[str, ...] else None,
        show_default=about.get("shown", _default(setting) not in (None, "")) if shown is None else shown,
    )


def _default(setting: Field[Any]) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _values(name: str, presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The value under the first preset, and under the others where it differs: '5; paper: 12'."""
    values = {preset: _shown(settings[name]) for preset, settings in presets.items() if name in settings}
    first = next(iter(values.values()))
    return "; ".join([first, *(f"{preset}: {value}" for preset, value in values.items() if value != first)])


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value) or "none"


def _hidden(name: str, parameter: inspect.Parameter) -> inspect.Parameter:
    kind = parameter.annotation.__origin__
    option = typer.Option(f"--{name.replace('_', '-')}", hidden=True)
    return _keyword(f"old_{name}", Annotated[kind | None, option], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def read(settings: type[T], options: Mapping[str, Any], **more: Any) -> T:
    """Build settings of the options that are theirs; those that are None are left to their defaults."""
    return settings(**given(settings, options), **more)


def given(settings: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of some settings that have a value, by the names of their fields."""
    values = {one.name: options[one.name] for one in _offered(settings) if options.get(one.name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def on_command_line(context: typer.Context) -> list[str]:
    """Names of the options that were given there, as they are said, with _ for -; not those of the environment."""
    sources = {one: context.get_parameter_source(str(one.name)) for one in context.command.params}
    given_there = [one for one, source in sources.items() if source and source.name == "COMMANDLINE"]
    return [one.opts[0].removeprefix("--").replace("-", "_") for one in given_there]


def existing(data: Path) -> Path:
    """The folder of a dataset, if it is there. Raises ConfigError."""
    if not data.is_dir():
        raise ConfigError(
            "--data",
            expected="a dataset",
            found=f"no folder {data}",
            remedy="bring yours in with 'import', get the data of the Algonauts 2023 challenge "
            "(algonauts.csail.mit.edu/2023), or write a stand-in with 'simulate'",
        )
    return data


def open_data(data: Path | None, noise_ceiling: Path | None, work: Path, decodes: bool = False) -> "Dataset":
    """Open the dataset with one id for each picture, and say what its user should know of it.

    data : as for `data_folder`
    decodes : whether the command decodes images anyway, so that it may look at all of them, once; other commands go by
        what an earlier one remembered in the work folder
    """
    from featcache.dataset.open import open_dataset, with_known_pictures
    from featcache.machine.progress import say

    opened = open_dataset(existing(data_folder(data, work)), noise_ceiling)
    dataset = with_known_pictures(opened, work, usual_workers() if decodes else None)
    for note in dataset.notes:
        say(note)
    return dataset


def in_parts(
    config: Any,
    settle: Callable[[], tuple[Any, ...]],
    call: Callable[..., Outcome],
    parts: Callable[..., Iterable[Any]],
    work: Path,
) -> Job:
    """The job of a command that an engine can do in parts.

    settle : opens the dataset, and gives the subjects and what else `call` and `parts` take
    call : (subjects, settings, work, ...) -> outcome
    parts : (subjects, settings, work, ...) -> parts, each with `name`, `subjects`, `config` and `inputs`; and `words`,
        if there are some that have the command do this part alone
    """

    once = functools.cache(settle)

    def pieces(without: Collection[str]) -> list[Part]:
        subjects, *more = once()
        if not [one for one in subjects if one.name not in without]:
            return []
        listed = [(part, [one.name for one in part.subjects]) for part in parts(subjects, config, work, *more)]
        return [
            Part(
                part.name,
                tuple(names),
                part.inputs,
                partial(call, part.subjects, part.config, work, *more),
                getattr(part, "words", {}),
            )
            for part, names in listed
            # what several subjects make together would be another thing without one of them
            if not without or (len(names) == 1 and names[0] not in without)
        ]

    def whole() -> Outcome:
        subjects, *more = settle()
        return call(subjects, config, work, *more)

    return Job(config, whole, parts=pieces)


def settled(
    data: Path | None, noise_ceiling: Path | None, work: Path, subject: str, split: str, decodes: bool = False
) -> "tuple[Sequence[Subject], Split]":
    """The subjects that are asked for, and the split over all subjects of the dataset. decodes : as for `open_data`"""
    from featcache.dataset.grouping import split_of

    dataset = open_data(data, noise_ceiling, work, decodes)
    return dataset.select(subject), split_of(split, dataset.subjects, work)
