"""A recipe: commands in a TOML file, in order, read and checked whole before the first runs (docs/recipes.md)."""

import difflib
import inspect
import itertools
import math
import re
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typer.core import TyperGroup

from featcache.errors import ConfigError, FeatcacheError, first_line
from featcache.machine.files import small_bytes
from heads.config.engines import ENGINE_PANEL
from heads.recipes.doing import do
from heads.recipes.jobs import Job, usage_fault


@dataclass(frozen=True)
class Option:
    """An option of a command: what it takes, how it is said on the command line, and how a flag is taken back.

    on : '' for an argument, which is said by its value alone
    many : whether it may be given several times, so that a list is of its values and not of steps
    """

    kind: type
    on: str
    off: str = ""
    many: bool = False


Commands = Mapping[str, Mapping[str, Option]]  # {command: {option, without dashes: what it is}}
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {  # in words, and what TOML may have for it
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("text or a number", (str, int, float)),
    Path: ("a path", (str,)),
}
_PARTS = ("title", "takes", "options", "steps")
_NO_STEPS = ("run", "units", "layers")
MOST_STEPS = 10_000  # more than a year of steps of an hour
_LARGEST = 2**63
_MOST_LEVELS = 100  # of keys in each other; a recipe needs two
_MOST_BYTES = 1_000_000  # of a recipe: a hundred times those of the longest
_OF_THE_COMMAND_LINE = ("help", "json", "quiet")  # options that a recipe cannot give


@dataclass(frozen=True)
class Step:
    """One command of a recipe, with one value for every option.

    number : of the step in the file, from 1; a list of values makes several of one number
    own : the options that the step itself gives
    """

    recipe: Path
    number: int
    command: str
    arguments: tuple[str, ...] = ()
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.recipe}, step {self.number} ({self.command})"

    @property
    def described(self) -> str:
        """In a few words: 'extract backbone=convnext_base size=384'."""
        return " ".join([self.command, *(f"{name}={value}" for name, value in self.own.items())])


def read_recipe(
    path: Path, commands: Commands, given: Mapping[str, Any], unsaid: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Step]:
    """The steps of a recipe, lists expanded: the last list of a step changes fastest.

    given : options that every command that has them takes, whatever the recipe says
    unsaid : {command: options, or lists of their values, of its steps that do not give them}

    Raises ConfigError for a file that is no recipe, and for the first command, option or value that cannot be.
    """
    recipe = _load(path)
    options, steps = recipe.get("options", {}), recipe.get("steps", [])
    if not isinstance(options, dict):
        raise ConfigError(path, expected="a table [options]", found=f"options = {options!r}", remedy="correct it")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise ConfigError(path, expected="one or more [[steps]]", found="none", remedy="add them (docs/recipes.md)")
    for number, step in enumerate(steps, 1):
        _check_step(path, number, step, commands)
    known = dict.fromkeys(name for step in steps for name in commands[step["run"]])
    for name, value in options.items():
        _refuse_unknown(name, known, f"{path}, [options]", "an option of one of the steps")
        if isinstance(value, list):
            raise ConfigError(
                f"{path}, [options]", expected=f"one value of {name}", found="a list", remedy="put lists into steps"
            )
    whole = [_completed(step, given, unsaid or {}) for step in steps]
    _refuse_too_many(path, whole, commands)
    return [
        one
        for number, step in enumerate(whole, 1)
        for one in _expanded(path, number, step, commands[step["run"]], options, given)
    ]


def _refuse_too_many(path: Path, steps: Sequence[Mapping[str, Any]], commands: Commands) -> None:
    """Raise ConfigError for a recipe whose lists multiply to more steps than anybody runs."""
    n_of_steps = [math.prod(len(values) for values in _lists(step, commands[step["run"]]).values()) for step in steps]
    if (n := sum(n_of_steps)) > MOST_STEPS:
        largest = n_of_steps.index(max(n_of_steps))
        raise ConfigError(
            f"{path}, step {largest + 1} ({steps[largest]['run']})",
            expected=f"{MOST_STEPS:,} steps at most, once every value of a list is one",
            found=f"{n:,} in all, {n_of_steps[largest]:,} of them of this step",
            remedy="shorten its lists, or write several recipes",
        )


def _lists(step: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, list[Any]]:
    """{option that a step gives: its values, of which each makes a step}"""
    return {
        name: value if isinstance(value, list) and not known[name].many else [value]
        for name, value in step.items()
        if name != "run"
    }


