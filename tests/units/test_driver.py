"""The process that starts workers and watches: it keeps as many as there is work for, and says what happens."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from featcache.errors import ConfigError
from heads.config import EngineConfig
from heads.units import driver as module
from heads.units import worker as worker_module
from heads.units.course import Course, Ended, Look
from heads.units.driver import described, drive
from heads.units.units import phases_of
from heads.units.worker import Worker
from support.steps import parted, whole

LOCAL = EngineConfig(engine="local")
TWO = {"a": ("subj01",), "b": ("subj02",)}


class Threads:
    """An engine whose workers are threads of this process."""

    def __init__(self, config, n_workers, logs):
        self.n_workers, self.address, self.trouble = n_workers, "dashboard: nowhere", ""
        self.executor = ThreadPoolExecutor(8)
        self.ended = []

    def start(self, work, orders, n):
        return [self.executor.submit(work, orders) for _ in range(n)]

    def leave(self):
        self.ended.append("left")

    def cancel(self):
        self.ended.append("cancelled")

    def close(self):
        self.ended.append("closed")
        self.executor.shutdown()


@pytest.fixture
def engines(monkeypatch):
    opened = []

    def make(*settings):
        opened.append(Threads(*settings))
        return opened[-1]

    monkeypatch.setattr("heads.units.engines.ENGINES", {"local": make})
    monkeypatch.setattr(worker_module, "_one_at_a_time", threading.Semaphore(8))
    return opened


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(module, "say", said.append)
    return said


def worker_of(steps, work, fail_first=0):
    """What each worker calls; the first few end with an error at once."""
    failing = list(range(fail_first))

    def call(orders):
        assert orders == {"told": True}
        if failing:
            raise RuntimeError(f"node {failing.pop()} is down")
        course = Course(steps, work, LOCAL)
        course.follow(Worker(course, work).turn)
        return {}

    return call


def test_workers_that_end_early_are_replaced(work, engines, lines):
    steps = [parted(work, 1, "extract", TWO), whole(work, 2, "blend")]
    ended = drive(steps, work, LOCAL, 2, worker_of(steps, work, fail_first=3), {"told": True})
    assert len(ended.units) == 3 and not ended.failed
    assert sum("a worker ended early: node" in line for line in lines) >= 2  # both of the first
    assert lines[0] == "2 workers; dashboard: nowhere"
    assert engines[0].ended == ["closed"]


def test_no_engine_is_started_where_all_is_done(work, engines, lines):
    steps = [parted(work, 1, "extract", TWO)]
    drive(steps, work, LOCAL, 2, worker_of(steps, work), {"told": True})
    drive(steps, work, LOCAL, 2, lambda orders: pytest.fail("started"), {"told": True})
    assert len(engines) == 1


def test_an_engine_that_cannot_start_workers_is_said_once(work, engines, lines):
    steps = [parted(work, 1, "extract", TWO)]

    def start(orders):
        engines[0].trouble = "the cluster has no workers"
        time.sleep(0.3)
        engines[0].trouble = ""
        return worker_of(steps, work)(orders)

    assert not drive(steps, work, LOCAL, 1, start, {"told": True}).failed
    assert [line for line in lines if "cluster" in line or "again" in line] == [
        "the cluster has no workers",
        "workers can start again",
    ]


def test_workers_that_never_do_anything_end_it(work, engines, lines):
    steps = [parted(work, 1, "extract", TWO)]
    with pytest.raises(ConfigError, match=r"10 that ended before they did \(node \d+ is down\)"):
        drive(steps, work, LOCAL, 2, worker_of(steps, work, fail_first=99), {"told": True})
    assert engines[0].ended == ["cancelled"]


def test_each_failure_is_said_once_with_its_own_error(work, engines, lines):
    def act(name):
        if name == "a":
            raise RuntimeError("out of ink")

    steps = [parted(work, 1, "extract", TWO, act)]
    ended = drive(steps, work, LOCAL, 1, worker_of(steps, work), {"told": True})
    assert len(ended.failed) == 1
    failures = [line for line in lines if "out of ink" in line]
    assert [line.partition(": process")[0] for line in failures] == [
        f"extract a: failed, attempt {number}" for number in range(1, len(failures) + 1)
    ]


def test_what_failed_in_an_earlier_run_is_tried_again(work, engines, lines):
    broken = [True]

    def act(name):
        if broken and name == "a":
            raise RuntimeError("out of ink")

    steps = [parted(work, 1, "extract", TWO, act)]
    assert drive(steps, work, LOCAL, 1, worker_of(steps, work), {"told": True}).failed
    broken.clear()
    assert not drive(steps, work, LOCAL, 1, worker_of(steps, work), {"told": True}).failed


@pytest.mark.parametrize(("interrupt", "end"), [("cancel", "cancelled"), ("leave", "left")])
def test_an_interruption_cancels_or_leaves(work, engines, lines, monkeypatch, interrupt, end):
    steps = [parted(work, 1, "extract", TWO)]
    monkeypatch.setattr(module.Driver, "_say_failures", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    config = EngineConfig(engine="local", interrupt=interrupt)
    with pytest.raises(KeyboardInterrupt):
        drive(steps, work, config, 1, lambda orders: {}, {"told": True})
    assert engines[0].ended == [end]


def test_a_phase_is_described_with_the_time_that_is_left(work):
    steps = [parted(work, 1, "extract", {f"p{n}": ("subj01",) for n in range(10)})]
    (phase,) = phases_of(steps)
    units = phase.units("")
    done = {unit.id: type("Done", (), {"seconds": 90.0}) for unit in units[:4]}
    look = Look(phase, units, {}, units[4:], done)
    assert described(look, Ended(), 2) == "extract: 4 of 10 done, 0 running, about 4.5 min left"
    assert described(look, Ended(), 0) == "extract: 4 of 10 done, 0 running"
    assert described(Look(phase, [phase.first("")], {}, [], {}), Ended(), 2) == (
        "extract looks through the data, 2 workers"
    )
