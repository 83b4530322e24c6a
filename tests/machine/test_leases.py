"""Pieces of work that several processes take from one folder: each once, whoever is lost, whatever the clocks say."""

import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from featcache.errors import StoreError
from featcache.machine import leases as module
from featcache.machine.documents import write_document
from featcache.machine.leases import Done, Leases, State, stamp_of

FORK = multiprocessing.get_context("fork")


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "work" / "units"


def record(made=(), unit="a piece"):
    return Done(unit, dict(made), 1.0, "here", "done", {})


def state(leases, unit="u"):
    return leases.states().get(unit, State())


def taken(leases, unit="u"):
    return leases.take(unit, state(leases, unit))


def elsewhere(monkeypatch, machine="ffffffff"):
    """Have what follows be another machine."""
    monkeypatch.setattr(module, "this_machine", lambda: machine)


def test_many_threads_do_each_piece_once(folder):
    """60 pieces, 8 workers that all want the first that is free: the done ones are counted as they are done."""
    pieces, did, lock = [f"p{n}" for n in range(60)], [], threading.Lock()

    def work(_):
        leases = Leases(folder)
        while not all(leases.done(piece) for piece in pieces):
            states = leases.states()
            for piece in pieces:
                now = states.get(piece, State())
                if now.done or now.held or (lease := leases.take(piece, now)) is None:
                    continue
                with lock:
                    did.append(piece)
                assert lease.finish(record())
                break

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sorted(did) == sorted(pieces)
    assert Leases(folder).again() == 0
    assert {name.partition(".")[2] for name in os.listdir(folder)} == {"done"}


def _take_and_die(folder):
    assert taken(Leases(folder)) is not None
    os._exit(9)


def test_a_process_of_this_machine_that_is_gone_loses_its_lease_at_once(folder):
    worker = FORK.Process(target=_take_and_die, args=(folder,))
    worker.start()
    worker.join()
    leases = Leases(folder, lost_after=3600)
    assert state(leases).held
    assert leases.is_lost("u", state(leases))
    assert taken(leases).number == 2
    assert state(leases).n_lost == 1


def test_a_process_of_this_machine_that_runs_keeps_its_lease(folder):
    mine, other = Leases(folder), Leases(folder)
    assert taken(mine) is not None
    assert not other.is_lost("u", state(other))
    assert taken(other) is None
    assert str(os.getpid()) in other.holder("u", state(other))


def test_a_number_that_another_process_has_by_now_holds_nothing(folder, monkeypatch):
    leases = Leases(folder)
    monkeypatch.setattr(module, "_began", lambda process=None: 17)
    assert taken(leases) is not None
    monkeypatch.setattr(module, "_began", lambda process=None: 18)
    assert leases.is_lost("u", state(leases))


@pytest.mark.parametrize("minutes", [-600, 600])
def test_another_machine_is_lost_after_its_silence_and_not_by_its_clock(folder, monkeypatch, minutes):
    elsewhere(monkeypatch)
    assert taken(Leases(folder)) is not None
    monkeypatch.undo()
    lease, (clock) = folder / "u.1.lease", Clock()
    leases = Leases(folder, lost_after=120, clock=clock)
    os.utime(lease, (time.time() + 60 * minutes,) * 2)
    assert not leases.is_lost("u", state(leases))
    clock.now += 119
    assert not leases.is_lost("u", state(leases))
    assert taken(leases) is None
    clock.now += 2
    assert leases.is_lost("u", state(leases))
    assert taken(leases).number == 2


def test_a_sign_of_life_begins_the_wait_anew(folder, monkeypatch):
    elsewhere(monkeypatch)
    assert taken(Leases(folder)) is not None
    monkeypatch.undo()
    clock = Clock()
    leases, lease = Leases(folder, lost_after=120, clock=clock), folder / "u.1.lease"
    assert not leases.is_lost("u", state(leases))
    for beat in range(5):
        clock.now += 100
        lease.write_bytes(lease.read_bytes()[:-5] + f"{beat:04d}\n".encode())
        assert not leases.is_lost("u", state(leases))
    clock.now += 121
    assert leases.is_lost("u", state(leases))


def test_a_worker_changes_its_lease_while_it_works(folder):
    leases = Leases(folder, lost_after=1.0, beat=0.01)
    lease = taken(leases)
    with lease.held():
        seen = {(folder / "u.1.lease").read_bytes()}
        until = time.monotonic() + 5
        while len(seen) < 4 and time.monotonic() < until:
            seen.add((folder / "u.1.lease").read_bytes())
    assert len(seen) >= 4
    assert len({len(content) for content in seen}) == 1  # in place
    assert json.loads(seen.pop().splitlines()[0])["process"] == os.getpid()


