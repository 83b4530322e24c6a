"""What was run: the journal, learning curves of checkpoints, and the keys of models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.backbone.checkpoint import Checkpoint, list_checkpoints
from featcache.errors import CheckpointError
from featcache.machine.journal import read
from featcache.machine.progress import say, size_of
from featcache.workdir import Workdir
from heads.blend.models import Model

Curve = tuple[Sequence[float], int | None]  # score of each epoch, and the epoch that is kept
_STAGES = {"pretrain": "stage 1, all subjects together", "finetune": "stage 2, each subject alone"}
_MOST_RUNS = 200  # of the journal, the latest


@dataclass(frozen=True)
class Stage:
    """Learning curves of one stage: {label: curves}, a fold of stage 1 or a subject of stage 2 to each label."""

    name: str
    meaning: str
    curves: Mapping[str, Sequence[Curve]]
    n_unfinished: int


@dataclass(frozen=True)
class Run:
    """One command of the journal, as the page says it."""

    began: str
    line: str
    seconds: float
    memory: str
    device: str
    code: int
    wrote: Sequence[str]
    versions: str


def stages(work: Path) -> list[Stage]:
    """Learning curves of the trainings in a work folder; none where nothing was trained."""
    try:
        checkpoints = list_checkpoints(work)
    except CheckpointError as error:
        say(f"no learning curves: {error}")
        return []
    found = []
    for name, meaning in _STAGES.items():
        own = [one for one in checkpoints if one.key.stage == name and one.facts.scores]
        curves: dict[str, list[Curve]] = {}
        for one in own:
            curves.setdefault(_label(one), []).append((one.facts.scores, one.facts.epoch))
        if own:
            found.append(Stage(name, meaning, curves, sum(not one.finished for one in own)))
    return found


def _label(checkpoint: Checkpoint) -> str:
    if checkpoint.key.stage == "pretrain":
        return f"{checkpoint.key.backbone.name}, fold {checkpoint.fold}"
    return ", ".join(checkpoint.key.subjects)


def runs(work: Path) -> list[Run]:
    """The latest commands that wrote to a work folder, oldest first."""
    return [_run(record) for record in read(Workdir(work).journal)[-_MOST_RUNS:]]


def _run(record: Mapping[str, Any]) -> Run:
    """A record of any version; what it lacks is left empty."""
    environment, versions = record.get("environment", {}), record.get("versions", {})
    words = [f"{name}={value}" for name, value in environment.items()]
    peak, device_peak = record.get("peak_memory", 0), record.get("peak_device_memory", 0)
    memory = size_of(peak) + (f", {size_of(device_peak)} of the device" if device_peak else "")
    return Run(
        began=str(record.get("began", "")).removesuffix("+00:00").replace("T", " "),
        line=" ".join([*words, str(record.get("command", "")), *map(str, record.get("arguments", ()))]),
        seconds=float(record.get("seconds", 0)),
        memory=memory if peak else "",
        device=str(record.get("device", "")),
        code=int(record.get("exit", 0)),
        wrote=list(record.get("wrote", ())),
        versions=", ".join(f"{name} {value}" for name, value in versions.items()),
    )


def keys(models: Sequence[Model]) -> dict[str, tuple[list[str], str]]:
    """{model: (names of its prediction stores, key of the first as JSON)}."""
    found: dict[str, tuple[list[str], str]] = {}
    for model in models:
        names, _ = found.setdefault(model.name, ([], json.dumps(model.key.to_json(), indent=1, sort_keys=True)))
        names.append(model.store.name)
    return found
