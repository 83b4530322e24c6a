"""The units of a recipe: what can be done by itself, in which order, and how it is told that it is done.

Steps come in phases. A phase is one step, or steps in a row of one command that has parts, since these need nothing of
each other. The units of a phase are known once the phase before it is over: which features there are, for instance.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import timm

from featcache import __version__
from featcache.config import fingerprint
from featcache.errors import FeatcacheError
from featcache.machine.leases import Done, Stamps, stamp_of
from heads.recipes.doing import do, note
from heads.recipes.jobs import Outcome
from heads.recipes.steps import Ready, located
from heads.units.torchrun import COMMANDS, ONE_DEVICE, Devices

_RECORDS = ("committed.json", "checkpoint.json", "files.json", "zarr.json", "encoder.json")  # that tell of a folder


@dataclass(frozen=True)
class Unit:
    """A piece of work that any process can do.

    id : 12 digits that change with all that decides what it makes
    step : number of its step in the recipe
    command, name : of its step; what it is of, in words
    subjects : whose results it makes; () where it is of all
    call : does it
    """

    id: str
    step: int
    command: str
    name: str
    subjects: tuple[str, ...]
    call: Callable[[], Outcome]

    @property
    def title(self) -> str:
        return f"{self.command} {self.name}".strip()


@dataclass(frozen=True)
class Phase:
    """Steps whose units may be done in any order. devices : that train one backbone together"""

    steps: tuple[Ready, ...]
    devices: Devices = ONE_DEVICE

    @property
    def command(self) -> str:
        """The command of its steps."""
        return self.steps[0].step.command

    @property
    def has_parts(self) -> bool:
        """Whether its steps have parts."""
        return self.steps[0].job.parts is not None

    def first(self, before: str, but: Collection[str] = ()) -> Unit:
        """The unit that comes before all others: it reads every image and response, whose digests are remembered.

        Otherwise each worker would.

        before : what identifies all that comes before the phase
        but : subjects that are left out
        """

        def call() -> Outcome:
            n = sum(1 for _ in self._parts(but))
            return Outcome(f"{n} units", {})

        return self._unit(self.steps[0], _id("look", before, self._lines), "looks through the data", call)

    def units(self, before: str, but: Collection[str] = ()) -> list[Unit]:
        """The units of the phase. but : subjects that are left out"""
        if not self.has_parts:
            (ready,) = self.steps
            unit = self._unit(ready, _id("step", before, self._lines), "", lambda: _whole(ready))
            return [] if ready.job.is_done() else [unit]
        return list(self._parts(but))

    def last(self, units: Sequence[Unit], records: Mapping[str, Done]) -> Unit:
        """The unit that comes after all others: it writes the phase into the journal, once."""

        def call() -> Outcome:
            for ready in self.steps:
                done = [records[unit.id] for unit in units if unit.step == ready.step.number and unit.id in records]
                note(ready.job, sum(one.seconds for one in done), merged([one.result for one in done]))
            return Outcome("", {})

        return self._unit(
            self.steps[-1], _id("journal", [unit.id for unit in units]), "is written into the journal", call
        )

    def _unit(self, ready: Ready, unit_id: str, name: str, call: Callable[[], Outcome]) -> Unit:
        return Unit(unit_id, ready.step.number, self.command, name, (), call)

    @property
    def _lines(self) -> list[list[str]]:
        return [[ready.step.command, *ready.step.arguments] for ready in self.steps]

    def _parts(self, but: Collection[str]) -> Iterator[Unit]:
        for ready in self.steps:
            assert ready.job.parts is not None
            try:
                parts = ready.job.parts(but)
            except FeatcacheError as error:
                raise located(error, ready.step) from error
            for part in parts:
                unit_id, call = _id(self.command, part.inputs, timm.__version__), part.call
                if self.devices.several and self.command in COMMANDS:
                    unit_id = _id(unit_id, vars(self.devices))  # batches are a device's
                    words = [self.command, *without(ready.step.arguments, part.words)]
                    words += [f"{name}={value}" for name, value in part.words.items()]
                    call = partial(self.devices.train, unit_id, words)
                yield Unit(unit_id, ready.step.number, self.command, part.name, part.subjects, call)


def without(words: Sequence[str], options: Collection[str]) -> list[str]:
    """A command line without some options, each '--name' that takes a value."""
    kept, takes_value = list[str](), False
    for word in words:
        if takes_value:
            takes_value = False
        elif word.partition("=")[0] in options:
            takes_value = "=" not in word
        else:
            kept.append(word)
    return kept


def phases_of(steps: Sequence[Ready], devices: Devices = ONE_DEVICE) -> list[Phase]:
    """Steps in a row of one command that has parts are one phase, any other step is one by itself."""
    keys = [(one.step.command if one.job.parts else number, bool(one.job.parts)) for number, one in enumerate(steps)]
    grouped = groupby(zip(keys, steps, strict=True), key=lambda pair: pair[0])
    return [Phase(tuple(step for _, step in group), devices) for _, group in grouped]


def record_of(unit: Unit, outcome: Outcome, seconds: float, work: Path) -> Done:
    """What is kept of a unit that was done."""
    host = f"{os.uname().nodename} {os.getpid()}"
    made = dict(made_by(outcome, work))
    return Done(unit.title, made, round(seconds, 2), host, outcome.message, outcome.result)


def made_by(outcome: Outcome, work: Path) -> Stamps:
    """Times and sizes of the files under the work folder that an outcome names, or of what tells of such a folder."""
    root, paths = work.resolve(), {str(outcome.opens)} if outcome.opens else set()
    paths |= set(_texts(outcome.result))
    stamps: dict[str, tuple[int, int]] = {}
    for text in sorted(paths):
        path = Path(text)
        if len(text) < 4096 and "\0" not in text and os.path.lexists(path) and path.resolve().is_relative_to(root):
            files = [path / name for name in _RECORDS] if path.is_dir() else [path]
            named = {file: os.path.relpath(file.resolve(), root) for file in files}
            stamps |= {name: stamp for file, name in named.items() if (stamp := stamp_of(file)) is not None}
    return stamps


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of the parts of one step as one: lists one after the other, tables by name; of others the last."""
    whole: dict[str, Any] = {}
    for result in results:
        for name, value in result.items():
            before = whole.get(name)
            if isinstance(value, list) and isinstance(before, list):
                new = [one for one in value if one not in before] if name == "chosen_on" else value
                whole[name] = [*before, *new]
            elif isinstance(value, Mapping) and isinstance(before, Mapping):
                whole[name] = merged([before, value])
            else:
                whole[name] = value
    return whole


def timed(call: Callable[[], Outcome]) -> tuple[Outcome, float]:
    """What a unit leaves, and the seconds that it took."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def _whole(ready: Ready) -> Outcome:
    try:
        return do(ready.job)
    except FeatcacheError as error:
        raise located(error, ready.step) from error


def _id(*what: Any) -> str:
    return fingerprint({"unit": list(what), "featcache": __version__})


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, Mapping):
        for inner in content.values():
            yield from _texts(inner)
    elif isinstance(content, list | tuple):
        for inner in content:
            yield from _texts(inner)
    elif isinstance(content, str):
        yield content
