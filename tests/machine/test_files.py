"""Files and folders appear whole or not at all, and a folder has one writer."""

import errno
import json
import subprocess
import sys
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
    whole_folder,
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


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, "no locks here")


@pytest.mark.filterwarnings("ignore:flock not supported")  # which filelock says where it does without
@pytest.mark.parametrize("locks", [True, False])
def test_a_second_writer_of_one_process_is_refused(tmp_path, monkeypatch, locks):
    if not locks:  # as on some network file systems
        monkeypatch.setattr("fcntl.flock", no_locks)
    folder = tmp_path / "new" / "folder"
    with only_writer(folder), pytest.raises(StoreError, match="found another process writing"), only_writer(folder):
        pytest.fail("two writers")
    with only_writer(folder):
        pass


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


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_appears_once_it_is_filled(tmp_path, exists):
    path = tmp_path / "folder"
    if exists:
        path.mkdir()
    with whole_folder(path) as partial:
        (partial / "a").write_text("content")
        assert not (path / "a").exists()
    assert (path / "a").read_text() == "content" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("content")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
