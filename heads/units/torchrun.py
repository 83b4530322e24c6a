"""Units of training on several devices, of one machine or of several: each is a command line under torchrun."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from featcache.errors import StoreError
from featcache.machine.documents import DocumentError, parse_json
from heads.recipes.jobs import Outcome

ROOT = Path(__file__).parents[2]
COMMANDS = ("pretrain", "finetune")  # that torchrun can start
_PORTS = range(29400, 30400)


@dataclass(frozen=True)
class Devices:
    """The devices that train one backbone together.

    nodes : machines, of the SLURM job that this process is in
    processes : on each machine, one a device
    """

    nodes: int = 1
    processes: int = 1

    @property
    def several(self) -> bool:
        """Whether torchrun is needed."""
        return self.nodes * self.processes > 1

    def train(self, unit: str, words: Sequence[str]) -> Outcome:
        """Train by a command line, `pretrain ...` or `finetune ...`, on all of these devices; its outcome.

        Raises StoreError, with the line that it ends with, where it fails.
        """
        line = [*self._launcher(unit), "-m", "featcache", *words, "--json"]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        with subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            with ThreadPoolExecutor(2) as readers:  # both, or the one that is not read would fill up
                out, err = readers.map(_passed_on, (process.stdout, process.stderr), (sys.stdout, sys.stderr))
        try:
            result = parse_json(out[-1]) if out else None
        except DocumentError:
            result = None
        if process.returncode or not isinstance(result, dict):
            faults = [one.removeprefix("error: ") for one in err if one.startswith("error: ")]
            raise StoreError(
                f"{words[0]} by {self.nodes * self.processes} processes",
                expected="that they train",
                found=faults[0] if faults else f"exit code {process.returncode}",
                remedy="see what they printed",
            )
        return Outcome(out[-2] if len(out) > 1 else "", result)

    def _launcher(self, unit: str) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={self.processes}"]
        if self.nodes == 1:
            return [*torchrun, "--standalone"]
        port = _PORTS[int(unit, 16) % len(_PORTS)]
        place = ["--rdzv-backend=c10d", f"--rdzv-endpoint={socket.gethostname()}:{port}", f"--rdzv-id={unit}"]
        srun = ["srun", "--overlap", f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1"]
        return [*srun, *torchrun, f"--nnodes={self.nodes}", *place]


ONE_DEVICE = Devices()


def _passed_on(source: IO[str], to: IO[str]) -> list[str]:
    """The lines that a process prints, which are printed here too."""
    lines = []
    for line in source:
        to.write(line)
        lines.append(line.rstrip())
    return lines


def python_path() -> str:
    """PYTHONPATH of processes that are started, in which they find this program, if it is not installed."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
