"""Jobs are done here, and each leaves a record in the journal of its work folder."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featcache import __version__
from featcache.errors import StoreError
from featcache.machine.journal import append
from featcache.machine.memory import forget_peak, peak_memory
from featcache.workdir import Workdir
from heads.recipes.jobs import Job, Outcome

_LIBRARIES = ("torch", "timm", "numpy")
INTERRUPTED = 130  # exit code


def do(job: Job) -> Outcome:
    """Run a command, and record it whether it succeeds or not. Of several processes, the first records.

    Raises StoreError where the work folder was taken away meanwhile: what was made is then of a folder without what
    was there, such as features of a backbone whose training was no longer seen.
    """
    if job.work is None or os.environ.get("RANK", "0") != "0":
        return job.call()
    forget_peak()
    began, clock = datetime.now(UTC), time.perf_counter()
    outcome, code, folder = None, 1, _number(job.work)
    try:
        outcome = job.call()
        if folder not in (None, _number(job.work)):
            raise StoreError(
                job.work,
                expected="the folder that was there when the command began",
                found="another one" if job.work.is_dir() else "none",
                remedy="see to its disk, and run the command again",
            )
        code = outcome.code
        return outcome
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    finally:
        if job.work.is_dir():  # a mistake in the options makes no work folder
            wrote = _written(outcome.result) if outcome else []
            append(Workdir(job.work).journal, _record(job, began, time.perf_counter() - clock, code, wrote))


def note(job: Job, seconds: float, result: Mapping[str, Any]) -> None:
    """Record in the journal that the parts of a command were done, by whichever processes. result : of all of them"""
    if job.work is not None and job.work.is_dir():
        append(Workdir(job.work).journal, _record(job, datetime.now(UTC), seconds, 0, _written(result)))


def _number(folder: Path) -> int | None:
    """What the file system knows a folder by, which a new one of the same name does not have; None for no folder."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _record(job: Job, began: datetime, seconds: float, code: int, wrote: list[str]) -> dict[str, Any]:
    """What docs/formats.md says of a record."""
    return {
        "command": job.line[0] if job.line else "",
        "arguments": list(job.line[1:]),
        "folder": os.getcwd(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FEATCACHE_")},
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "peak_memory": peak_memory(),
        "exit": code,
        "wrote": wrote,
        "versions": _versions(),
    } | _device(job)


def _written(result: Mapping[str, Any]) -> list[str]:
    """Names of the stores or checkpoints of an outcome, which end in the fingerprint of their key."""
    return [Path(one["path"]).name for kind in ("stores", "checkpoints") for one in result.get(kind, ())]


def _versions() -> dict[str, str]:
    versions = {"featcache": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _device(job: Job) -> dict[str, Any]:
    """Where a command computed; of a GPU, its name and the most of its memory that was taken."""
    device = getattr(job.config, "device", None)
    torch = sys.modules.get("torch")  # not loaded for the sake of a record
    if device is None or torch is None:
        return {} if device is None else {"device": device}
    if device == "cpu" or not torch.cuda.is_available():
        return {"device": "cpu"}
    return {"device": torch.cuda.get_device_name(), "peak_device_memory": torch.cuda.max_memory_allocated()}
