"""Files and folders appear whole or not at all, and a folder has one writer."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from featcache.errors import StoreError
from featcache.machine.files import (
    only_writer,
    refuse_full_disk,
    replace_bytes,
    replace_json,
    whole_file,
)

WRITER = """
import sys
from pathlib import Path
from featcache.machine.files import only_writer
with only_writer(Path(sys.argv[1]), wait=sys.argv[2] == "wait"):
    print(Path(sys.argv[1], "content").read_text())
"""


def start_writer(folder: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_another_process_is_refused_or_waits(tmp_path):
    with only_writer(tmp_path):
        waiting = start_writer(tmp_path, "wait")
        _, error = start_writer(tmp_path, "do not").communicate()
        expected = f"{tmp_path}: expected to be the only writer; found another process writing; wait for it to end"
        assert expected in error
        (tmp_path / "content").write_text("of the first writer")
    assert waiting.communicate() == ("of the first writer\n", "")


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def without_locks(request, monkeypatch):
    """A file system without locks, as some network disks are, which say so in several ways."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)


def refuse_a_second_writer(folder: Path) -> None:
    with only_writer(folder), pytest.raises(StoreError, match="found another process writing"), only_writer(folder):
        pytest.fail("two writers")
    with only_writer(folder):
        pass


def test_a_second_writer_of_one_process_is_refused(tmp_path):
    refuse_a_second_writer(tmp_path / "new" / "folder")


def test_a_second_writer_is_refused_without_locks(tmp_path, without_locks):
    refuse_a_second_writer(tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [".writing.lock"]


def test_a_lock_that_came_with_a_copied_folder_holds_nobody_up(tmp_path, without_locks):
    (tmp_path / ".writing.lock").touch()  # it stays on a disk with locks
    refuse_a_second_writer(tmp_path)


def test_a_process_that_is_gone_holds_nobody_up_without_locks(tmp_path, without_locks):
    if not (child := os.fork()):
        with only_writer(tmp_path):
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".writing.marker").read_text().startswith(f"{child}\n")
    refuse_a_second_writer(tmp_path)


def test_a_writer_of_another_machine_is_named_without_locks(tmp_path, without_locks):
    (tmp_path / ".writing.marker").write_text("77\nnode12\n")
    with pytest.raises(StoreError) as refused, only_writer(tmp_path):
        pytest.fail("two writers")
    words = "found another process writing, process 77 of node12; wait for it to end; if that process is gone, delete "
    assert words + str(tmp_path / ".writing.marker") in str(refused.value)


def test_a_marker_that_was_never_written_is_nobodys_after_a_minute(tmp_path, without_locks):
    marker = tmp_path / ".writing.marker"
    marker.touch()
    with pytest.raises(StoreError), only_writer(tmp_path):
        pytest.fail("its process may be about to write it")
    os.utime(marker, (time.time() - 61,) * 2)
    refuse_a_second_writer(tmp_path)


def test_a_long_wait_is_said_once(tmp_path, monkeypatch):
    said: list[str] = []

    def wait() -> None:
        with only_writer(tmp_path, wait=True):
            pass

    monkeypatch.setattr("featcache.machine.files._PATIENCE", 0.01)
    monkeypatch.setattr("featcache.machine.files.say", said.append)
    with only_writer(tmp_path):
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not said:
            time.sleep(0.01)
        time.sleep(0.1)
    waiting.join()
    assert said == [f"{tmp_path}: waits for another process that writes there"]


def test_an_error_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path):
        _ = 1 / 0
    with only_writer(tmp_path):
        pass


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 3e9})())
    refuse_full_disk(tmp_path, 3_000_000_000)
    with pytest.raises(StoreError, match=r"expected 3\.1 GB of free disk; found 3\.0 GB; make room"):
        refuse_full_disk(tmp_path, 3_100_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 4e5})())
    with pytest.raises(StoreError, match=r"expected 1\.5 MB of free disk; found 400\.0 kB; make room"):
        refuse_full_disk(tmp_path, 1_500_000)


def test_files_are_replaced_and_nothing_else_is_left(tmp_path):
    replace_bytes(tmp_path / "new" / "a.bin", b"one")
    replace_bytes(tmp_path / "new" / "a.bin", b"two")
    replace_json(tmp_path / "new" / "b.json", {"name": "é", "values": [1.5, None]})
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"two"
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == {"name": "é", "values": [1.5, None]}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.bin", "b.json"]


def test_a_file_that_was_begun_is_hidden_and_keeps_its_ending(tmp_path):
    with whole_file(tmp_path / "a.npy") as partial:
        np.save(partial, np.arange(3))  # which would add a missing .npy
        assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    replace_json(path, 1)
    with pytest.raises(error), whole_file(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(StoreError, match=r"a.json: expected a file, or nothing; found a folder; remove it"):
        replace_json(tmp_path / "a.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
