"""Files and folders appear whole or not at all, and a folder has one writer."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from featcache.errors import StoreError
from featcache.machine import files as files_module
from featcache.machine.files import (
    file_checksum,
    is_leftover,
    only_writer,
    open_regular,
    partial_path,
    refuse_full_disk,
    regular_status,
    remove_leftovers,
    replace_bytes,
    replace_json,
    small_bytes,
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
    assert waiting.communicate(timeout=60) == ("of the first writer\n", "")


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
    (tmp_path / ".writing.marker").write_text("77\nnode12\nand what a later version adds\n")
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


def test_a_marker_that_another_process_takes_away_first_holds_nobody_up(tmp_path, without_locks, monkeypatch):
    (tmp_path / ".writing.marker").touch()

    def taken_away(marker: Path) -> bool:
        marker.unlink()
        return True

    assert files_module._was_never_written(tmp_path / "missing") is False
    monkeypatch.setattr(files_module, "_was_never_written", taken_away)
    with only_writer(tmp_path):
        pass


def test_a_long_wait_is_said_once(tmp_path, monkeypatch):
    said: list[str] = []

    def wait() -> None:
        with only_writer(tmp_path, wait=True):
            pass

    monkeypatch.setattr("featcache.machine.files._PATIENCE", 0.01)
    monkeypatch.setattr("featcache.machine.files.say", said.append)
    with only_writer(tmp_path):
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        ends = time.monotonic() + 20
        while not said and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(0.1)
    waiting.join(20)
    assert said == [f"{tmp_path}: waits for another process that writes there"]


def test_a_disk_that_fails_is_not_taken_for_one_without_locks(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match="broken"), only_writer(tmp_path):
        pytest.fail("it is not held")


def test_an_error_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path):
        _ = 1 / 0
    with only_writer(tmp_path):
        pass


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 3e9})())
    refuse_full_disk(tmp_path / "new" / "folder", 3_000_000_000)
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(StoreError, match=r"expected 3\.1 GB of free disk; found 3\.0 GB; make room"):
        refuse_full_disk(tmp_path, 3_100_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 4e5})())
    with pytest.raises(StoreError, match=r"expected 1\.5 MB of free disk; found 400\.0 kB; make room"):
        refuse_full_disk(tmp_path, 1_500_000)


def test_files_are_replaced_and_nothing_else_is_left(tmp_path):
    replace_bytes(tmp_path / "new" / "deep" / "a.bin", b"one")
    (tmp_path / "new" / "deep" / "a.bin").unlink()
    (tmp_path / "new" / "deep").rmdir()
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


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, steps = tmp_path / "a.json", []
    sync, rename = os.fsync, os.replace

    def synced(number: int) -> None:
        steps.append(os.fstat(number).st_size)
        sync(number)

    def renamed(*names: Path) -> None:
        steps.append("renamed")
        rename(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    replace_bytes(path, b"12345")
    assert steps == [5, "renamed"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    replace_json(path, 1)
    with pytest.raises(error), whole_file(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_an_error_before_anything_is_written_is_that_error(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.json"):
        _ = 1 / 0


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(StoreError, match=r"a.json: expected a file, or nothing; found a folder; remove it"):
        replace_json(tmp_path / "a.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# --- regular files


def special_files(folder: Path) -> list[Path]:
    """A folder, a pipe and a link to it."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "pipe")
    return [folder / name for name in ("folder", "pipe", "link")]


@pytest.mark.parametrize("opened", [regular_status, open_regular, lambda path: small_bytes(path, 99), file_checksum])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, opened):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for path in special_files(tmp_path):
        with pytest.raises(OSError, match="no regular file"):
            opened(path)
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "missing")
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_a_regular_file_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"123456789")
    assert regular_status(path).st_size == 9
    with open_regular(path) as file:
        assert file.read() == b"123456789"
    assert small_bytes(path, 9) == b"123456789"
    with pytest.raises(OSError, match="9 bytes, more than 8"):
        small_bytes(path, 8)


def test_a_checksum_is_the_crc32c_of_all_blocks(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"123456789")
    assert file_checksum(path) == "e3069283"  # the check value of this CRC, RFC 3720
    monkeypatch.setattr(files_module, "_AT_ONCE", 4)
    assert file_checksum(path) == "e3069283"
    path.write_bytes(b"")
    assert file_checksum(path) == "00000000"


# --- what processes left unfinished


@pytest.fixture
def gone() -> int:
    """Number of a process that has ended."""
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    return child


