"""Workers that share the units of steps: each is done once, what fails is tried again, and the rest goes on."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from featcache.errors import BusyError, DataError
from featcache.machine.journal import read
from featcache.machine.leases import State
from featcache.workdir import Workdir
from heads.config import EngineConfig
from heads.units.course import Course
from heads.units.units import phases_of
from heads.units.worker import Worker, take_part
from support.steps import parted, whole

HERE = EngineConfig(engine="here")
TWO = {"a": ("subj01",), "b": ("subj02",)}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def wrote(work):
    return sorted(path.name for path in work.glob("*.txt"))


def test_one_worker_does_every_unit_in_order(work):
    order = []
    steps = [
        parted(work, 1, "extract", TWO, order.append),
        parted(work, 2, "fit-heads", TWO, order.append),
        whole(work, 3, "blend", order.append),
    ]
    ended, worker = take_part(steps, work, HERE)
    assert order == ["a", "b", "a", "b", "blend"]
    assert (work / "blend.txt").read_text() == "extract-a.txt extract-b.txt fit-heads-a.txt fit-heads-b.txt"
    assert [unit.title for unit in ended.units] == ["extract a", "extract b", "fit-heads a", "fit-heads b", "blend"]
    assert not ended.failed and not ended.not_begun
    assert len(worker.did) == 5 + 4  # the look before, and the record after, both phases
    assert ended.results(steps)[0]["counts"] == {"a": 1, "b": 1}
    assert [len(one.get("stores", ())) for one in ended.results(steps)] == [2, 2, 0]


def test_what_is_done_is_not_done_again(work):
    order = []
    steps = [parted(work, 1, "extract", TWO, order.append), whole(work, 2, "blend", order.append)]
    take_part(steps, work, HERE)
    assert len(take_part(steps, work, HERE)[1].did) == 0
    (work / "extract-b.txt").unlink()
    assert len(take_part(steps, work, HERE)[1].did) == 1
    (work / "blend.txt").write_text("another")
    assert len(take_part(steps, work, HERE)[1].did) == 1
    assert order == ["a", "b", "blend", "b", "blend"]


def test_other_inputs_are_another_unit(work):
    order = []
    for options in (1, 2):
        take_part([parted(work, 1, "extract", TWO, order.append, options)], work, HERE)
    assert order == ["a", "b", "a", "b"]


def test_workers_side_by_side_share_the_units(work):
    """Four courses in four threads, each of which is a process of its own but for its memory."""
    names, did, lock = {f"p{n}": ("subj01",) for n in range(24)}, [], threading.Lock()

    def act(name):
        with lock:
            did.append((name, threading.get_ident()))
        time.sleep(0.01)

    def follow(_):
        course = Course([parted(work, 1, "extract", names, act), whole(work, 2, "blend", act)], work, HERE)
        return course.follow(Worker(course, work).turn)

    with ThreadPoolExecutor(4) as pool:
        everyone = list(pool.map(follow, range(4)))
    assert sorted(name for name, _ in did) == sorted([*names, "blend"])
    assert len({thread for _, thread in did}) > 1
    assert all(len(ended.records) == 24 + 1 + 2 for ended in everyone)
    assert len(read(Workdir(work).journal)) == 2  # one of each step, whoever wrote it


def test_a_failure_is_tried_again_and_forgotten(work):
    tries = []

    def act(name):
        tries.append(name)
        if tries.count("a") < 3 and name == "a":
            raise RuntimeError("the disk was away\nfor a moment")

    ended, worker = take_part([parted(work, 1, "extract", TWO, act)], work, HERE)
    assert tries == ["a", "b", "a", "a"]  # what failed here comes last
    assert not ended.failed
    assert worker.failed and wrote(work) == ["extract-a.txt", "extract-b.txt"]


def test_a_unit_that_always_fails_is_given_up_with_its_own_error_and_the_rest_goes_on(work):
    def act(name):
        if name == "a":
            raise DataError("subj01", expected="30 images", found="29", remedy="look for it")

    steps = [
        parted(work, 1, "extract", TWO, act),
        parted(work, 2, "fit-heads", TWO, act),
        parted(work, 3, "pretrain", {"both": ("subj01", "subj02")}),
        whole(work, 4, "blend"),
    ]
    ended, _ = take_part(steps, work, HERE)
    ((unit, failure),) = ended.failed.values()
    assert unit.title == "extract a"
    assert failure.error == "subj01: expected 30 images; found 29; look for it"
    # of the other subject all is done; what is of both is not begun
    assert wrote(work) == ["extract-b.txt", "fit-heads-b.txt"]
    assert ended.not_begun == ["pretrain", "blend"]


def test_attempts_of_other_workers_count(work):
    def fail(name):
        raise RuntimeError(name)

    def go(name):
        pass

    steps, config = [parted(work, 1, "extract", {"a": ("subj01",)}, fail)], EngineConfig(engine="here", attempts=2)
    assert take_part(steps, work, config)[0].failed
    # a worker that comes later finds it given up, and one that allows more attempts tries it
    again = [parted(work, 1, "extract", {"a": ("subj01",)}, go)]
    assert take_part(again, work, config)[0].failed
    assert not take_part(again, work, HERE)[0].failed


def test_what_failed_here_is_left_to_others_while_there_are_any(work):
    """A unit fails in one worker; another holds the second unit. The first waits, and the other does both."""
    did, second, failed = [], threading.Event(), threading.Event()

    def act_of(who):
        def act(name):
            if name == "b" and who == "other":
                second.set()
                failed.wait(10)
                time.sleep(0.2)
            elif name == "a" and who == "first":
                second.wait(10)
                failed.set()
                raise RuntimeError("this machine has no such library")
            did.append((who, name))

        return act

    def follow(who):
        if who == "other":
            time.sleep(0.05)
        course = Course([parted(work, 1, "extract", TWO, act_of(who))], work, HERE)
        return course.follow(Worker(course, work).turn)

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(follow, ["first", "other"]))
    assert not any(ended.failed for ended in ends)
    assert ("other", "a") in did and ("first", "a") not in did


def test_a_worker_that_fails_at_all_ends_where_an_engine_started_it(work):
    def fail(name):
        raise RuntimeError("CUDA error: an illegal memory access")

    steps = [parted(work, 1, "extract", {f"p{n}": ("subj01",) for n in range(9)}, fail)]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        take_part(steps, work, HERE, idle=60)
    failed = [state.failed for state in Course(steps, work, HERE).leases.states().values() if state.failed]
    assert len(failed) == 3  # and not all nine


def test_a_folder_that_another_process_writes_to_is_no_failure(work, monkeypatch):
    monkeypatch.setattr("heads.units.worker._BUSY", 0.05)
    tries = []

    def act(name):
        tries.append(name)
        if len(tries) < 5:
            raise BusyError("a store", expected="to be the only writer", found="another", remedy="wait")

    ended, worker = take_part([parted(work, 1, "extract", {"a": ("subj01",)}, act)], work, HERE)
    assert len(tries) == 5 and not ended.failed and not worker.failed


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_worker_that_is_told_to_end_gives_its_unit_back(work, end):
    def act(name):
        raise end

    steps = [parted(work, 1, "extract", {"a": ("subj01",)}, act)]
    with pytest.raises(end):
        take_part(steps, work, HERE)
    course = Course(steps, work, HERE)
    (unit,) = phases_of(steps)[0].units("")
    state = course.leases.states()[unit.id]
    assert (state.held, state.released, state.failed) == (False, {1}, frozenset())
    assert state != State()


def test_a_step_that_ends_with_another_exit_code_has_failed(work):
    ended, _ = take_part([whole(work, 1, "check", code=1), whole(work, 2, "blend")], work, HERE)
    ((_, failure),) = ended.failed.values()
    assert "found 1; check says" in failure.error
    assert ended.not_begun == ["blend"]


def test_a_worker_of_an_engine_ends_when_there_is_nothing_to_take(work):
    """Another process holds the only unit; a worker with an idle time ends, one without would wait."""
    steps = [parted(work, 1, "extract", {"a": ("subj01",)})]
    course = Course(steps, work, HERE)
    lease = course.leases.take(phases_of(steps)[0].first("").id, State())
    assert lease is not None
    began = time.monotonic()
    ended, worker = take_part(steps, work, HERE, idle=0.1)
    assert len(worker.did) == 0 and not ended.records
    assert time.monotonic() - began < 30


def test_parts_are_looked_for_once_before_others_look(work):
    """The first look reads every image; the workers that come later wait for it, and find digests remembered."""
    steps = [parted(work, 1, "extract", TWO)]
    ended, _ = take_part(steps, work, HERE)
    phase = phases_of(steps)[0]
    assert phase.first("").id in ended.records
    assert phase.first("").id not in [unit.id for unit in phase.units("")]
