"""A journal keeps every whole record, whatever a full disk or another process does."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from featcache.machine.journal import append, read


def test_records_come_back_in_order(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    assert read(path) == []
    assert all(append(path, {"number": number, "path": tmp_path}) for number in range(3))
    assert read(path) == [{"number": number, "path": str(tmp_path)} for number in range(3)]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("kept", range(12))
def test_a_torn_record_costs_no_other(tmp_path: Path, kept: int):
    path = tmp_path / "journal.jsonl"
    append(path, {"number": 0})
    with path.open("ab") as file:
        file.write(json.dumps({"number": 1}).encode()[:kept])  # a number cut off is no record either
    append(path, {"number": 2})
    assert [record["number"] for record in read(path)] == [0, 2]


def test_a_full_disk_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, write = tmp_path / "journal.jsonl", os.write
    append(path, {"number": 0})
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))
    assert not append(path, {"number": 1})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "write", full)
    assert not append(path, {"number": 2})
    monkeypatch.setattr(os, "write", write)
    assert append(path, {"number": 3})
    assert [record["number"] for record in read(path)] == [0, 3]


def test_where_nothing_can_be_written_there_is_no_journal(tmp_path: Path):
    assert not append(tmp_path / "missing" / "journal.jsonl", {}) and not append(tmp_path, {})


def test_what_is_no_record_is_left_out(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n7\n\n{"number": 1}\n')
    assert read(path) == [{"number": 1}]


def _write_many(path: Path, writer: int) -> None:
    for number in range(200):
        append(path, {"writer": writer, "number": number, "filling": "x" * (37 * writer)})


@pytest.mark.slow
def test_processes_that_write_together_lose_nothing(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, writer)) for writer in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    pairs = [(record["writer"], record["number"]) for record in read(path)]
    assert sorted(pairs) == [(writer, number) for writer in range(3) for number in range(200)]
