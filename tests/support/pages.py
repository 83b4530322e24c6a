"""Fenced blocks of pages of the documentation, and how a block of each language is run.

Comments in front of a block, which readers do not see, say how:

    <!-- from: files -->          it starts in a new folder, filled as tests/support/readers.py says
    <!-- read: needs four GPUs -->  it is read and not run: commands up to their settings
    <!-- output -->               its lines are among those that the block before it printed, whatever the numbers
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from torch.distributed.run import get_args_parser

from heads.commands.app import app, run
from heads.recipes.jobs import Job
from heads.recipes.steps import commands_of, read_recipe

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("sh", "python", "toml", "json", "text")
COMMAND_LINES = (("python", "cli.py"), ("featcache",))
_FENCE = re.compile(r"((?:^ *<!--[^\n]*-->\n+)*)^( *)```([^\n`]*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (from|read|output)(?:: ([^\n]+?))? -->")
_MODULE = re.compile(r"# ((?:\w+/)*\w+)\.py\n")  # first line of a block that is a file


@dataclass(frozen=True)
class Block:
    """One block of a page. comments : {from, read or output: what it says}"""

    page: Path
    line: int
    language: str
    text: str
    comments: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start(3)) + 1, found[3], found[4], dict(_COMMENT.findall(found[1])))
        for found in _FENCE.finditer(text)
    ]


@dataclass(frozen=True)
class Line:
    """One command of a block of shell, with the environment that it names."""

    words: tuple[str, ...]
    environment: Mapping[str, str]


def lines_of(text: str) -> Iterator[Line]:
    """Every command of a block of shell: lines that go on are joined, and those with && are taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            names = [word for word in words[:end] if re.match(r"[A-Z_]+=", word)]
            yield Line(tuple(words[len(names) : end]), dict(name.split("=", 1) for name in names))
            words = words[end + 1 :]


class Page:
    """Runs blocks of one page, in the working directory.

    Parameters
    ----------
    tiny : {pattern of command lines: options of a small size}, added to a command unless it says them
    smaller : {argument: the one that stands for it}
    """

    def __init__(
        self,
        capfd: pytest.CaptureFixture[str],
        patch: pytest.MonkeyPatch,
        tiny: Mapping[str, Mapping[str, str]],
        smaller: Mapping[str, str],
    ) -> None:
        self.capfd, self.patch, self.tiny, self.smaller = capfd, patch, tiny, smaller
        self.names: dict[str, Any] = {}
        self.printed = ""

    def run(self, block: Block) -> None:
        """Run or read a block. Fails where it does not do what the page says."""
        if block.language not in LANGUAGES:
            pytest.fail(f"{block.where}: expected a language, one of {', '.join(LANGUAGES)}; found {block.language!r}")
        try:
            getattr(self, f"_{block.language}")(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.where}: {error}\n{block.text}") from error

    def _sh(self, block: Block) -> None:
        self.printed = ""
        for line in lines_of(block.text):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in line.environment.items():
                    patch.setenv(name, value)
                self._line(line.words, "read" in block.comments)

    def _line(self, words: Sequence[str], only_read: bool) -> None:
        program, *rest = words
        if arguments := _arguments(words):
            read(arguments) if only_read else self._do(arguments)
        elif program == "torchrun":
            parser = get_args_parser()
            parser.allow_abbrev = False
            options = parser.parse_args(rest)
            assert options.training_script == "cli.py", options.training_script
            read(options.training_script_args)
        elif program == "make":
            subprocess.run(["make", "--dry-run", "--directory", str(ROOT), *rest], check=True, capture_output=True)
        elif words[:2] == ("pip", "install"):
            _refuse_unknown_extras(rest)
        else:
            raise AssertionError(f"expected a command of featcache; found {program!r}")

    def _do(self, arguments: Sequence[str]) -> None:
        said = [self.smaller.get(word, word) for word in arguments]
        small = [options for pattern, options in self.tiny.items() if re.match(pattern, " ".join(said))]
        added = [word for options in small for one in options.items() if one[0] not in said for word in one]
        code = run([*said, *added])
        out, err = self.capfd.readouterr()
        self.printed += out + err
        assert code == 0, f"{shlex.join(arguments)}: {err}"

    def _python(self, block: Block) -> None:
        names = self.names
        if module := _MODULE.match(block.text):
            if "/" not in module[1]:  # a file of the user's
                Path(f"{module[1]}.py").write_text(block.text, encoding="utf-8")
            new = ModuleType(module[1].replace("/", "."))
            self.patch.setitem(sys.modules, new.__name__, new)
            names = new.__dict__
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)
        self.printed = "".join(self.capfd.readouterr())

    def _toml(self, block: Block) -> None:
        path = Path("recipe.toml")
        path.write_text(block.text, encoding="utf-8")
        if "steps" in tomllib.loads(block.text):
            assert read_recipe(path, commands_of(typer.main.get_command(app)), {})  # type: ignore[arg-type]

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    def _text(self, block: Block) -> None:
        if "output" in block.comments:
            printed = {_bare(line) for line in self.printed.splitlines()}
            missing = [line for line in block.text.splitlines() if _bare(line) not in printed | {"", "..."}]
            assert not missing, f"not among what was printed:\n{os.linesep.join(missing)}\n\n{self.printed}"


def _arguments(words: Sequence[str]) -> tuple[str, ...]:
    """What a line says after the name of the command line; nothing for another program."""
    for name in COMMAND_LINES:
        if tuple(words[: len(name)]) == name:
            return tuple(words[len(name) :])
    return ()


def read(arguments: Sequence[str]) -> None:
    """Read a command line up to its settings, and do not run it."""
    job = app(args=list(arguments), standalone_mode=False)
    assert isinstance(job, Job), f"{shlex.join(arguments)}: {job}"


def _refuse_unknown_extras(words: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {extra for word in words for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")}
    unknown = extras - project["optional-dependencies"].keys()
    assert not unknown, f"no extra {', '.join(sorted(unknown))}"


def _bare(line: str) -> str:
    """A line without its numbers and fingerprints, lines of a table, spaces, and the path of the working directory."""
    line = line.replace(f"{Path.cwd()}{os.sep}", "")
    without_table = re.sub(r"[─━┃│┏┓┗┛┡┩├┤└┘╇┳┴┬┼]+", " ", line)
    return " ".join(re.sub(r"\b[0-9a-f]{6}\b|-?\d[\d.,]*", "0", without_table).split())
