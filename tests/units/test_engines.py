"""Engines start workers in other processes: the same files as in one, whoever is killed, and an end when told so."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import cli
from featcache.errors import ConfigError
from featcache.machine.leases import Leases
from featcache.workdir import Workdir
from heads.config import EngineConfig
from heads.units import engines as module
from heads.units.engines import Local, Processes, SlurmJobs, WorkerLostError, opened

RECIPE = """
[options]
backbone = "test_resnet"
weights = "none"
size = 32

[[steps]]
run = "extract"
layers = "pooled,layer2"

[[steps]]
run = "fit-heads"
folds = 3
loss = "mnnpc"

[[steps]]
run = "fit-heads"
folds = 3
loss = "smooth_l1"
epochs = 2

[[steps]]
run = "blend"
method = "uniform"
"""
PATIENCE = 120
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """{file: its bytes} of what one process makes of the recipe: one of its own, without what tests make quicker."""
    folder = tmp_path_factory.mktemp("alone")
    path = folder / "recipe.toml"
    path.write_text(RECIPE)
    _in_a_process(line(path, tiny, folder / "work", "--quiet"))
    return contents(folder / "work")


def _in_a_process(words):
    """Run a command line that must succeed; what it prints on stdout."""
    ended = subprocess.run([sys.executable, "cli.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def contents(work):
    """Bytes of what a recipe makes, but for headers of safetensors, whose order the library leaves to chance."""
    return {
        path.relative_to(work): path.read_bytes()
        for folder in ("features.zarr", "predictions.zarr", "submission")
        for path in (work / folder).rglob("*")
        if path.is_file() and path.suffix not in (".safetensors", ".lock") and path.name != "files.json"
    }


def line(recipe, tiny, work, *more):
    return ["run", str(recipe), "--data", str(tiny), "--work", str(work), *more]


def held(work):
    """Processes that hold a unit."""
    found = []
    for path in Workdir(work).units.glob("*.lease"):
        with suppress(OSError, ValueError, LookupError):
            found.append(json.loads(path.read_bytes().splitlines()[0])["process"])
    return found


def wait_until(holds):
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_one_worker_makes_the_same(alone, recipe, tiny, tmp_path):
    result = json.loads(
        _in_a_process(line(recipe, tiny, tmp_path / "work", "--engine", "here", "--json")).splitlines()[-1]
    )
    assert contents(tmp_path / "work") == alone
    assert result["units"] == 2 + 4 + 1 and result["again"] == 0
    assert [one["command"] for one in result["steps"]] == ["extract", "fit-heads", "fit-heads", "blend"]
    assert [len(one.get("stores", ())) for one in result["steps"]] == [2, 2, 2, 0]


def test_two_local_workers_make_the_same_though_one_is_killed(alone, recipe, tiny, tmp_path, capfd):
    work, killed = tmp_path / "work", []

    def kill_one():
        wait_until(lambda: set(held(work)) - {os.getpid()})
        killed.append(next(iter(set(held(work)) - {os.getpid()})))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    code = cli.run(line(recipe, tiny, work, "--engine", "local", "--workers", "2"))
    killer.join()
    said = capfd.readouterr().err
    assert code == 0 and killed
    assert "a worker ended early: a worker ended with code -9" in said
    assert contents(work) == alone


def test_a_second_start_beside_the_first_shares_its_work(alone, recipe, tiny, tmp_path):
    work = tmp_path / "work"
    words = [sys.executable, "cli.py", *line(recipe, tiny, work, "--engine", "here", "--json")]
    both = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [one.communicate(timeout=PATIENCE)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert contents(work) == alone
    messages = [out.splitlines()[-2] for out in ended]
    here = [int(message.split(" units, ")[1].split(" of them here")[0]) for message in messages]
    assert sum(here) == 2 + 4 + 1  # each once


@pytest.mark.parametrize("interrupt", ["cancel", "leave"])
def test_an_interruption_ends_the_workers_or_leaves_them(recipe, tiny, tmp_path, interrupt):
    work = tmp_path / "work"
    words = line(recipe, tiny, work, "--engine", "local", "--workers", "1", "--interrupt", interrupt)
    driver = subprocess.Popen([sys.executable, "cli.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: held(work))
    (worker,) = set(held(work))
    driver.send_signal(signal.SIGINT)
    assert driver.communicate(timeout=PATIENCE)[1].splitlines()[-1].startswith("error: interrupted")
    assert driver.returncode == 130
    if interrupt == "leave":
        wait_until(lambda: (work / "submission" / "files.json").exists())
    wait_until(lambda: not is_running(worker))
    assert all(not state.held for state in Leases(Workdir(work).units).states().values())
    assert (work / "submission").exists() is (interrupt == "leave")


def is_running(process):
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_dask_makes_the_same(alone, recipe, tiny, tmp_path):
    distributed = pytest.importorskip("distributed")
    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**settings, silence_logs=50) as cluster:
        words = line(recipe, tiny, tmp_path / "work", "--engine", "dask", "--scheduler", cluster.scheduler_address)
        assert cli.run(words) == 0
    assert contents(tmp_path / "work") == alone


def test_submitit_makes_the_same_though_a_worker_is_killed(alone, recipe, tiny, tmp_path):
    pytest.importorskip("submitit")
    work = tmp_path / "work"

    def kill_one():
        wait_until(lambda: set(held(work)) - {os.getpid()})
        os.kill(next(iter(set(held(work)) - {os.getpid()})), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    words = ("--engine", "submitit", "--cluster", "local", "--workers", "2")
    assert cli.run(line(recipe, tiny, work, *words)) == 0
    killer.join()
    assert contents(work) == alone


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--engine", "dask"), "--scheduler with the address of a running Dask scheduler"),
        (("--engine", "dask", "--scheduler", "tcp://127.0.0.1:9"), "expected a running Dask scheduler"),
        (("--engine", "slurm"), "expected one of here, local, submitit, dask; found 'slurm'"),
        (("--partition", "gpu"), "--partition: expected --engine with it; found none"),
        (("--workers", "3"), "--workers: expected --engine with it; found none"),
        (("--engine", "submitit", "--time", "long"), "--time: expected such as 90min, 8h or 2d; found 'long'"),
        (("--engine", "submitit", "--slurm", "qos"), "--slurm: expected NAME=VALUE; found 'qos'"),
        (("--engine", "local", "--attempts", "0"), "--attempts: expected 1 or more; found 0"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(recipe, tiny, tmp_path, capfd, monkeypatch, words, found):
    pytest.importorskip("distributed")
    monkeypatch.setattr(module, "_DASK_SECONDS", 1)
    assert cli.run(line(recipe, tiny, tmp_path / "work", *words)) == 1
    lines = [one for one in capfd.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(lines) == 1 and found in lines[0]


def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'featcache\[cluster\]'"),
        opened(EngineConfig(engine="submitit"), 1, tmp_path),
    ):
        pass


def test_workers_that_cannot_start_end_it_with_their_own_error(recipe, tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    assert cli.run(line(recipe, tiny, tmp_path / "work", "--engine", "local", "--workers", "2")) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: --engine local: expected workers that do a unit; found 10 that ended before they did"
    )
    assert "code 1" in last


def test_each_gpu_has_a_worker_and_cores_are_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    engine = Local(EngineConfig(engine="local"), 0, tmp_path)
    shares = [module._share(number, engine.n_workers, 2) for number in range(2)]
    assert engine.n_workers == 2
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["5", "7"]
    assert [share["OMP_NUM_THREADS"] for share in shares] == ["4", "4"]


def test_a_process_that_fails_says_where_its_words_are(tmp_path):
    executor = Processes(tmp_path / "logs", [{}])
    future = executor.submit(json.dumps, {"orders": 1})  # its module prints JSON of stdin, and is `python -m json`
    with pytest.raises(WorkerLostError, match=r"ended with code 1; .*-0\.log has what it printed"):
        future.result(PATIENCE)
    assert "No module named json.__main__" in next((tmp_path / "logs").iterdir()).read_text()


class Job:
    """What submitit says of one job."""

    def __init__(self, number, folder):
        self.job_id, self.cancelled = number, False
        self.paths = type("Paths", (), {"result_pickle": folder / f"{number}.pkl", "stderr": folder / f"{number}.err"})

    def result(self):
        return {"done": 3}

    def cancel(self, check):
        self.cancelled = True


class Jobs:
    """submitit's executor, without SLURM."""

    def __init__(self, folder):
        self.folder, self.jobs = folder, []

    def batch(self):
        from contextlib import nullcontext

        return nullcontext()

    def submit(self, fn, *arguments):
        self.jobs.append(Job(f"7_{len(self.jobs)}", self.folder))
        return self.jobs[-1]


