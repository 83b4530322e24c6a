"""Where the pieces of a command are done: in this process, in others of this machine, or on a cluster."""

import re
from dataclasses import dataclass

from featcache.config import at_least, one_of, option
from featcache.errors import ConfigError

ENGINES = ("here", "local", "submitit", "dask")
CLUSTERS = ("auto", "slurm", "local")
INTERRUPTS = ("cancel", "leave")
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(d|h|m|min)?")
_MINUTES = {"d": 1440, "h": 60, "m": 1, "min": 1, None: 1}
ENGINE_PANEL = "Cluster"  # of options, in --help


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where pieces are done, by how many workers, and how long a silent one is waited for."""

    engine: str | None = option(
        None,
        "Who does the work, piece by piece. here: this process, beside any others that run the same line. local: "
        "processes of this machine. submitit: SLURM jobs. dask: the workers of a Dask cluster. If it is not given, "
        "this process does all of it, as a whole.",
        ENGINE_PANEL,
    )
    scheduler: str | None = option(
        None, "Of --engine dask: address of the scheduler, tcp://HOST:PORT, or a scheduler file.", ENGINE_PANEL
    )
    cluster: str = option(
        "auto",
        "Of --engine submitit: slurm; or local, processes of this machine, as a rehearsal. auto: slurm where there is "
        "sbatch.",
        ENGINE_PANEL,
    )
    partition: str | None = option(None, "Of --engine submitit: SLURM partition.", ENGINE_PANEL)
    nodes: int = option(
        1,
        "Of --engine submitit: machines of each job. A training takes all of them; other units take the first.",
        ENGINE_PANEL,
    )
    gpus: int = option(
        0, "Of --engine submitit: GPUs of each job, on each machine. A training takes all of them.", ENGINE_PANEL
    )
    processes: int = option(
        0,
        "Processes that train one backbone together, on each machine, by torchrun. 0: one for each of --gpus.",
        ENGINE_PANEL,
    )
    cpus: int = option(0, "Of --engine submitit: cores of each job; 0: as SLURM gives them.", ENGINE_PANEL)
    memory: float = option(
        0.0, "Of --engine submitit: main memory of each job, in 10^9 bytes; 0: as SLURM gives it.", ENGINE_PANEL
    )
    time: str = option("8h", "Of --engine submitit: longest time of a job, which is then queued again.", ENGINE_PANEL)
    slurm: tuple[str, ...] = option((), "Of --engine submitit: further options of sbatch, NAME=VALUE.", ENGINE_PANEL)
    attempts: int = option(3, "How often a piece is tried, by other workers where there are some.", ENGINE_PANEL)
    lost_after: float = option(
        120.0, "Seconds without a sign of life after which a worker of another machine is taken for lost.", ENGINE_PANEL
    )
    workers: int = 0  # processes; 0: as the engine has them
    interrupt: str = option(
        "cancel", "What Ctrl-C does to the workers. cancel: end them. leave: let them go on.", ENGINE_PANEL
    )

    def __post_init__(self) -> None:
        if self.engine is not None:
            one_of("engine", self.engine, ENGINES)
        one_of("cluster", self.cluster, CLUSTERS)
        one_of("interrupt", self.interrupt, INTERRUPTS)
        at_least("attempts", self.attempts, 1)
        at_least("workers", self.workers, 0)
        at_least("nodes", self.nodes, 1)
        at_least("processes", self.processes, 0)
        at_least("gpus", self.gpus, 0)
        at_least("cpus", self.cpus, 0)
        at_least("memory", self.memory, 0)
        at_least("lost-after", self.lost_after, 1)
        _ = self.minutes
        _ = self.sbatch
        if self.engine == "dask" and not self.scheduler:
            raise ConfigError(
                "--engine dask",
                expected="--scheduler with the address of a running Dask scheduler",
                found="none",
                remedy="add it, such as --scheduler tcp://HOST:8786",
            )

    @property
    def minutes(self) -> int:
        """The longest time of a SLURM job. Raises ConfigError."""
        parts = _TIME.fullmatch(self.time.strip())
        minutes = float(parts[1]) * _MINUTES[parts[2]] if parts else 0
        if minutes < 1:
            raise ConfigError("--time", expected="such as 90min, 8h or 2d", found=repr(self.time), remedy="correct it")
        return round(minutes)

    @property
    def sbatch(self) -> dict[str, str]:
        """{option of sbatch: its value} of `slurm`. Raises ConfigError."""
        pairs = [one.partition("=") for one in self.slurm]
        for name, sign, _ in pairs:
            if not name or not sign:
                raise ConfigError("--slurm", expected="NAME=VALUE", found=repr(name + sign), remedy="correct it")
        return {name.lstrip("-").replace("-", "_"): value for name, _, value in pairs}
