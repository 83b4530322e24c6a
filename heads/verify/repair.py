"""What is damaged is taken away, so that the commands that made it make it again, and those are run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path

import featcache
from featcache.backbone.checkpoint import open_checkpoint, record
from featcache.cache.pixels import forget_pixels
from featcache.cache.store import open_store
from featcache.machine.journal import read
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.verify.findings import (
    BLEND,
    CHECKPOINTS,
    COMPARISONS,
    DATASET,
    FEATURES,
    HEADS,
    PIXELS,
    PREDICTIONS,
    Finding,
)

_COMMANDS = {  # that make what is taken away; what is not here is made again wherever it is needed
    DATASET: ("import",),
    CHECKPOINTS: ("pretrain", "finetune"),
    FEATURES: ("extract", "add-features"),
    PREDICTIONS: ("fit-heads",),
    HEADS: ("fit-heads",),
    COMPARISONS: ("compare",),
    BLEND: ("blend",),
}


@dataclass(frozen=True)
class Line:
    """A command line of the journal, the variables that it was run with, and the folder; '' where that is not known."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str = ""


def take_away(findings: Sequence[Finding]) -> list[str]:
    """Take away what is damaged and no more, and say what; a line for each thing.

    Of a store with damaged chunks, rows from the first of them on are taken back; `extract` makes the damaged ones
    again and keeps the others, `fit-heads` makes all of them. Of a dataset nothing is removed: `import` replaces it.
    """
    damaged: dict[Path, list[Finding]] = {}
    for finding in findings:
        if finding.fault:
            damaged.setdefault(finding.owner, []).append(finding)
    return [f"{owner}: {_take_away(owner, faults)}" for owner, faults in damaged.items()]


def _take_away(owner: Path, faults: Sequence[Finding]) -> str:
    kind = faults[0].kind
    if kind in (FEATURES, PREDICTIONS) and all(fault.part for fault in faults):
        first: dict[str, int] = {}
        for fault in faults:
            first[fault.part] = min(fault.row, first.get(fault.part, fault.row))
        open_store(owner).take_back(first)
        return f"damaged rows of {', '.join(f'{name} from {row} on' for name, row in first.items())} are made again"
    if kind == CHECKPOINTS and owner.name.startswith("state-"):
        checkpoint = open_checkpoint(owner.parent)
        record(with_changes(checkpoint, facts=with_changes(checkpoint.facts, state=None)))
        return "removed; the training starts again"
    if kind == DATASET:
        return "stays until 'import' replaces it"
    if kind == PIXELS:
        forget_pixels(owner)
    elif owner.is_dir() and not owner.is_symlink():
        shutil.rmtree(owner)
    else:
        owner.unlink(missing_ok=True)
    return "removed"


def lines_for(findings: Sequence[Finding], work: Path) -> list[Line]:
    """Command lines of the journal that make again what is damaged in a work folder, in their order, each once.

    Of blends, the last alone. A command that ended with an error is not among them.
    """
    wanted = {name for finding in findings if finding.fault for name in _COMMANDS.get(finding.kind, ())}
    found: dict[tuple[str, ...], Line] = {}
    for entry in read(Workdir(work).journal):
        line = _line(entry, work)
        if line is None or entry.get("exit") != 0 or line.words[0] not in wanted:
            continue
        if line.words[0] == "blend":
            found = {words: other for words, other in found.items() if words[0] != "blend"}
        found.setdefault(line.words, line)
    return list(found.values())


def _line(entry: Mapping[str, object], work: Path) -> Line | None:
    """The command line of a record, on the folder as it is called now; None for what is no record of one."""
    command, words, environment = (entry.get(name) for name in ("command", "arguments", "environment"))
    if not isinstance(command, str) or not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before != "--work" and word != "--work" and not word.startswith("--work=")
    ]
    texts = environment.items() if isinstance(environment, dict) else ()
    known = {str(name): str(value) for name, value in texts if str(name).startswith("FEATCACHE_")}
    folder = entry.get("folder")
    return Line((command, *kept, "--work", str(work.absolute())), known, folder if isinstance(folder, str) else "")


def run_again(lines: Sequence[Line]) -> int:
    """Run command lines one after the other, each in a process of its own. The exit code of the first that fails.

    A line is run in its folder, for its paths may be relative, or in the present one where that is gone.
    """
    for line in lines:
        say(f"again: {' '.join(line.words)}")
        words = [sys.executable, "-m", "featcache", *line.words]
        folder = line.folder if os.path.isdir(line.folder) else None
        paths = os.pathsep.join(filter(None, [str(Path(featcache.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, **line.environment, "PYTHONPATH": paths}  # in another folder it must be found, too
        done = subprocess.run(words, env=variables, cwd=folder, check=False)
        if done.returncode:
            return done.returncode
    return 0