def test_jobs_of_a_slurm_without_accounting_are_watched_in_its_queue(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_POLL", 0.01)
    monkeypatch.setattr(module, "_GONE_FROM_QUEUE", 0.05)
    queue = {"7_0", "7_1", "7_2"}
    executor = SlurmJobs(Jobs(tmp_path), lambda jobs: set(queue))
    futures = executor.submit_all(print, [(1,), (2,), (3,)])
    (tmp_path / "7_0.pkl").touch()
    assert futures[0].result(PATIENCE) == {"done": 3}
    queue.discard("7_1")
    with pytest.raises(WorkerLostError, match="job 7_1 left the queue without an answer"):
        futures[1].result(PATIENCE)
    assert not futures[2].done()
    executor.end()
    assert executor._jobs.jobs[2].cancelled and not executor._jobs.jobs[0].cancelled


def test_a_queue_that_does_not_answer_loses_no_job(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_POLL", 0.01)
    monkeypatch.setattr(module, "_GONE_FROM_QUEUE", 0.05)
    executor = SlurmJobs(Jobs(tmp_path), lambda jobs: None)
    future = executor.submit(print, 1)
    time.sleep(0.3)
    assert not future.done()
    (tmp_path / "7_0.pkl").touch()
    assert future.result(PATIENCE) == {"done": 3}
