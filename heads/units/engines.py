"""Engines that start workers: thin adapters, behind `concurrent.futures.Executor`, of what labs already run.

An engine starts a function in other processes, tells when it has ended, and ends it. Which units a worker does is no
concern of it. A new engine is one class here and an entry in ENGINES.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which
from typing import Any, Protocol

import torch

from featcache.errors import ConfigError, first_line
from featcache.machine.extra import needed
from heads.config import EngineConfig
from heads.units.torchrun import python_path

_POLL = 2.0  # seconds between two looks at jobs
_GONE_FROM_QUEUE = 10.0  # seconds after which a job that is not in the queue, and left no answer, is lost
_DASK_SECONDS = 20  # in which a scheduler has to answer
_LOCAL = 2  # workers of a machine without GPUs, where the user does not say
_CLUSTER = 4  # SLURM jobs, where the user does not say

Work = Callable[[dict[str, Any]], dict[str, Any]]  # what a worker does: orders -> what it did; see heads/commands


class WorkerLostError(Exception):
    """A worker ended without an answer."""


class Engine(Protocol):
    """Starts workers, by an executor of the library that it stands for.

    address : where its workers can be watched, in words
    n_workers : how many there may be
    """

    @property
    def address(self) -> str: ...

    @property
    def n_workers(self) -> int: ...

    @property
    def trouble(self) -> str:
        """Why no worker can start now, in words; '' where one can."""

    def start(self, work: Work, orders: dict[str, Any], n: int) -> list[Future[Any]]:
        """Start so many workers, each of which calls `work(orders)`."""

    def leave(self) -> None:
        """Let workers go on when this process ends."""

    def cancel(self) -> None:
        """End all workers."""

    def close(self) -> None:
        """Let go of the engine, whose workers have ended or are about to."""


class Processes(Executor):
    """Each call in a process of its own, `python -m MODULE`, which takes its argument as JSON on stdin.

    The function must be of a module that calls it so. logs : folder of what processes print
    """

    def __init__(self, logs: Path, environments: Sequence[Mapping[str, str]]) -> None:
        self._logs, self._environments = logs, environments
        self._running: dict[Future[Any], tuple[subprocess.Popen[bytes], int]] = {}
        self._lock = threading.Lock()
        logs.mkdir(parents=True, exist_ok=True)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start the process; the future ends with it."""
        with self._lock:
            taken = {place for _, place in self._running.values()}
            place = next(n for n in range(len(taken) + 1) if n not in taken)
            log = self._logs / f"{os.uname().nodename}-{os.getpid()}-{place}.log"
            environment = {**os.environ, **self._environments[place % len(self._environments)]}
            with log.open("ab") as out:
                process = subprocess.Popen(
                    [sys.executable, "-m", fn.__module__],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for this process to pass on
                )
            future: Future[Any] = Future()
            future.set_running_or_notify_cancel()
            self._running[future] = process, place
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(args[0]).encode())
            process.stdin.close()
        threading.Thread(target=self._wait, args=(future, process, log), daemon=True).start()
        return future

    def _wait(self, future: Future[Any], process: subprocess.Popen[bytes], log: Path) -> None:
        code = process.wait()
        with self._lock:
            self._running.pop(future)
        if code:
            future.set_exception(WorkerLostError(f"a worker ended with code {code}; {log} has what it printed"))
        else:
            future.set_result({})

    def end(self) -> None:
        """Ask all processes to end, and end those that do not within a few seconds."""
        with self._lock:
            processes = [process for process, _ in self._running.values()]
        for process in processes:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 10
        for process in processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()

    @property
    def processes(self) -> list[int]:
        """Numbers of the processes that run."""
        with self._lock:
            return [process.pid for process, _ in self._running.values()]