def begun(folder: Path, process: int, name: str = "a.npy", machine: str | None = None) -> Path:
    """A path as another process of this machine, or of another one, would call it."""
    ours = partial_path(folder / name).name
    return folder / ours.replace(f"-{os.getpid()}-", f"-{process}-").replace(ours[1:9], machine or ours[1:9])


def test_an_unfinished_name_says_who_writes_and_is_given_once(tmp_path):
    one, other = (partial_path(tmp_path / "a.npy") for _ in range(2))
    assert one != other and one.parent == tmp_path and one.suffix == ".npy"
    assert re.fullmatch(rf"\.[0-9a-f]{{8}}-{os.getpid()}-\d+\.partial\.a\.npy", one.name)


def test_leftovers_of_processes_that_are_gone_are_removed_and_nothing_else(tmp_path, gone):
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    left = [begun(folder, gone, name) for name in ("a.npy", "store", "line\nbreak", "link")]
    left[0].write_text("half")
    (left[1] / "deep").mkdir(parents=True)
    (left[1] / "deep" / "file").touch()
    left[2].touch()
    left[3].symlink_to(outside)
    beyond = begun(folder, 2**40)  # no process can have this number
    beyond.touch()
    kept = [begun(folder, os.getpid()), begun(folder, gone, machine="00000000"), folder / ".hidden", folder / "a.npy"]
    kept += [folder / f"{gone}.partial.npy", folder / left[0].name[1:]]
    for path in kept:
        path.touch()
    assert all(map(is_leftover, [*left, beyond])) and not any(map(is_leftover, kept))
    assert sorted(remove_leftovers(folder)) == sorted([*left, beyond])
    assert sorted(folder.iterdir()) == sorted(kept) and (outside / "kept").is_dir()
    assert remove_leftovers(folder) == [] and remove_leftovers(tmp_path / "missing") == []


def test_a_leftover_that_cannot_be_removed_stops_nobody(tmp_path, gone, monkeypatch):
    path = begun(tmp_path, gone)
    path.touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert remove_leftovers(tmp_path) == [path]


def test_a_folder_that_cannot_be_removed_leaves_the_others_to_be_removed(tmp_path, gone, monkeypatch):
    left = [begun(tmp_path, gone, f"{number}.npy") for number in range(4)]
    for path in left[:2]:
        path.mkdir()
    for path in left[2:]:
        path.touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(os, "rmdir", refuse)
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(left[:2])


@pytest.mark.parametrize(
    "name",
    [".00000000-77-1.partial.a.npy", ".committed.json.77", ".77.a.safetensors", ".features.partial-ab12", ".a\nb.77"],
)
def test_what_another_machine_or_an_earlier_version_began_is_nobodys_after_a_week(tmp_path, name):
    path, week = tmp_path / name, 7 * 86400
    path.touch()
    os.utime(path, (0, time.time() - week + 60))
    assert not is_leftover(path) and remove_leftovers(tmp_path) == []
    os.utime(path, (0, time.time() - week - 1))
    assert is_leftover(path) and remove_leftovers(tmp_path) == [path]
    assert is_leftover(path) is False  # it is gone, and has no time


def test_the_process_of_another_user_runs(tmp_path, monkeypatch):
    def refuse(process: int, signal: int) -> None:
        assert (process, signal) == (77, 0)
        raise PermissionError

    path = begun(tmp_path, 77)
    monkeypatch.setattr(os, "kill", refuse)
    assert not is_leftover(path)


def test_the_first_that_is_begun_in_a_folder_removes_what_was_left_there(tmp_path, gone):
    path = begun(tmp_path / "elsewhere", gone)
    left = tmp_path / "new" / path.name
    left.parent.mkdir()
    left.touch()
    partial_path(tmp_path / "new" / "a.npy")
    assert not left.exists()
    left.touch()
    partial_path(tmp_path / "new" / "a.npy")  # and looks no more
    assert left.exists()


def test_sets_of_processes_that_do_not_see_each_other_are_told_apart(monkeypatch):
    named = set()
    for readlink in (lambda path: "pid:[1]", lambda path: "pid:[2]", refuse_to_read):
        monkeypatch.setattr(os, "readlink", readlink)
        named.add(files_module.this_machine.__wrapped__())
    assert len(named) == 3 and all(re.fullmatch("[0-9a-f]{8}", name) for name in named)


def refuse_to_read(path: str) -> str:
    raise FileNotFoundError(path)
