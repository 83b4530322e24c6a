"""What the speed benchmarks share: ratios within one process, peak memory, and one form for their results.

A benchmark is a script that takes --quick and prints, as the last line of its stdout, a JSON list of Figures.
benchmarks/suite.py runs them one after the other and writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Figure:
    """One line of the page.

    what, against : what was measured, and what it was compared with
    ratio : a number of one run; None where something could not run, and `note` says why
    target : what the ratio should reach, or None for a figure that only informs
    at_most : whether the ratio should be at most the target; else at least
    details : sizes, seconds, memory, versions: whatever makes the ratio checkable
    """

    what: str
    against: str
    ratio: float | None
    target: float | None = None
    at_most: bool = True
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = 3) -> tuple[float, float, float]:
    """Median seconds of both and the median of the rounds' ratios ours / theirs, taken in turn: both meet one load."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return median(p[0] for p in pairs), median(p[1] for p in pairs), median(p[0] / p[1] for p in pairs)


def peak_gb() -> float:
    """The most memory that this process has had, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def options(description: str | None, **defaults: tuple[Any, Any]) -> argparse.Namespace:
    """Sizes, or names, from the command line: {name: (whole, quick)}; `quick` is among the result's attributes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    for name, (whole, quick) in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(whole), help=f"[{whole}; quick {quick}]")
    given = parser.parse_args()
    for name, sizes in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, sizes[given.quick])
    return given


def report(figures: Sequence[Figure]) -> None:
    """A line each for a person, then the JSON."""
    for one in figures:
        aim = "" if one.target is None else f" (aim: at {'most' if one.at_most else 'least'} {one.target:g})"
        print(f"{one.what}, against {one.against}: {one.note if one.ratio is None else f'{one.ratio:.3g}'}{aim}")
    print(json.dumps([asdict(one) for one in figures]))