class Local:
    """Workers on this machine: one for each GPU, or with a share of the cores each."""

    trouble = ""

    def __init__(self, config: EngineConfig, n_workers: int, logs: Path) -> None:
        n_gpus = torch.cuda.device_count()
        self.n_workers = n_workers or n_gpus or _LOCAL
        shares = [_share(number, self.n_workers, n_gpus) for number in range(self.n_workers)]
        self.executor = Processes(logs, shares)
        self.address = f"what they print is in {logs}"

    def start(self, work: Work, orders: dict[str, Any], n: int) -> list[Future[Any]]:
        """Start so many processes."""
        return [self.executor.submit(work, orders) for _ in range(n)]

    def leave(self) -> None:
        """Let them go on: they are in sessions of their own."""

    close = leave

    def cancel(self) -> None:
        """End them."""
        self.executor.end()


def _share(number: int, n_workers: int, n_gpus: int) -> dict[str, str]:
    """The environment of one of several workers: its GPU, and its part of the cores unless the user gave one."""
    share = {"PYTHONPATH": python_path()}
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // n_workers, 1))
    if n_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
        share["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % n_gpus]
    return share


class SlurmJobs(Executor):
    """SLURM jobs as futures.

    jobs : submitit's executor
    queued : (jobs) -> numbers of those that wait or run. Accounting, which submitit asks, is not kept by every SLURM
    """

    def __init__(self, jobs: Any, queued: Callable[[Sequence[Any]], set[str] | None]) -> None:
        self._jobs, self._queued = jobs, queued
        logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns of accounting that is not kept
        self._running: dict[Future[Any], Any] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue one job."""
        return self.submit_all(fn, [args])[0]

    def submit_all(self, fn: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Future[Any]]:
        """Queue several jobs as one array."""
        try:
            with self._jobs.batch():
                jobs = [self._jobs.submit(fn, *one) for one in arguments]
        except (RuntimeError, OSError) as error:  # of sbatch, whose own words these are
            raise ConfigError(
                "--engine submitit",
                expected="sbatch to take the jobs",
                found=first_line(error),
                remedy="correct --partition, --gpus, --time or --slurm, or ask who runs the cluster",
            ) from error
        futures: list[Future[Any]] = [Future() for _ in jobs]
        for future in futures:
            future.set_running_or_notify_cancel()
        with self._lock:
            self._running |= dict(zip(futures, jobs, strict=True))
        return futures

    def end(self) -> None:
        """Cancel all jobs."""
        with self._lock:
            jobs = list(self._running.values())
        for job in jobs:
            job.cancel(check=False)

    @property
    def names(self) -> list[str]:
        """Numbers of the jobs that are queued or run."""
        with self._lock:
            return [str(job.job_id) for job in self._running.values()]

    def _watch(self) -> None:
        absent: dict[Future[Any], int] = {}  # how often in a row a job was not in the queue
        while True:
            time.sleep(_POLL)
            with self._lock:
                jobs = list(self._running.items())
            queue = self._queued([job for _, job in jobs]) if jobs else set()
            for future, job in jobs:
                there = job.paths.result_pickle.exists()
                absent[future] = 0 if there or queue is None or str(job.job_id) in queue else absent.get(future, 0) + 1
                if there or absent[future] * _POLL > _GONE_FROM_QUEUE:
                    with self._lock:
                        self._running.pop(future)
                    self._end(future, job, there)

    def _end(self, future: Future[Any], job: Any, answered: bool) -> None:
        if not answered:
            future.set_exception(
                WorkerLostError(f"job {job.job_id} left the queue without an answer; {job.paths.stderr}")
            )
            return
        try:
            future.set_result(job.result())
        except Exception as error:
            future.set_exception(WorkerLostError(f"job {job.job_id}: {first_line(error)}; {job.paths.stderr}"))


def queued_by_slurm(_jobs: Sequence[Any]) -> set[str] | None:
    """Numbers of the user's jobs that wait or run; None where SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(asked.stdout.split())


def running_here(jobs: Sequence[Any]) -> set[str]:
    """Numbers of those jobs, processes of this machine, that have not ended."""
    return {str(job.job_id) for job in jobs if not job.done()}


class Submitit:
    """SLURM jobs, by submitit; where there is no SLURM, its own processes of this machine, as a rehearsal."""

    trouble = ""

    def __init__(self, config: EngineConfig, n_workers: int, logs: Path) -> None:
        submitit = needed("submitit", "--engine submitit", "cluster")
        slurm = which("sbatch") is not None if config.cluster == "auto" else config.cluster == "slurm"
        os.environ["PYTHONPATH"] = python_path()
        jobs = submitit.AutoExecutor(folder=logs / "%j", cluster="slurm" if slurm else "local")
        settings: dict[str, Any] = {"timeout_min": config.minutes, "name": "featcache"}
        if slurm:
            settings |= {"slurm_partition": config.partition} if config.partition else {}
            settings |= {"nodes": config.nodes, "tasks_per_node": 1}
            settings |= {"gpus_per_node": config.gpus} if config.gpus else {}
            settings |= {"cpus_per_task": config.cpus} if config.cpus else {}
            settings |= {"mem_gb": config.memory} if config.memory else {}
            settings["slurm_additional_parameters"] = config.sbatch
            settings["slurm_array_parallelism"] = n_workers or _CLUSTER
        try:
            jobs.update_parameters(**settings)
        except (TypeError, ValueError, NameError) as error:
            raise ConfigError(
                "--engine submitit", expected="options that it takes", found=first_line(error), remedy="correct them"
            ) from error
        self.n_workers = n_workers or _CLUSTER
        self.executor = SlurmJobs(jobs, queued_by_slurm if slurm else running_here)
        where = "jobs of SLURM" if slurm else "processes of this machine, as a rehearsal for SLURM"
        self.address = f"{where}; what they print is in {logs}"

    def start(self, work: Work, orders: dict[str, Any], n: int) -> list[Future[Any]]:
        """Queue so many jobs, as one array."""
        return self.executor.submit_all(work, [(orders,)] * n)

    def leave(self) -> None:
        """Let them go on: they are SLURM's."""

    close = leave

    def cancel(self) -> None:
        """Cancel the jobs."""
        self.executor.end()


class Dask:
    """Workers of a running Dask cluster, one task for each."""

    def __init__(self, config: EngineConfig, n_workers: int, logs: Path) -> None:
        distributed = needed("distributed", "--engine dask", "cluster")
        scheduler = str(config.scheduler)
        file = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
        try:
            self._client = distributed.Client(**file, timeout=_DASK_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise ConfigError(
                f"--scheduler {scheduler}",
                expected="a running Dask scheduler",
                found=first_line(error),
                remedy="start one with 'dask scheduler', and workers with 'dask worker'",
            ) from error
        self._distributed = distributed
        self.n_workers = n_workers or max(len(self._client.scheduler_info(n_workers=-1)["workers"]), 1)
        self.executor = self._client.get_executor(pure=False)
        self.address = f"dashboard: {self._client.dashboard_link}"

    @property
    def trouble(self) -> str:
        """Why no worker can start now, in words; '' where one can."""
        there = self._client.scheduler_info(n_workers=-1)["workers"]
        return "" if there else "the Dask cluster has no workers; waits for some"

    def start(self, work: Work, orders: dict[str, Any], n: int) -> list[Future[Any]]:
        """Start so many tasks."""
        return [self.executor.submit(work, orders) for _ in range(n)]

    def leave(self) -> None:
        """Let the tasks go on, although nobody waits for them."""
        self._distributed.fire_and_forget(self._tasks())

    def cancel(self) -> None:
        """Cancel the tasks; one that runs ends after its unit."""
        self._client.cancel(self._tasks(), force=True)
        self.close()

    def close(self) -> None:
        """Leave the cluster."""
        self._client.close(timeout=5)

    def _tasks(self) -> list[Any]:
        return [self._distributed.Future(key, client=self._client) for key in list(self._client.futures)]


ENGINES: Mapping[str, Callable[[EngineConfig, int, Path], Engine]] = {
    "local": Local,
    "submitit": Submitit,
    "dask": Dask,
}


@contextmanager
def opened(config: EngineConfig, n_workers: int, logs: Path) -> Iterator[Engine]:
    """The engine of these settings, whose workers end with the block unless it is interrupted and they are left."""
    engine = ENGINES[str(config.engine)](config, n_workers, logs)
    try:
        yield engine
        engine.close()
    except KeyboardInterrupt:
        engine.cancel() if config.interrupt == "cancel" else engine.leave()
        raise
    except BaseException:
        engine.cancel()
        raise