def described(path: Path) -> str:
    """What a recipe says of itself, in one line: its title, and what it takes. Raises ConfigError where not text."""
    recipe = _load(path)
    texts = {name: recipe[name] for name in ("title", "takes") if name in recipe}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ConfigError(f"{path}: {name}", expected="text", found=f"{text!r}", remedy="correct it")
    return "; ".join(texts.values()) or path.name


def _completed(
    step: Mapping[str, Any], given: Mapping[str, Any], unsaid: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A step with the options that it does not say, and without lists that a given value takes the place of."""
    own = {name: value for name, value in step.items() if not (name in given and isinstance(value, list))}
    return own | {name: value for name, value in unsaid.get(step["run"], {}).items() if name not in step}


def _load(path: Path) -> dict[str, Any]:
    try:
        text = small_bytes(path, _MOST_BYTES).decode()
        if max(part.count(".") for part in re.split(r"[,=\n\[\]{}#\"']", text)) > _MOST_LEVELS:
            raise ValueError(f"keys in each other, {_MOST_LEVELS} and more")  # which take tomllib minutes
        recipe = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(
            path, expected="a recipe", found="no such file", remedy="name one, such as recipes/demo.toml"
        ) from error
    except OSError as error:
        found = "a folder" if path.is_dir() else f"what cannot be read ({error.strerror or error})"
        raise ConfigError(path, expected="a recipe", found=found, remedy="name a .toml file") from error
    except (ValueError, RecursionError) as error:  # of TOML, or of the bytes before it
        found = f"a mistake in it: {first_line(error)}"
        raise ConfigError(path, expected="TOML", found=found, remedy="correct it") from error
    if _has_huge(recipe):
        found = f"one of {_LARGEST} or more"
        raise ConfigError(path, expected="numbers that options can take", found=found, remedy="correct it")
    for name in recipe:
        _refuse_unknown(name, _PARTS, str(path), "title, takes, [options] and [[steps]]")
    return recipe


def _has_huge(value: Any) -> bool:
    """Whether a whole number in what TOML has is larger than any option takes; Python does not even print some."""
    if isinstance(value, (dict, list)):
        return any(map(_has_huge, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and abs(value) >= _LARGEST


def _check_step(path: Path, number: int, step: Mapping[str, Any], commands: Commands) -> None:
    if not isinstance(command := step.get("run"), str):
        found = "nothing" if command is None else repr(command)
        raise ConfigError(f"{path}, step {number}", expected="run = and a command", found=found, remedy="add it")
    _refuse_unknown(command, commands, f"{path}, step {number}", f"one of {', '.join(commands)}")
    for name in step:
        if name != "run":
            where = f"{path}, step {number} ({command})"
            _refuse_unknown(name, commands[command], where, f"an option of {command}")


def _refuse_unknown(name: str, known: Mapping[str, Any] | Sequence[str], where: str, expected: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
        raise ConfigError(where, expected=expected, found=f"{name!r}", remedy=str(hint))


def _expanded(
    path: Path,
    number: int,
    step: Mapping[str, Any],
    known: Mapping[str, Option],
    options: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Iterator[Step]:
    own = _lists(step, known)
    shared = {name: value for name, value in options.items() if name in known}
    for values in itertools.product(*own.values()):
        chosen = dict(zip(own, values, strict=True))
        bare = Step(path, number, step["run"], own=chosen)
        arguments = [
            argument
            for name, value in (shared | chosen).items()
            if name not in given
            for argument in _arguments(name, value, known[name], bare.where)
        ]
        arguments += [f"--{name}={value}" for name, value in given.items() if name in known]
        yield Step(path, number, step["run"], tuple(one for one in arguments if one), chosen)
    if empty := [name for name, values in own.items() if not values]:
        where = Step(path, number, step["run"]).where
        raise ConfigError(where, expected=f"one or more values of {empty[0]}", found="[]", remedy="leave it out")


def _arguments(name: str, value: Any, option: Option, where: str) -> list[str]:
    """One value as on the command line, or all of an option of many. Raises ConfigError for one of another kind."""
    return [
        _argument(name, one, option, where) for one in (value if option.many and isinstance(value, list) else [value])
    ]


def _argument(name: str, value: Any, option: Option, where: str) -> str:
    """As on the command line; '' for a flag that is not given. Raises ConfigError for a value of another kind."""
    expected, kinds = _KINDS[option.kind]
    if not isinstance(value, kinds) or isinstance(value, bool) != (option.kind is bool):
        raise ConfigError(f"{where}: --{name}", expected=expected, found=f"{value!r}", remedy="correct it")
    if option.kind is bool:
        return option.on if value else option.off
    return f"{option.on}={value}" if option.on else str(value)


def commands_of(group: TyperGroup) -> Commands:
    """What a recipe may run: each command with its options, but --json, and its arguments, by their names."""
    return {name: _options_of(command) for name, command in group.commands.items() if name not in _NO_STEPS}


def _options_of(command: Any) -> dict[str, Option]:
    signature = inspect.signature(command.callback).parameters
    found = {}
    for one in command.params:
        if one.hidden or getattr(one, "rich_help_panel", None) == ENGINE_PANEL:  # for the command line alone
            continue
        annotation = signature[one.name].annotation
        kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        many = get_origin(kind) is list
        kind = next((part for part in get_args(kind) if part in _KINDS), kind)  # of int | None
        said = one.opts[0] if one.param_type_name == "option" else ""
        found[one.opts[0].removeprefix("--")] = Option(kind, said, next(iter(one.secondary_opts), ""), many)
    return {name: option for name, option in found.items() if name not in _OF_THE_COMMAND_LINE}


@dataclass(frozen=True)
class Ready:
    """A step whose options are read and whose settings are checked. options : as the command reads them."""

    step: Step
    job: Job
    options: Mapping[str, Any]


def ready(group: TyperGroup, step: Step) -> Ready:
    """Read a step's options as the command itself does, and build its settings. Raises FeatcacheError."""
    command = group.commands[step.command]
    try:
        context = command.make_context(step.command, list(step.arguments))
        job = replace(command.invoke(context), line=(step.command, *step.arguments))
        return Ready(step, job, dict(context.params))
    except FeatcacheError as error:
        raise located(error, step) from error
    except Exception as error:
        if (fault := usage_fault(error)) is None:
            raise
        raise ConfigError(
            step.where,
            expected=f"options of {step.command}",
            found=fault,
            remedy="correct it, or the environment",
        ) from error


def work_of(steps: Sequence[Ready]) -> Path:
    """The work folder of some steps. Raises ConfigError where they have several."""
    works = list(dict.fromkeys(Path(one.options["work"]) for one in steps if "work" in one.options))
    if len(works) != 1:
        raise ConfigError(
            "--work",
            expected="one work folder of all steps",
            found=", ".join(map(str, works)) or "none",
            remedy="write a recipe for each",
        )
    return works[0]


def located(error: FeatcacheError, step: Step) -> FeatcacheError:
    """The same mistake, with the step that it is in."""
    return error.inside(step.where)


@dataclass(frozen=True)
class Ran:
    """What the steps of a recipe left.

    results : of each step that was run or skipped
    code : exit code
    opens : the last file that a step left for a person to open
    """

    results: Sequence[dict[str, Any]]
    code: int = 0
    opens: Path | None = None


def run_steps(steps: Sequence[Ready], say: Callable[[str], None], advance: Callable[[], None] = lambda: None) -> Ran:
    """Run what is checked, one after the other, up to the first that fails.

    Every command skips what is done already, so that the same recipe run again goes on where it stopped.

    advance : called after each step
    """
    from featcache.machine.memory import give_back_memory

    last, results, opens = steps[-1].step.number, [], None
    for one in steps:
        step, job = one.step, one.job
        name = f"step {step.number} of {last}: {step.described}"
        about = {"step": step.number, "command": step.command, "options": dict(step.own)}
        if job.is_done():
            say(f"{name}: is there already")
            results.append(about | {"skipped": True})
            advance()
            continue
        say(name)
        began = time.perf_counter()
        try:
            outcome = do(job)
        except FeatcacheError as error:
            raise located(error, step) from error
        seconds = round(time.perf_counter() - began, 2)
        say(f"{outcome.message} ({seconds:.1f} s)")
        results.append(about | {"skipped": False} | outcome.result | {"seconds": seconds})
        opens = outcome.opens or opens
        give_back_memory()  # a step has what it would have as a command alone
        advance()
        if outcome.code:
            return Ran(results, outcome.code, opens)
    return Ran(results, opens=opens)