def test_of_two_that_find_a_worker_lost_one_takes_its_place(folder, monkeypatch):
    elsewhere(monkeypatch)
    assert taken(Leases(folder)) is not None
    monkeypatch.undo()
    clock = Clock()
    both = [Leases(folder, lost_after=1, clock=clock) for _ in range(2)]
    seen = [state(one) for one in both]
    assert [one.take("u", now) for one, now in zip(both, seen, strict=True)] == [None, None]
    clock.now += 2
    got = [one.take("u", now) for one, now in zip(both, seen, strict=True)]
    assert [lease is not None for lease in got] == [True, False]


def test_a_worker_that_was_only_slow_is_counted(folder, monkeypatch):
    elsewhere(monkeypatch)
    slow = taken(Leases(folder))
    monkeypatch.undo()
    clock = Clock()
    leases = Leases(folder, lost_after=1, clock=clock)
    assert taken(leases) is None
    clock.now += 2
    quick = taken(leases)
    assert quick.finish(record())
    assert not slow.finish(record())
    assert leases.done("u") is not None
    assert leases.again() == 1


def test_a_piece_that_ended_since_the_listing_is_not_taken(folder):
    early, leases = Leases(folder), Leases(folder)
    before = state(early)
    taken(leases).finish(record())
    assert early.take("u", before) is None
    assert early.done("u") is not None


def test_a_record_counts_as_long_as_what_was_made_is_as_it_was(folder):
    made = folder.parent / "store" / "committed.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    leases = Leases(folder)
    taken(leases).finish(record({"store/committed.json": stamp_of(made)}))
    assert leases.done("u") is not None
    assert Leases(folder).done("u") is not None
    made.write_text("{ }")
    assert leases.done("u") is None
    assert taken(leases) is not None  # to be done again
    made.unlink()
    assert Leases(folder).done("u") is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"unit": 1}'])
def test_a_damaged_record_does_not_count(folder, content):
    leases = Leases(folder)
    taken(leases).finish(record())
    (folder / "u.done").write_bytes(content)
    assert Leases(folder).done("u") is None
    assert taken(Leases(folder)).finish(record())
    assert Leases(folder).done("u") is not None


def test_the_record_of_another_piece_does_not_count(folder):
    leases = Leases(folder)
    taken(leases, "other").finish(record())
    os.replace(folder / "other.done", folder / "u.done")
    assert leases.done("u") is None


def test_a_piece_that_fails_is_given_up_after_its_attempts(folder):
    leases = Leases(folder)
    for number in range(1, 4):
        assert not state(leases).given_up(3)
        lease = taken(leases)
        assert lease.number == number
        lease.fail(f"error {number}")
    assert state(leases).given_up(3)
    assert not state(leases).given_up(4)
    assert [one.error for one in leases.failures("u", state(leases))] == ["error 1", "error 2", "error 3"]
    assert str(os.getpid()) in leases.failures("u", state(leases))[0].who
    leases.forget_failures(["u"])
    assert state(leases) == State()
    assert taken(leases).number == 1


def test_what_is_given_back_was_no_attempt(folder):
    leases = Leases(folder)
    for _ in range(5):
        taken(leases).release()
    assert not state(leases).held
    assert not state(leases).given_up(1)
    assert state(leases).n_lost == 0


def test_failures_of_a_piece_that_somebody_works_on_are_kept(folder):
    leases = Leases(folder)
    taken(leases).fail("once")
    assert taken(leases) is not None
    leases.forget_failures(["u"])
    assert state(leases).failed == {1}


def test_a_piece_that_ends_its_workers_is_given_up(folder):
    leases = Leases(folder)
    for number in range(1, 12):
        (folder / f"u.{number}.lease").write_bytes(b"")
    assert state(leases).n_lost == 10
    assert state(leases).given_up(3)


def test_a_piece_that_is_done_leaves_its_record_alone(folder):
    leases = Leases(folder)
    taken(leases).fail("once")
    taken(leases).release()
    taken(leases).finish(record())
    assert os.listdir(folder) == ["u.done"]


def test_a_lease_that_is_not_written_yet_is_waited_for(folder):
    clock = Clock()
    leases = Leases(folder, lost_after=10, clock=clock)
    (folder / "u.1.lease").touch()
    assert not leases.is_lost("u", state(leases))
    assert leases.holder("u", state(leases)) == ""
    clock.now += 11
    assert leases.is_lost("u", state(leases))


def test_a_folder_that_was_taken_away_is_said(folder):
    leases = Leases(folder)
    folder.rmdir()
    with pytest.raises(StoreError, match="that it is gone"):
        leases.take("u", State())


def test_other_files_in_the_folder_are_no_pieces(folder):
    leases = Leases(folder)
    (folder / "logs").mkdir()
    (folder / "u.x.lease").touch()
    (folder / "u.1.else").touch()
    write_document(folder / "v.json", {})
    assert leases.states() == {}
